//! RDMA rows of hosts that lack something.

use super::super::tests::name;
use super::*;
use belay_transport::fabric::verbs::inventory::{Access, DeviceFile, Gid, GidKind, Libraries, PortState, Transport};

fn gid(index: u32, gid: &str, kind: GidKind) -> Gid {
    Gid { index, gid: gid.parse().expect("an address"), kind, netdev: Some("eth2".into()) }
}

/// A host with everything: one RoCE device of one port.
pub(in crate::check) fn good() -> Inventory {
    let limits = Limits {
        firmware: "20.31.1014".into(),
        max_mr: 1 << 24,
        max_mr_size: u64::MAX,
        max_qp_rd_atom: 16,
        max_qp_init_rd_atom: 16,
        max_qp_wr: 32768,
        max_cqe: 4_194_303,
        max_sge: 30,
        on_demand: OnDemand::Some { read: true, write: true },
    };
    let port = Port {
        number: 1,
        state: PortState::Active,
        transport: Transport::Roce,
        lid: 0,
        rate: Some("100 Gb/sec (4X EDR)".into()),
        active_mtu_bytes: Some(4096),
        gids: vec![gid(0, "fe80::1", GidKind::RoceV1), gid(3, "::ffff:10.0.0.7", GidKind::RoceV2)],
    };
    let file = |path: &str| DeviceFile { path: path.into(), access: Access::Usable };
    let device = Device {
        name: "mlx5_0".into(),
        numa_node: Some(1),
        uverbs: Some(file("/dev/infiniband/uverbs0")),
        ports: vec![port],
        asked: Asked::Answered(limits),
    };
    Inventory {
        libraries: Ok(Libraries {
            ibverbs: "/usr/lib/libibverbs.so.1.14.44.0".into(),
            rdmacm: "/usr/lib/librdmacm.so.1.3.44.0".into(),
        }),
        kernel: true,
        devices: vec![device],
        rdma_cm: file("/dev/infiniband/rdma_cm"),
        memory: LockedMemory { limit: None, pinned: 0, privileged: false },
    }
}

/// A host that is good but for one change, and its rows that are not ok.
fn lacking(change: impl FnOnce(&mut Inventory)) -> Vec<Finding> {
    let mut inventory = good();
    change(&mut inventory);
    let findings = judge(&inventory);
    assert!(
        findings.iter().all(|finding| finding.verdict != Verdict::Missing),
        "guests move without RDMA: {findings:?}"
    );
    findings.into_iter().filter(|finding| finding.verdict != Verdict::Ok).collect()
}

#[test]
fn a_good_hosts_rows_say_what_an_operator_chooses_by() {
    let rows: Vec<(&str, String)> =
        judge(&good()).into_iter().map(|finding| (name(&finding), finding.detail)).collect();
    let expected = [
        ("rdma libraries", "libibverbs 1.14.44.0, librdmacm 1.3.44.0"),
        ("rdma connections", "/dev/infiniband/rdma_cm may be used"),
        ("rdma device", "mlx5_0: RoCE, NUMA node 1, /dev/infiniband/uverbs0 may be used"),
        (
            "rdma limits",
            "mlx5_0: READs a queue pair 16 out, 16 in; 32768 requests a queue, 30 pieces each; 4194303 completions a queue; \
             16777216 regions of up to 16 EiB; paging on demand: READ and WRITE; firmware 20.31.1014",
        ),
        ("rdma port", "mlx5_0 port 1: ACTIVE, RoCE, 100 Gb/sec (4X EDR), path MTU 4096"),
        ("rdma gid", "mlx5_0 port 1 GID 0: fe80::1 RoCE v1 on eth2"),
        ("rdma gid", "mlx5_0 port 1 GID 3: 10.0.0.7 RoCE v2 on eth2 (taken unless --gid-index says another)"),
        ("memlock", "no limit"),
    ];
    let rows: Vec<(&str, &str)> = rows.iter().map(|(name, detail)| (*name, detail.as_str())).collect();
    assert_eq!(rows, expected);
}

#[test]
fn each_thing_that_is_wrong_has_the_row_it_belongs_to() {
    let row = |change: fn(&mut Inventory)| {
        let mut odd = lacking(change);
        assert_eq!(odd.len(), 1, "{odd:?}");
        let finding = odd.remove(0);
        assert!(!finding.mend.is_empty(), "{finding:?}");
        finding.name
    };
    assert_eq!(row(|host| host.kernel = false), DEVICE);
    assert_eq!(row(|host| host.devices.clear()), DEVICE);
    assert_eq!(row(|host| host.devices[0].uverbs = None), DEVICE);
    assert_eq!(row(|host| host.devices[0].asked = Asked::NoDriver), DEVICE);
    assert_eq!(row(|host| host.rdma_cm.access = Access::Absent), CONNECTIONS);
    assert_eq!(row(|host| host.rdma_cm.access = Access::Denied), CONNECTIONS);
    assert_eq!(row(|host| host.devices[0].ports[0].state = PortState::Down), PORT);
    assert_eq!(row(|host| host.devices[0].ports[0].gids.clear()), PORT);
    assert_eq!(row(|host| host.memory.limit = Some(GUEST_BYTES - 1)), MEMLOCK);
    assert!(lacking(|host| host.memory.limit = Some(GUEST_BYTES)).is_empty());
}

#[test]
fn without_libraries_the_devices_are_shown_all_the_same() {
    let nothing = std::path::Path::new("/nonexistent/libibverbs.so.1");
    let error = belay_transport::fabric::verbs::inventory::LoadError::NoLibrary {
        library: nothing.into(),
        package: "libibverbs1",
        reason: "cannot open shared object file: No such file or directory".into(),
    };
    let mut inventory = good();
    inventory.libraries = Err(error);
    inventory.devices[0].asked = Asked::NotAsked;
    let findings = judge(&inventory);
    assert_eq!((name(&findings[0]), findings[0].verdict), (LIBRARIES, Verdict::Degraded));
    assert!(findings[0].mend[0].contains("libibverbs1"), "{:?}", findings[0]);
    assert!(findings.iter().any(|finding| finding.name == PORT && finding.detail.contains("ACTIVE")));
}

#[test]
fn sizes_are_told_in_their_own_unit() {
    for (size, told) in
        [(0, "0 B"), (4096, "4 KiB"), (256 << 20, "256 MiB"), (3 << 29, "1.5 GiB"), (u64::MAX, "16 EiB")]
    {
        assert_eq!(bytes(size), told);
    }
}
