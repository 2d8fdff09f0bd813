//! The fabric as an operator meets it: which one carries a session, and why not another, said at both ends.

mod running;

use running::Place;

#[test]
fn p9_both_ends_say_over_which_fabric_they_have_met_and_why_not_over_verbs() {
    let place = Place::new();
    let (here, there) = (place.text("destination"), place.text("source"));
    let receive = ["receive", "--json", "--listen", "127.0.0.1:0", "--drive", "threads", "--state-dir", &here];
    let mut receive = place.belay(&receive);
    let to = receive.wait_for_event("listening")["address"].as_str().expect("text").to_owned();
    let guest = ["--memory", "8M", "--drive", "threads", "--policy", "none", "--run-before", "0ms"];
    let send = ["send", "--json", "--to", &to, "--state-dir", &there];
    // No --trusted-fabric anywhere, so it is tcp on every host, with or without RDMA.
    let mut send = place.belay(&[&send[..], &guest].concat());
    for process in [&mut send, &mut receive] {
        let connected = process.wait_for_event("connected");
        assert_eq!((&connected["fabric"], &connected["tls"]), (&"tcp".into(), &false.into()));
        let why = connected["without_verbs"].as_str().expect("the reason is told");
        let rdma =
            ["this host has no RDMA device", "this host has RDMA that cannot", "--trusted-fabric was not said on"];
        assert!(rdma.iter().any(|start| why.starts_with(start)), "{why}");
    }
    for process in [&mut send, &mut receive] {
        process.signal(libc::SIGTERM);
        process.end();
    }
    place.expect_nothing_left();
}

#[test]
fn a_fabric_that_was_asked_for_needs_no_reason() {
    let place = Place::new();
    let (here, there) = (place.text("destination"), place.text("source"));
    let listen = format!("unix:{}", place.text("receive.sock"));
    let receive = ["receive", "--json", "--listen", &listen, "--drive", "threads", "--state-dir", &here];
    let mut receive = place.belay(&receive);
    receive.wait_for_event("listening");
    let guest = ["--memory", "8M", "--drive", "threads", "--policy", "none", "--run-before", "0ms"];
    // A profile's device is no matter for a fabric that has none.
    let send = ["send", "--json", "--to", &listen, "--state-dir", &there, "--fabric", "local", "-d", "nosuch0"];
    let mut send = place.belay(&[&send[..], &guest].concat());
    for process in [&mut send, &mut receive] {
        let connected = process.wait_for_event("connected");
        assert_eq!((&connected["fabric"], connected.get("without_verbs")), (&"local".into(), None));
    }
    for process in [&mut send, &mut receive] {
        process.signal(libc::SIGTERM);
        process.end();
    }
    place.expect_nothing_left();
}
