//! What a source keeps of a migration, so that another process can go on where it dies: the journal, and memory with names.
//!
//! With `--memory-dir` guest RAM, ring, overflow memory and state are files that outlive the process. Without it they are anonymous and end
//! with it; the journal is there all the same, because a release has to be on disk before it is said.

use super::SourceError;
use crate::migrate::protocol::{self, PROTOCOL_VERSION};
use crate::migrate::reattach::Identity;
use crate::migrate::release::{ReleaseError, ReleaseRecord};
use crate::migrate::settings::Proposal;
use belay_checkpoint::dirty::DirtySet;
use belay_checkpoint::fold::{Catch, FoldError, FoldState, FoldTarget};
use belay_checkpoint::guest::{DirtyTracker, Guest, GuestError, RamBlock, TrackerKind};
use belay_checkpoint::journal::{
    Damaged, Journal, JournalError, KeptState, Listed, Mark, MemoryFolder, MigrationId, WriteError, list,
};
use belay_checkpoint::ownership::OwnerEpoch;
use belay_checkpoint::ownership::source::State;
use belay_checkpoint::record::Limits;
use belay_checkpoint::ring::{OWNER_REGION_BYTES, RingReader, RingShape, Spool, SpoolError};
use belay_transport::explain;
use belay_transport::region::{Extent, Mapping, RamFile, RegionError};
use belay_transport::session::RegionGeometry;
use belay_transport::{Deadline, PAGE_SIZE, PageSize, RegionId};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
#[cfg(test)]
mod golden;

/// The journal's body.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Written {
    pub identity: Identity,
    /// Where the destination listens.
    pub to: String,
    /// `None` before anything was agreed on.
    pub proposal: Option<Proposal>,
    /// Regions of guest RAM: id, bytes, size of a page.
    pub regions: Vec<(RegionId, u64, PageSize)>,
    /// The folder of named memory; `None`: nobody can take over.
    pub memory: Option<PathBuf>,
    /// Whatever else whoever starts a source again wants to know (the command's options).
    pub extra: Vec<u8>,
}

impl Written {
    /// What was agreed on, if it is another migration protocol than this program's.
    fn other_protocol(&self) -> Option<u16> {
        self.proposal.as_ref().map(|proposal| proposal.protocol).filter(|&found| found != PROTOCOL_VERSION)
    }
}

/// What moves: in kept memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Marked {
    state: State,
    /// Incarnations since the migration began.
    nonces: Vec<u64>,
}

/// Why something could not be kept or taken over.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    NotWritten(#[from] WriteError),
    #[error("the memory of migration {id} in {} cannot be taken", path.display())]
    Memory {
        id: MigrationId,
        path: PathBuf,
        #[source]
        source: RegionError,
    },
    #[error(transparent)]
    Region(#[from] RegionError),
    #[error("the memory of migration {id} is damaged: {what}")]
    Damaged { id: MigrationId, what: String },
    /// What it was agreed under is not spoken here: nobody could go on with its destination.
    #[error("migration {id} was agreed on under migration protocol {found}, {PROTOCOL_VERSION} is spoken here")]
    OtherProtocol { id: MigrationId, found: u16 },
    #[error("nothing is left of migration {id} to be taken over: {why}")]
    NothingLeft { id: MigrationId, why: String },
    #[error("there is nothing to take over under {}", .0.display())]
    None(PathBuf),
    #[error("several migrations can be taken over, say which: {}", ids(.0))]
    Several(Vec<MigrationId>),
    #[error("cannot {doing}")]
    Io {
        doing: &'static str,
        #[source]
        source: std::io::Error,
    },
}

const NOWHERE: &str = "its process died before the guest could have gone anywhere, and the guest with it";

fn ids(all: &[MigrationId]) -> String {
    all.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

#[derive(Debug)]
struct Memory {
    folder: MemoryFolder,
    state: KeptState,
    mark: Mark,
}

/// One migration's journal and memory, this process's until it is dropped.
#[derive(Debug)]
pub struct Keep {
    state_dir: PathBuf,
    journal: Journal,
    identity: Identity,
    written: Written,
    /// The owner epoch under which an earlier process gave the guest away for good.
    released: Option<OwnerEpoch>,
    memory: Option<Memory>,
    /// Of what was taken over.
    marked: Option<Marked>,
}

/// The ring of one session and the region beside it.
pub(super) struct RingFiles {
    pub ring: RamFile,
    pub owner: RamFile,
}

fn ring_name(nonce: u64) -> String {
    format!("ring-{nonce:016x}")
}

fn owner_name(nonce: u64) -> String {
    format!("owner-{nonce:016x}")
}

impl Keep {
    /// Begins to keep a new migration. With a `memory_dir` (on tmpfs or hugetlbfs) its memory has names there.
    pub fn begin(state_dir: &Path, memory_dir: Option<&Path>, identity: Identity) -> Result<Self, KeepError> {
        sweep(state_dir);
        let journal = Journal::create(state_dir, identity.migration)?;
        let memory = memory_dir.map(|directory| MemoryFolder::path_in(directory, identity.migration));
        let (to, proposal, regions, extra) = (String::new(), None, Vec::new(), Vec::new());
        let written = Written { identity, to, proposal, regions, memory, extra };
        let state_dir = state_dir.to_owned();
        // Where memory will be is on disk before there is any, so that whatever is left of it is found.
        let made = journal.write(&protocol::encode(&written)).map_err(KeepError::from);
        let make = || memory_dir.map(|directory| Memory::create(directory, identity.migration)).transpose();
        match made.and_then(|()| make()) {
            Ok(memory) => Ok(Self { state_dir, journal, identity, written, released: None, memory, marked: None }),
            Err(error) => {
                // Nothing was kept yet; the first error is the one to tell.
                let _ = journal.remove();
                Err(error)
            }
        }
    }

    /// Takes over migration `id`, or the only one there is.
    pub fn take_over(state_dir: &Path, id: Option<MigrationId>) -> Result<Self, KeepError> {
        let id = match id {
            Some(id) => id,
            None => only_one(state_dir)?,
        };
        let (journal, body) = Journal::open(state_dir, id)?;
        let nothing = |why: &str| KeepError::NothingLeft { id, why: why.to_owned() };
        let damaged = |what: String| KeepError::Damaged { id, what };
        let body = body.ok_or_else(|| nothing(NOWHERE))?;
        let written: Written = protocol::decode(&body).map_err(|error| damaged(explain(&error)))?;
        let identity = written.identity;
        if written.proposal.is_none() {
            return Err(nothing(NOWHERE));
        }
        let state_dir = state_dir.to_owned();
        let released = ReleaseRecord::find(&state_dir, id);
        let released = released.map_err(|error| damaged(format!("its release record cannot be read: {error}")))?;
        if let Some(record) = released {
            // It stands without any memory, and before it.
            let released = Some(OwnerEpoch(record.owner_epoch));
            return Ok(Self { state_dir, journal, identity, written, released, memory: None, marked: None });
        }
        if let Some(found) = written.other_protocol() {
            return Err(KeepError::OtherProtocol { id, found });
        }
        let Some(path) = &written.memory else {
            return Err(nothing(
                "its memory was anonymous and died with its process (it was started without --memory-dir)",
            ));
        };
        let (memory, marked) = Memory::open(path, id)?;
        match marked.as_ref().map(|marked| marked.state) {
            None => return Err(nothing(NOWHERE)),
            Some(State::Running { .. }) => {
                return Err(nothing("the guest ran here when its process died, and ended with it"));
            }
            Some(State::Lost { .. }) => return Err(nothing("it was given up as lost")),
            Some(State::Ceded { .. }) => return Err(nothing("the arbiter had said that the destination has it")),
            Some(_) => {}
        }
        Ok(Self { state_dir, journal, identity, written, released: None, memory: Some(memory), marked })
    }

    /// Whether an earlier process released the guest: nothing here resumes it.
    pub fn is_released(&self) -> bool {
        self.released.is_some()
    }

    /// By what both hosts know the migration.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Guest RAM as a session tells of it.
    pub(super) fn geometry(&self) -> Vec<RegionGeometry> {
        let regions = self.written.regions.iter();
        regions.map(|&(id, bytes, page_size)| RegionGeometry { id, bytes, page_size }).collect()
    }

    /// What is written down.
    pub fn written(&self) -> &Written {
        &self.written
    }

    /// Whether another process can take over from this one.
    pub fn outlives(&self) -> bool {
        self.memory.is_some()
    }

    /// Where the memory is that outlives this process.
    pub fn memory_path(&self) -> Option<&Path> {
        self.memory.as_ref().map(|memory| memory.folder.path())
    }

    /// Fails where named memory has too little room for a guest of `ram` bytes, its ring and its overflow memory: before anything is started.
    pub fn expect_room(&self, ram: u64, ring: u64, overflow: u64) -> Result<(), KeepError> {
        let Some(Memory { folder, .. }) = &self.memory else { return Ok(()) };
        let parts = [ram, ring, OWNER_REGION_BYTES as u64, overflow];
        Ok(folder.expect_room(parts.into_iter().map(|bytes| folder.rounded(bytes)).sum())?)
    }

    /// Makes sure of room for all of guest RAM, where it has a name: what the guest gave back is a hole that somebody else may fill, and it
    /// may want it again at the destination. Takes long only where a large guest has given something back.
    pub(super) fn reserve_ram(&self, blocks: &[RamBlock]) -> Result<(), RegionError> {
        let Some(Memory { folder, .. }) = &self.memory else { return Ok(()) };
        for block in blocks {
            if block.file.is_whole()? {
                continue;
            }
            let len = block.file.len() as u64;
            let reserved = block.file.reserve(Extent { offset: 0, len });
            reserved.map_err(|error| match folder.expect_room(len) {
                Err(no_room @ RegionError::NoRoom { .. }) => no_room,
                _ => error,
            })?;
        }
        Ok(())
    }

    /// Guest RAM of region `id`: a new file, all holes.
    pub fn make_ram(&self, id: RegionId, bytes: usize, page_size: PageSize) -> Result<RamFile, KeepError> {
        let Some(memory) = &self.memory else { return Ok(RamFile::memfd("belay-guest-ram", bytes, page_size)?) };
        let (path, found) = (memory.folder.path().to_owned(), memory.folder.page_size());
        if found != page_size {
            return Err(RegionError::WrongPageSize { path, backing: found.to_string(), asked: page_size }.into());
        }
        Ok(memory.folder.make(&format!("ram-{}", id.0), bytes, true)?)
    }

    /// Guest RAM as an earlier process left it.
    pub fn open_ram(&self, id: RegionId) -> Result<RamFile, KeepError> {
        let migration = self.identity.migration;
        let Some(memory) = &self.memory else {
            return Err(KeepError::NothingLeft { id: migration, why: "it was released".to_owned() });
        };
        let path = memory.folder.path().to_owned();
        memory.folder.file(&format!("ram-{}", id.0)).map_err(|source| KeepError::Memory { id: migration, path, source })
    }

    /// Writes down what was agreed on. On disk when it returns: before anything of the guest leaves.
    pub(super) fn agree(
        &mut self,
        to: String,
        proposal: Proposal,
        blocks: &[RamBlock],
        extra: Vec<u8>,
    ) -> Result<(), KeepError> {
        let regions = blocks.iter().map(|block| (block.id, block.file.len() as u64, block.page_size)).collect();
        let written = Written { to, proposal: Some(proposal), regions, extra, ..self.written.clone() };
        self.journal.write(&protocol::encode(&written))?;
        self.written = written;
        Ok(())
    }

    /// A session's ring and owner's region.
    pub(super) fn make_ring(&self, nonce: u64, bytes: usize) -> Result<RingFiles, RegionError> {
        Ok(match &self.memory {
            None => RingFiles {
                ring: RamFile::memfd("belay-ring", bytes, PageSize::Small)?,
                owner: RamFile::memfd("belay-owner", OWNER_REGION_BYTES, PageSize::Small)?,
            },
            Some(memory) => RingFiles {
                ring: memory.folder.make(&ring_name(nonce), bytes, true)?,
                owner: memory.folder.make(&owner_name(nonce), OWNER_REGION_BYTES, true)?,
            },
        })
    }

    /// Another session's ring has taken the place of this one's.
    pub(super) fn forget_ring(&self, nonce: u64) {
        if let Some(memory) = &self.memory {
            memory.folder.forget(&ring_name(nonce));
            memory.folder.forget(&owner_name(nonce));
        }
    }

    /// The reader of the first session's ring.
    pub(super) fn reader(&self, ring_len: usize, nonce: u64, overflow: usize) -> Result<RingReader, SourceError> {
        Ok(match &self.memory {
            None => RingReader::new(ring_len, nonce, overflow)?,
            Some(memory) => {
                let spool = Spool::create(&memory.folder, &memory.state, overflow).map_err(SourceError::Spool)?;
                RingReader::with(spool, ring_len, nonce)?
            }
        })
    }

    /// RAM and device state at the switch, epoch 0.
    pub(super) fn fold_state(
        &self,
        target: FoldTarget,
        limits: Limits,
        device_state: Vec<u8>,
    ) -> Result<FoldState, FoldError> {
        match &self.memory {
            None => Ok(FoldState::new(target, limits, device_state)),
            Some(memory) => FoldState::kept(target, limits, device_state, &memory.state),
        }
    }

    /// Keeps who owns the guest, before anything that this allows is done.
    pub(super) fn mark(&mut self, state: State, nonces: &[u64]) -> Result<(), RegionError> {
        let Some(memory) = &mut self.memory else { return Ok(()) };
        memory.mark.write(&protocol::encode(&Marked { state, nonces: nonces.to_vec() }))
    }

    /// Who owned the guest when the process before this one died, and the incarnations it had.
    pub(super) fn left(&self) -> (State, Vec<u64>) {
        let nonces = self.marked.as_ref().map(|marked| marked.nonces.clone()).unwrap_or_default();
        match (self.released, &self.marked) {
            (Some(owner_epoch), _) => (State::Released { owner_epoch }, nonces),
            (None, Some(marked)) => (marked.state, nonces),
            (None, None) => (State::new(), nonces),
        }
    }

    /// Ring, reader and fold state as the process before this one left them; `None` where the guest had not come to its switch.
    pub(super) fn left_behind(&self, blocks: &[RamBlock]) -> Result<Option<LeftBehind>, SourceError> {
        let Some(memory) = &self.memory else { return Ok(None) };
        let (spool, at) = match Spool::open(&memory.folder, &memory.state) {
            Ok(found) => found,
            Err(source) => return Err(SourceError::Spool(source)),
        };
        let Some(at) = at else { return Ok(None) };
        let io = |doing| move |source| SourceError::Io { doing, source };
        let ring = match memory.folder.file(&ring_name(at.nonce)) {
            Ok(file) => file,
            // Taken away from whoever could still write it, which comes after all that it held was folded.
            Err(RegionError::BadLength { len: 0, .. }) => {
                RamFile::memfd("belay-ring", RingShape::LEAST.next_multiple_of(PAGE_SIZE), PageSize::Small)?
            }
            Err(error) => return Err(error.into()),
        };
        let ring = ring.map().map_err(io("map the ring"))?;
        let owner_region = memory.folder.file(&owner_name(at.nonce))?.map().map_err(io("map the owner region"))?;
        let (ring, owner_region) = (Arc::new(ring), Arc::new(owner_region));
        let limits = limits(blocks);
        let Some(state) = FoldState::resume(FoldTarget::new(blocks)?, limits, &memory.state)? else { return Ok(None) };
        let reader = RingReader::resume(spool, at, ring.len())?;
        Ok(Some(LeftBehind { ring, owner_region, catch: Catch::resume(reader, state)? }))
    }

    /// Writes down, fsynced, that nothing here resumes this guest ever again; where.
    pub(super) fn release(&mut self, session: u64, owner_epoch: OwnerEpoch) -> Result<PathBuf, ReleaseError> {
        let record = ReleaseRecord::new(self.identity.migration, session, owner_epoch.0, self.written.to.clone());
        record.write(&self.state_dir)
    }

    /// Makes sure that nobody takes over any more, without a word on disk: memory without names cannot be found again. Who has it
    /// mapped keeps it.
    pub fn give_up_memory(&mut self) -> std::io::Result<()> {
        match (self.memory.take(), &self.written.memory) {
            (Some(memory), _) => memory.folder.remove(),
            // Of an earlier process, which nobody needs to look into.
            (None, Some(path)) if path.exists() => MemoryFolder::open(path).map_err(std::io::Error::other)?.remove(),
            (None, _) => Ok(()),
        }
    }

    /// The migration has come to an end that leaves nothing to be taken over.
    pub fn close(mut self) -> Result<(), KeepError> {
        self.give_up_memory().map_err(|source| KeepError::Io { doing: "remove a migration's memory", source })?;
        Ok(self.journal.remove()?)
    }
}

/// What is there to go on with.
pub(super) struct LeftBehind {
    pub ring: Arc<Mapping>,
    pub owner_region: Arc<Mapping>,
    pub catch: Catch,
}

/// What a record of a guest of these blocks is held against.
pub(super) fn limits(blocks: &[RamBlock]) -> Limits {
    Limits::for_regions(blocks.iter().map(|block| (block.id, (block.file.len() / PAGE_SIZE) as u64)))
}

impl Memory {
    fn create(directory: &Path, id: MigrationId) -> Result<Self, KeepError> {
        let folder = MemoryFolder::create(directory, id)?;
        let made = KeptState::create(&folder).map_err(KeepError::from).and_then(|state| {
            let (mark, _) = state.mark().map_err(|damaged| KeepError::Damaged { id, what: damaged.to_string() })?;
            Ok((state, mark))
        });
        match made {
            Ok((state, mark)) => Ok(Self { folder, state, mark }),
            Err(error) => {
                let _ = folder.remove();
                Err(error)
            }
        }
    }

    fn open(path: &Path, id: MigrationId) -> Result<(Self, Option<Marked>), KeepError> {
        let failed = |source| KeepError::Memory { id, path: path.to_owned(), source };
        let damaged = |damaged: Damaged| KeepError::Damaged { id, what: damaged.to_string() };
        if !path.exists() {
            let why = format!("{} is gone; the host was started anew, or somebody removed it", path.display());
            return Err(KeepError::NothingLeft { id, why });
        }
        let folder = MemoryFolder::open(path).map_err(failed)?;
        let state = KeptState::open(&folder).map_err(failed)?.map_err(damaged)?;
        let (mark, value) = state.mark().map_err(damaged)?;
        let marked = match value {
            None => None,
            Some(bytes) => {
                Some(protocol::decode(&bytes).map_err(|error| KeepError::Damaged { id, what: explain(&error) })?)
            }
        };
        Ok((Self { folder, state, mark }, marked))
    }
}

/// What a process could do with what is listed.
#[derive(Debug, PartialEq)]
enum Standing {
    /// Take it over, or at least say what is wrong with it.
    Takeable,
    /// Nothing: it can be removed.
    Nothing,
    /// Nothing; kept for whoever wants to look, or just being made.
    Leave,
}

fn standing(state_dir: &Path, listed: &Listed) -> Standing {
    let body = match &listed.body {
        Err(_) => return Standing::Takeable,
        Ok(None) => return Standing::Leave,
        Ok(Some(body)) => body,
    };
    let Ok(written) = protocol::decode::<Written>(body) else { return Standing::Takeable };
    if !matches!(ReleaseRecord::find(state_dir, listed.id), Ok(None)) {
        return Standing::Takeable;
    }
    match (&written.proposal, &written.memory) {
        (None, _) | (_, None) => Standing::Nothing,
        (Some(_), Some(path)) => match Memory::open(path, listed.id) {
            Err(KeepError::NothingLeft { .. }) => Standing::Nothing,
            Err(_) => Standing::Takeable,
            Ok((_, marked)) => match marked.map(|marked| marked.state) {
                None | Some(State::Running { .. }) => Standing::Nothing,
                Some(State::Lost { .. } | State::Ceded { .. }) => Standing::Leave,
                Some(_) => Standing::Takeable,
            },
        },
    }
}

fn only_one(state_dir: &Path) -> Result<MigrationId, KeepError> {
    let takeable = list(state_dir)?.into_iter().filter(|listed| standing(state_dir, listed) == Standing::Takeable);
    let (mut free, mut held): (Vec<_>, Vec<_>) = takeable.partition(|listed| listed.holder.is_none());
    match (free.len(), held.pop()) {
        (1, _) => Ok(free.remove(0).id),
        (0, None) => Err(KeepError::None(state_dir.to_owned())),
        (0, Some(one)) => {
            let holder = one.holder.unwrap_or_default();
            Err(JournalError::Held { id: one.id, holder }.into())
        }
        _ => Err(KeepError::Several(free.into_iter().map(|listed| listed.id).collect())),
    }
}

/// Removes what processes left of which nothing can be taken over: memory is not to be held for nobody.
pub fn sweep(state_dir: &Path) {
    let Ok(all) = list(state_dir) else { return };
    for listed in
        all.iter().filter(|listed| listed.holder.is_none() && standing(state_dir, listed) == Standing::Nothing)
    {
        let Ok((journal, Some(body))) = Journal::open(state_dir, listed.id) else { continue };
        let memory = protocol::decode::<Written>(&body).ok().and_then(|written| written.memory);
        if let Some(folder) = memory.and_then(|path| MemoryFolder::open(&path).ok()) {
            let _ = folder.remove();
        }
        let _ = journal.remove();
    }
}

impl From<SpoolError> for SourceError {
    fn from(error: SpoolError) -> Self {
        Self::Spool(error)
    }
}

impl From<FoldError> for SourceError {
    fn from(error: FoldError) -> Self {
        match error {
            FoldError::Ring(error) => Self::Ring(error),
            error => Self::Fold(error),
        }
    }
}

/// A guest that is the destination's. Nothing here asks anything of it; whoever did would be told.
pub struct GivenAway;

impl GivenAway {
    fn refuse<T>(call: &'static str) -> Result<T, GuestError> {
        Err(GuestError::WrongState { call, state: "released", wanted: "here" })
    }
}

impl Guest for GivenAway {
    fn pause(&mut self, _: Deadline) -> Result<(), GuestError> {
        Self::refuse("pausing")
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        Self::refuse("resuming")
    }

    fn save(&mut self, _: &mut Vec<u8>) -> Result<(), GuestError> {
        Self::refuse("saving")
    }

    fn load(&mut self, _: &[u8]) -> Result<(), GuestError> {
        Self::refuse("loading")
    }

    fn set_incarnation(&mut self, _: u64) -> Result<(), GuestError> {
        Self::refuse("a new incarnation")
    }

    fn memory(&self) -> &[RamBlock] {
        &[]
    }

    fn tracker(&mut self, _: TrackerKind) -> Result<Box<dyn DirtyTracker>, GuestError> {
        Self::refuse("tracking")
    }

    fn device_writes(&mut self, _: &mut DirtySet) -> Result<(), GuestError> {
        Self::refuse("asking for device writes")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migrate::golden::proposal;

    #[test]
    fn a_migration_under_another_protocol_is_not_taken_over_and_stays_as_it_was() {
        let directory = tempfile::tempdir().expect("a directory");
        let identity = Identity::random().expect("randomness");
        let journal = |proposal: Proposal| {
            let mut keep = Keep::begin(directory.path(), None, identity).expect("begun");
            keep.agree("192.0.2.1:7700".to_owned(), proposal, &[], Vec::new()).expect("agreed");
            std::fs::read(keep.journal.path()).expect("written")
        };
        let other = PROTOCOL_VERSION + 1;
        let before = journal(Proposal { protocol: other, ..proposal() });
        let error = Keep::take_over(directory.path(), Some(identity.migration)).expect_err("nobody speaks it");
        assert!(matches!(error, KeepError::OtherProtocol { found, .. } if found == other), "{error}");
        let (journal, _) = Journal::open(directory.path(), identity.migration).expect("it is free again");
        assert_eq!(std::fs::read(journal.path()).expect("still there"), before);
        // Of one that was released nothing is said to anybody: the record stands.
        ReleaseRecord::new(identity.migration, 7, 3, String::new()).write(directory.path()).expect("written");
        drop(journal);
        assert!(Keep::take_over(directory.path(), Some(identity.migration)).expect("released").is_released());
    }
}
