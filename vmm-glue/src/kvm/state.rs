//! What a stopped guest is besides its memory: saved as typed sections, read back with every length checked.
//!
//! ```text
//! "BELAYKVM", version u16, vCPUs u16, then sections: tag u16, vCPU u16 (0xffff: the VM's), length u32, bytes
//! ```
//! All numbers little-endian. Kernel structures are stored as the kernel lays them out (x86-64 ABI, fixed for ever). A reader
//! refuses unknown tags, wrong lengths, and sections that are missing or doubled.

use super::device::PortState;
use super::machine::{Machine, failed};
use belay_checkpoint::guest::GuestError;
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, Xsave, kvm_clock_data, kvm_cpuid_entry2,
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use std::collections::BTreeMap;

const MAGIC: &[u8; 8] = b"BELAYKVM";
const VERSION: u16 = 1;
const VM: u16 = u16::MAX;
const MSR_IA32_TSC: u32 = 0x10;

/// The tag of a section. Numbers are part of the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u16)]
enum Tag {
    Cpuid = 1,
    TscKhz = 2,
    Regs = 3,
    Sregs = 4,
    Xsave = 5,
    Xcrs = 6,
    DebugRegs = 7,
    Lapic = 8,
    Msrs = 9,
    MpState = 10,
    Events = 11,
    Clock = 32,
    PicMaster = 33,
    PicSlave = 34,
    IoApic = 35,
    Pit = 36,
    Port = 48,
}

const TAGS: [Tag; 17] = [
    Tag::Cpuid,
    Tag::TscKhz,
    Tag::Regs,
    Tag::Sregs,
    Tag::Xsave,
    Tag::Xcrs,
    Tag::DebugRegs,
    Tag::Lapic,
    Tag::Msrs,
    Tag::MpState,
    Tag::Events,
    Tag::Clock,
    Tag::PicMaster,
    Tag::PicSlave,
    Tag::IoApic,
    Tag::Pit,
    Tag::Port,
];

/// A kernel structure that is nothing but its bytes.
///
/// # Safety
/// The type is `repr(C)`, made of integers (and arrays and unions of them) without padding, and any bytes are a valid value.
unsafe trait Plain: Sized {}

// SAFETY (all below): structures of linux/kvm.h for x86; the kernel ABI spells padding out as fields, and all are integers.
// SAFETY: see above.
unsafe impl Plain for kvm_regs {}
// SAFETY: see above.
unsafe impl Plain for kvm_sregs {}
// SAFETY: see above.
unsafe impl Plain for kvm_xcrs {}
// SAFETY: see above.
unsafe impl Plain for kvm_debugregs {}
// SAFETY: see above.
unsafe impl Plain for kvm_lapic_state {}
// SAFETY: see above.
unsafe impl Plain for kvm_mp_state {}
// SAFETY: see above.
unsafe impl Plain for kvm_vcpu_events {}
// SAFETY: see above.
unsafe impl Plain for kvm_clock_data {}
// SAFETY: see above; the union's largest member covers all of it.
unsafe impl Plain for kvm_irqchip {}
// SAFETY: see above.
unsafe impl Plain for kvm_pit_state2 {}
// SAFETY: see above.
unsafe impl Plain for kvm_cpuid_entry2 {}
// SAFETY: see above.
unsafe impl Plain for kvm_msr_entry {}
// SAFETY: an integer.
unsafe impl Plain for u32 {}

fn bytes_of<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: `Plain` types have no padding, so all bytes are initialised; the length is that of the slice.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

fn values_of<T: Plain>(tag: Tag, bytes: &[u8]) -> Result<Vec<T>, GuestError> {
    if !bytes.len().is_multiple_of(size_of::<T>()) {
        let size = size_of::<T>();
        return Err(GuestError::BadState(format!("{tag:?} has {} bytes, not a multiple of {size}", bytes.len())));
    }
    // SAFETY: `chunks_exact` gives `size_of::<T>()` bytes, any bytes are a valid `Plain`, and the read takes no alignment.
    let read = |chunk: &[u8]| unsafe { chunk.as_ptr().cast::<T>().read_unaligned() };
    Ok(bytes.chunks_exact(size_of::<T>()).map(read).collect())
}

fn value_of<T: Plain>(tag: Tag, bytes: &[u8]) -> Result<T, GuestError> {
    let mut values = values_of(tag, bytes)?;
    let count = values.len();
    values
        .pop()
        .filter(|_| count == 1)
        .ok_or_else(|| GuestError::BadState(format!("{tag:?} occurs {count} times in its section")))
}

struct Writer<'a>(&'a mut Vec<u8>);

impl Writer<'_> {
    fn section(&mut self, tag: Tag, vcpu: u16, bytes: &[u8]) {
        self.0.extend((tag as u16).to_le_bytes());
        self.0.extend(vcpu.to_le_bytes());
        self.0.extend((bytes.len() as u32).to_le_bytes());
        self.0.extend(bytes);
    }
}

/// The model-specific registers of KVM's list that this vCPU has and lets be set.
pub(super) fn usable_msrs(fd: &VcpuFd, list: &[u32]) -> Vec<u32> {
    let usable = |&index: &u32| {
        let Ok(mut one) = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }]) else { return false };
        matches!(fd.get_msrs(&mut one), Ok(1)) && matches!(fd.set_msrs(&one), Ok(1))
    };
    let mut usable: Vec<u32> = list.iter().copied().filter(usable).collect();
    // TSC_ADJUST and others first: the counter itself is set last, closest to the guest's next instruction.
    usable.sort_by_key(|&index| (index == MSR_IA32_TSC, index));
    usable
}

/// Appends the whole state of a stopped machine.
pub(super) fn save(machine: &Machine, out: &mut Vec<u8>) -> Result<(), GuestError> {
    out.extend(head(machine.vcpus().len()));
    let mut writer = Writer(out);
    save_vm(machine, &mut writer)?;
    for vcpu in machine.vcpus() {
        save_vcpu(machine, vcpu.index, &vcpu.fd(), &mut writer)?;
    }
    Ok(())
}

/// What stands before the sections.
fn head(vcpus: usize) -> Vec<u8> {
    [&MAGIC[..], &VERSION.to_le_bytes(), &(vcpus as u16).to_le_bytes()].concat()
}

fn save_vm(machine: &Machine, writer: &mut Writer<'_>) -> Result<(), GuestError> {
    let vm = machine.vm();
    let clock = vm.get_clock().map_err(failed("KVM_GET_CLOCK"))?;
    writer.section(Tag::Clock, VM, bytes_of(&[clock]));
    if machine.irqchip {
        for (tag, chip_id) in IRQCHIPS {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).map_err(failed("KVM_GET_IRQCHIP"))?;
            writer.section(tag, VM, bytes_of(&[chip]));
        }
    }
    if machine.pit {
        let pit = vm.get_pit2().map_err(failed("KVM_GET_PIT2"))?;
        writer.section(Tag::Pit, VM, bytes_of(&[pit]));
    }
    let port = postcard::to_stdvec(&machine.port().save()).map_err(|error| GuestError::BadState(error.to_string()))?;
    writer.section(Tag::Port, VM, &port);
    Ok(())
}

const IRQCHIPS: [(Tag, u32); 3] = [
    (Tag::PicMaster, KVM_IRQCHIP_PIC_MASTER),
    (Tag::PicSlave, KVM_IRQCHIP_PIC_SLAVE),
    (Tag::IoApic, KVM_IRQCHIP_IOAPIC),
];

fn save_vcpu(machine: &Machine, index: usize, fd: &VcpuFd, writer: &mut Writer<'_>) -> Result<(), GuestError> {
    let vcpu = index as u16;
    writer.section(Tag::Cpuid, vcpu, bytes_of(machine.cpuid(index).as_slice()));
    let khz = fd.get_tsc_khz().map_err(failed("KVM_GET_TSC_KHZ"))?;
    writer.section(Tag::TscKhz, vcpu, bytes_of(&[khz]));
    // mp_state before the rest: KVM settles pending INIT and SIPI in it.
    let mp_state = match machine.irqchip {
        true => Some(fd.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?),
        false => None,
    };
    writer.section(Tag::Regs, vcpu, bytes_of(&[fd.get_regs().map_err(failed("KVM_GET_REGS"))?]));
    writer.section(Tag::Sregs, vcpu, bytes_of(&[fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?]));
    writer.section(Tag::Xsave, vcpu, &get_xsave(fd, machine.xsave_bytes)?);
    writer.section(Tag::Xcrs, vcpu, bytes_of(&[fd.get_xcrs().map_err(failed("KVM_GET_XCRS"))?]));
    writer.section(Tag::DebugRegs, vcpu, bytes_of(&[fd.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?]));
    if let Some(mp_state) = mp_state {
        let lapic = fd.get_lapic().map_err(failed("KVM_GET_LAPIC"))?;
        writer.section(Tag::Lapic, vcpu, bytes_of(&[lapic]));
        writer.section(Tag::MpState, vcpu, bytes_of(&[mp_state]));
    }
    let wanted: Vec<_> = machine.msrs().iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut msrs = Msrs::from_entries(&wanted).map_err(|error| GuestError::BadState(format!("{error:?}")))?;
    let got = fd.get_msrs(&mut msrs).map_err(failed("KVM_GET_MSRS"))?;
    if got != wanted.len() {
        return Err(GuestError::BadState(format!("MSR {:#x} can no longer be read", wanted[got].index)));
    }
    writer.section(Tag::Msrs, vcpu, bytes_of(msrs.as_slice()));
    let events = fd.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?;
    writer.section(Tag::Events, vcpu, bytes_of(&[events]));
    Ok(())
}

/// XSAVE state in the kernel's size for this VM, which is beyond 4096 bytes only for guests with tile registers.
fn get_xsave(fd: &VcpuFd, bytes: usize) -> Result<Vec<u8>, GuestError> {
    let mut xsave = new_xsave(bytes)?;
    // SAFETY: the buffer has the size KVM_CAP_XSAVE2 gave for this VM.
    unsafe { fd.get_xsave2(&mut xsave) }.map_err(failed("KVM_GET_XSAVE2"))?;
    let fam = xsave.as_fam_struct_ref();
    let mut out = bytes_of(&fam.xsave.region).to_vec();
    out.extend(bytes_of(xsave.as_slice()));
    Ok(out)
}

fn new_xsave(bytes: usize) -> Result<Xsave, GuestError> {
    Xsave::new((bytes - 4096).div_ceil(4))
        .map_err(|error| GuestError::BadState(format!("XSAVE of {bytes} bytes: {error:?}")))
}

fn set_xsave(fd: &VcpuFd, bytes: usize, state: &[u8]) -> Result<(), GuestError> {
    let words: Vec<u32> = values_of(Tag::Xsave, state)?;
    let mut xsave = new_xsave(bytes)?;
    if words.len() != 1024 + xsave.as_slice().len() {
        return Err(GuestError::BadState(format!("XSAVE of {} bytes where this host has {bytes}", state.len())));
    }
    // SAFETY: the number of entries, which is the structure's length field, is not changed.
    unsafe { xsave.as_mut_fam_struct() }.xsave.region.copy_from_slice(&words[..1024]);
    xsave.as_mut_slice().copy_from_slice(&words[1024..]);
    // SAFETY: the buffer has the size KVM_CAP_XSAVE2 gave for this VM.
    unsafe { fd.set_xsave2(&xsave) }.map_err(failed("KVM_SET_XSAVE"))
}

/// A saved state, taken apart: bytes by (vCPU, tag).
type Sections<'a> = BTreeMap<(u16, Tag), &'a [u8]>;

fn parse(state: &[u8], vcpus: usize) -> Result<Sections<'_>, GuestError> {
    let bad = |what: &str| GuestError::BadState(what.to_owned());
    let (head, mut rest) = state.split_at_checked(12).ok_or_else(|| bad("shorter than its head"))?;
    let word = |bytes: &[u8], at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    if &head[..8] != MAGIC {
        return Err(bad("it does not begin with BELAYKVM"));
    }
    if word(head, 8) != VERSION {
        return Err(GuestError::BadState(format!("version {}, this is {VERSION}", word(head, 8))));
    }
    if usize::from(word(head, 10)) != vcpus {
        return Err(GuestError::BadState(format!("vCPUs in it: {}, in this guest: {vcpus}", word(head, 10))));
    }
    let mut sections = Sections::new();
    while !rest.is_empty() {
        let (head, body) = rest.split_at_checked(8).ok_or_else(|| bad("a section's head is cut off"))?;
        let (tag, vcpu) = (word(head, 0), word(head, 2));
        let len = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
        let tag = TAGS.into_iter().find(|&known| known as u16 == tag);
        let tag = tag.ok_or_else(|| GuestError::BadState(format!("unknown section {}", word(head, 0))))?;
        if vcpu != VM && usize::from(vcpu) >= vcpus {
            return Err(GuestError::BadState(format!("{tag:?} of vCPU {vcpu}, this guest has {vcpus}")));
        }
        let (bytes, next) = body.split_at_checked(len).ok_or_else(|| bad("a section is cut off"))?;
        if sections.insert((vcpu, tag), bytes).is_some() {
            return Err(GuestError::BadState(format!("{tag:?} of vCPU {vcpu} occurs twice")));
        }
        rest = next;
    }
    Ok(sections)
}

/// Puts a saved state into a stopped machine.
pub(super) fn load(machine: &Machine, state: &[u8]) -> Result<(), GuestError> {
    let mut sections = parse(state, machine.vcpus().len())?;
    for vcpu in machine.vcpus() {
        load_vcpu(machine, vcpu.index, &vcpu.fd(), &mut sections)?;
    }
    load_vm(machine, &mut sections)?;
    match sections.keys().next() {
        Some((vcpu, tag)) => Err(GuestError::BadState(format!("{tag:?} of vCPU {vcpu}, which this VM does not have"))),
        None => Ok(()),
    }
}

fn take<'a>(sections: &mut Sections<'a>, vcpu: u16, tag: Tag) -> Result<&'a [u8], GuestError> {
    sections.remove(&(vcpu, tag)).ok_or_else(|| GuestError::BadState(format!("{tag:?} of vCPU {vcpu} is missing")))
}

fn load_vcpu(machine: &Machine, index: usize, fd: &VcpuFd, sections: &mut Sections<'_>) -> Result<(), GuestError> {
    let vcpu = index as u16;
    if take(sections, vcpu, Tag::Cpuid)? != bytes_of(machine.cpuid(index).as_slice()) {
        return Err(GuestError::BadState(
            "this host's CPU, as KVM gives it to guests, differs from the other's".into(),
        ));
    }
    let khz: u32 = value_of(Tag::TscKhz, take(sections, vcpu, Tag::TscKhz)?)?;
    let here = fd.get_tsc_khz().map_err(failed("KVM_GET_TSC_KHZ"))?;
    if khz != here {
        // KVM takes another frequency where the CPU scales it, or where it is higher or within 250 ppm.
        let refused = |error| {
            format!(
                "the guest's time stamp counter runs at {khz} kHz and this host's at {here} kHz, which its CPU cannot scale down (KVM_SET_TSC_KHZ: {error}): choose a host whose counter is no faster"
            )
        };
        fd.set_tsc_khz(khz).map_err(|error| GuestError::BadState(refused(error)))?;
    }
    let sregs = value_of(Tag::Sregs, take(sections, vcpu, Tag::Sregs)?)?;
    fd.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
    let regs = value_of(Tag::Regs, take(sections, vcpu, Tag::Regs)?)?;
    fd.set_regs(&regs).map_err(failed("KVM_SET_REGS"))?;
    let xcrs = value_of(Tag::Xcrs, take(sections, vcpu, Tag::Xcrs)?)?;
    fd.set_xcrs(&xcrs).map_err(failed("KVM_SET_XCRS"))?;
    set_xsave(fd, machine.xsave_bytes, take(sections, vcpu, Tag::Xsave)?)?;
    let debug_regs = value_of(Tag::DebugRegs, take(sections, vcpu, Tag::DebugRegs)?)?;
    fd.set_debug_regs(&debug_regs).map_err(failed("KVM_SET_DEBUGREGS"))?;
    if machine.irqchip {
        let lapic = value_of(Tag::Lapic, take(sections, vcpu, Tag::Lapic)?)?;
        fd.set_lapic(&lapic).map_err(failed("KVM_SET_LAPIC"))?;
        let mp_state = value_of(Tag::MpState, take(sections, vcpu, Tag::MpState)?)?;
        fd.set_mp_state(mp_state).map_err(failed("KVM_SET_MP_STATE"))?;
    }
    let entries: Vec<kvm_msr_entry> = values_of(Tag::Msrs, take(sections, vcpu, Tag::Msrs)?)?;
    let msrs = Msrs::from_entries(&entries).map_err(|error| GuestError::BadState(format!("{error:?}")))?;
    let set = fd.set_msrs(&msrs).map_err(failed("KVM_SET_MSRS"))?;
    if let Some(refused) = entries.get(set) {
        return Err(GuestError::BadState(format!("KVM refuses {:#x} in MSR {:#x}", refused.data, refused.index)));
    }
    let events = value_of(Tag::Events, take(sections, vcpu, Tag::Events)?)?;
    fd.set_vcpu_events(&events).map_err(failed("KVM_SET_VCPU_EVENTS"))
}

fn load_vm(machine: &Machine, sections: &mut Sections<'_>) -> Result<(), GuestError> {
    let vm = machine.vm();
    if machine.irqchip {
        for (tag, _) in IRQCHIPS {
            let chip: kvm_irqchip = value_of(tag, take(sections, VM, tag)?)?;
            vm.set_irqchip(&chip).map_err(failed("KVM_SET_IRQCHIP"))?;
        }
    }
    if machine.pit {
        let pit = value_of(Tag::Pit, take(sections, VM, Tag::Pit)?)?;
        vm.set_pit2(&pit).map_err(failed("KVM_SET_PIT2"))?;
    }
    let saved: kvm_clock_data = value_of(Tag::Clock, take(sections, VM, Tag::Clock)?)?;
    // The clock goes on from where it was; how long the guest stood still is not added.
    let clock = kvm_clock_data { clock: saved.clock, ..Default::default() };
    vm.set_clock(&clock).map_err(failed("KVM_SET_CLOCK"))?;
    let bytes = take(sections, VM, Tag::Port)?;
    let port: PortState = postcard::from_bytes(bytes)
        .map_err(|error| GuestError::BadState(format!("the packet port's state: {error}")))?;
    if !machine.port().load(port) {
        return Err(GuestError::BadState("the packet port has another number of vCPUs".into()));
    }
    Ok(())
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;

#[cfg(test)]
mod golden;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::guests::{Filler, GuestSpec};
    use crate::kvm::testing::Nowhere;
    use crate::kvm::{BareGuest, KvmGuest, KvmOptions, Tracking};
    use belay_checkpoint::guest::Guest;
    use belay_transport::PageSize;
    use belay_transport::region::RamFile;
    use std::sync::Arc;

    pub(super) const VCPUS: u16 = 2;

    pub(super) fn guest() -> Option<KvmGuest> {
        if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
            eprintln!("skipped: /dev/kvm cannot be opened: {error}");
            return None;
        }
        let spec = GuestSpec {
            memory_bytes: 4 << 20,
            working_set_bytes: 1 << 20,
            vcpus: VCPUS,
            filler: Filler::Host,
            ..GuestSpec::default()
        };
        let file = Arc::new(RamFile::memfd("belay-test-state", 4 << 20, PageSize::Small).unwrap());
        let alias = Arc::new(file.map().unwrap());
        let options = KvmOptions { tracking: Tracking::None, irqchip: true };
        let mut guest = KvmGuest::new(&spec, &options, file, alias, Arc::new(Nowhere)).unwrap();
        guest.boot().unwrap();
        Some(guest)
    }

    pub(super) fn saved(guest: &mut KvmGuest) -> Vec<u8> {
        let mut state = Vec::new();
        guest.save(&mut state).unwrap();
        state
    }

    /// Gives every section of a guest a value that a fresh one does not have.
    fn mark(guest: &mut KvmGuest) {
        const LSTAR: u32 = 0xc000_0082;
        for vcpu in guest.machine.vcpus() {
            let (fd, own) = (vcpu.fd(), vcpu.index as u64 + 1);
            fd.set_regs(&kvm_regs { rax: own, rsp: own << 8, r15: own << 16, ..fd.get_regs().unwrap() }).unwrap();
            let mut sregs = fd.get_sregs().unwrap();
            (sregs.fs.base, sregs.gdt.limit, sregs.cr2) = (own << 12, own as u16, own << 4);
            fd.set_sregs(&sregs).unwrap();
            let bytes = guest.machine.xsave_bytes;
            let mut xsave: Vec<u32> = values_of(Tag::Xsave, &get_xsave(&fd, bytes).unwrap()).unwrap();
            xsave[40] = 0xabcd + own as u32; // the low word of XMM0
            xsave[128] |= 3; // XSTATE_BV: x87 and SSE are in use
            set_xsave(&fd, bytes, bytes_of(&xsave)).unwrap();
            let mut xcrs = fd.get_xcrs().unwrap();
            xcrs.xcrs[0].value |= 3;
            fd.set_xcrs(&xcrs).unwrap();
            let mut debug = fd.get_debug_regs().unwrap();
            debug.db[0] = own << 20;
            fd.set_debug_regs(&debug).unwrap();
            let mut lapic = fd.get_lapic().unwrap();
            lapic.regs[0x80] = (own << 4) as i8; // task priority
            fd.set_lapic(&lapic).unwrap();
            let msr = kvm_msr_entry { index: LSTAR, data: own << 24, ..Default::default() };
            assert_eq!(fd.set_msrs(&Msrs::from_entries(&[msr]).unwrap()).unwrap(), 1);
            fd.set_mp_state(kvm_mp_state { mp_state: kvm_bindings::KVM_MP_STATE_HALTED }).unwrap();
            let mut events = fd.get_vcpu_events().unwrap();
            events.nmi.masked = 1;
            fd.set_vcpu_events(&events).unwrap();
        }
        let machine = &guest.machine;
        machine.vm().set_clock(&kvm_clock_data { clock: 1 << 50, ..Default::default() }).unwrap();
        for (_, chip_id) in IRQCHIPS {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            machine.vm().get_irqchip(&mut chip).unwrap();
            if chip_id == KVM_IRQCHIP_IOAPIC {
                // SAFETY: every member is plain integers, and the kernel filled all of the union.
                let ioapic = unsafe { &mut chip.chip.ioapic };
                ioapic.redirtbl[5].bits = 0x1_0035;
            } else {
                chip.chip.pic.irq_base = 0x20 + chip_id as u8;
            }
            machine.vm().set_irqchip(&chip).unwrap();
        }
        let mut pit = machine.vm().get_pit2().unwrap();
        pit.channels[2].count = 0x1234;
        machine.vm().set_pit2(&pit).unwrap();
        let vcpus = usize::from(VCPUS);
        assert!(machine.port().load(PortState { sequence: 77, windows: vec![[5; 8]; vcpus], paces: vec![9; vcpus] }));
    }

    #[test]
    fn every_field_of_a_saved_vcpu_comes_back() {
        let (Some(mut from), Some(mut into)) = (guest(), guest()) else { return };
        mark(&mut from);
        let (state, fresh) = (saved(&mut from), saved(&mut into));
        into.load(&state).unwrap();
        let again = saved(&mut into);
        let [state, fresh, again] = [&state, &fresh, &again].map(|bytes| parse(bytes, usize::from(VCPUS)).unwrap());
        assert_eq!(state.len(), 6 + 11 * usize::from(VCPUS));
        for (&(vcpu, tag), &bytes) in &state {
            let again = again[&(vcpu, tag)];
            let of_the_host = matches!(tag, Tag::Cpuid | Tag::TscKhz);
            assert!(
                of_the_host || bytes != fresh[&(vcpu, tag)],
                "{tag:?} was not marked: this test proves nothing for it"
            );
            match tag {
                Tag::Clock => {
                    let clock = |bytes| value_of::<kvm_clock_data>(tag, bytes).unwrap().clock;
                    assert!(clock(again) >= clock(bytes) && clock(again) < clock(bytes) + 10_000_000_000);
                }
                Tag::Msrs => {
                    let msrs = |bytes| values_of::<kvm_msr_entry>(tag, bytes).unwrap();
                    for (was, is) in msrs(bytes).into_iter().zip(msrs(again)) {
                        let goes_on = was.index == MSR_IA32_TSC && is.data > was.data && is.data < was.data + (1 << 36);
                        assert!(was.index == is.index && (was.data == is.data || goes_on), "{was:x?} became {is:x?}");
                    }
                }
                Tag::Pit => {
                    let pit = |bytes| {
                        let mut pit = value_of::<kvm_pit_state2>(tag, bytes).unwrap();
                        // When a channel was loaded is a time of the host's, set anew by the kernel.
                        pit.channels.iter_mut().for_each(|channel| channel.count_load_time = 0);
                        pit
                    };
                    assert_eq!(bytes_of(&[pit(again)]), bytes_of(&[pit(bytes)]));
                }
                _ => assert_eq!(again, bytes, "{tag:?} of vCPU {vcpu}"),
            }
        }
    }

    #[test]
    fn a_guest_of_a_slower_counter_is_taken_or_refused_with_both_frequencies() {
        let Some(mut guest) = guest() else { return };
        let here = guest.tsc_khz().unwrap();
        let mut state = saved(&mut guest);
        let at = parse(&state, usize::from(VCPUS)).unwrap()[&(0, Tag::TscKhz)].as_ptr().addr() - state.as_ptr().addr();
        let half = here / 2;
        state[at..at + 4].copy_from_slice(&half.to_ne_bytes());
        match guest.load(&state) {
            // This CPU scales.
            Ok(()) => assert_eq!(guest.tsc_khz().unwrap(), half),
            Err(GuestError::BadState(why)) => {
                assert!(why.contains(&format!("{half} kHz")) && why.contains(&format!("{here} kHz")), "{why}");
            }
            Err(other) => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_state_that_is_cut_changed_or_foreign_is_refused() {
        let Some(mut guest) = guest() else { return };
        let state = saved(&mut guest);
        for len in (0..state.len()).step_by(97) {
            assert!(matches!(guest.load(&state[..len]), Err(GuestError::BadState(_))), "{len} bytes");
        }
        let change = |at: usize, to: u8| {
            let mut changed = state.clone();
            changed[at] = to;
            changed
        };
        for (at, to) in [(0, b'X'), (8, 2), (10, 3), (12, 0xee), (14, 9), (15, 0)] {
            assert!(matches!(guest.load(&change(at, to)), Err(GuestError::BadState(_))), "byte {at}");
        }
        let mut twice = state.clone();
        twice.extend_from_within(12..);
        assert!(matches!(guest.load(&twice), Err(GuestError::BadState(_))));
        guest.load(&state).unwrap();
    }
}
