//! How far the guest's output has left: one word of memory that the page server writes and the VMM reads.
//!
//! It outlives the page server in the VMM's hands. The word is written *after* the world has taken a packet, so a page server that
//! dies in between makes its successor send that packet again, byte for byte the same.

use belay_checkpoint::guest::Packet;
use belay_checkpoint::outbox::Emitter;
use belay_transport::region::{Mapping, RamFile, RegionError};
use belay_transport::{PAGE_SIZE, PageSize};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

const MAGIC: u64 = u64::from_le_bytes(*b"belayldg");
const MAGIC_AT: usize = 0;
/// Every packet with a smaller sequence number has left.
const LEFT_BEFORE_AT: usize = 64;

/// See the module. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Ledger {
    file: Arc<RamFile>,
    word: Arc<Mapping>,
}

/// Why there is no ledger.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    #[error(transparent)]
    Region(#[from] RegionError),
    #[error("mapping the ledger of output")]
    Map(#[source] io::Error),
    #[error("a ledger of output has {len} bytes and begins with {magic:#018x}; it is not one")]
    NotALedger { len: usize, magic: u64 },
}

impl Ledger {
    /// One of a guest of which nothing has left.
    pub fn new() -> Result<Self, LedgerError> {
        let file = RamFile::memfd("belay-ledger", PAGE_SIZE, PageSize::Small)?;
        let word = file.map().map_err(LedgerError::Map)?;
        word.store_u64(MAGIC_AT, MAGIC, Ordering::SeqCst);
        Ok(Self { file: Arc::new(file), word: Arc::new(word) })
    }

    /// One that another process of this user has made.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, LedgerError> {
        let file = RamFile::from_fd(fd)?;
        let word = file.map().map_err(LedgerError::Map)?;
        let magic = word.load_u64(MAGIC_AT, Ordering::SeqCst);
        if file.len() != PAGE_SIZE || magic != MAGIC {
            return Err(LedgerError::NotALedger { len: file.len(), magic });
        }
        Ok(Self { file: Arc::new(file), word: Arc::new(word) })
    }

    /// To be laid down with the VMM.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The packet `sequence`, and all before it, have left.
    pub fn has_left(&self, sequence: u64) {
        self.word.store_u64(LEFT_BEFORE_AT, sequence.saturating_add(1), Ordering::Release);
    }

    /// The first sequence number that is not known to have left.
    pub fn left_before(&self) -> u64 {
        self.word.load_u64(LEFT_BEFORE_AT, Ordering::Acquire)
    }

    /// `out`, with every packet it has taken written down here.
    pub fn keep(&self, out: Box<dyn Emitter>) -> Box<dyn Emitter> {
        Box::new(Kept { out, ledger: self.clone() })
    }
}

struct Kept {
    out: Box<dyn Emitter>,
    ledger: Ledger,
}

impl Emitter for Kept {
    fn send(&mut self, packet: &Packet) -> io::Result<()> {
        self.out.send(packet)?;
        self.ledger.has_left(packet.sequence);
        Ok(())
    }
}
