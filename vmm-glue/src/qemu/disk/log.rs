//! What a guest did to its disk in one epoch, as bytes: between a relay and its page server, and in a record's disk section.
//!
//! ```text
//! head    version 1 (1) | length of the name (1) | the disk's name | bytes of the disk (8)
//! entry   what (1) | offset (8) | length (4) | bytes, if it is a write          little-endian
//! ```
//! Entries stand in the order in which the guest was told that they were done, flushes among them. Doing all of them twice, or some of them
//! and then all, gives the same disk.

use std::sync::Arc;

/// Version of the encoding.
pub const LOG_VERSION: u8 = 1;
/// Longest name of a disk, in bytes.
pub const MOST_NAME_BYTES: usize = 64;
/// Longest single write, in bytes: what a relay lets QEMU send at once.
pub const MOST_WRITE_BYTES: u32 = 1 << 20;
/// What an entry counts where logs are bounded, beside its bytes.
pub const ENTRY_BYTES: u64 = 64;

const WRITE: u8 = 1;
const ZERO: u8 = 2;
const FLUSH: u8 = 3;

/// One thing that was done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    Write {
        offset: u64,
        data: Arc<[u8]>,
    },
    /// These bytes read as zero.
    Zero {
        offset: u64,
        len: u32,
    },
    /// All before it is to be on the disk before anything after it.
    Flush,
}

impl Entry {
    /// What it counts where logs are bounded.
    pub fn cost(&self) -> u64 {
        match self {
            Self::Write { data, .. } => ENTRY_BYTES + data.len() as u64,
            Self::Zero { .. } | Self::Flush => ENTRY_BYTES,
        }
    }
}

/// One thing that was done, as it lies in a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part<'a> {
    Write { offset: u64, data: &'a [u8] },
    Zero { offset: u64, len: u32 },
    Flush,
}

/// What is no log, or another disk's. Nothing of it was done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LogError {
    #[error("it ends in the middle of an entry, at byte {at}")]
    Cut { at: usize },
    #[error("it is of version {found}; this belay reads {LOG_VERSION}")]
    Version { found: u8 },
    #[error("the disk's name is no text of 1 to {MOST_NAME_BYTES} bytes")]
    Name,
    #[error("an entry of kind {kind} at byte {at}")]
    Kind { kind: u8, at: usize },
    #[error("{len} bytes at {offset} of a disk of {disk_bytes}")]
    Range { offset: u64, len: u32, disk_bytes: u64 },
}

/// A log that was checked whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log<'a> {
    pub name: &'a str,
    pub disk_bytes: u64,
    pub parts: Vec<Part<'a>>,
}

/// The entries of a disk as bytes.
pub fn encode<'e>(name: &str, disk_bytes: u64, entries: impl IntoIterator<Item = &'e Entry>) -> Vec<u8> {
    assert!(!name.is_empty() && name.len() <= MOST_NAME_BYTES, "a disk's name of {} bytes", name.len());
    let mut bytes = vec![LOG_VERSION, name.len() as u8];
    bytes.extend_from_slice(name.as_bytes());
    bytes.extend(disk_bytes.to_le_bytes());
    for entry in entries {
        let (kind, offset, len, data): (u8, u64, u32, &[u8]) = match entry {
            Entry::Write { offset, data } => (WRITE, *offset, data.len() as u32, data),
            Entry::Zero { offset, len } => (ZERO, *offset, *len, &[]),
            Entry::Flush => (FLUSH, 0, 0, &[]),
        };
        bytes.push(kind);
        bytes.extend(offset.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes.extend_from_slice(data);
    }
    bytes
}

/// Reads and checks all of a log.
pub fn decode(bytes: &[u8]) -> Result<Log<'_>, LogError> {
    let mut rest = bytes;
    let cut = |rest: &[u8]| LogError::Cut { at: bytes.len() - rest.len() };
    let take = |rest: &mut &'_ [u8], len: usize| -> Result<(), LogError> {
        *rest = rest.get(len..).ok_or_else(|| cut(rest))?;
        Ok(())
    };
    let [version, name_bytes] = *rest.first_chunk().ok_or_else(|| cut(rest))?;
    if version != LOG_VERSION {
        return Err(LogError::Version { found: version });
    }
    take(&mut rest, 2)?;
    let name_bytes = usize::from(name_bytes);
    let name = rest.get(..name_bytes).ok_or_else(|| cut(rest))?;
    let name = std::str::from_utf8(name).map_err(|_| LogError::Name)?;
    if name.is_empty() || name.len() > MOST_NAME_BYTES {
        return Err(LogError::Name);
    }
    take(&mut rest, name_bytes)?;
    let disk_bytes = u64::from_le_bytes(*rest.first_chunk().ok_or_else(|| cut(rest))?);
    take(&mut rest, 8)?;
    let mut parts = Vec::new();
    while !rest.is_empty() {
        let at = bytes.len() - rest.len();
        let head: &[u8; 13] = rest.first_chunk().ok_or_else(|| cut(rest))?;
        let kind = head[0];
        let offset = u64::from_le_bytes(head[1..9].try_into().expect("eight bytes"));
        let len = u32::from_le_bytes(head[9..].try_into().expect("four bytes"));
        take(&mut rest, 13)?;
        let within = len > 0 && offset.checked_add(u64::from(len)).is_some_and(|end| end <= disk_bytes);
        match kind {
            WRITE | ZERO if !within || (kind == WRITE && len > MOST_WRITE_BYTES) => {
                return Err(LogError::Range { offset, len, disk_bytes });
            }
            WRITE => {
                let data = rest.get(..len as usize).ok_or_else(|| cut(rest))?;
                parts.push(Part::Write { offset, data });
                take(&mut rest, len as usize)?;
            }
            ZERO => parts.push(Part::Zero { offset, len }),
            FLUSH if offset == 0 && len == 0 => parts.push(Part::Flush),
            FLUSH => return Err(LogError::Range { offset, len, disk_bytes }),
            kind => return Err(LogError::Kind { kind, at }),
        }
    }
    Ok(Log { name, disk_bytes, parts })
}

/// A log that is understood is written as it came, and nothing of it lies outside of its disk.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz(bytes: &[u8]) {
    let Ok(log) = decode(bytes) else { return };
    let entries = log.parts.iter().map(|part| match *part {
        Part::Write { offset, data } => {
            assert!(offset + data.len() as u64 <= log.disk_bytes);
            Entry::Write { offset, data: data.into() }
        }
        Part::Zero { offset, len } => {
            assert!(offset + u64::from(len) <= log.disk_bytes);
            Entry::Zero { offset, len }
        }
        Part::Flush => Entry::Flush,
    });
    assert_eq!(encode(log.name, log.disk_bytes, &entries.collect::<Vec<_>>()), bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries() -> Vec<Entry> {
        vec![
            Entry::Write { offset: 512, data: [7; 3].into() },
            Entry::Flush,
            Entry::Zero { offset: 0x0102, len: 0x0304 },
        ]
    }

    #[test]
    fn a_log_is_what_it_was_when_its_version_came_out() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
        let log = encode("vda", 0x1_0000, &entries());
        for (_, bytes) in crate::golden::compare(folder, LOG_VERSION.into(), "disk-log", &[("log", log)]) {
            let log = decode(&bytes).unwrap();
            assert_eq!((log.name, log.disk_bytes), ("vda", 0x1_0000));
            let parts =
                [Part::Write { offset: 512, data: &[7; 3] }, Part::Flush, Part::Zero { offset: 0x0102, len: 0x0304 }];
            assert_eq!(log.parts, parts);
        }
    }

    #[test]
    fn what_lies_outside_of_the_disk_or_is_cut_off_is_refused() {
        let bytes = encode("vda", 0x1_0000, &entries());
        let whole: Vec<usize> = (0..=bytes.len()).filter(|&end| decode(&bytes[..end]).is_ok()).collect();
        assert_eq!(whole, [13, 29, 42, 55], "between entries, and nowhere else");
        let far = encode("vda", 600, &[Entry::Write { offset: 598, data: [1; 3].into() }]);
        assert_eq!(decode(&far), Err(LogError::Range { offset: 598, len: 3, disk_bytes: 600 }));
        let wraps = encode("vda", 600, &[Entry::Zero { offset: u64::MAX, len: 2 }]);
        assert!(matches!(decode(&wraps), Err(LogError::Range { .. })));
        assert_eq!(decode(b"\x02\x01v"), Err(LogError::Version { found: 2 }));
        assert_eq!(decode(b"\x01\0\0\0\0\0\0\0\0\0"), Err(LogError::Name));
    }

    proptest::proptest!(
        #[test]
        fn no_bytes_make_reading_a_log_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..90)) {
            fuzz(&bytes);
            fuzz(&[b"\x01\x01d\0\x01\0\0\0\0\0\0", &bytes[..]].concat());
        }
    );
}
