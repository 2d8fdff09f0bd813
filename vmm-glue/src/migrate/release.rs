//! The release record: the source's written word that it will never resume this guest (P6). It stands whatever else is kept of the
//! migration ([`super::source::keep`]), and before all of it: who takes over asks for it first.

use super::observation::monotonic_us;
use belay_checkpoint::journal::MigrationId;
use belay_transport::harmless;
use belay_transport::stop_point::reached;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// What is written down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseRecord {
    /// Which migration.
    pub migration: String,
    /// Nonce of the session in which the guest was released.
    pub session_nonce: u64,
    /// The owner epoch the destination had it under.
    pub owner_epoch: u64,
    pub to: String,
    /// CLOCK_MONOTONIC of this host, microseconds.
    pub at_us: u64,
}

/// Why a release could not be written down.
#[derive(Debug, thiserror::Error)]
pub enum ReleaseError {
    /// It is certain that no record is on disk: the release may be refused.
    #[error("cannot write the release record {path}; it is not on disk")]
    NotWritten {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// It may or may not survive a power failure: the guest must not be resumed here until a person has looked.
    #[error("cannot make sure that the release record {path} is on disk, nor that it is not")]
    Unknown {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl ReleaseRecord {
    /// A record of now.
    pub fn new(migration: MigrationId, session_nonce: u64, owner_epoch: u64, to: String) -> Self {
        Self { migration: migration.to_string(), session_nonce, owner_epoch, to, at_us: monotonic_us() }
    }

    fn path(state_dir: &Path, migration: &str) -> PathBuf {
        state_dir.join(format!("released-{migration}.json"))
    }

    /// The record of a migration, if it was released. One that is there and cannot be read is an error: the guest may have been released.
    pub fn find(state_dir: &Path, migration: MigrationId) -> io::Result<Option<Self>> {
        match fs::read(Self::path(state_dir, &migration.to_string())) {
            Ok(bytes) => Self::parse(&bytes).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn parse(bytes: &[u8]) -> io::Result<Self> {
        serde_json::from_slice(bytes).map_err(|error| io::Error::other(harmless(&error.to_string())))
    }

    fn text(&self) -> io::Result<String> {
        serde_json::to_string_pretty(self).map_err(io::Error::other)
    }

    /// Writes it under `state_dir` and returns once it is on disk, directory entry included; gives the path.
    pub fn write(&self, state_dir: &Path) -> Result<PathBuf, ReleaseError> {
        let path = Self::path(state_dir, &self.migration);
        let draft = path.with_extension("draft");
        let directory = self.draft(state_dir, &draft).map_err(|source| {
            let _ = fs::remove_file(&draft);
            ReleaseError::NotWritten { path: path.clone(), source }
        })?;
        fs::rename(&draft, &path).map_err(|source| ReleaseError::NotWritten { path: path.clone(), source })?;
        reached("release-renamed");
        // From here on the name exists; only a directory that was synced says for how long.
        directory.sync_all().map_err(|source| ReleaseError::Unknown { path: path.clone(), source })?;
        Ok(path)
    }

    fn draft(&self, state_dir: &Path, draft: &Path) -> io::Result<File> {
        fs::create_dir_all(state_dir)?;
        let mut file = File::create(draft)?;
        file.write_all(self.text()?.as_bytes())?;
        reached("release-unsynced");
        file.sync_all()?;
        File::open(state_dir)
    }
}

/// What a fuzz target asks of a release record: one that is believed says the same when it is written again.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz(bytes: &[u8]) {
    match ReleaseRecord::parse(bytes) {
        Ok(record) => {
            let written = record.text().expect("plain data");
            assert_eq!(ReleaseRecord::parse(written.as_bytes()).expect("our own"), record);
        }
        Err(error) => crate::fuzzing::told(&error),
    }
}

/// A record as it is written, for the corpus.
#[cfg(test)]
pub(crate) fn seeds() -> [(&'static str, Vec<u8>); 1] {
    let record = ReleaseRecord {
        migration: MigrationId([7; 8]).to_string(),
        session_nonce: 7,
        owner_epoch: 3,
        to: "192.0.2.1:7700".to_owned(),
        at_us: 1234,
    };
    [("release-record", [&[2], record.text().expect("plain data").as_bytes()].concat())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_on_disk_when_write_returns_and_reads_back_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let record = ReleaseRecord::new(MigrationId([7; 8]), 7, 0, "127.0.0.1:7700".into());
        let path = record.write(&directory.path().join("state")).unwrap();
        let read: ReleaseRecord = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(read, record);
        assert_eq!(ReleaseRecord::find(&directory.path().join("state"), MigrationId([7; 8])).unwrap(), Some(record));
        assert_eq!(ReleaseRecord::find(directory.path(), MigrationId([7; 8])).unwrap(), None);
        fs::write(&path, b"{ half").unwrap();
        assert!(
            ReleaseRecord::find(&directory.path().join("state"), MigrationId([7; 8])).is_err(),
            "it may have been released"
        );
        assert!(!path.with_extension("draft").exists());
    }

    #[test]
    fn a_release_that_cannot_be_written_says_that_it_is_not_on_disk() {
        let directory = tempfile::tempdir().unwrap();
        let blocked = directory.path().join("file");
        fs::write(&blocked, b"in the way").unwrap();
        let error = ReleaseRecord::new(MigrationId([7; 8]), 7, 0, String::new()).write(&blocked).unwrap_err();
        assert!(matches!(error, ReleaseError::NotWritten { .. }), "{error}");
    }
}
