//! The release record: the source's written word that it will never resume this guest (P6).

use super::observation::monotonic_us;
use belay_transport::stop_point::reached;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// What is written down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseRecord {
    /// Nonce of the session in which the guest went.
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
    pub fn new(session_nonce: u64, owner_epoch: u64, to: String) -> Self {
        Self { session_nonce, owner_epoch, to, at_us: monotonic_us() }
    }

    /// Writes it under `state_dir` and returns once it is on disk, directory entry included; gives the path.
    pub fn write(&self, state_dir: &Path) -> Result<PathBuf, ReleaseError> {
        let path = state_dir.join(format!("released-{:016x}.json", self.session_nonce));
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
        file.write_all(serde_json::to_string_pretty(self).map_err(io::Error::other)?.as_bytes())?;
        reached("release-unsynced");
        file.sync_all()?;
        File::open(state_dir)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_on_disk_when_write_returns_and_reads_back_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let record = ReleaseRecord::new(7, 0, "127.0.0.1:7700".into());
        let path = record.write(&directory.path().join("state")).unwrap();
        let read: ReleaseRecord = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(read, record);
        assert!(!path.with_extension("draft").exists());
    }

    #[test]
    fn a_release_that_cannot_be_written_says_that_it_is_not_on_disk() {
        let directory = tempfile::tempdir().unwrap();
        let blocked = directory.path().join("file");
        fs::write(&blocked, b"in the way").unwrap();
        let error = ReleaseRecord::new(7, 0, String::new()).write(&blocked).unwrap_err();
        assert!(matches!(error, ReleaseError::NotWritten { .. }), "{error}");
    }
}
