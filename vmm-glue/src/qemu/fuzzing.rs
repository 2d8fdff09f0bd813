//! What comes from a QEMU and what it says of itself, from a relay, from whoever wants a relay's hand, and from a destination as device state or disk writes, under any
//! bytes.

use super::disk;
use super::inspect::{InspectError, Inspection};
use super::process::Process;
use super::qmp::{Qmp, QmpError};
use super::relay::fuzzing::frames;
use super::state::{State, behind_the_prefix, first_header, prefix_bytes};
use crate::fuzzing::heard;
use belay_transport::Deadline;
use serde_json::Value;
use std::path::Path;
use std::time::Duration;

pub(crate) fn qemu(bytes: &[u8]) {
    match bytes.split_first() {
        Some((2, bytes)) => disk::messages::fuzz(bytes),
        Some((3, bytes)) => disk::nbd::fuzz(bytes),
        Some((4, bytes)) => disk::log::fuzz(bytes),
        Some((5, bytes)) => drop(conversation(bytes)),
        Some((mode, bytes)) if mode % 2 == 0 => frames(bytes),
        Some((_, bytes)) => state(bytes),
        None => {}
    }
}

/// Connects to a QEMU that says all this and then ends, looks at its guest, and listens until it has no more to say: nothing is waited for that does not
/// come, events come in their order, and its words steer no terminal.
fn conversation(bytes: &[u8]) -> Option<Inspection> {
    let (ours, _theirs) = heard(bytes);
    let deadline = Deadline::after(Duration::from_secs(60));
    let mut qmp = Qmp::over(ours, Path::new("qmp"), deadline).map_err(|error| told(&error)).ok()?;
    let itself = Process::behind(&qmp, Some(std::process::id())).expect("this process");
    let found = match Inspection::of(&mut qmp, &itself, deadline) {
        Ok(found) => Some(found),
        Err(InspectError::Qmp(error)) => {
            told(&error);
            None
        }
        Err(InspectError::Odd(_)) => None,
        Err(error @ InspectError::Process(_)) => panic!("{error}"),
    };
    let event = |line: &[u8]| Some(serde_json::from_slice::<Value>(line).ok()?.get("event")?.as_str()?.to_owned());
    let mut said = bytes.split(|&byte| byte == b'\n').filter_map(event);
    loop {
        match qmp.wait_for("say more", |_| true, deadline) {
            Ok(event) => assert!(said.any(|name| name == event.name), "{} was not said, or not now", event.name),
            Err(error) => {
                told(&error);
                return found;
            }
        }
    }
}

fn told(error: &QmpError) {
    assert!(matches!(error, QmpError::Closed { .. } | QmpError::NotQmp(_) | QmpError::Refused { .. }), "{error:?}");
    let said = error.to_string();
    assert!(said.chars().count() <= 700 && !said.contains(char::is_control), "{said:?}");
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
        ("qmp", [&[5], QMP.as_bytes()].concat()),
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

/// A QEMU of one gigabyte that is looked at, in the order of the questions.
#[cfg(test)]
const QMP: &str = concat!(
    r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": ["oob"]}}"#,
    "\r\n",
    r#"{"return": {}, "id": 1}"#,
    "\n",
    r#"{"return": [{"name": "stop"}, {"name": "migrate"}]}"#,
    "\n",
    r#"{"return": [{"state": false, "capability": "postcopy-ram"}]}"#,
    "\n",
    r#"{"return": [{"name": "n0", "type": "child<virtio-net-pci>"}, {"name": "type", "type": "string"}]}"#,
    "\n",
    r#"{"timestamp": {"seconds": 2, "microseconds": 5}, "event": "NIC_RX_FILTER_CHANGED", "data": {"name": "n0"}}"#,
    "\n",
    r#"{"return": []}"#,
    "\n",
    r#"{"return": []}"#,
    "\n",
    r#"{"return": [{"id": "m", "size": 1073741824, "share": true}]}"#,
    "\n",
    r#"{"return": "memory-backend-file"}"#,
    "\n",
    r#"{"return": "/dev/shm"}"#,
    "\n",
    r#"{"error": {"class": "GenericError", "desc": "Property 'confidential-guest-support' not found"}}"#,
    "\n",
    r#"{"return": {"human-readable-text": "name PSize\n pc.bios 4 KiB  0x00 0x40000 0x40000\n m 4 KiB  0x0 0x4000 0x4000\n"}}"#,
    "\n",
    r#"{"return": {"status": "running", "singlestep": false}}"#,
    "\n",
    r#"{"return": "pc-q35-7.2-machine"}"#,
    "\n",
    r#"{"return": [{"cpu-index": 0}, {"cpu-index": 1}]}"#,
    "\n",
    r#"{"return": {"enabled": true, "present": true}}"#,
    "\n",
    r#"{"return": [{"device": "d0", "inserted": {"ro": false, "drv": "raw", "file": "nbd+unix:///d?socket=/run/d.sock"}}]}"#,
    "\n",
    r#"{"return": "virtio-net-pci.0: index=0,type=nic\r\n \\ n0: index=0,type=stream\r\n"}"#,
    "\n",
    r#"{"timestamp": {"seconds": 3, "microseconds": 0}, "event": "STOP"}"#,
    "\n",
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_qemu_that_answers_everything_is_looked_at_to_the_end() {
        let found = conversation(QMP.as_bytes()).expect("every question was answered");
        assert_eq!(
            (found.vcpus, found.kvm, &*found.status, &*found.version.to_string()),
            (2, true, "running", "10.0.2")
        );
        assert_eq!(
            (&*found.ram[0].kind, found.ram[0].bytes, &*found.other[0].name),
            ("memory-backend-file", 1 << 30, "pc.bios")
        );
        assert_eq!(
            (found.disks[0].server.as_deref(), &*found.nets[0].kind, found.devices.len()),
            (Some(Path::new("/run/d.sock")), "stream", 1)
        );
    }
}
