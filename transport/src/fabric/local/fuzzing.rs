//! A local lane's first message under any bytes.

use super::*;
use crate::fabric::LaneKind;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

/// Nothing is mapped beyond the files that came, and nothing with another right than was said.
pub(crate) fn exports(bytes: &[u8]) {
    let Some((&files, message)) = bytes.split_first() else { return };
    let files = usize::from(files % 4);
    let descriptors: Vec<OwnedFd> = (0..files)
        .map(|at| {
            let fd = memfd_create("belay-fuzzing", MemfdFlags::CLOEXEC).expect("a memfd");
            ftruncate(&fd, 4096 << at).expect("memory");
            fd
        })
        .collect();
    let id = LaneId { kind: LaneKind::Fault, index: 0 };
    match map_exports(id, message, descriptors) {
        Ok((remotes, watch)) => {
            assert_eq!(remotes.len(), files);
            for (at, remote) in remotes.iter().enumerate() {
                assert!(remote.mapping.len() <= 4096 << at);
                assert_eq!(remote.mapping.is_writable(), remote.right == Right::Write);
            }
            assert!(watch.is_none_or(|watch| watch.region.len() >= OWNER_EPOCH_OFFSET + 8));
        }
        Err(FabricError::Protocol { .. }) => {}
        // Such a file is less than a word long.
        Err(FabricError::OutOfRange { size, .. }) => assert!(size < OWNER_EPOCH_OFFSET as u64 + 8),
        Err(error) => panic!("{error}"),
    }
}

/// Inputs as an owner writes them, for the corpus.
#[cfg(test)]
pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let words = [EXPORTS_MAGIC, 3, 5, 0x102, 0x100, 4096, 0, 0x101, 8192, 1, 0x102, 4096, 0];
    let message: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
    vec![("local-exports", [vec![1, 3], message].concat())]
}
