//! The virtual machine itself: its descriptor, its memslots, its vCPUs. Shared by the guest, its vCPU threads and its trackers.

use super::control::Control;
use super::device::Port;
use super::guests::{GuestSpec, Layout, MEMORY_HOLE_START, SECOND_MEMORY_START};
use super::tracker_ring::{Collected, Ring};
use super::vcpu::Vcpu;
use super::{KvmOptions, Tracking, ioctl};
use belay_checkpoint::guest::{GuestError, PacketSink, RamBlock};
use belay_transport::region::Mapping;
use belay_transport::{PAGE_SHIFT, RegionId};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VmFd};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

/// Where KVM on Intel may put the three pages it needs for itself; far from RAM and from the device.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// A run of guest-physical memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Slot {
    pub number: u32,
    pub gpa: u64,
    /// First page of RAM behind it, and how many.
    pub first_page: u64,
    pub pages: u64,
}

/// See the module. The order of the fields is the order in which they go: vCPUs before the VM, the VM before its memory.
pub(super) struct Machine {
    vcpus: Vec<Arc<Vcpu>>,
    vm: VmFd,
    /// The mapping the vCPUs use. The userfaultfd is registered on it by whoever serves pages.
    memory: Arc<Mapping>,
    slots: Vec<Slot>,
    region: RegionId,
    control: Arc<Control>,
    port: Arc<Port>,
    collected: Option<Arc<Collected>>,
    /// What the guest sees of the CPU, by vCPU.
    cpuids: Vec<CpuId>,
    msrs: Vec<u32>,
    tracking: Tracking,
    pub irqchip: bool,
    pub pit: bool,
    pub xsave_bytes: usize,
}

/// Names the failing call in an error.
pub(super) fn failed<E: Into<io::Error>>(doing: impl Into<String>) -> impl FnOnce(E) -> GuestError {
    move |source| GuestError::Io { doing: doing.into(), source: source.into() }
}

impl Machine {
    /// Makes the VM over `ram`, with nothing in its registers yet.
    pub fn new(
        spec: &GuestSpec,
        layout: &Layout,
        options: &KvmOptions,
        ram: &RamBlock,
        memory: Arc<Mapping>,
        sink: Arc<dyn PacketSink>,
    ) -> Result<Self, GuestError> {
        let kvm = Kvm::new().map_err(failed("opening /dev/kvm"))?;
        let vm = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
        vm.set_tss_address(TSS_ADDRESS).map_err(failed("KVM_SET_TSS_ADDR"))?;
        if options.irqchip {
            vm.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
            vm.create_pit2(Default::default()).map_err(failed("KVM_CREATE_PIT2"))?;
        }
        let slots = slots_of(layout.pages());
        let collected = match options.tracking {
            Tracking::Ring { entries } => {
                enable_ring(&vm, entries)?;
                Some(Arc::new(Collected::new(ram.id, layout.pages(), slots.clone())))
            }
            Tracking::Log => {
                enable_manual_protect(&vm)?;
                None
            }
            Tracking::None => None,
        };
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
        let xsave_bytes = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0).max(4096);
        let (mut vcpus, mut cpuids) = (Vec::new(), Vec::new());
        for index in 0..usize::from(spec.vcpus) {
            let fd = vm.create_vcpu(index as u64).map_err(failed("KVM_CREATE_VCPU"))?;
            let cpuid = cpuid_of(&supported, index as u32);
            fd.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
            let ring = match (&collected, options.tracking) {
                (Some(collected), Tracking::Ring { entries }) => {
                    // SAFETY: `fd` stays open during the call; the mapping made needs no descriptor afterwards.
                    let borrowed = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
                    Some(Ring::map(borrowed, entries, collected.clone()).map_err(failed("mapping a dirty ring"))?)
                }
                _ => None,
            };
            vcpus.push(Arc::new(Vcpu::new(index, fd, ring).map_err(failed("mapping struct kvm_run"))?));
            cpuids.push(cpuid);
        }
        let list = kvm.get_msr_index_list().map_err(failed("KVM_GET_MSR_INDEX_LIST"))?;
        let msrs = super::state::usable_msrs(&vcpus[0].fd(), list.as_slice());
        let machine = Self {
            vcpus,
            vm,
            memory,
            slots,
            region: ram.id,
            control: Arc::new(Control::new(usize::from(spec.vcpus))),
            port: Arc::new(Port::new(spec, sink)),
            collected,
            cpuids,
            msrs,
            tracking: options.tracking,
            irqchip: options.irqchip,
            pit: options.irqchip,
            xsave_bytes,
        };
        machine.set_slots(0)?;
        Ok(machine)
    }

    fn set_slots(&self, flags: u32) -> Result<(), GuestError> {
        for slot in &self.slots {
            let region = kvm_userspace_memory_region {
                slot: slot.number,
                flags,
                guest_phys_addr: slot.gpa,
                memory_size: slot.pages << PAGE_SHIFT,
                userspace_addr: self.memory.address() + (slot.first_page << PAGE_SHIFT),
            };
            // SAFETY: the range lies in `memory`, which is mapped for as long as this VM lives (`Machine` owns both and
            // drops the VM first), and is guest memory to everyone in this process: only copies and atomics touch it.
            unsafe { self.vm.set_user_memory_region(region) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(())
    }

    /// Has KVM note which pages are written from now on.
    pub fn log_dirty_pages(&self) -> Result<(), GuestError> {
        self.set_slots(KVM_MEM_LOG_DIRTY_PAGES)
    }

    pub fn vm(&self) -> &VmFd {
        &self.vm
    }

    pub fn vcpus(&self) -> &[Arc<Vcpu>] {
        &self.vcpus
    }

    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    pub fn region(&self) -> RegionId {
        self.region
    }

    pub fn control(&self) -> &Arc<Control> {
        &self.control
    }

    pub fn port(&self) -> &Arc<Port> {
        &self.port
    }

    pub fn collected(&self) -> Option<&Arc<Collected>> {
        self.collected.as_ref()
    }

    pub fn cpuid(&self, vcpu: usize) -> &CpuId {
        &self.cpuids[vcpu]
    }

    pub fn msrs(&self) -> &[u32] {
        &self.msrs
    }

    pub fn tracking(&self) -> Tracking {
        self.tracking
    }
}

/// Memslots for RAM of so many pages: around the hole that the device lies in.
fn slots_of(pages: u64) -> Vec<Slot> {
    let low = pages.min(MEMORY_HOLE_START >> PAGE_SHIFT);
    let mut slots = vec![Slot { number: 0, gpa: 0, first_page: 0, pages: low }];
    if pages > low {
        slots.push(Slot { number: 1, gpa: SECOND_MEMORY_START, first_page: low, pages: pages - low });
    }
    slots
}

fn enable_ring(vm: &VmFd, entries: u32) -> Result<(), GuestError> {
    let none = |reason: String| GuestError::NoTracker { kind: belay_checkpoint::guest::TrackerKind::KvmRing, reason };
    let entry = size_of::<kvm_bindings::kvm_dirty_gfn>();
    let caps = [kvm_bindings::KVM_CAP_DIRTY_LOG_RING_ACQ_REL, kvm_bindings::KVM_CAP_DIRTY_LOG_RING];
    let (cap, most_bytes) = caps
        .iter()
        .map(|&cap| (cap, vm.check_extension_raw(cap.into())))
        .find(|&(_, most)| most > 0)
        .ok_or_else(|| none("this kernel's KVM has no dirty ring".into()))?;
    let most = most_bytes as usize / entry;
    if !entries.is_power_of_two() || entries as usize > most || (entries as usize * entry) < belay_transport::PAGE_SIZE
    {
        return Err(none(format!("{entries} entries: KVM takes a power of two from {} to {most}", 4096 / entry)));
    }
    ioctl::enable(vm, cap, entries as u64 * entry as u64).map_err(failed("enabling the KVM dirty ring"))
}

fn enable_manual_protect(vm: &VmFd) -> Result<(), GuestError> {
    let cap = kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
    if vm.check_extension_raw(cap.into()) & kvm_bindings::KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE as i32 == 0 {
        let kind = belay_checkpoint::guest::TrackerKind::KvmLog;
        let reason = "this kernel's KVM lacks KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2".into();
        return Err(GuestError::NoTracker { kind, reason });
    }
    let manual = kvm_bindings::KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE.into();
    ioctl::enable(vm, cap, manual).map_err(failed("enabling manual dirty-log protection"))
}

/// The host's CPUID for vCPU `index`: the APIC id, which tells on which CPU it was asked, is the vCPU's own.
fn cpuid_of(supported: &CpuId, index: u32) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => entry.ebx = entry.ebx & 0x00ff_ffff | index << 24,
            0xb | 0x1f => entry.edx = index,
            _ => {}
        }
    }
    cpuid
}
