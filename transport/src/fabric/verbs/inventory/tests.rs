//! Hosts that lack something, made of files, judged on one that may have no RDMA at all.

use super::super::VerbsSettings;
use super::*;
use std::collections::HashMap;
use std::fs;
use tempfile::TempDir;

/// A host made of files, and what its devices would answer.
struct Host {
    dir: TempDir,
    denied: Vec<&'static str>,
    memory: LockedMemory,
    libraries: Result<(), LoadError>,
    answers: HashMap<String, Result<Answer, (&'static str, i32)>>,
}

fn limits() -> Limits {
    Limits {
        firmware: "20.31.1014".into(),
        max_mr: 1 << 20,
        max_mr_size: u64::MAX,
        max_qp_rd_atom: 16,
        max_qp_init_rd_atom: 16,
        max_qp_wr: 32768,
        max_cqe: 4_194_303,
        max_sge: 30,
        on_demand: OnDemand::Some { read: true, write: true },
    }
}

const NO_LIMIT: LockedMemory = LockedMemory { limit: None, pinned: 0, privileged: false };

impl Host {
    /// With the kernel's RDMA core, its connection manager and the libraries, and no device.
    fn bare() -> Self {
        let host = Self {
            dir: tempfile::tempdir().expect("tempdir"),
            denied: vec![],
            memory: NO_LIMIT,
            libraries: Ok(()),
            answers: HashMap::new(),
        };
        fs::create_dir_all(host.path("sys/class/infiniband")).expect("dir");
        host.file("dev/rdma_cm", "");
        host
    }

    /// And one device of two ports, the second one down: RoCE with GIDs of both versions, over IPv4 and IPv6.
    fn roce() -> Self {
        let mut host = Self::bare();
        host.device("mlx5_0", "1: CA", 0);
        host.file("sys/class/infiniband/mlx5_0/device/numa_node", "1\n");
        host.port("mlx5_0", 1, "4: ACTIVE", "Ethernet");
        host.port("mlx5_0", 2, "1: DOWN", "Ethernet");
        let link_local = "fe80:0000:0000:0000:5054:00ff:fe12:3456";
        let v4 = "0000:0000:0000:0000:0000:ffff:0a00:0007";
        for (index, gid, kind) in [
            (0, link_local, "IB/RoCE v1"),
            (1, link_local, "RoCE v2"),
            (2, v4, "IB/RoCE v1"),
            (3, v4, "RoCE v2"),
            (11, "fd00:0000:0000:0000:0000:0000:0000:0007", "RoCE v2"),
        ] {
            host.gid("mlx5_0", 1, index, gid, kind, "eth2");
        }
        host.gid("mlx5_0", 2, 0, link_local, "RoCE v2", "eth3");
        // An empty entry: zeroes, and no type to be read.
        host.file("sys/class/infiniband/mlx5_0/ports/1/gids/4", "0000:0000:0000:0000:0000:0000:0000:0000\n");
        host
    }

    fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    fn file(&self, path: &str, content: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().expect("has one")).expect("dir");
        fs::write(path, content).expect("file");
    }

    fn remove(&self, path: &str) {
        let path = self.path(path);
        if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.expect("removed");
    }

    fn device(&mut self, name: &str, node_type: &str, uverbs: u32) {
        self.file(&format!("sys/class/infiniband/{name}/node_type"), &format!("{node_type}\n"));
        self.file(&format!("sys/class/infiniband_verbs/uverbs{uverbs}/ibdev"), &format!("{name}\n"));
        self.file(&format!("dev/uverbs{uverbs}"), "");
        self.answers.insert(name.into(), Ok(Answer { limits: limits(), mtus: vec![(1, 4096)] }));
    }

    fn port(&self, device: &str, number: u8, state: &str, link_layer: &str) {
        let port = format!("sys/class/infiniband/{device}/ports/{number}");
        self.file(&format!("{port}/state"), &format!("{state}\n"));
        self.file(&format!("{port}/link_layer"), &format!("{link_layer}\n"));
        self.file(&format!("{port}/lid"), "0x1f\n");
        self.file(&format!("{port}/rate"), "100 Gb/sec (4X EDR)\n");
    }

    fn gid(&self, device: &str, port: u8, index: u32, gid: &str, kind: &str, netdev: &str) {
        let port = format!("sys/class/infiniband/{device}/ports/{port}");
        self.file(&format!("{port}/gids/{index}"), &format!("{gid}\n"));
        self.file(&format!("{port}/gid_attrs/types/{index}"), &format!("{kind}\n"));
        self.file(&format!("{port}/gid_attrs/ndevs/{index}"), &format!("{netdev}\n"));
    }

    fn inventory(&self) -> Inventory {
        let roots = Roots { sys: self.path("sys"), dev: self.path("dev") };
        let denied = |path: &Path| match path {
            _ if !path.exists() => Access::Absent,
            _ if self.denied.iter().any(|name| path.ends_with(name)) => Access::Denied,
            _ => Access::Usable,
        };
        let libraries = Libraries {
            ibverbs: "/usr/lib/libibverbs.so.1.14.44.0".into(),
            rdmacm: "/usr/lib/librdmacm.so.1.3.44.0".into(),
        };
        let ask = || {
            self.libraries.clone()?;
            let answers = self.answers.iter().map(|(name, answer)| (name.clone(), answer.clone())).collect();
            Ok((libraries.clone(), answers))
        };
        Inventory::at(&roots, &denied, self.memory, &ask)
    }

    fn choose(&self, settings: &VerbsSettings) -> Result<(String, u8, u32), Trouble> {
        let inventory = self.inventory();
        let choice = inventory.choose(settings, 1 << 30)?;
        Ok((choice.device.name.clone(), choice.port.number, choice.gid.index))
    }

    /// What stands in the way of a session for which nothing was said.
    fn trouble(&self) -> Trouble {
        self.choose(&VerbsSettings::default()).expect_err("something is wrong")
    }
}

fn asking(device: Option<&str>, port: Option<u8>, gid_index: Option<u8>) -> VerbsSettings {
    VerbsSettings { device: device.map(str::to_owned), port, gid_index, ..VerbsSettings::default() }
}

#[test]
fn a_device_is_told_with_its_node_ports_gids_and_limits() {
    let inventory = Host::roce().inventory();
    assert_eq!(inventory.troubles(), []);
    assert_eq!(inventory.libraries.as_ref().expect("there").versions(), "libibverbs 1.14.44.0, librdmacm 1.3.44.0");
    let [device] = &inventory.devices[..] else { panic!("{inventory:?}") };
    assert_eq!((&*device.name, device.transport(), device.numa_node), ("mlx5_0", Transport::Roce, Some(1)));
    assert_eq!(device.asked, Asked::Answered(limits()));
    assert!(device.uverbs.as_ref().is_some_and(|file| file.path.ends_with("uverbs0")), "{device:?}");
    let [first, second] = &device.ports[..] else { panic!("{device:?}") };
    assert_eq!((first.number, first.state, first.lid), (1, PortState::Active, 0x1f));
    assert_eq!((first.active_mtu_bytes, second.active_mtu_bytes), (Some(4096), None));
    let gids: Vec<String> = first.gids.iter().map(Gid::to_string).collect();
    let expected = [
        "0: fe80::5054:ff:fe12:3456 RoCE v1 on eth2",
        "1: fe80::5054:ff:fe12:3456 RoCE v2 on eth2",
        "2: 10.0.0.7 RoCE v1 on eth2",
        "3: 10.0.0.7 RoCE v2 on eth2",
        "11: fd00::7 RoCE v2 on eth2",
    ];
    assert_eq!(gids, expected, "the empty entry is none, and 11 comes after 3");
}

#[test]
fn what_was_not_said_is_chosen_and_what_was_said_is_taken() {
    let mut host = Host::roce();
    host.device("mlx4_0", "1: CA", 1);
    host.port("mlx4_0", 1, "1: DOWN", "InfiniBand");
    let chosen = |settings| host.choose(&settings).expect("possible");
    // The first device by name is down; of the other one's GIDs RoCE v2 over IPv4.
    assert_eq!(chosen(asking(None, None, None)), ("mlx5_0".into(), 1, 3));
    assert_eq!(chosen(asking(Some("mlx5_0"), Some(1), Some(11))), ("mlx5_0".into(), 1, 11));
    host.gid("mlx5_0", 1, 2, "fe80:0000:0000:0000:0000:0000:0000:0002", "IB/RoCE v1", "eth2");
    host.gid("mlx5_0", 1, 3, "fe80:0000:0000:0000:0000:0000:0000:0003", "RoCE v2", "eth2");
    assert_eq!(
        host.choose(&asking(None, None, None)).expect("possible").2,
        11,
        "a routed address before link-local ones"
    );
}

#[test]
fn a_host_without_the_libraries_is_told_the_package_and_its_devices_are_still_seen() {
    let mut host = Host::roce();
    let missing = LoadError::NoLibrary {
        library: "libibverbs.so.1".into(),
        package: "libibverbs1",
        reason: "cannot open shared object file".into(),
    };
    host.libraries = Err(missing.clone());
    assert_eq!(host.trouble(), Trouble::Library(missing));
    assert!(host.trouble().to_string().contains("install rdma-core's libraries"));
    assert!(host.trouble().mend()[0].contains("apt install libibverbs1"));
    let inventory = host.inventory();
    assert_eq!(inventory.devices[0].asked, Asked::NotAsked);
    assert_eq!(inventory.devices[0].ports[0].gids.len(), 5);

    let old = LoadError::NoSymbols {
        library: "libibverbs.so.1".into(),
        package: "libibverbs1",
        symbols: vec!["ibv_reg_mr_iova2"],
    };
    host.libraries = Err(old);
    let told = host.trouble().to_string();
    assert!(told.contains("ibv_reg_mr_iova2") && told.contains("newer rdma-core"), "{told}");
}

#[test]
fn no_kernel_module_no_device_and_no_provider_are_three_things() {
    let mut host = Host::bare();
    assert_eq!(host.trouble(), Trouble::NoDevice);
    assert!(host.trouble().mend().iter().any(|mend| mend.contains("rdma link add")));
    host.remove("sys/class/infiniband");
    assert_eq!(host.trouble(), Trouble::NoKernelModule);
    assert!(host.trouble().mend()[0].contains("modprobe -a ib_uverbs rdma_ucm"));

    host = Host::roce();
    host.answers.clear();
    assert_eq!(host.trouble(), Trouble::NoDriver { device: "mlx5_0".into() });
    assert!(host.trouble().mend()[0].contains("ibverbs-providers"));
}

#[test]
fn device_files_that_are_absent_or_not_permitted_are_named() {
    let mut host = Host::roce();
    host.denied = vec!["uverbs0"];
    assert_eq!(host.trouble(), Trouble::UverbsDenied { device: "mlx5_0".into(), path: host.path("dev/uverbs0") });
    assert!(host.trouble().mend().iter().any(|mend| mend.contains("setfacl") && mend.contains("uverbs0")));
    host.remove("dev/uverbs0");
    assert_eq!(host.trouble(), Trouble::NoUverbs { device: "mlx5_0".into() });
    host.remove("sys/class/infiniband_verbs");
    assert_eq!(host.trouble(), Trouble::NoUverbs { device: "mlx5_0".into() });

    let mut host = Host::roce();
    host.denied = vec!["rdma_cm"];
    assert_eq!(host.trouble(), Trouble::ConnectionManagerDenied { path: host.path("dev/rdma_cm") });
    host.remove("dev/rdma_cm");
    assert_eq!(host.trouble(), Trouble::NoConnectionManager { path: host.path("dev/rdma_cm") });
    assert_eq!(host.trouble().mend(), ["sudo modprobe rdma_ucm"]);
}

#[test]
fn a_device_that_does_not_answer_is_told_with_the_errno() {
    let mut host = Host::roce();
    host.answers.insert("mlx5_0".into(), Err(("opening it", libc::EBUSY)));
    let trouble = host.trouble();
    assert_eq!(trouble, Trouble::NoAnswer { device: "mlx5_0".into(), doing: "opening it", errno: libc::EBUSY });
    assert!(trouble.to_string().contains("mlx5_0: opening it failed: Device or resource busy"), "{trouble}");
}

#[test]
fn too_little_memory_to_be_locked_is_told_with_both_numbers() {
    let mut host = Host::roce();
    let limit = |limit| LockedMemory { limit: Some(limit), ..NO_LIMIT };
    host.memory = limit(8 << 20);
    assert!(matches!(host.trouble(), Trouble::Memlock(low) if (low.have, low.need) == (8 << 20, 1 << 30)));
    let told = host.trouble().to_string();
    assert!(told.contains("8.0 MiB") && told.contains("1.00 GiB") && told.contains("RLIMIT_MEMLOCK"), "{told}");
    assert!(host.trouble().mend().iter().any(|mend| mend == "ulimit -l unlimited"));
    host.memory = limit(1 << 30);
    assert!(host.choose(&VerbsSettings::default()).is_ok(), "exactly enough");
    host.memory = LockedMemory { privileged: true, ..limit(0) };
    assert!(host.choose(&VerbsSettings::default()).is_ok(), "with the capability the limit is not looked at");
}

#[test]
fn ports_that_are_down_or_wait_for_a_subnet_manager_or_have_no_gid_differ() {
    let host = Host::roce();
    let second = asking(Some("mlx5_0"), Some(2), None);
    let trouble = host.choose(&second).expect_err("it is down");
    let expected =
        Trouble::PortDown { device: "mlx5_0".into(), port: 2, state: PortState::Down, netdev: Some("eth3".into()) };
    assert_eq!(trouble, expected);
    assert_eq!(trouble.to_string(), "port 2 of mlx5_0 is DOWN: bring its link up");
    assert_eq!(trouble.mend(), ["sudo ip link set eth3 up"]);

    host.remove("sys/class/infiniband/mlx5_0/ports/1/gids");
    let first = asking(Some("mlx5_0"), Some(1), None);
    assert_eq!(host.choose(&first), Err(Trouble::NoGid { device: "mlx5_0".into(), port: 1 }));

    let mut host = Host::bare();
    host.device("mlx5_0", "1: CA", 0);
    host.port("mlx5_0", 1, "2: INIT", "InfiniBand");
    host.gid("mlx5_0", 1, 0, "fe80:0000:0000:0000:b859:9f03:00fc:1234", "IB/RoCE v1", "");
    assert_eq!(host.trouble(), Trouble::NoSubnetManager { device: "mlx5_0".into(), port: 1 });
    assert!(host.trouble().mend()[0].contains("opensm"));
    host.port("mlx5_0", 1, "4: ACTIVE", "InfiniBand");
    let inventory = host.inventory();
    let choice = inventory.choose(&VerbsSettings::default(), 0).expect("it is up");
    assert_eq!((choice.device.transport(), choice.gid.kind), (Transport::InfiniBand, GidKind::InfiniBand));
    assert_eq!(choice.gid.netdev, None);
}

#[test]
fn what_was_asked_for_and_is_not_there_is_told_with_what_is() {
    let host = Host::roce();
    let trouble = |settings| host.choose(&settings).expect_err("not there");
    let no_device = trouble(asking(Some("mlx5_9"), None, None));
    assert_eq!(no_device, Trouble::NoSuchDevice { asked: "mlx5_9".into(), have: vec!["mlx5_0".into()] });
    assert!(no_device.to_string().ends_with("(there are: mlx5_0)"), "{no_device}");
    assert_eq!(
        trouble(asking(None, Some(3), None)),
        Trouble::NoSuchPort { device: "mlx5_0".into(), asked: 3, ports: 2 }
    );
    let no_gid = trouble(asking(None, None, Some(4)));
    assert!(matches!(&no_gid, Trouble::NoSuchGid { asked: 4, have, .. } if have.len() == 5), "{no_gid:?}");
    assert!(no_gid.to_string().contains("3: 10.0.0.7 RoCE v2 on eth2"), "{no_gid}");
}

#[test]
fn another_roce_version_than_asked_for_is_an_error_that_names_the_right_entries() {
    let inventory = Host::roce().inventory();
    let device = &inventory.devices[0];
    let port = &device.ports[0];
    assert_eq!(device.check_kind(port, &port.gids[3], GidKind::RoceV2), Ok(()));
    let trouble = device.check_kind(port, &port.gids[2], GidKind::RoceV2).expect_err("v1");
    assert!(
        trouble.to_string().starts_with("GID 2 of port 1 of mlx5_0 is RoCE v1, and RoCE v2 was asked for"),
        "{trouble}"
    );
    assert!(trouble.to_string().contains("3: 10.0.0.7 RoCE v2"), "{trouble}");
}

#[test]
fn iwarp_is_known_by_its_node_type_and_a_software_device_by_its_interface() {
    let mut host = Host::bare();
    host.device("siw0", "4: RNIC", 0);
    host.port("siw0", 1, "4: ACTIVE", "Ethernet");
    host.gid("siw0", 1, 0, "5254:0012:3456:0000:0000:0000:0000:0000", "IB/RoCE v1", "eth0");
    host.file("sys/class/net/eth0/device/numa_node", "0\n");
    let inventory = host.inventory();
    let choice = inventory.choose(&VerbsSettings::default(), 0).expect("it is up");
    assert_eq!((choice.port.transport, choice.gid.kind), (Transport::Iwarp, GidKind::Iwarp));
    assert_eq!(choice.device.numa_node, Some(0));
    host.file("sys/class/net/eth0/device/numa_node", "-1\n");
    assert_eq!(host.inventory().devices[0].numa_node, None, "the kernel's way to say that there is but one");

    host.device("usnic0", "5: usNIC", 1);
    host.port("usnic0", 1, "4: ACTIVE", "Ethernet");
    let trouble = host.choose(&asking(Some("usnic0"), None, None));
    assert_eq!(trouble, Err(Trouble::OtherTransport { device: "usnic0".into() }));
}

#[test]
fn a_devices_answer_is_read_field_by_field() {
    let mut attr: belay_verbs_sys::ibv_device_attr_ex = belay_verbs_sys::zeroed();
    for (to, from) in attr.orig_attr.fw_ver.iter_mut().zip(*b"16.35\0not this") {
        *to = from.cast_signed() as _;
    }
    (attr.orig_attr.max_mr, attr.orig_attr.max_mr_size) = (-1, 1 << 40);
    (attr.orig_attr.max_qp_rd_atom, attr.orig_attr.max_qp_init_rd_atom) = (16, 8);
    (attr.orig_attr.max_qp_wr, attr.orig_attr.max_cqe, attr.orig_attr.max_sge) = (1000, 2000, 3);
    let read = ask::limits(&attr);
    let expected = Limits {
        firmware: "16.35".into(),
        max_mr: u32::MAX,
        max_mr_size: 1 << 40,
        max_qp_rd_atom: 16,
        max_qp_init_rd_atom: 8,
        max_qp_wr: 1000,
        max_cqe: 2000,
        max_sge: 3,
        on_demand: ask::on_demand(0, 0),
    };
    assert_eq!(read, expected);
    if belay_verbs_sys::extended_available() {
        assert_eq!(ask::on_demand(0, 0b1100), OnDemand::None, "transports mean nothing without the general bit");
        assert_eq!(ask::on_demand(1, 0b1000), OnDemand::Some { read: true, write: false });
        assert_eq!(ask::on_demand(3, 0b0100), OnDemand::Some { read: false, write: true });
    } else {
        assert_eq!(ask::on_demand(1, 0b1100), OnDemand::Unknown);
    }
}

#[test]
fn this_host_can_be_looked_at_and_every_trouble_says_what_to_do() {
    let inventory = Inventory::of_this_host();
    eprintln!("{inventory:#?}");
    assert_eq!(inventory.kernel, Path::new("/sys/class/infiniband").is_dir());
    for trouble in inventory.troubles() {
        eprintln!("{trouble}\n{:?}", trouble.mend());
        assert!(!trouble.mend().is_empty(), "{trouble}");
    }
    if inventory.devices.is_empty() {
        assert!(inventory.choose(&VerbsSettings::default(), 0).is_err());
    }
}
