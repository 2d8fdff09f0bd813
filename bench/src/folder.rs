//! A folder of a run's own, gone with it.

use crate::error::BenchError;
use std::fs;
use std::path::{Path, PathBuf};

/// See the module.
pub struct Folder(PathBuf);

impl Folder {
    /// Makes `bench-SUITE-PID` in `parent`.
    pub fn make(parent: &Path, suite: &str) -> Result<Self, BenchError> {
        let path = parent.join(format!("bench-{suite}-{}", std::process::id()));
        fs::create_dir(&path).map_err(BenchError::io("make a folder for this run"))?;
        Ok(Self(path))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
