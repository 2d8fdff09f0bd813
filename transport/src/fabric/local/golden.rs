//! A local lane's message as it is on the socket.

use super::*;
use crate::fabric::LaneKind;
use crate::golden::compare;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");

#[test]
fn a_local_lanes_message_is_as_it_was_when_the_version_came_out() {
    let files: Vec<_> = [12_288, 8192, 4096]
        .map(|len| {
            let fd = memfd_create("golden", MemfdFlags::CLOEXEC).unwrap();
            ftruncate(&fd, len).unwrap();
            (Arc::new(Mapping::read_write(&fd, len as usize).unwrap()), fd)
        })
        .into();
    let [(ram, ram_file), (ring, ring_file), (region, region_file)] = &files[..] else { unreachable!() };
    let mut exports = Exports::default();
    exports.add_read(ram, &[Extent { offset: 0, len: 4096 }]).unwrap();
    exports.add_ring(ring, region).unwrap();
    let exports = exports.with_keys(0x1817_1615_1413_1200);
    let id = LaneId { kind: LaneKind::Fault, index: 0 };
    for (_, bytes) in compare(FOLDER, 1, "local", &[("exports", exports_message(&exports, 0))]) {
        let descriptors = [ram_file, ring_file, region_file].map(|file| file.try_clone().unwrap()).into();
        let (remotes, watch) = map_exports(id, &bytes, descriptors).unwrap();
        let lens: Vec<_> = remotes.iter().map(|remote| (remote.mapping.len(), remote.right)).collect();
        assert_eq!(lens, [(12_288, Right::Read), (8192, Right::Write), (4096, Right::Read)]);
        assert_eq!(watch.expect("a region").was, 0);
    }
}
