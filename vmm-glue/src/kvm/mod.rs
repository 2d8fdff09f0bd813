//! A small VMM on KVM: RAM, one to N vCPUs, one device (the packet port) and the bare guests that belay's promises are tested
//! with.

pub mod apart;
mod bare;
mod control;
mod device;
pub mod guests;
pub(crate) mod host_threads;
mod ioctl;
mod machine;
pub mod registration;
mod shared;
pub(crate) mod state;
#[cfg(any(test, feature = "fuzzing"))]
mod testing;
mod tracker_log;
mod tracker_ring;
mod vcpu;

pub use bare::BareGuest;
use belay_checkpoint::dirty::DirtySet;
use belay_checkpoint::guest::{DirtyTracker, Guest, GuestError, PacketSink, RamBlock, TrackerKind};
use belay_transport::region::{Mapping, RamFile};
use belay_transport::{Deadline, PageSize, RegionId};
use control::Wish;
use guests::{GuestSpec, LEDGER_ENTRY, Layout, Program, SCANNER_ENTRY};
pub use host_threads::HostGuest;
use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_regs, kvm_segment, kvm_sregs};
use machine::{Machine, failed};
pub use shared::SharedGuest;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use vcpu::VcpuThread;

/// How KVM is to be able to track writes. It must be known when the VM is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tracking {
    /// Not at all, or by userfaultfd.
    None,
    /// The dirty log, with manual protect.
    Log,
    /// Dirty rings of so many entries (a power of two from 256 to what KVM allows).
    Ring { entries: u32 },
}

/// Entries of a dirty ring unless told otherwise: room for 8192 pages a vCPU between two stops.
pub const DEFAULT_RING_ENTRIES: u32 = 8192;

/// What the operator may choose about the VM, apart from the guest itself.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct KvmOptions {
    pub tracking: Tracking,
    /// An in-kernel interrupt controller and timer. No guest here needs one.
    pub irqchip: bool,
}

impl Default for KvmOptions {
    fn default() -> Self {
        Self { tracking: Tracking::Ring { entries: DEFAULT_RING_ENTRIES }, irqchip: false }
    }
}

/// A guest in this process. It begins paused and empty: [`BareGuest::boot`] starts it for the first time, [`Guest::load`] goes on
/// with one that was saved.
pub struct KvmGuest {
    machine: Arc<Machine>,
    threads: Vec<JoinHandle<()>>,
    spec: GuestSpec,
    layout: Layout,
    blocks: Vec<RamBlock>,
    memory: Arc<Mapping>,
}

impl KvmGuest {
    /// Makes the VM over `file`, of which `alias` is a mapping that the vCPUs do not use. The VM maps the file once more for
    /// itself: that mapping ([`RamBlock::vmm_address`]) is the one to register with userfaultfd.
    pub fn new(
        spec: &GuestSpec,
        options: &KvmOptions,
        file: Arc<RamFile>,
        alias: Arc<Mapping>,
        sink: Arc<dyn PacketSink>,
    ) -> Result<Self, GuestError> {
        let layout = spec.layout().map_err(|error| GuestError::Unsupported(error.to_string()))?;
        if file.len() as u64 != spec.memory_bytes || alias.len() != file.len() {
            let (asked, file, alias) = (spec.memory_bytes, file.len(), alias.len());
            return Err(GuestError::Unsupported(format!(
                "a guest of {asked} bytes in a file of {file}, mapped {alias}"
            )));
        }
        let memory = Arc::new(file.map().map_err(failed("mapping guest memory"))?);
        let page_size: PageSize = file.page_size();
        let block = RamBlock { id: RegionId(0), page_size, file, alias, vmm_address: memory.address() };
        let machine = Arc::new(Machine::new(spec, &layout, options, &block, memory.clone(), sink)?);
        vcpu::install_kick_handler();
        let mut guest = Self { machine, threads: Vec::new(), spec: spec.clone(), layout, blocks: vec![block], memory };
        for vcpu in guest.machine.vcpus() {
            let (kicker, resetter) = (guest.machine.clone(), guest.machine.clone());
            let thread = VcpuThread {
                vcpu: vcpu.clone(),
                control: guest.machine.control().clone(),
                port: guest.machine.port().clone(),
                kick_all: Box::new(move || kicker.vcpus().iter().for_each(|vcpu| vcpu.kick())),
                reset_rings: Box::new(move || ioctl::reset_dirty_rings(resetter.vm())),
            };
            let name = format!("vcpu-{}", vcpu.index);
            let spawned = std::thread::Builder::new().name(name).spawn(move || thread.run());
            guest.threads.push(spawned.map_err(failed("starting a vCPU thread"))?);
        }
        Ok(guest)
    }

    /// The mapping the vCPUs use, for those who register it with userfaultfd.
    pub fn vmm_memory(&self) -> &Arc<Mapping> {
        &self.memory
    }

    /// As [`Guest::pause`], for good: a vCPU that does not stop by the deadline, because it waits for a page, stops as soon as it has
    /// the page, and runs nothing before that.
    pub fn halt(&mut self, deadline: Deadline) -> Result<(), GuestError> {
        self.stop(deadline, Wish::Stands)
    }

    fn stop(&self, deadline: Deadline, on_timeout: Wish) -> Result<(), GuestError> {
        let vcpus = self.machine.vcpus();
        self.machine.control().stop(deadline, on_timeout, |index| vcpus[index].kick(), |index| vcpus[index].unkick())
    }

    /// Packets the guest has emitted since its first start.
    pub fn packets(&self) -> u64 {
        self.machine.port().sequence()
    }

    /// Ticks of the guest's TSC in a millisecond.
    pub fn tsc_khz(&self) -> Result<u32, GuestError> {
        self.machine.control().check_paused("reading the TSC frequency")?;
        self.machine.vcpus()[0].fd().get_tsc_khz().map_err(failed("KVM_GET_TSC_KHZ"))
    }
}

impl Guest for KvmGuest {
    fn pause(&mut self, deadline: Deadline) -> Result<(), GuestError> {
        self.stop(deadline, Wish::Withdrawn)
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.machine.control().run()
    }

    fn save(&mut self, out: &mut Vec<u8>) -> Result<(), GuestError> {
        self.machine.control().check_paused("save")?;
        state::save(&self.machine, out)
    }

    fn load(&mut self, state: &[u8]) -> Result<(), GuestError> {
        self.machine.control().check_paused("load")?;
        state::load(&self.machine, state)
    }

    fn set_incarnation(&mut self, nonce: u64) -> Result<(), GuestError> {
        self.machine.port().set_nonce(nonce);
        Ok(())
    }

    fn memory(&self) -> &[RamBlock] {
        &self.blocks
    }

    fn tracker(&mut self, kind: TrackerKind) -> Result<Box<dyn DirtyTracker>, GuestError> {
        match (kind, self.machine.tracking(), self.machine.collected()) {
            (TrackerKind::KvmLog, Tracking::Log, _) => Ok(Box::new(tracker_log::LogTracker::new(self.machine.clone()))),
            (TrackerKind::KvmRing, Tracking::Ring { .. }, Some(collected)) => {
                Ok(Box::new(tracker_ring::RingTracker::new(self.machine.clone(), collected.clone())))
            }
            (TrackerKind::UffdWp | TrackerKind::UffdSync, ..) => {
                let reason = "it belongs to whoever serves this guest's pages, not to its VMM".into();
                Err(GuestError::NoTracker { kind, reason })
            }
            (_, tracking, _) => {
                let reason = format!("the VM was made for {tracking:?}, and KVM takes one choice for a VM's life");
                Err(GuestError::NoTracker { kind, reason })
            }
        }
    }

    fn device_writes(&mut self, _into: &mut DirtySet) -> Result<(), GuestError> {
        // The packet port writes no guest memory.
        self.machine.control().check_paused("asking for device writes")
    }
}

impl BareGuest for KvmGuest {
    fn spec(&self) -> &GuestSpec {
        &self.spec
    }

    fn boot(&mut self) -> Result<(), GuestError> {
        self.machine.control().check_paused("boot")?;
        bare::write_first_content(&self.blocks[0].alias, &self.spec, &self.layout);
        for vcpu in self.machine.vcpus() {
            let fd = vcpu.fd();
            let sregs = user_mode(fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?, &self.layout);
            fd.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
            let entry = if self.spec.program == Program::Scanner { SCANNER_ENTRY } else { LEDGER_ENTRY };
            let regs = kvm_regs {
                rip: self.layout.text().offset() as u64 + entry,
                rdi: self.layout.parameters(vcpu.index as u16),
                rflags: 2,
                ..Default::default()
            };
            fd.set_regs(&regs).map_err(failed("KVM_SET_REGS"))?;
            // With interrupt controllers in the kernel every vCPU but the first waits for a SIPI, which nobody here would send.
            if self.machine.irqchip {
                let running = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
                fd.set_mp_state(running).map_err(failed("KVM_SET_MP_STATE"))?;
            }
        }
        Ok(())
    }

    fn park_at_step(&mut self, step: u64) -> Result<(), GuestError> {
        self.machine.control().set_park(Some(step));
        Ok(())
    }

    fn unpark(&mut self) -> Result<(), GuestError> {
        self.machine.control().set_park(None);
        Ok(())
    }

    fn wait_parked(&mut self, deadline: Deadline) -> Result<Vec<u64>, GuestError> {
        self.machine.control().wait_parked(deadline)?;
        self.steps()
    }

    fn steps(&mut self) -> Result<Vec<u64>, GuestError> {
        Ok(self.machine.port().steps())
    }

    fn failure(&mut self) -> Option<String> {
        self.machine.control().failure()
    }
}

impl Drop for KvmGuest {
    fn drop(&mut self) {
        /// A vCPU that waits for a page nobody serves does not end; its thread then keeps the VM and its memory alive.
        const BOUND: Duration = Duration::from_secs(2);
        let vcpus = self.machine.vcpus();
        if self.machine.control().exit(Deadline::after(BOUND), |index| vcpus[index].kick()) {
            for thread in self.threads.drain(..) {
                let _ = thread.join();
            }
        }
    }
}

/// 64-bit mode, ring 3, paging on: legal for VMX and SVM alike, and native speed also where ring 0 is emulated.
fn user_mode(mut sregs: kvm_sregs, layout: &Layout) -> kvm_sregs {
    const CR0_PG_AM_WP_NE_ET_MP_PE: u64 = 0x8005_0033;
    const CR4_PAE_OSFXSR: u64 = 0x220;
    const EFER_LME_LMA: u64 = 0x500;
    let data = kvm_segment {
        limit: u32::MAX,
        selector: 0x2b,
        type_: 3,
        present: 1,
        dpl: 3,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cr0 = CR0_PG_AM_WP_NE_ET_MP_PE;
    sregs.cr3 = layout.page_tables().offset() as u64;
    sregs.cr4 = CR4_PAE_OSFXSR;
    sregs.efer = EFER_LME_LMA;
    sregs.cs = kvm_segment { selector: 0x33, type_: 11, db: 0, l: 1, ..data };
    (sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, selector: 0x40, type_: 11, present: 1, ..Default::default() };
    sregs.ldt = kvm_segment { unusable: 1, ..Default::default() };
    sregs.gdt = Default::default();
    sregs.idt = Default::default();
    sregs
}
