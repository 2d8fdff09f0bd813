//! Why guest RAM could not be made, opened, mapped or allocated. The texts say what to do, because they reach operators.

use crate::units::PageSize;
use std::io;
use std::path::PathBuf;

/// Why a RAM file could not be used.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    #[error("a region of {len} bytes is not a whole, positive number of {page_size} pages")]
    BadLength { len: u64, page_size: PageSize },
    #[error(
        "{needed} huge pages of 2 MiB are needed and {free} are free; reserve them with `sysctl vm.nr_hugepages={advice}` \
         (or `echo {advice} > /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages`)"
    )]
    NoHugePages {
        needed: u64,
        free: u64,
        /// What nr_hugepages has to be so that `needed` more fit.
        advice: u64,
    },
    #[error(
        "{path} is on {filesystem}: guest RAM must lie on tmpfs or hugetlbfs, because only their pages can be shared \
         with a userfaultfd that reports minor faults (try a path under /dev/shm)"
    )]
    WrongFileSystem { path: PathBuf, filesystem: String },
    #[error("{path} is on {backing} pages and {asked} pages were asked for")]
    WrongPageSize { path: PathBuf, backing: String, asked: PageSize },
    #[error("out of memory or of space after {done} of {len} bytes were allocated")]
    NoSpace {
        done: u64,
        len: u64,
        #[source]
        source: io::Error,
    },
    #[error("{path} needs {needed} bytes, and {free} are free in its file system")]
    NoRoom { path: PathBuf, needed: u64, free: u64 },
    #[error("{doing}")]
    Io {
        doing: String,
        #[source]
        source: io::Error,
    },
}

impl RegionError {
    pub(super) fn io(doing: impl Into<String>) -> impl FnOnce(rustix::io::Errno) -> Self {
        let doing = doing.into();
        move |errno| Self::Io { doing, source: errno.into() }
    }
}

impl From<RegionError> for io::Error {
    fn from(error: RegionError) -> Self {
        Self::other(error)
    }
}
