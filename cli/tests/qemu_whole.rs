//! A guest as there are many: a virtio disk with several requests on their way, and a network card with somebody in conversation. What it has answered
//! it had flushed, or not; whatever dies, nobody who heard an answer is contradicted, and every sector is of the generation that memory says.

mod qemu_guest;
mod running;

use qemu_guest::network::{IN_FLIGHT, Network, relay};
use qemu_guest::{Console, Linux, Machine, Qemu, no_qemu, shared_memory, status};
use running::{Place, Process, kill};
use std::fs;
use std::path::Path;

const SECTORS: usize = 256;

fn disk_relay(place: &Place, folder: &Path, image: &Path, name: &str, more: &[&str]) -> (Process, String) {
    let path = |suffix: &str| folder.join(format!("{name}.{suffix}")).display().to_string();
    let (guest, hand, image) = (path("nbd"), path("disk"), image.display().to_string());
    let words = [&["disk", "--json", "--guest", &guest, "--hand", &hand, "--image", &image], more].concat();
    let mut relay = place.belay(&words);
    relay.wait_for_event("listening");
    (relay, hand)
}

#[test]
fn p3_p4_a_guest_with_a_virtio_disk_and_a_network_is_caught_whole_and_its_conversation_goes_on() {
    if no_qemu() {
        return;
    }
    let Some(linux) = Linux::here() else { return };
    let (place, folder) = (Place::new(), shared_memory());
    let Some(mut network) = Network::here(folder.path(), &linux) else { return };
    let image = place.path("image");
    fs::write(&image, vec![0; 1 << 20]).expect("an image");
    let machine = Machine {
        vcpus: 2,
        blocks: vec![192],
        address: Some("10.77.0.2"),
        sectors: SECTORS,
        virtio_disk: true,
        ..Machine::of("q35", Some(linux))
    };
    let (_net_here, net_here) = relay(&place, folder.path(), "here", &network);
    let (_net_there, net_there) = relay(&place, folder.path(), "there", &network);
    let (_disk_here, disk_here) = disk_relay(&place, folder.path(), &image, "here", &[]);
    let (_disk_there, disk_there) = disk_relay(&place, folder.path(), &image, "there", &["--incoming"]);
    let mut source = Qemu::start(&place, folder.path(), &machine, "here");
    source.wait_until_booted();
    source.console.wait_for_disk(1);
    network.wait_for(100);

    let (state_dir, arguments) = (place.text("there"), machine.arguments(folder.path(), "there"));
    let mut words = vec!["receive", "--json", "--listen", "127.0.0.1:0", "--state-dir", &state_dir];
    words.extend(["qemu", "--relay", &net_there, "--disk", &disk_there, "--", &machine.program]);
    words.extend(arguments.iter().map(String::as_str));
    let mut destination = place.belay(&words);
    let to = destination.wait_for_event("listening")["address"].as_str().expect("an address").to_owned();
    let (kept, run_dir, socket) = (place.text("here"), place.text("run"), source.socket.display().to_string());
    let mut words = vec!["send", "--json", "--to", &to, "--state-dir", &kept, "--run-dir", &run_dir];
    // Long enough that a destination which is struck has always written and said something that is not committed.
    words.extend(["--release", "never", "--period", "100ms"]);
    words.extend(["qemu", "--relay", &net_here, "--disk", &disk_here, "--qmp", &socket]);
    let mut sender = place.belay(&words);
    destination.wait_for_event("all-landed");
    Console(folder.path().join("there-console")).wait_for_disk(2);
    let answered = network.answered();
    network.wait_for(answered + 100);

    let qemu = destination.seen.iter().find(|event| event["event"] == "vmm-started").expect("told")["pid"].as_i64();
    let struck = network.answered();
    destination.signal(libc::SIGKILL);
    kill(qemu.expect("a pid") as i32, libc::SIGKILL);
    assert_eq!(sender.end(), 10, "{}", sender.story());
    source.wait();
    let at_home = Console(folder.path().join("here-console.standby"));
    network.wait_for(struck + 2 * IN_FLIGHT as u64);
    // All of it is looked at there, twice.
    at_home.wait_for_disk(at_home.disk_rounds() + 2);
    network.wait_for(struck + 300);
    let monitor = sender.events("qemu-left").next().expect("told")["monitor"].as_str().expect("a path").to_owned();
    assert_eq!(status(&mut qemu_guest::monitor(Path::new(&monitor))), "running");
    network.end();
    qemu_guest::moving::end_left(&sender);
}
