//! Getting at the two libraries: which files they are, and why they cannot be had.

use libc::c_void;
use std::ffi::{CStr, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// The libraries' names for the loader. The number is their ABI; it has not changed since 2006.
pub const IBVERBS_SONAME: &str = "libibverbs.so.1";
/// As [`IBVERBS_SONAME`].
pub const RDMACM_SONAME: &str = "librdmacm.so.1";

/// How this build reaches the libraries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Build {
    /// Opened at run time, the default.
    Opened,
    /// The executable depends on them (feature `linked`).
    Linked,
    /// rdma-sys stands in for our bindings (feature `rdma-sys`).
    RdmaSys,
}

/// This build's way.
pub const BUILD: Build = if cfg!(feature = "rdma-sys") {
    Build::RdmaSys
} else if cfg!(feature = "linked") {
    Build::Linked
} else {
    Build::Opened
};

/// Why the libraries cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    #[error(
        "{library} cannot be opened ({reason}): install rdma-core's libraries (Debian and Ubuntu: {package} and ibverbs-providers; Fedora and RHEL: libibverbs and librdmacm)"
    )]
    NoLibrary { library: PathBuf, package: &'static str, reason: String },
    #[error("{library} lacks {symbols:?}: it is older than rdma-core 32 or is no {package}; install a newer rdma-core")]
    NoSymbols { library: PathBuf, package: &'static str, symbols: Vec<&'static str> },
}

/// The libraries in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verbs {
    /// The file libibverbs is in, links followed: its name ends in its version.
    pub ibverbs: PathBuf,
    /// The file librdmacm is in, links followed.
    pub rdmacm: PathBuf,
}

impl Verbs {
    /// Found by one function of each.
    pub(crate) fn at(of_ibverbs: *const c_void, of_rdmacm: *const c_void) -> Self {
        Self {
            ibverbs: file_of(of_ibverbs).unwrap_or_else(|| IBVERBS_SONAME.into()),
            rdmacm: file_of(of_rdmacm).unwrap_or_else(|| RDMACM_SONAME.into()),
        }
    }
}

/// The file that the code at `address` was loaded from.
fn file_of(address: *const c_void) -> Option<PathBuf> {
    // SAFETY: a structure of pointers, of which null is one.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: takes any address, and writes only into `info`.
    let found = unsafe { libc::dladdr(address, &raw mut info) } != 0 && !info.dli_fname.is_null();
    // SAFETY: dladdr has set it to a string that lives as long as the library, which is never closed.
    let name = found.then(|| unsafe { CStr::from_ptr(info.dli_fname) })?;
    let path = Path::new(OsStr::from_bytes(name.to_bytes()));
    Some(path.canonicalize().unwrap_or_else(|_| path.to_owned()))
}

/// Makes the libraries ready and says where they are. Succeeds before anything else of this crate is called; a failure is not
/// remembered, so that a library which has been installed meanwhile is found. Any thread may call it, any number of times.
#[cfg(not(any(feature = "linked", feature = "rdma-sys")))]
pub fn load() -> Result<&'static Verbs, LoadError> {
    crate::symbols::Tables::global(Path::new(IBVERBS_SONAME), Path::new(RDMACM_SONAME)).map(|tables| tables.found())
}

/// Says where the libraries are: the loader has found them, or this process would not run.
#[cfg(any(feature = "linked", feature = "rdma-sys"))]
pub fn load() -> Result<&'static Verbs, LoadError> {
    static FOUND: std::sync::OnceLock<Verbs> = std::sync::OnceLock::new();
    Ok(FOUND.get_or_init(|| {
        Verbs::at(crate::symbols::ibv_open_device as *const c_void, crate::symbols::rdma_create_id as *const c_void)
    }))
}

/// Opens the two libraries from given files and finds every function in them, without using them for any call: for those
/// who want to know what would happen.
#[cfg(not(any(feature = "linked", feature = "rdma-sys")))]
pub fn try_open(ibverbs: &Path, rdmacm: &Path) -> Result<Verbs, LoadError> {
    crate::symbols::Tables::open(ibverbs, rdmacm).map(|tables| tables.found().clone())
}

#[cfg(not(any(feature = "linked", feature = "rdma-sys")))]
pub(crate) use opened::Opened;

#[cfg(not(any(feature = "linked", feature = "rdma-sys")))]
mod opened {
    use super::LoadError;
    use libc::c_void;
    use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
    use std::ffi::CStr;
    use std::path::{Path, PathBuf};
    use std::ptr::NonNull;

    /// A library that was opened, and stays open while the process lives: device drivers behind it start threads and leave
    /// handlers that must not lose their code.
    pub(crate) struct Opened {
        handle: *mut c_void,
        library: PathBuf,
        package: &'static str,
    }

    impl Opened {
        /// `library` is a path, or a name for the loader to look for; `package` has it.
        pub(crate) fn open(library: &Path, package: &'static str) -> Result<Self, LoadError> {
            // SAFETY: runs the library's initializers. They set up state of their own only.
            let opened = unsafe { Library::open(Some(library), RTLD_NOW | RTLD_LOCAL) };
            let opened = opened.map_err(|error| LoadError::NoLibrary {
                library: library.to_owned(),
                package,
                reason: error.to_string(),
            })?;
            Ok(Self { handle: opened.into_raw(), library: library.to_owned(), package })
        }

        /// A symbol in exactly that version: the library's default one may become a newer one some day.
        #[cfg(target_env = "gnu")]
        pub(crate) fn symbol(&self, name: &CStr, version: &CStr) -> Option<NonNull<c_void>> {
            // SAFETY: an open library and two strings.
            NonNull::new(unsafe { libc::dlvsym(self.handle, name.as_ptr(), version.as_ptr()) })
        }

        /// A symbol in the library's default version; this C library's loader knows no other.
        #[cfg(not(target_env = "gnu"))]
        pub(crate) fn symbol(&self, name: &CStr, _version: &CStr) -> Option<NonNull<c_void>> {
            // SAFETY: an open library and a string.
            NonNull::new(unsafe { libc::dlsym(self.handle, name.as_ptr()) })
        }

        /// The error for symbols it does not have.
        pub(crate) fn lacks(&self, symbols: Vec<&'static str>) -> LoadError {
            LoadError::NoSymbols { library: self.library.clone(), package: self.package, symbols }
        }
    }
}
