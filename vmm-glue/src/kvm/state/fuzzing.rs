//! A saved state under any bytes, as far as it can be read without a VM.

use super::*;

const VCPUS: usize = 2;

/// Every byte of a state that is taken belongs to one section, and every section to this guest.
pub(crate) fn state(bytes: &[u8]) {
    let sections = match parse(bytes, VCPUS) {
        Ok(sections) => sections,
        Err(error) => return assert!(error.to_string().len() < 1000),
    };
    let mut counted = 12;
    for ((vcpu, tag), body) in sections {
        counted += 8 + body.len();
        assert!(vcpu == VM || usize::from(vcpu) < VCPUS);
        let all_of_it = |values: usize, size: usize| assert_eq!(values * size, body.len());
        match tag {
            Tag::Msrs => {
                if let Ok(msrs) = values_of::<kvm_msr_entry>(tag, body) {
                    all_of_it(msrs.len(), size_of::<kvm_msr_entry>());
                }
            }
            Tag::Regs if value_of::<kvm_regs>(tag, body).is_ok() => all_of_it(1, size_of::<kvm_regs>()),
            Tag::Port => {
                if let Ok(port) = postcard::from_bytes::<PortState>(body) {
                    let written = postcard::to_stdvec(&port).expect("plain data");
                    assert!(postcard::from_bytes::<PortState>(&written).is_ok());
                }
            }
            _ => {}
        }
    }
    assert_eq!(counted, bytes.len());
}

/// Inputs of our own encoder, for the corpus.
#[cfg(test)]
pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let port = PortState { sequence: 77, windows: vec![[5; 8]; VCPUS], paces: vec![9; VCPUS] };
    let mut state = [&MAGIC[..], &VERSION.to_le_bytes(), &(VCPUS as u16).to_le_bytes()].concat();
    let mut writer = Writer(&mut state);
    writer.section(Tag::Regs, 0, bytes_of(&[kvm_regs { rax: 1, ..Default::default() }]));
    writer.section(Tag::Msrs, 1, bytes_of(&[kvm_msr_entry { index: 0x10, ..Default::default() }; 2]));
    writer.section(Tag::TscKhz, 1, bytes_of(&[2_000_000u32]));
    writer.section(Tag::Port, VM, &postcard::to_stdvec(&port).expect("plain data"));
    vec![("state", [vec![2], state].concat())]
}
