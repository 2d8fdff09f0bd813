//! What of a guest belay can move and tether, and what to change where it cannot. Decides by [`Inspection`] alone.

use super::inspect::{Disk, Inspection, Net, OtherMemory, Ram};
use std::path::PathBuf;

/// What a migration of QEMU's own must be able to do for the switch: leave out RAM that is a shared file.
const IGNORE_SHARED: &str = "x-ignore-shared";
/// Device state without RAM, between two pages of a running guest.
const SAVE_DEVICES: &str = "xen-save-devices-state";
/// Run states from which a guest can leave (qapi/run-state.json).
const MOVABLE: [&str; 4] = ["running", "paused", "prelaunch", "suspended"];
/// Of /dev: who has these open has memory of the guest that belay cannot follow.
const BEHIND_QEMU: [(&str, &str, &str); 5] = [
    (
        "/dev/vfio",
        "a device that is passed through (VFIO) writes guest memory by itself",
        "take the device out: device_del",
    ),
    ("/dev/vhost-net", "vhost-net, in the host's kernel, writes guest memory", "start the netdev with vhost=off"),
    ("/dev/vhost-vsock", "vhost-vsock, in the host's kernel, writes guest memory", "take the device out"),
    ("/dev/vhost-scsi", "vhost-scsi, in the host's kernel, writes guest memory", "use virtio-scsi"),
    ("/dev/vhost-vdpa", "a vDPA device writes guest memory by itself", "take the device out"),
];

/// What cannot be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Against {
    /// The guest cannot be moved at all.
    Moving,
    /// It can be moved; it could not be caught if its destination were lost.
    Tethering,
}

/// One reason why not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Objection {
    pub against: Against,
    /// What of the guest it is about: a block, a device, a disk.
    pub what: String,
    pub why: String,
    /// What to change; empty where nothing but leaving it out helps.
    pub change: String,
}

/// What keeps a guest's packets until the checkpoint that covers them has committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeldBy {
    /// Nothing does.
    Nobody,
    /// A [relay](super::relay), to which its one socket netdev is connected.
    Relay,
    /// [Gates](super::tap) before so many of its taps.
    Gates(usize),
}

/// Everything that stands against moving or tethering this guest, worst first. `tracker`: why this host cannot learn which pages
/// another process's threads write (asynchronous write protection, Linux 6.7), if it cannot.
/// `held`: what holds the packets of the guest's netdevs: a relay those of one.
/// `served`: sockets of the [disk relays](super::disk) that keep the guest's writable disks.
pub fn objections(guest: &Inspection, tracker: Result<(), &str>, held: HeldBy, served: &[PathBuf]) -> Vec<Objection> {
    let mut found = Vec::new();
    versions(guest, &mut found);
    ram(&guest.ram, &mut found);
    guest_itself(guest, &mut found);
    devices(guest, &mut found);
    for disk in &guest.disks {
        found.extend(objection_to_disk(disk, served));
    }
    let (kind, mut held) = match held {
        HeldBy::Nobody => ("", 0),
        HeldBy::Relay => ("stream", 1),
        HeldBy::Gates(taps) => ("tap", taps),
    };
    for net in &guest.nets {
        match held > 0 && net.kind == kind {
            true => held -= 1,
            false => found.push(objection_to_net(net)),
        }
    }
    for memory in &guest.other {
        found.extend(objection_to_memory(memory));
    }
    if let Err(why) = tracker {
        let why = format!("this host cannot learn which pages QEMU's threads write: {why}");
        found.push(against(Against::Tethering, "this host", why, "run a kernel of 6.7 or later"));
    }
    found.sort_by_key(|objection| objection.against);
    found
}

fn against(against: Against, what: &str, why: impl Into<String>, change: impl Into<String>) -> Objection {
    Objection { against, what: what.to_owned(), why: why.into(), change: change.into() }
}

fn versions(guest: &Inspection, found: &mut Vec<Objection>) {
    let qemu = format!("QEMU {}", guest.version);
    if !guest.capabilities.contains(IGNORE_SHARED) {
        let why = format!("its migration cannot leave out RAM that is a shared file ({IGNORE_SHARED})");
        found.push(against(Against::Moving, &qemu, why, "use a QEMU of 4.0 or later"));
    }
    if !guest.commands.contains(SAVE_DEVICES) {
        let why = format!("it cannot save device state by itself ({SAVE_DEVICES})");
        found.push(against(Against::Tethering, &qemu, why, "use a QEMU that was built with this command"));
    }
}

/// The two options that make a block movable.
fn options(ram: &Ram, main: bool) -> String {
    let Ram { id, bytes, .. } = ram;
    let object = format!("-object memory-backend-file,id={id},size={bytes},mem-path=/dev/shm/{id},share=on");
    if main { format!("{object} -machine memory-backend={id}") } else { object }
}

fn ram(blocks: &[Ram], found: &mut Vec<Objection>) {
    if blocks.is_empty() {
        found.push(against(Against::Moving, "guest RAM", "QEMU names no memory backend", ""));
    }
    for (index, ram) in blocks.iter().enumerate() {
        let what = format!("RAM {}", ram.id);
        let why = match (&ram.path, ram.share, &ram.mapping) {
            (None, ..) => format!("it is a {}, which no other process can map", ram.kind),
            (Some(path), false, _) => format!("{path} is mapped privately (share=off)"),
            (Some(path), true, None) => {
                found.push(against(
                    Against::Moving,
                    &what,
                    format!("{path} is not mapped by that process in one piece"),
                    "give the number of the QEMU process itself with --pid",
                ));
                continue;
            }
            (Some(path), true, Some(_)) if ram.kind != "memory-backend-file" => {
                format!("{path} is of a {}, which QEMU's migration does not leave out", ram.kind)
            }
            (Some(_), true, Some(_)) => continue,
        };
        // The first is the machine's own; others are of NUMA nodes and DIMMs, which name theirs.
        found.push(against(Against::Moving, &what, why, options(ram, index == 0)));
    }
}

fn guest_itself(guest: &Inspection, found: &mut Vec<Objection>) {
    if !MOVABLE.contains(&guest.status.as_str()) {
        let why = format!("it is in the state {}", guest.status);
        found.push(against(Against::Moving, "the guest", why, "only a guest that runs or is paused can leave"));
    }
    if let Some(kind) = &guest.confidential {
        found.push(against(Against::Moving, kind, "the guest's memory is secret from this host", ""));
    }
}

fn devices(guest: &Inspection, found: &mut Vec<Objection>) {
    for (path, why, change) in BEHIND_QEMU {
        if guest.host_devices.iter().any(|open| open.to_string_lossy().starts_with(path)) {
            found.push(against(Against::Moving, path, why, change));
        }
    }
    for (kind, path) in &guest.devices {
        if kind.starts_with("vhost-user") {
            let why = format!("{path}: another process maps guest memory and writes it");
            found.push(against(Against::Moving, kind, why, "use the device's virtio namesake"));
        }
    }
}

fn objection_to_disk(disk: &Disk, served: &[PathBuf]) -> Option<Objection> {
    let what = format!("disk {}", disk.name);
    if disk.driver == "nvme" {
        let why = "nvme:// drives the controller from guest memory, by VFIO";
        return Some(against(Against::Moving, &what, why, "use the kernel's driver and its block device"));
    }
    let same = |server: &PathBuf, one: &PathBuf| {
        server == one || matches!((server.canonicalize(), one.canonicalize()), (Ok(server), Ok(one)) if server == one)
    };
    let kept = disk.server.as_ref().is_some_and(|server| served.iter().any(|one| same(server, one)));
    (!disk.read_only && !kept).then(|| {
        let why =
            "at a catch guest memory goes back to its last checkpoint, and what was written to this disk would not";
        against(
            Against::Tethering,
            &what,
            why,
            "connect it to a `belay disk` (-blockdev nbd) and name that with --disk, or make it read-only",
        )
    })
}

fn objection_to_net(net: &Net) -> Objection {
    let what = format!("netdev {}", net.name);
    if net.kind == "vhost-user" || net.kind == "vhost-vdpa" {
        let why = format!("{}: somebody else maps guest memory and writes it", net.kind);
        return against(Against::Moving, &what, why, "use a tap or a socket netdev");
    }
    let why = format!("{}: its packets are not held until the checkpoint that covers them has committed", net.kind);
    against(
        Against::Tethering,
        &what,
        why,
        "connect it to a `belay relay` (-netdev stream, one of them), name its tap with --tap, or take it out (device_del, netdev_del)",
    )
}

/// Firmware and ROMs are the same on both hosts and travel once; anything else would be as old as the switch after a catch.
fn objection_to_memory(memory: &OtherMemory) -> Option<Objection> {
    let name = memory.name.as_str();
    let rom = name.ends_with(".rom") || name.starts_with("/rom@") || name.ends_with(".bios") || name == "isa-bios";
    (!rom).then(|| {
        let why = format!("{} KiB that the guest writes and that no checkpoint holds", memory.bytes >> 10);
        against(Against::Tethering, &format!("memory {name}"), why, "start the guest without this device")
    })
}

#[cfg(test)]
mod tests {
    use super::super::process::Mapping;
    use super::super::qmp::Version;
    use super::*;

    fn good() -> Inspection {
        let mapping = Mapping { start: 4096, end: 8192, offset: 0, file: (0, 1, 2), path: "/dev/shm/m".into() };
        let ram = Ram {
            id: "m".into(),
            kind: "memory-backend-file".into(),
            bytes: 4096,
            share: true,
            path: Some("/dev/shm/m".into()),
            mapping: Some(mapping),
        };
        Inspection {
            version: Version { major: 10, minor: 0, micro: 2 },
            pid: 1,
            status: "running".into(),
            machine: "pc-q35-10.0-machine".into(),
            vcpus: 1,
            kvm: true,
            commands: [SAVE_DEVICES.to_owned()].into(),
            capabilities: [IGNORE_SHARED.to_owned()].into(),
            ram: vec![ram],
            other: vec![
                OtherMemory { name: "pc.bios".into(), bytes: 1 << 18 },
                OtherMemory { name: "/rom@etc/acpi/tables".into(), bytes: 1 << 17 },
                OtherMemory { name: "0000:00:02.0/virtio-net-pci.rom".into(), bytes: 1 << 18 },
            ],
            devices: vec![("virtio-net-pci".into(), "/machine/peripheral/net0".into())],
            disks: vec![Disk { name: "d0".into(), driver: "raw".into(), read_only: true, server: None }],
            nets: vec![],
            confidential: None,
            host_devices: vec!["/dev/kvm".into(), "/dev/net/tun".into()],
        }
    }

    /// The one objection to a good guest with one thing changed.
    fn odd(change: impl FnOnce(&mut Inspection)) -> Objection {
        let mut guest = good();
        change(&mut guest);
        let mut found = objections(&guest, Ok(()), HeldBy::Nobody, &[]);
        assert_eq!(found.len(), 1, "{found:#?}");
        found.remove(0)
    }

    #[test]
    fn a_guest_that_is_prepared_meets_no_objection() {
        assert_eq!(objections(&good(), Ok(()), HeldBy::Nobody, &[]), []);
    }

    #[test]
    fn ram_that_is_no_shared_file_is_told_exactly_which_options_to_add() {
        let objection = odd(|guest| {
            let kind = "memory-backend-ram".into();
            guest.ram[0] = Ram { id: "pc.ram".into(), kind, bytes: 1 << 30, share: false, path: None, mapping: None };
        });
        assert_eq!(objection.against, Against::Moving);
        assert_eq!(
            objection.change,
            "-object memory-backend-file,id=pc.ram,size=1073741824,mem-path=/dev/shm/pc.ram,share=on -machine memory-backend=pc.ram"
        );
        let private = odd(|guest| guest.ram[0].share = false);
        assert!(private.why.contains("share=off") && private.change.contains("share=on"), "{private:?}");
        let memfd = odd(|guest| guest.ram[0].kind = "memory-backend-memfd".into());
        assert!(memfd.why.contains("does not leave out"), "{memfd:?}");
        let elsewhere = odd(|guest| guest.ram[0].mapping = None);
        assert!(elsewhere.change.contains("--pid"), "{elsewhere:?}");
    }

    #[test]
    fn whatever_writes_guest_memory_beside_qemu_stands_against_moving_by_its_name() {
        let opened = |path: &str| {
            let path = PathBuf::from(path);
            odd(move |guest| guest.host_devices.push(path))
        };
        for path in ["/dev/vfio/12", "/dev/vhost-net", "/dev/vhost-vsock", "/dev/vhost-scsi", "/dev/vhost-vdpa-0"] {
            assert_eq!(opened(path).against, Against::Moving, "{path}");
        }
        let user = odd(|guest| guest.devices.push(("vhost-user-blk-pci".into(), "/machine/peripheral/x".into())));
        assert_eq!((user.against, user.what.as_str()), (Against::Moving, "vhost-user-blk-pci"));
        let net = |kind: &str| Net { name: "n0".into(), kind: kind.into() };
        let user = odd(|guest| guest.nets.push(net("vhost-user")));
        assert_eq!((user.against, user.what.as_str()), (Against::Moving, "netdev n0"));
        assert_eq!(odd(|guest| guest.disks[0].driver = "nvme".into()).what, "disk d0");
        assert_eq!(odd(|guest| guest.confidential = Some("sev-guest".into())).what, "sev-guest");
        assert_eq!(odd(|guest| guest.status = "internal-error".into()).against, Against::Moving);
    }

    #[test]
    fn what_could_not_be_restored_stands_against_a_tether_by_its_name() {
        let screen =
            odd(|guest| guest.other.push(OtherMemory { name: "0000:00:01.0/vga.vram".into(), bytes: 1 << 24 }));
        assert_eq!((screen.against, screen.what.as_str()), (Against::Tethering, "memory 0000:00:01.0/vga.vram"));
        let flash = odd(|guest| guest.other.push(OtherMemory { name: "system.flash1".into(), bytes: 1 << 19 }));
        assert_eq!(flash.against, Against::Tethering);
        let disk = odd(|guest| guest.disks[0].read_only = false);
        assert_eq!((disk.against, disk.what.as_str()), (Against::Tethering, "disk d0"));
        let on_relay = |guest: &mut Inspection| {
            guest.disks[0] = Disk {
                read_only: false,
                driver: "nbd".into(),
                server: Some("/run/d".into()),
                ..guest.disks[0].clone()
            };
        };
        assert_eq!(odd(on_relay).what, "disk d0", "of a relay that was not named");
        let mut kept = good();
        on_relay(&mut kept);
        assert_eq!(objections(&kept, Ok(()), HeldBy::Nobody, &["/run/d".into()]), []);
        let tap = odd(|guest| guest.nets.push(Net { name: "n0".into(), kind: "tap".into() }));
        assert_eq!((tap.against, tap.what.as_str()), (Against::Tethering, "netdev n0"));
        let mut gated = good();
        gated.nets = ["n0", "n1"].map(|name| Net { name: name.into(), kind: "tap".into() }).into();
        let found = objections(&gated, Ok(()), HeldBy::Gates(1), &[]);
        assert!(found.len() == 1 && found[0].what == "netdev n1", "one gate holds one tap: {found:?}");
        assert_eq!(objections(&gated, Ok(()), HeldBy::Gates(2), &[]), []);
        assert_eq!(objections(&gated, Ok(()), HeldBy::Relay, &[]).len(), 2, "no relay holds a tap");
        assert_eq!(odd(|guest| guest.commands.clear()).against, Against::Tethering);
        let found = objections(&good(), Err("no WP_ASYNC"), HeldBy::Nobody, &[]);
        assert!(
            found.len() == 1 && found[0].against == Against::Tethering && found[0].why.contains("no WP_ASYNC"),
            "{found:?}"
        );
    }

    #[test]
    fn what_stands_against_moving_comes_first() {
        let mut guest = good();
        guest.disks[0].read_only = false;
        guest.capabilities.clear();
        let order: Vec<_> =
            objections(&guest, Ok(()), HeldBy::Nobody, &[]).into_iter().map(|objection| objection.against).collect();
        assert_eq!(order, [Against::Moving, Against::Tethering]);
    }
}
