//! A folder of a run's own, gone with it however that ends.

use crate::error::BenchError;
use crate::leavings::{self, Remembered};
use std::fs;
use std::path::{Path, PathBuf};

/// See the module.
pub struct Folder {
    path: PathBuf,
    /// Forgotten once it is gone.
    _remembered: Remembered,
}

impl Folder {
    /// Makes `bench-SUITE-PID` in `parent`.
    pub fn make(parent: &Path, suite: &str) -> Result<Self, BenchError> {
        let path = parent.join(format!("bench-{suite}-{}", std::process::id()));
        fs::create_dir(&path).map_err(BenchError::io("make a folder for this run"))?;
        let remembered = leavings::path(&path);
        Ok(Self { path, _remembered: remembered })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}
