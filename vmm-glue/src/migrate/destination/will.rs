//! What a page server alone knows, written down for the next one: kept by the VMM as a file in memory ([`Kept::Will`]).
//!
//! A will is never changed: a new one is laid down in its place, and the VMM forgets the old one in the same step, so whoever comes finds
//! one or the other and no half of either. With it lie the page states, the ledger of output and the guard's hand-over socket.
//!
//! ```text
//! 0   magic "belaywil" · version u32 · length of what follows the head, u32 · CRC-64/NVME of that
//! 24  the will (postcard)
//! ```
//! What is *not* in it, and how it is found again:
//! * pages harvested and not known committed: every page that has landed counts as dirty in the first epoch after a takeover;
//! * discards since the last harvest: their states say so, and they are carried as dirty pages;
//! * output that was held: the VMM keeps each packet until the ledger says that it has left, and gives all of them again;
//! * output numbers, incarnation: the VMM's own state;
//! * the last committed epoch, the ring, lanes and keys: the source says them anew.

use super::DestinationError;
use crate::kvm::apart::{Keeper, Kept};
use crate::migrate::observation::ObservationId;
use crate::migrate::protocol::PROTOCOL_VERSION;
use crate::migrate::settings::Proposal;
use crate::migrate::switch_map::RegionClasses;
use belay_checkpoint::guest::GuestError;
use belay_checkpoint::ownership::OwnerEpoch;
use belay_checkpoint::record::crc;
use belay_transport::region::{RamFile, RegionError};
use belay_transport::{PAGE_SIZE, PageSize};
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, OwnedFd};
use zeroize::Zeroizing;

const MAGIC: [u8; 8] = *b"belaywil";
const VERSION: u32 = 1;
const HEAD: usize = 24;
/// Longest will: the switch map of the most fragmented guest that this version takes is far below it.
const MOST_BYTES: usize = 256 << 20;

/// See the module.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Will {
    pub proposal: Proposal,
    /// Which frames are read from the source, and which were never written there.
    pub map: Vec<RegionClasses>,
    /// Under which the source said go.
    pub owner_epoch: OwnerEpoch,
    /// Of every incarnation of the guest, in order.
    pub nonces: Vec<u64>,
    /// The source has released the guest: it is this host's own.
    pub owned: bool,
    /// What was noted last.
    pub because: ObservationId,
}

/// Why a will cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum WillError {
    #[error("no will was laid down: the page server died before the guest was handed over")]
    None,
    #[error(transparent)]
    Region(#[from] RegionError),
    #[error("mapping the will")]
    Map(#[source] std::io::Error),
    #[error("a file of {bytes} bytes is no will")]
    NotAWill { bytes: usize },
    #[error("the will is of version {found}, this program reads {VERSION}")]
    Version { found: u32 },
    #[error("the will is damaged: {bytes} bytes with checksum {found:#018x}, {said:#018x} was written beside them")]
    Damaged { bytes: usize, found: u64, said: u64 },
    #[error("the will is of a migration under protocol {found}, {PROTOCOL_VERSION} is spoken here")]
    Protocol { found: u16 },
    #[error("the will cannot be understood")]
    Malformed(#[source] postcard::Error),
}

/// What stands before a body.
fn header(body: &[u8]) -> [u8; HEAD] {
    let mut head = [0; HEAD];
    head[..8].copy_from_slice(&MAGIC);
    head[8..12].copy_from_slice(&VERSION.to_le_bytes());
    head[12..16].copy_from_slice(&(body.len() as u32).to_le_bytes());
    head[16..].copy_from_slice(&crc(body).to_le_bytes());
    head
}

impl Will {
    /// As a file in memory.
    fn write(&self) -> Result<RamFile, WillError> {
        // It holds the secret of the migration.
        let body = Zeroizing::new(postcard::to_stdvec(self).map_err(WillError::Malformed)?);
        let len = (HEAD + body.len()).next_multiple_of(PAGE_SIZE);
        if len > MOST_BYTES {
            return Err(WillError::NotAWill { bytes: len });
        }
        let file = RamFile::memfd("belay-will", len, PageSize::Small)?;
        file.preallocate(1, &|_| ())?;
        let mapping = file.map().map_err(WillError::Map)?;
        mapping.write(HEAD, &body);
        mapping.write(0, &header(&body));
        Ok(file)
    }

    /// Reads one that was laid down.
    pub fn read(file: Option<OwnedFd>) -> Result<Self, WillError> {
        let file = RamFile::from_fd(file.ok_or(WillError::None)?)?;
        let mapping = file.map().map_err(WillError::Map)?;
        let bytes = file.len();
        let mut head = [0; HEAD];
        mapping.read(0, &mut head);
        let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("four bytes"));
        let (version, len) = (word(8), word(12) as usize);
        if head[..8] != MAGIC || bytes > MOST_BYTES || len > bytes - HEAD {
            return Err(WillError::NotAWill { bytes });
        }
        if version != VERSION {
            return Err(WillError::Version { found: version });
        }
        let mut body = Zeroizing::new(vec![0; len]);
        mapping.read(HEAD, &mut body);
        let said = u64::from_le_bytes(head[16..].try_into().expect("eight bytes"));
        let found = crc(&body);
        if found != said {
            return Err(WillError::Damaged { bytes: len, found, said });
        }
        let (will, rest): (Self, _) = postcard::take_from_bytes(&body).map_err(WillError::Malformed)?;
        match (rest, will.proposal.protocol) {
            ([], PROTOCOL_VERSION) => Ok(will),
            ([], found) => Err(WillError::Protocol { found }),
            _ => Err(WillError::NotAWill { bytes }),
        }
    }

    /// Lays it down in place of an earlier one.
    pub(super) fn lay_down(&self, keeper: &Keeper) -> Result<(), DestinationError> {
        let file = self.write().map_err(|error| {
            DestinationError::Guest(GuestError::Io {
                doing: "writing the will".to_owned(),
                source: std::io::Error::other(error),
            })
        })?;
        Ok(keeper.keep(Kept::Will, file.as_fd())?)
    }
}

/// What a fuzz target asks of a will: one that is taken is laid down again as one that says the same.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz(data: &[u8]) {
    let Some((mode, bytes)) = data.split_first() else { return };
    // Whoever can lay a will down can make its head right: most inputs are to come past it.
    let bytes = match mode % 2 {
        0 => bytes.to_vec(),
        _ => [&header(bytes)[..], bytes].concat(),
    };
    let len = bytes.len().max(1).next_multiple_of(PAGE_SIZE);
    let file = RamFile::memfd("belay-will-fuzz", len, PageSize::Small).expect("memory");
    file.map().expect("memory").write(0, &bytes);
    let read = |file: &RamFile| Will::read(Some(file.as_fd().try_clone_to_owned().expect("a descriptor")));
    match read(&file) {
        Ok(will) => assert_eq!(read(&will.write().expect("it was one")).expect("our own"), will),
        Err(error) => assert!(error.to_string().len() < 400),
    }
}

/// A will of a guest that is tethered, for golden files and the corpus.
#[cfg(test)]
fn tethered() -> Will {
    Will {
        proposal: crate::migrate::golden::proposal_of_version_3(),
        map: vec![RegionClasses { id: belay_transport::RegionId(0), runs: vec![(2, 1), (1, 300)] }],
        owner_epoch: OwnerEpoch(3),
        nonces: vec![7, 0x4847_4645_4443_4241],
        owned: false,
        because: ObservationId("source-4711-3".to_owned()),
    }
}

/// Inputs of our own encoder, for the corpus.
#[cfg(test)]
pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let body = postcard::to_stdvec(&tethered()).expect("plain data");
    let whole = [&[0][..], &header(&body), &body].concat();
    vec![("whole", whole), ("sealed", [&[1][..], &body].concat())]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::guests::GuestSpec;
    use crate::migrate::reattach::Identity;
    use crate::migrate::settings::{ReleasePolicy, VmmSpec};
    use belay_transport::RegionId;

    fn will() -> Will {
        Will {
            proposal: Proposal {
                protocol: PROTOCOL_VERSION,
                vmm: VmmSpec::Kvm(GuestSpec::default()),
                tether: None,
                output_to: Some("unix:/run/observer".into()),
                release: ReleasePolicy::Never,
                shards: 3,
                nonces: vec![1, 2],
                identity: Identity::random().expect("random"),
                reattach: None,
            },
            map: vec![RegionClasses {
                id: RegionId(0),
                runs: (0..2000).map(|run: u64| (1 + (run % 2) as u8, run + 1)).collect(),
            }],
            owner_epoch: OwnerEpoch(4),
            nonces: vec![1, 2, 3],
            owned: false,
            because: ObservationId("destination-1-9".into()),
        }
    }

    fn file_of(will: &Will) -> RamFile {
        will.write().expect("written")
    }

    fn read(file: &RamFile) -> Result<Will, WillError> {
        Will::read(Some(file.as_fd().try_clone_to_owned().expect("dup")))
    }

    #[test]
    fn a_will_reads_back_as_it_was_written_also_over_more_than_a_page() {
        let will = will();
        let file = file_of(&will);
        assert!(file.len() > PAGE_SIZE);
        assert_eq!(read(&file).expect("read"), will);
        assert!(matches!(Will::read(None), Err(WillError::None)));
    }

    #[test]
    fn a_will_is_laid_down_as_it_was_when_its_version_came_out() {
        let owned = Will { proposal: Proposal { tether: None, ..tethered().proposal }, owned: true, ..tethered() };
        let wills = [("tethered", tethered()), ("owned", owned)];
        let bytes = wills.clone().map(|(name, will)| {
            let file = file_of(&will);
            let mut bytes = vec![0; file.len()];
            file.map().expect("map").read(0, &mut bytes);
            (name, bytes)
        });
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
        for (name, bytes) in crate::golden::compare(folder, VERSION as u16, "will", &bytes) {
            let file = RamFile::memfd("belay-will", bytes.len(), PageSize::Small).expect("memfd");
            file.map().expect("map").write(0, &bytes);
            let (_, will) = wills.iter().find(|(there, _)| *there == name).expect("compared");
            assert_eq!(&read(&file).expect("read"), will);
        }
    }

    #[test]
    fn no_bit_of_a_will_can_be_changed_unnoticed() {
        let file = file_of(&will());
        let mapping = file.map().expect("map");
        let mut whole = vec![0; file.len()];
        mapping.read(0, &mut whole);
        let len = u32::from_le_bytes(whole[12..16].try_into().unwrap()) as usize;
        // Every bit of the head, and one of every byte after it.
        let bits = (0..HEAD * 8).chain((HEAD..HEAD + len).map(|byte| byte * 8 + byte % 8));
        for bit in bits {
            let byte = bit / 8;
            mapping.write(byte, &[whole[byte] ^ 1 << (bit % 8)]);
            assert!(read(&file).is_err(), "bit {} of byte {byte}", bit % 8);
            mapping.write(byte, &whole[byte..=byte]);
        }
        assert!(read(&file).is_ok());
    }

    #[test]
    fn a_will_that_is_cut_short_or_of_another_version_is_refused_by_name() {
        let file = file_of(&will());
        let mapping = file.map().expect("map");
        let mut whole = vec![0; file.len()];
        mapping.read(0, &mut whole);
        let short = RamFile::memfd("belay-will", PAGE_SIZE, PageSize::Small).expect("memfd");
        short.map().expect("map").write(0, &whole[..PAGE_SIZE]);
        assert!(matches!(read(&short), Err(WillError::NotAWill { .. })));
        mapping.write(8, &2_u32.to_le_bytes());
        assert!(matches!(read(&file), Err(WillError::Version { found: 2 })));
        let other = PROTOCOL_VERSION + 1;
        let agreed = Will { proposal: Proposal { protocol: other, ..will().proposal }, ..will() };
        assert!(matches!(read(&file_of(&agreed)), Err(WillError::Protocol { found }) if found == other));
        short.map().expect("map").zero(0, PAGE_SIZE);
        assert!(matches!(read(&short), Err(WillError::NotAWill { .. })), "nothing was ever written");
    }
}
