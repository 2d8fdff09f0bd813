//! QEMU as it is packaged: spoken to over QMP, looked at through /proc, never patched.
//!
//! ```text
//!   qmp      the QEMU Machine Protocol: one request at a time, each with a deadline; events in order
//!   process  who is behind the socket: pid, pidfd, mappings, open devices
//!   inspect  what the guest is made of: RAM blocks and their files, other memory, devices, disks
//!   inject   a userfaultfd of its address space, made by one of its threads
//!   judge    what of it belay can move and tether, and what to change where it cannot
//!   spec     what two QEMUs must have in common for a guest to go from one to the other
//!   memory   its RAM, as files that are mapped here too
//!   machine  what one is ordered to do: stop, go on, save, load
//!   state    what it saves, and how a checkpoint becomes something that loads
//!   launch   one that belay starts, on a leash: it ends with belay until its guest is its own
//!   keeping  the leash's process, which keeps it for the next page server where it may
//!   estate   what a dead page server has left of one
//!   standby  the command line of a second one over the same memory
//!   leaving  a guest at its source: until it left, and after it was caught
//!   arriving a guest at its destination
//!   host     a destination that takes QEMU guests
//!   wire     its network, as its pauses need it
//!   relay    what a guest sends, held until its checkpoint has committed
//!   tap      what a guest sends through a tap, held by the kernel until its checkpoint has committed
//!   disks    its writable disks, as its pauses and its checkpoints need them
//!   disk     what a guest writes to its disks, kept out of their images until its checkpoint has committed
//! ```

pub mod arriving;
pub mod disk;
pub mod disks;
pub mod estate;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
pub mod host;
pub mod inject;
pub mod inspect;
pub mod judge;
pub mod keeping;
pub mod launch;
pub mod leash;
pub mod leaving;
pub mod machine;
mod memory;
pub mod process;
pub mod qmp;
pub mod relay;
pub mod spec;
mod standby;
mod state;
pub mod tap;
pub mod wire;
