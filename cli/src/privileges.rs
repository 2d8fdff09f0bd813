//! Gives up, before anything of the network is touched, what a command does not need: capabilities, new privileges through exec,
//! and being read by others.
//!
//! ```text
//!                    kept of root's capabilities                                     dumpable
//!   send, receive    SYS_PTRACE  userfaultfd(2) for faults raised in the kernel      not as root
//!   vmm              IPC_LOCK    memory that a device pins, beyond RLIMIT_MEMLOCK
//!                    SYS_NICE    the real-time priority of who tells of a death
//!                    DAC_OVERRIDE  a state directory or socket that is another user's
//!   … receive --tap  NET_ADMIN   the gate before a guest's tap, as well
//!   guard            SYS_NICE                                                        never
//!   relay, disk      DAC_OVERRIDE  another user's socket or image, which are opened   not as root
//!                    again while the guest lives; … relay --world tap: none
//! ```
//! A relay and a disk live as long as their guest and read what its QEMU writes, so they give up what they opened their far side with, which
//! for a tap is all there is.
//! A user other than root has no capabilities to give up (`belay@.service` needs none). Such a process stays dumpable, because
//! /proc/self/pagemap, which trackers read, then belongs to root; it writes no core file all the same. no_new_privs makes all of it
//! last: what is executed later has no more than this.

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_no_new_privs};

/// Which process this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// A page server or a VMM: next to guest memory.
    Host,
    /// A page server that holds what a guest sends through a tap: that is told to the kernel's network.
    HostOfTap,
    /// The guard: it knows two secrets and no guest.
    Guard,
    /// What stands between a QEMU and a socket or an image that may have to be opened again.
    Relay,
    /// What stands between a QEMU and a tap, which is open.
    RelayOfTap,
}

impl Part {
    fn keeps(self) -> CapabilitySet {
        match self {
            Self::Host => {
                CapabilitySet::SYS_PTRACE
                    | CapabilitySet::IPC_LOCK
                    | CapabilitySet::SYS_NICE
                    | CapabilitySet::DAC_OVERRIDE
            }
            Self::HostOfTap => Self::Host.keeps() | CapabilitySet::NET_ADMIN,
            Self::Guard => CapabilitySet::SYS_NICE,
            Self::Relay => CapabilitySet::DAC_OVERRIDE,
            Self::RelayOfTap => CapabilitySet::empty(),
        }
    }
}

/// Gives up what `part` does not need. To be called before the process has threads: capabilities are a thread's own, and those
/// started later have what this one has. What the system will not do is left as it was; nothing depends on it.
pub fn give_up(part: Part) {
    let _ = set_no_new_privs(true);
    let _ = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    if part == Part::Guard || rustix::process::geteuid().is_root() {
        let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    }
    if let Ok(has) = capabilities(None) {
        let kept = has.permitted & part.keeps();
        let _ = set_capabilities(
            None,
            CapabilitySets { effective: has.effective & kept, permitted: kept, inheritable: has.inheritable & kept },
        );
    }
}
