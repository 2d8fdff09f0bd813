//! RAM that is not like other RAM: of huge pages, and given back to the host and taken again while the guest is on its way. The guest checks its own
//! memory all along.

mod qemu_guest;
mod running;
#[path = "../../transport/src/testing.rs"]
mod testing;

use belay_transport::Deadline;
use qemu_guest::moving::{end_left, is_frozen, receive, send, started, wait_until_ended};
use qemu_guest::{Console, Linux, Machine, Qemu, expect_no_gap, monitor, no_qemu, shared_memory};
use running::{BOUND, Place, kill};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use serde_json::json;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// RAM of huge pages under the name by which a machine's block is looked for, for as long as the file is held.
fn huge_ram(folder: &Path, name: &str, mib: u64) -> Option<OwnedFd> {
    let made = memfd_create("qemu-huge", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB);
    let file = match made.and_then(|file| ftruncate(&file, mib << 20).map(|()| file)) {
        Ok(file) => file,
        Err(errno) => {
            eprintln!("skipped: no memory of huge pages: {errno}");
            return None;
        }
    };
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    std::os::unix::fs::symlink(path, folder.join(format!("{name}-m0"))).expect("a link");
    Some(file)
}

#[test]
fn a_guest_on_huge_pages_is_caught_and_of_a_page_that_it_wrote_only_what_changed_is_sent() {
    if no_qemu() {
        return;
    }
    let Some(linux) = Linux::here() else { return };
    const MIB: u64 = 128;
    let Some(_pages) = testing::HugePages::reserve(2 * MIB / 2) else { return };
    let (place, folder) = (Place::new(), shared_memory());
    let (Some(_here), Some(_there)) = (huge_ram(folder.path(), "here", MIB), huge_ram(folder.path(), "there", MIB))
    else {
        return;
    };
    let machine = Machine::of("q35", Some(linux));
    let mut source = Qemu::start(&place, folder.path(), &machine, "here");
    source.wait_until_booted();
    let (mut destination, to) = receive(&place, folder.path(), &machine, &[]);
    let mut sender = send(&place, &to, &source.socket, &["--release", "never", "--period", "25ms"]);
    destination.wait_for_event("all-landed");
    // The kernel reports nothing less than a huge page: 512 pages of 4 KiB.
    destination.wait_for("a checkpoint of less than a huge page", |event| {
        event["event"] == "committed" && event["pages"].as_u64().is_some_and(|pages| pages > 0 && pages < 512)
    });
    let there = Console(folder.path().join("there-console"));
    let ticked = there.ticks().len();
    there.wait_for(ticked + 40);
    let qemu = started(&mut destination);
    kill(qemu, libc::SIGKILL);
    assert_eq!(sender.end(), 10, "{}", sender.story());
    assert_eq!(destination.end(), 13, "{}", destination.story());
    wait_until_ended(qemu);
    source.wait();
    let returned = Console(folder.path().join("here-console.standby")).wait_for(100);
    let (left, lost) = (*source.console.ticks().last().unwrap(), *there.ticks().last().unwrap());
    for part in [&source.console.ticks(), &there.ticks(), &returned] {
        expect_no_gap(part);
    }
    let back = returned[0];
    assert!(back > left + 20 && back <= lost + 2, "left at {left}, lost at {lost}, back at {back}");
    end_left(&sender);
    place.expect_nothing_left();
}

#[test]
fn memory_that_a_guest_gave_back_in_mid_pull_is_zero_when_it_takes_it_again_and_after_a_catch() {
    if no_qemu() {
        return;
    }
    let Some(linux) = Linux::here().filter(|linux| linux.with_modules.is_some()) else {
        eprintln!("skipped: no module of a balloon: the kernel is not the lab's");
        return;
    };
    const MIB: u64 = 224;
    let (place, folder) = (Place::new(), shared_memory());
    let balloon = ["-device", "virtio-balloon-pci,id=balloon,free-page-reporting=on"].map(str::to_owned).to_vec();
    let machine = Machine { blocks: vec![MIB as usize], churn: 48, more: balloon, ..Machine::of("pc", Some(linux)) };
    let mut source = Qemu::start(&place, folder.path(), &machine, "here");
    source.wait_until_booted();
    source.console.wait_for_churn(1);
    // belay has the first monitor.
    let second = place.path("second");
    let mut with_second = machine.clone();
    with_second.more.extend(["-qmp".to_owned(), format!("unix:{},server=on,wait=off", second.display())]);
    let (mut destination, to) = receive(&place, folder.path(), &with_second, &["--hold-pull-at", "40"]);
    let mut sender = send(&place, &to, &source.socket, &["--release", "never", "--period", "50ms"]);
    destination.wait_for_state("tethered");
    let has = || (std::fs::metadata(folder.path().join("there-m0")).expect("its RAM").blocks() * 512) >> 20;
    assert_eq!(has(), MIB, "allocated before the guest came");
    let mut qmp = monitor(&second);
    let mut resize = |mib: u64| {
        let mut ask = |command: &str, arguments| {
            qmp.execute(command, arguments, Deadline::after(BOUND)).unwrap_or_else(|error| panic!("{command}: {error}"))
        };
        ask("balloon", json!({ "value": mib << 20 }));
        let end = Instant::now() + BOUND;
        while ask("query-balloon", json!({}))["actual"].as_u64() != Some(mib << 20) {
            assert!(Instant::now() < end, "the balloon does not come to {mib} MiB");
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    // What the guest takes all the time has room beside it.
    let there = Console(folder.path().join("there-console"));
    resize(MIB - 48);
    let end = Instant::now() + BOUND;
    while has() > MIB - 32 {
        assert!(Instant::now() < end, "{} MiB of {MIB} are still there", has());
        std::thread::sleep(Duration::from_millis(5));
    }
    resize(MIB);
    // Of the pages that were not here when they were given up, and of others.
    let churned = there.churned();
    there.wait_for_churn(churned + 2);
    destination.hear();
    let landed = destination.seen.iter().rev().find_map(|event| event["absent_frames"].as_u64());
    assert!(landed.is_none_or(|absent| absent > 0), "it was not in mid-pull: {}", destination.story());
    destination.wait_for_event("committed");
    let qemu = started(&mut destination);
    kill(qemu, libc::SIGKILL);
    assert_eq!(sender.end(), 10, "{}", sender.story());
    assert_eq!(destination.end(), 13, "{}", destination.story());
    wait_until_ended(qemu);
    source.wait();
    let back = Console(folder.path().join("here-console.standby"));
    back.wait_for_churn(2);
    for part in [source.console.ticks(), there.ticks(), back.ticks()] {
        expect_no_gap(&part);
    }
    end_left(&sender);
    place.expect_nothing_left();
}

#[test]
fn p2_whoever_has_a_second_monitor_cannot_have_a_guest_run_that_has_left() {
    if no_qemu() {
        return;
    }
    let Some(linux) = Linux::here() else { return };
    let (place, folder) = (Place::new(), shared_memory());
    let machine = Machine::of("q35", Some(linux));
    let mut with_second = machine.clone();
    let second = place.path("second");
    with_second.more.extend(["-qmp".to_owned(), format!("unix:{},server=on,wait=off", second.display())]);
    let mut source = Qemu::start(&place, folder.path(), &with_second, "here");
    source.wait_until_booted();
    let mut qmp = monitor(&second);
    let (mut destination, to) = receive(&place, folder.path(), &machine, &[]);
    let mut sender = send(&place, &to, &source.socket, &["--release", "never", "--period", "50ms"]);
    destination.wait_for_event("all-landed");
    let end = Instant::now() + BOUND;
    while !is_frozen(source.pid()) {
        assert!(Instant::now() < end, "it does not stand: {}", sender.story());
        std::thread::sleep(Duration::from_millis(2));
    }
    let left = source.console.ticks().len();
    let refused = qmp.execute("cont", json!({}), Deadline::after(Duration::from_secs(1)));
    assert!(refused.is_err(), "it obeyed: {refused:?}");
    for _ in 0..3 {
        destination.wait_for_event("committed");
    }
    assert_eq!(source.console.ticks().len(), left, "it ran on here");
    let qemu = started(&mut destination);
    kill(qemu, libc::SIGKILL);
    assert_eq!(sender.end(), 10, "{}", sender.story());
    assert_eq!(destination.end(), 13, "{}", destination.story());
    source.wait();
    assert_eq!(source.console.ticks().len(), left, "it ran on here when it was ended");
    expect_no_gap(&Console(folder.path().join("here-console.standby")).wait_for(60));
    end_left(&sender);
    place.expect_nothing_left();
}
