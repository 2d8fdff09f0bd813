//! A tethered QEMU guest with a network: what it said and was not committed nobody has heard, what was heard it has said, and who was in
//! conversation with it goes on.

mod qemu_guest;
mod running;

use qemu_guest::network::{IN_FLIGHT, Network, frames, relay};
use qemu_guest::{Linux, Machine, Qemu, newer_qemu, no_qemu};
use running::{BOUND, Place, Process, kill};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// A guest in conversation at home.
struct Home {
    place: Place,
    folder: qemu_guest::SharedMemory,
    network: Network,
    machine: Machine,
    relay: Process,
    hand: String,
    source: Qemu,
}

/// On its way between two relays.
struct Scene {
    place: Place,
    folder: qemu_guest::SharedMemory,
    network: Network,
    source: Qemu,
    destination: Process,
    sender: Process,
    relays: [Process; 2],
}

impl Home {
    /// In a QEMU that connects to its relay again by itself where there is a `newer` one. `None`, said, where it cannot be.
    fn start(newer: Option<String>) -> Option<Self> {
        if no_qemu() {
            return None;
        }
        let linux = Linux::here()?;
        let (place, folder) = (Place::new(), qemu_guest::shared_memory());
        let mut network = Network::here(folder.path(), &linux)?;
        let mut machine = Machine { blocks: vec![192], address: Some("10.77.0.2"), ..Machine::of("q35", Some(linux)) };
        if let Some(program) = newer {
            (machine.program, machine.reconnects) = (program, true);
        }
        let (relay, hand) = relay(&place, folder.path(), "here", &network);
        let source = Qemu::start(&place, folder.path(), &machine, "here");
        source.wait_until_booted();
        network.wait_for(200);
        Some(Self { place, folder, network, machine, relay, hand, source })
    }

    /// Sends it away.
    fn leave(self, sent: &[&str]) -> Scene {
        let Self { place, folder, network, machine, relay: here, hand: hand_here, source } = self;
        let (there, hand_there) = relay(&place, folder.path(), "there", &network);
        let (state_dir, arguments) = (place.text("there"), machine.arguments(folder.path(), "there"));
        let mut words = vec!["receive", "--json", "--listen", "127.0.0.1:0", "--state-dir", &state_dir];
        words.extend(["qemu", "--relay", &hand_there, "--", &machine.program]);
        words.extend(arguments.iter().map(String::as_str));
        let mut destination = place.belay(&words);
        let to = destination.wait_for_event("listening")["address"].as_str().expect("an address").to_owned();
        let (kept, run_dir, socket) = (place.text("here"), place.text("run"), source.socket.display().to_string());
        let mut words = vec!["send", "--json", "--to", &to, "--state-dir", &kept, "--run-dir", &run_dir];
        words.extend(sent);
        words.extend(["qemu", "--relay", &hand_here, "--qmp", &socket]);
        let sender = place.belay(&words);
        Scene { place, folder, network, source, destination, sender, relays: [here, there] }
    }
}

/// Long enough that a destination which is struck has always said something that is not committed.
const STRUCK: [&str; 4] = ["--release", "never", "--period", "100ms"];

#[test]
fn p4_a_conversation_with_a_guest_survives_its_destination_and_no_answer_is_taken_back() {
    let Some(home) = Home::start(None) else { return };
    survives_its_destination(home.leave(&STRUCK));
}

#[test]
fn p4_a_conversation_with_a_guest_survives_its_relay_where_qemu_connects_again_and_then_its_destination() {
    let Some(newer) = newer_qemu() else { return };
    let Some(mut home) = Home::start(Some(newer)) else { return };
    home.relay.crash();
    let answered = home.network.answered();
    // A socket that nobody serves is replaced.
    (home.relay, home.hand) = relay(&home.place, home.folder.path(), "here", &home.network);
    home.network.wait_for(answered + 2 * IN_FLIGHT as u64);
    survives_its_destination(home.leave(&STRUCK));
}

fn survives_its_destination(scene: Scene) {
    let Scene { place: _place, folder: _folder, mut network, mut source, mut destination, mut sender, relays } = scene;
    destination.wait_for_event("all-landed");
    let (before, begun) = (network.answered(), Instant::now());
    network.wait_for(before + 300);
    println!("{:.0} answers a second under the tether", 300.0 / begun.elapsed().as_secs_f64());
    let qemu = destination.seen.iter().find(|event| event["event"] == "vmm-started").expect("told")["pid"].as_i64();
    let (struck, begun) = (network.answered(), Instant::now());
    kill(qemu.expect("a pid") as i32, libc::SIGKILL);
    sender.wait_for_event("caught");
    network.wait_for(struck + 2 * IN_FLIGHT as u64);
    println!("{} ms from the kill until the conversation went on", begun.elapsed().as_millis());
    network.wait_for(struck + 300);
    assert_eq!(sender.end(), 10, "{}", sender.story());
    assert_eq!(destination.end(), 13, "{}", destination.story());
    source.wait();
    // Nobody has the relay in hand any more, and it goes on.
    network.wait_for(struck + 600);
    network.end();
    drop(relays);
    drop(sender);
}

#[test]
fn after_a_release_the_conversation_goes_on_and_the_relay_that_the_guest_left_is_anybodys_again() {
    let Some(home) = Home::start(None) else { return };
    let mut scene = home.leave(&[]);
    assert_eq!(scene.sender.end(), 0, "{}", scene.sender.story());
    assert_eq!(scene.destination.end(), 0, "{}", scene.destination.story());
    scene.source.wait();
    let answered = scene.network.answered();
    scene.network.wait_for(answered + 300);
    // Another guest's card, at the relay that was left: what it sends reaches everybody.
    let frame = [&[0xff; 6][..], &[0x52, 0x54, 0, 1, 2, 3, 0x88, 0xb5], &[0x5a; 46]].concat();
    let framed = [&(frame.len() as u32).to_be_bytes()[..], &frame].concat();
    let mut port = UnixStream::connect(&scene.network.socket).expect("a port of the network");
    port.set_read_timeout(Some(Duration::from_millis(50))).expect("a port");
    let end = Instant::now() + BOUND;
    let (mut bytes, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
    // Seldom enough that all of them have room where they wait until the relay has heard that the killed QEMU is gone: whoever waited for room
    // here would not read the port.
    let mut card = UnixStream::connect(scene.folder.path().join("here.net")).expect("the relay that was left");
    let mut next = Instant::now();
    loop {
        if Instant::now() >= next {
            card.write_all(&framed).expect("room for a frame");
            next += Duration::from_millis(250);
        }
        let read = port.read(&mut buffer).unwrap_or(0);
        bytes.extend(&buffer[..read]);
        if frames(&mut bytes).contains(&frame) {
            break;
        }
        assert!(Instant::now() < end, "nothing comes through the relay that was left");
    }
    // The network passes nothing on while one of its ports is full, which this would soon be: nobody reads it any more.
    drop(port);
    scene.network.end();
    for left in scene.destination.events("qemu-left") {
        kill(left["pid"].as_i64().expect("a pid") as i32, libc::SIGKILL);
    }
    drop(scene.relays);
    scene.place.expect_nothing_left();
}
