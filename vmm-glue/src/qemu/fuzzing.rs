//! What comes from a QEMU, from a relay, from whoever wants a relay's hand, and from a destination as device state or disk writes, under any
//! bytes.

use super::disk;
use super::relay::fuzzing::frames;
use super::state::{State, behind_the_prefix, first_header, prefix_bytes};

pub(crate) fn qemu(bytes: &[u8]) {
    match bytes.split_first() {
        Some((2, bytes)) => disk::messages::fuzz(bytes),
        Some((3, bytes)) => disk::nbd::fuzz(bytes),
        Some((4, bytes)) => disk::log::fuzz(bytes),
        Some((mode, bytes)) if mode % 2 == 0 => frames(bytes),
        Some((_, bytes)) => state(bytes),
        None => {}
    }
}

/// A state that is understood is all of what came but its head; where devices begin in a stream, they begin with their header.
fn state(bytes: &[u8]) {
    let Ok((state, next_output)) = State::read(bytes) else { return };
    let (State::Stream(body) | State::Devices(body)) = state;
    assert!(bytes.ends_with(body) && bytes[5..13] == next_output.to_le_bytes() && bytes.len() == body.len() + 13);
    let Ok(header) = first_header(body) else { return };
    assert!(behind_the_prefix(body).starts_with(header));
    for stream in [body, &bytes[13..], &[body, behind_the_prefix(body)].concat()] {
        if let Ok(at) = prefix_bytes(stream, header) {
            assert!(stream[at..].starts_with(header));
        }
    }
}

/// Inputs of our own encoders, for the corpus.
#[cfg(test)]
pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    use super::relay::golden::{from_hand, from_relay};
    use super::state::{begin_devices, begin_stream};
    let framed = |body: &[u8]| [&(body.len() as u32).to_be_bytes(), body].concat();
    let hand: Vec<u8> = from_hand().iter().flat_map(|(_, bytes)| framed(bytes)).collect();
    let relay: Vec<u8> = from_relay().iter().flat_map(|(_, bytes)| framed(bytes)).collect();
    // QEVM of version 3, a footer, and a device: section, name, instance, version, what is in it, footer; the end.
    let device = b"\x04\0\0\0\0\x05timer\0\0\0\0\0\0\0\x02what is in it\x7e\0\0\0\0";
    let (mut stream, mut devices) = (vec![1], vec![1]);
    begin_stream(&mut stream, 7);
    stream.extend([&b"QEVM\0\0\0\x03\x07pc-q35\x7e\0\0\0\x02"[..], device, b"\0"].concat());
    begin_devices(&mut devices, 8);
    devices.extend([&b"QEVM\0\0\0\x03"[..], device, b"\0"].concat());
    let disk =
        |messages: Vec<(&str, Vec<u8>)>| messages.iter().flat_map(|(_, bytes)| framed(bytes)).collect::<Vec<u8>>();
    let entries = [
        disk::log::Entry::Write { offset: 512, data: [0xd5; 9].into() },
        disk::log::Entry::Flush,
        disk::log::Entry::Zero { offset: 0, len: 4096 },
    ];
    // Flags, the option GO for the export `disk`, and a read.
    let nbd = b"\x03\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x0a\0\0\0\x04disk\0\0\x25\x60\x95\x13\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\x02\0";
    vec![
        ("disk-from-hand", [vec![2], disk(disk::messages::golden::from_hand())].concat()),
        ("disk-from-relay", [vec![2], disk(disk::messages::golden::from_relay())].concat()),
        ("nbd", nbd.to_vec()),
        ("disk-log", [vec![4], disk::log::encode("vda", 1 << 20, &entries)].concat()),
        ("from-hand", [vec![0], hand].concat()),
        ("from-relay", [vec![0], relay].concat()),
        ("stream", stream),
        ("devices", devices),
    ]
}
