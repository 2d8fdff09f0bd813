//! A saved state as another host gets it. What KVM gives is of the host, so the file is of structures filled here; a state that is
//! saved where there is KVM has the same sections, in the same order and of the same sizes.

use super::tests::{VCPUS, guest, saved};
use super::*;
use crate::golden::compare;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");

/// A structure whose bytes are all different from their neighbours.
fn filled<T: Plain>(from: u8) -> T {
    let bytes: Vec<u8> = (0..size_of::<T>()).map(|at| from.wrapping_add((at * 7 + at / 256) as u8)).collect();
    value_of(Tag::Port, &bytes).expect("one")
}

/// Sections as [`save`] writes them. Where their number is the host's there are two of each.
fn state() -> Vec<u8> {
    let mut state = head(usize::from(VCPUS));
    let mut writer = Writer(&mut state);
    writer.section(Tag::Clock, VM, bytes_of(&[filled::<kvm_clock_data>(1)]));
    for (tag, chip_id) in IRQCHIPS {
        writer.section(tag, VM, bytes_of(&[kvm_irqchip { chip_id, ..filled(chip_id as u8) }]));
    }
    writer.section(Tag::Pit, VM, bytes_of(&[filled::<kvm_pit_state2>(2)]));
    writer.section(Tag::Port, VM, &postcard::to_stdvec(&port()).expect("plain data"));
    for vcpu in 0..VCPUS {
        let own = 16 * (vcpu as u8 + 1);
        writer.section(Tag::Cpuid, vcpu, bytes_of(&[filled::<kvm_cpuid_entry2>(own), filled(own + 1)]));
        writer.section(Tag::TscKhz, vcpu, bytes_of(&[2_000_000_u32 + u32::from(vcpu)]));
        writer.section(Tag::Regs, vcpu, bytes_of(&[filled::<kvm_regs>(own + 2)]));
        writer.section(Tag::Sregs, vcpu, bytes_of(&[filled::<kvm_sregs>(own + 3)]));
        writer.section(Tag::Xsave, vcpu, bytes_of(&[filled::<u32>(own + 4); 1024]));
        writer.section(Tag::Xcrs, vcpu, bytes_of(&[filled::<kvm_xcrs>(own + 5)]));
        writer.section(Tag::DebugRegs, vcpu, bytes_of(&[filled::<kvm_debugregs>(own + 6)]));
        writer.section(Tag::Lapic, vcpu, bytes_of(&[filled::<kvm_lapic_state>(own + 7)]));
        writer.section(Tag::MpState, vcpu, bytes_of(&[filled::<kvm_mp_state>(own + 8)]));
        writer.section(Tag::Msrs, vcpu, bytes_of(&[filled::<kvm_msr_entry>(own + 9), filled(own + 10)]));
        writer.section(Tag::Events, vcpu, bytes_of(&[filled::<kvm_vcpu_events>(own + 11)]));
    }
    state
}

fn port() -> PortState {
    PortState { sequence: 77, windows: vec![[1, 2, 3, 4, 5, 6, 7, 8]; usize::from(VCPUS)], paces: vec![9, 300] }
}

/// Tag, vCPU and size of each section, in order. Sizes that are the host's are left out.
fn sections(state: &[u8]) -> Vec<(u16, u16, Option<u32>)> {
    let mut found = Vec::new();
    let mut rest = &state[head(0).len()..];
    while let Some((start, body)) = rest.split_first_chunk::<8>() {
        let [tag, vcpu] = [0, 2].map(|at| u16::from_le_bytes([start[at], start[at + 1]]));
        let len = u32::from_le_bytes(start[4..].try_into().expect("four bytes"));
        let of_the_host = [Tag::Cpuid, Tag::Xsave, Tag::Msrs].map(|tag| tag as u16).contains(&tag);
        found.push((tag, vcpu, (!of_the_host && tag != Tag::Port as u16).then_some(len)));
        rest = &body[len as usize..];
    }
    found
}

#[test]
fn a_saved_state_is_as_it_was_when_its_version_came_out() {
    for (_, bytes) in compare(FOLDER, VERSION, "kvm-state", &[("state", state())]) {
        let read = parse(&bytes, usize::from(VCPUS)).expect("read");
        let tags: std::collections::BTreeSet<Tag> = read.keys().map(|&(_, tag)| tag).collect();
        assert!(tags.into_iter().eq(TAGS), "every section is in the file");
        let regs: kvm_regs = value_of(Tag::Regs, read[&(1, Tag::Regs)]).expect("read");
        assert_eq!(bytes_of(&[regs]), bytes_of(&[filled::<kvm_regs>(34)]));
        assert_eq!(postcard::from_bytes::<PortState>(read[&(VM, Tag::Port)]).expect("read"), port());
    }
}

#[test]
fn what_kvm_gives_is_saved_as_the_file_of_this_version_has_it() {
    let Some(mut guest) = guest() else { return };
    let file = std::fs::read(format!("{FOLDER}/v{VERSION}/kvm-state/state")).expect("the file is there");
    let state = saved(&mut guest);
    assert_eq!(state[..head(0).len()], file[..head(0).len()]);
    assert_eq!(sections(&state), sections(&file));
}
