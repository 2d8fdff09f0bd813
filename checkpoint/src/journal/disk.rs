//! The part that survives everything: one small file a migration, and the lock beside it.

use super::MigrationId;
use crc_fast::{CrcAlgorithm, Digest};
use rustix::fs::{FlockOperation, flock};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const MAGIC: [u8; 8] = *b"BELAYJNL";
/// Version of the file. A reader takes its own and no other.
pub(super) const VERSION: u32 = 1;
const HEAD: usize = 32;
/// How long a listing of another process may hold the lock of what it looks at.
const LOOKED_AT: Duration = Duration::from_secs(1);
/// Longest body: a bound on what a damaged length can make a reader do.
const MOST: u64 = 16 << 20;

/// Why a journal could not be made, opened or read.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("cannot {doing} {}", path.display())]
    Io {
        doing: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("migration {id} is held by process {holder}, which runs")]
    Held { id: MigrationId, holder: String },
    #[error("{} is damaged: {what}", path.display())]
    Damaged { path: PathBuf, what: String },
    #[error("{} is a journal of version {found}; this belay reads {VERSION}", path.display())]
    Version { path: PathBuf, found: u32 },
    #[error("{} belongs to uid {owner} and this process runs as {own}: it may have been put there by somebody else", path.display())]
    ForeignOwner { path: PathBuf, owner: u32, own: u32 },
    #[error("there is no migration {id} under {}", state_dir.display())]
    NoSuch { id: MigrationId, state_dir: PathBuf },
}

/// Why something could not be written down.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// It is certain that it is not on disk; what was there before is.
    #[error("cannot write {}; it is not on disk", path.display())]
    NotWritten {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// It may or may not survive a power failure.
    #[error("cannot make sure that {} is on disk, nor that it is not", path.display())]
    Unknown {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// One migration's folder under the state directory, held by this process.
#[derive(Debug)]
pub struct Journal {
    id: MigrationId,
    folder: PathBuf,
    _lock: File,
}

/// A migration that was found under a state directory.
#[derive(Debug)]
pub struct Listed {
    pub id: MigrationId,
    /// The process that has it, if one does.
    pub holder: Option<String>,
    /// What was written down last; `None` where nothing was yet.
    pub body: Result<Option<Vec<u8>>, JournalError>,
}

fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> JournalError {
    let path = path.to_owned();
    move |source| JournalError::Io { doing, path, source }
}

fn migrations(state_dir: &Path) -> PathBuf {
    state_dir.join("migrations")
}

impl Journal {
    /// Makes a new migration's folder and takes its lock.
    pub fn create(state_dir: &Path, id: MigrationId) -> Result<Self, JournalError> {
        let parent = migrations(state_dir);
        let folder = parent.join(id.to_string());
        fs::create_dir_all(state_dir).map_err(io("make", state_dir))?;
        DirBuilder::new().mode(0o700).recursive(true).create(&parent).map_err(io("make", &parent))?;
        DirBuilder::new().mode(0o700).create(&folder).map_err(io("make", &folder))?;
        let lock = take_lock(&folder, id, true)?;
        // The names of the folders, so that what is written inside is found again.
        for directory in [state_dir, &parent] {
            File::open(directory).and_then(|open| open.sync_all()).map_err(io("sync", directory))?;
        }
        Ok(Self { id, folder, _lock: lock })
    }

    /// Takes a migration that another process left, and what it wrote down last.
    pub fn open(state_dir: &Path, id: MigrationId) -> Result<(Self, Option<Vec<u8>>), JournalError> {
        let folder = migrations(state_dir).join(id.to_string());
        match fs::symlink_metadata(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(JournalError::NoSuch { id, state_dir: state_dir.to_owned() });
            }
            Err(source) => return Err(JournalError::Io { doing: "look at", path: folder, source }),
            Ok(metadata) => check_owner(&folder, &metadata)?,
        }
        let lock = take_lock(&folder, id, false)?;
        let body = read(&folder)?;
        Ok((Self { id, folder, _lock: lock }, body))
    }

    /// Which migration.
    pub fn id(&self) -> MigrationId {
        self.id
    }

    /// The file that [`Journal::write`] writes.
    pub fn path(&self) -> PathBuf {
        self.folder.join("journal")
    }

    /// Replaces what is written down, and returns once it is on disk, directory entry included.
    pub fn write(&self, body: &[u8]) -> Result<(), WriteError> {
        let path = self.path();
        let draft = self.folder.join("journal.draft");
        let directory = self.draft(&draft, body).map_err(|source| {
            let _ = fs::remove_file(&draft);
            WriteError::NotWritten { path: path.clone(), source }
        })?;
        fs::rename(&draft, &path).map_err(|source| WriteError::NotWritten { path: path.clone(), source })?;
        // From here on it is there; only a directory that was synced says for how long.
        directory.sync_all().map_err(|source| WriteError::Unknown { path, source })
    }

    fn draft(&self, draft: &Path, body: &[u8]) -> io::Result<File> {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(draft)?;
        file.write_all(&[&header(body)[..], body].concat())?;
        file.sync_all()?;
        File::open(&self.folder)
    }

    /// The migration is over and nothing of it is needed: its folder goes.
    pub fn remove(self) -> Result<(), JournalError> {
        fs::remove_dir_all(&self.folder).map_err(io("remove", &self.folder))
    }
}

/// What stands before a body.
fn header(body: &[u8]) -> [u8; HEAD] {
    let mut head = [0; HEAD];
    head[..8].copy_from_slice(&MAGIC);
    head[8..12].copy_from_slice(&VERSION.to_le_bytes());
    head[16..24].copy_from_slice(&(body.len() as u64).to_le_bytes());
    head[24..].copy_from_slice(&crc(body).to_le_bytes());
    head
}

fn crc(body: &[u8]) -> u64 {
    let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
    digest.update(&VERSION.to_le_bytes());
    digest.update(&(body.len() as u64).to_le_bytes());
    digest.update(body);
    digest.finalize()
}

/// A journal tells where secrets and guest memory are, so it is believed only if it is our own.
fn check_owner(path: &Path, metadata: &fs::Metadata) -> Result<(), JournalError> {
    let (owner, own) = (metadata.uid(), rustix::process::geteuid().as_raw());
    if owner == own { Ok(()) } else { Err(JournalError::ForeignOwner { path: path.to_owned(), owner, own }) }
}

fn take_lock(folder: &Path, id: MigrationId, new: bool) -> Result<File, JournalError> {
    let path = folder.join("lock");
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let mut file = options.open(&path).map_err(io("open", &path))?;
    // Whoever lists what there is looks at a folder that is just being made, too.
    let end = Instant::now() + if new { LOOKED_AT } else { Duration::ZERO };
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => break,
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < end => std::thread::sleep(Duration::from_millis(1)),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut holder = String::new();
                let _ = file.take(16).read_to_string(&mut holder);
                return Err(JournalError::Held { id, holder });
            }
            Err(errno) => return Err(io("lock", &path)(errno.into())),
        }
    }
    // For whoever finds it held; a full disk must not keep anybody from taking over.
    let _ = file.set_len(0).and_then(|()| file.write_all(std::process::id().to_string().as_bytes()));
    Ok(file)
}

fn read(folder: &Path) -> Result<Option<Vec<u8>>, JournalError> {
    let path = folder.join("journal");
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(JournalError::Io { doing: "open", path, source }),
    };
    check_owner(&path, &file.metadata().map_err(io("look at", &path))?)?;
    let mut bytes = Vec::new();
    file.take(HEAD as u64 + MOST + 1).read_to_end(&mut bytes).map_err(io("read", &path))?;
    parse(&path, &bytes).map(Some)
}

fn parse(path: &Path, bytes: &[u8]) -> Result<Vec<u8>, JournalError> {
    let damaged = |what: String| JournalError::Damaged { path: path.to_owned(), what };
    let Some((head, body)) = bytes.split_at_checked(HEAD) else {
        return Err(damaged(format!("it has {} bytes and its header alone {HEAD}", bytes.len())));
    };
    let word = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("eight bytes"));
    if head[..8] != MAGIC {
        return Err(damaged("it does not begin as a journal does".to_owned()));
    }
    let version = word(8) as u32;
    if word(8) >> 32 != 0 || word(16) != body.len() as u64 || word(24) != crc(body) {
        // A later version may have another header; it says so in the same place.
        if version != VERSION && word(8) >> 32 == 0 && version.abs_diff(VERSION) < 16 && word(16) == body.len() as u64 {
            return Err(JournalError::Version { path: path.to_owned(), found: version });
        }
        return Err(damaged(format!("length or checksum of its {} bytes is wrong", bytes.len())));
    }
    if version != VERSION {
        return Err(damaged(format!("its version says {version} and its checksum {VERSION}")));
    }
    Ok(body.to_vec())
}

/// Every migration under `state_dir`, in no order. A directory that is not there has none.
pub fn list(state_dir: &Path) -> Result<Vec<Listed>, JournalError> {
    let parent = migrations(state_dir);
    let entries = match fs::read_dir(&parent) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(JournalError::Io { doing: "read", path: parent, source }),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(io("read", &parent))?;
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        found.push(match Journal::open(state_dir, id) {
            Ok((_, body)) => Listed { id, holder: None, body: Ok(body) },
            Err(JournalError::Held { holder, .. }) => Listed { id, holder: Some(holder), body: read(&entry.path()) },
            Err(error) => Listed { id, holder: None, body: Err(error) },
        });
    }
    Ok(found)
}

/// What a fuzz target asks of a journal's bytes: what is taken is exactly what would be written; with `sealed`, the head is made to fit first.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz(bytes: &[u8], sealed: bool) {
    let mut bytes = bytes.to_vec();
    if sealed && let Some((head, body)) = bytes.split_at_mut_checked(HEAD) {
        head.copy_from_slice(&header(body));
    }
    let parsed = parse(Path::new("journal"), &bytes);
    assert!(!sealed || bytes.len() < HEAD || parsed.is_ok(), "what is right was refused");
    match parsed {
        Ok(body) => assert_eq!([&header(&body)[..], &body].concat(), bytes),
        Err(error) => assert!(error.to_string().len() < 400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(byte: u8) -> MigrationId {
        MigrationId([byte; 8])
    }

    #[test]
    fn what_was_written_last_is_what_the_next_process_reads() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        let journal = Journal::create(&state, id(7)).unwrap();
        journal.write(b"agreed").unwrap();
        journal.write(b"released").unwrap();
        assert!(!journal.folder.join("journal.draft").exists());
        let mode = fs::metadata(journal.path()).unwrap().mode() & 0o777;
        assert_eq!(mode, 0o600, "it holds a secret");
        drop(journal);
        let (journal, body) = Journal::open(&state, id(7)).unwrap();
        assert_eq!(body.as_deref(), Some(&b"released"[..]));
        journal.remove().unwrap();
        assert!(list(&state).unwrap().is_empty());
        assert!(matches!(Journal::open(&state, id(7)), Err(JournalError::NoSuch { .. })));
    }

    #[test]
    fn two_processes_never_hold_the_same_migration() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::create(directory.path(), id(1)).unwrap();
        journal.write(b"x").unwrap();
        let Err(JournalError::Held { holder, .. }) = Journal::open(directory.path(), id(1)) else {
            panic!("it is held")
        };
        assert_eq!(holder, std::process::id().to_string());
        assert!(Journal::create(directory.path(), id(1)).is_err(), "nor is it made twice");
        let listed = list(directory.path()).unwrap();
        assert_eq!(listed[0].holder.as_deref(), Some(&*std::process::id().to_string()));
        drop(journal);
        assert!(list(directory.path()).unwrap()[0].holder.is_none());
        Journal::open(directory.path(), id(1)).unwrap();
    }

    #[test]
    fn a_write_cut_short_leaves_what_was_there_and_a_flipped_bit_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::create(directory.path(), id(2)).unwrap();
        journal.write(b"what was agreed").unwrap();
        // A death in the middle of the next one: a draft of any length, not yet renamed.
        fs::write(journal.folder.join("journal.draft"), b"BELAYJNLhalf").unwrap();
        let path = journal.path();
        drop(journal);
        let (journal, body) = Journal::open(directory.path(), id(2)).unwrap();
        assert_eq!(body.as_deref(), Some(&b"what was agreed"[..]));
        journal.write(b"goes on").unwrap();
        drop(journal);
        let whole = fs::read(&path).unwrap();
        for byte in 0..whole.len() {
            for bit in 0..8 {
                let mut flipped = whole.clone();
                flipped[byte] ^= 1 << bit;
                fs::write(&path, &flipped).unwrap();
                let error = Journal::open(directory.path(), id(2)).expect_err("a flipped bit");
                let refused = matches!(error, JournalError::Damaged { .. } | JournalError::Version { .. });
                assert!(refused, "bit {bit} of byte {byte}: {error}");
            }
        }
        for len in 0..whole.len() {
            fs::write(&path, &whole[..len]).unwrap();
            assert!(matches!(Journal::open(directory.path(), id(2)), Err(JournalError::Damaged { .. })), "{len} bytes");
        }
    }

    #[test]
    fn what_cannot_be_written_is_said_not_to_be_on_disk() {
        let directory = tempfile::tempdir().unwrap();
        let in_the_way = directory.path().join("file");
        fs::write(&in_the_way, b"in the way").unwrap();
        assert!(matches!(Journal::create(&in_the_way, id(3)), Err(JournalError::Io { .. })));
        let journal = Journal::create(directory.path(), id(3)).unwrap();
        fs::remove_dir_all(&journal.folder).unwrap();
        let error = journal.write(b"x").unwrap_err();
        assert!(matches!(error, WriteError::NotWritten { .. }), "{error}");
    }

    #[test]
    fn a_later_version_is_named() {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&2u64.to_le_bytes());
        bytes.extend_from_slice(&0u64.to_le_bytes());
        bytes.extend_from_slice(&1234u64.to_le_bytes());
        let error = parse(Path::new("journal"), &bytes).unwrap_err();
        assert!(matches!(error, JournalError::Version { found: 2, .. }), "{error}");
    }
}
