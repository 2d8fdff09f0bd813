//! Where the sockets of running belay processes lie, and who may be there.
//!
//! One socket a process, `ID.sock`, mode 0600, in a directory that nobody but its owner (us, or root) may write to. Binding and the
//! removal of what dead processes have left go under one flock(2), so that nobody takes a socket away that another has just made.
//! A socket that refuses connections has no process behind it: one that is only slow, stopped or crowded does not refuse.

use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longest id. A socket's path may have 107 bytes in all.
const LONGEST_ID: usize = 64;
/// Sockets looked at in one directory.
const MOST_SOCKETS: usize = 1024;
/// Directories in it that are looked into.
const MOST_INNER: usize = 256;
/// How long the directory's lock is waited for; whoever has it does a few system calls under it.
const LOCK_BOUND: Duration = Duration::from_secs(5);

/// Why there is no socket, or why none was looked for.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    #[error(
        "`{0}` cannot be a name: 1 to {LONGEST_ID} letters, digits, dots, dashes and underscores, the first no dot or dash"
    )]
    Name(String),
    #[error("cannot {doing} {path}")]
    Io {
        doing: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "{path} is owned by user {owner} and has mode {mode:03o}: whoever may write there could stand in for belay"
    )]
    Unsafe { path: PathBuf, owner: u32, mode: u32 },
    #[error("{path}: a belay process of that name runs already")]
    Taken { path: PathBuf },
    #[error("{path}: another belay process has the lock and does not give it back")]
    Locked { path: PathBuf },
    #[error("{path} is too long for a socket: choose a shorter --run-dir or --name")]
    TooLong { path: PathBuf },
}

/// Whether `id` can be a name.
pub fn check_id(id: &str) -> Result<(), PlaceError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let good = (1..=LONGEST_ID).contains(&id.len()) && id.chars().all(plain) && !id.starts_with(['.', '-']);
    good.then_some(()).ok_or_else(|| PlaceError::Name(id.to_owned()))
}

/// The directory of sockets.
#[derive(Debug, Clone)]
pub struct Place(PathBuf);

impl Place {
    /// The place at `path`, made if need be with mode 0700; an existing one must be nobody else's to write to.
    pub fn make(path: &Path) -> Result<Self, PlaceError> {
        let doing = |doing| move |source| PlaceError::Io { doing, path: path.to_owned(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(doing("make"))?;
        let place = Self::at(path)?.ok_or_else(|| doing("find")(io::ErrorKind::NotFound.into()))?;
        let owner = fs::metadata(path).map_err(doing("look at"))?.uid();
        match owner == rustix::process::geteuid().as_raw() || owner == 0 {
            true => Ok(place),
            false => Err(PlaceError::Unsafe { path: path.to_owned(), owner, mode: 0o700 }),
        }
    }

    /// The place at `path`, if it is there: to be looked into. Root looks into any user's, if nobody else may write there.
    pub fn at(path: &Path) -> Result<Option<Self>, PlaceError> {
        let facts = match fs::symlink_metadata(path) {
            Ok(facts) => facts,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(PlaceError::Io { doing: "look at", path: path.to_owned(), source }),
        };
        // A link may lead anywhere; only what it leads to counts, and that is asked for below.
        let facts = if facts.is_symlink() { fs::metadata(path).unwrap_or(facts) } else { facts };
        let (owner, mode) = (facts.uid(), facts.mode() & 0o777);
        let own = rustix::process::geteuid();
        let ours = owner == own.as_raw() || owner == 0 || own.is_root();
        if !facts.is_dir() || !ours || mode & 0o022 != 0 {
            return Err(PlaceError::Unsafe { path: path.to_owned(), owner, mode });
        }
        Ok(Some(Self(path.to_owned())))
    }

    /// Directories in it that are places too: those of services that run as users of their own.
    pub fn inner(&self) -> Vec<Self> {
        let entries = fs::read_dir(&self.0).into_iter().flatten().flatten();
        let inner = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).take(MOST_INNER);
        inner.filter_map(|entry| Self::at(&entry.path()).ok().flatten()).collect()
    }

    /// Where the socket of `id` is.
    pub fn socket(&self, id: &str) -> PathBuf {
        self.0.join(format!("{id}.sock"))
    }

    /// The ids that have a socket, in order.
    pub fn ids(&self) -> Result<Vec<String>, PlaceError> {
        let entries =
            fs::read_dir(&self.0).map_err(|source| PlaceError::Io { doing: "list", path: self.0.clone(), source })?;
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let ids = names.filter_map(|name| name.strip_suffix(".sock").map(str::to_owned));
        let mut ids: Vec<_> = ids.filter(|id| check_id(id).is_ok()).take(MOST_SOCKETS).collect();
        ids.sort();
        Ok(ids)
    }

    fn lock(&self) -> Result<OwnedFd, PlaceError> {
        let path = self.0.join(".lock");
        let failed = |source: Errno| PlaceError::Io { doing: "lock", path: path.clone(), source: source.into() };
        let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR).map_err(failed)?;
        let end = Instant::now() + LOCK_BOUND;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(file),
                Err(Errno::WOULDBLOCK) if Instant::now() < end => std::thread::sleep(Duration::from_millis(2)),
                Err(Errno::WOULDBLOCK) => return Err(PlaceError::Locked { path }),
                Err(error) => return Err(failed(error)),
            }
        }
    }

    /// Removes the sockets of processes that have ended; their ids.
    pub fn sweep(&self) -> Result<Vec<String>, PlaceError> {
        if !self.ids()?.iter().any(|id| is_dead(&self.socket(id))) {
            return Ok(Vec::new());
        }
        let _lock = self.lock()?;
        let mut dead = self.ids()?;
        dead.retain(|id| is_dead(&self.socket(id)) && fs::remove_file(self.socket(id)).is_ok());
        Ok(dead)
    }

    /// Makes the socket of `id`, which nobody but this user and root can connect to.
    pub fn bind(&self, id: &str) -> Result<Bound, PlaceError> {
        check_id(id)?;
        let path = self.socket(id);
        SocketAddrUnix::new(&path).map_err(|_| PlaceError::TooLong { path: path.clone() })?;
        let failed = |doing, path: &Path| {
            let path = path.to_owned();
            move |source| PlaceError::Io { doing, path, source }
        };
        // What others have left is no reason not to start.
        let _ = self.sweep();
        let _lock = self.lock()?;
        if path.symlink_metadata().is_ok() {
            if !is_dead(&path) {
                return Err(PlaceError::Taken { path });
            }
            fs::remove_file(&path).map_err(failed("remove the socket of a process that has ended,", &path))?;
        }
        // Its name is there only once its mode is right.
        let draft = self.0.join(format!(".{}", std::process::id()));
        let _ = fs::remove_file(&draft);
        let listener = UnixListener::bind(&draft).map_err(failed("make the socket", &path))?;
        let named =
            fs::set_permissions(&draft, fs::Permissions::from_mode(0o600)).and_then(|()| fs::rename(&draft, &path));
        if let Err(source) = named {
            let _ = fs::remove_file(&draft);
            return Err(failed("name the socket", &path)(source));
        }
        // Held open, so that its inode number is nobody else's meanwhile.
        let pinned = rustix::fs::open(&path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
        let pinned = pinned.map_err(io::Error::from).map_err(failed("look at", &path))?;
        Ok(Bound { listener: Some(listener), name: Name { place: self.clone(), path, pinned } })
    }
}

/// A socket under its name.
pub struct Bound {
    listener: Option<UnixListener>,
    pub name: Name,
}

impl Bound {
    /// The listener, and the name, which is taken away when dropped.
    pub fn split(mut self) -> (UnixListener, Name) {
        (self.listener.take().expect("taken once"), self.name)
    }
}

/// The name of a socket; taken away when dropped, if it is still this process's.
#[derive(Debug)]
pub struct Name {
    place: Place,
    path: PathBuf,
    pinned: OwnedFd,
}

impl Name {
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        let _lock = self.place.lock();
        let ours = rustix::fs::fstat(&self.pinned).map(|facts| facts.st_ino);
        if fs::symlink_metadata(&self.path).is_ok_and(|facts| Ok(facts.ino()) == ours) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Connects within `bound`. A listener that is stopped and has its queue full would hold a blocking connect for ever.
pub fn dial(path: &Path, bound: Duration) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let end = Instant::now() + bound;
    loop {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        match connect(&socket, &address) {
            Ok(()) => {
                let stream = UnixStream::from(socket);
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(Errno::AGAIN) if Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
            Err(Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether nobody listens at `path` any more.
fn is_dead(path: &Path) -> bool {
    matches!(dial(path, Duration::ZERO), Err(error) if error.kind() == io::ErrorKind::ConnectionRefused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_ours_alone_and_goes_with_its_process() {
        let directory = tempfile::tempdir().unwrap();
        let place = Place::make(&directory.path().join("run/belay")).unwrap();
        assert_eq!(fs::metadata(&place.0).unwrap().mode() & 0o777, 0o700);
        let bound = place.bind("vm-1").unwrap();
        let (listener, name) = bound.split();
        assert_eq!(fs::metadata(name.path()).unwrap().mode() & 0o777, 0o600);
        assert!(matches!(place.bind("vm-1"), Err(PlaceError::Taken { .. })));
        assert_eq!((place.ids().unwrap(), place.sweep().unwrap()), (vec!["vm-1".to_owned()], vec![]));
        drop((listener, name));
        assert!(place.ids().unwrap().is_empty());
    }

    #[test]
    fn what_a_dead_process_left_is_known_and_taken_away() {
        let directory = tempfile::tempdir().unwrap();
        let place = Place::make(directory.path()).unwrap();
        // What SIGKILL leaves: a name, and nobody behind it.
        drop(UnixListener::bind(place.socket("dead")).unwrap());
        let (listener, name) = place.bind("living").unwrap().split();
        assert_eq!(place.ids().unwrap(), ["living"], "binding swept");
        drop(UnixListener::bind(place.socket("dead")).unwrap());
        assert_eq!(place.sweep().unwrap(), ["dead"]);
        let again = place.bind("dead").unwrap();
        assert_eq!(place.ids().unwrap(), ["dead", "living"]);
        drop((listener, name, again));
    }

    #[test]
    fn a_name_is_not_taken_away_from_whoever_has_it_now() {
        let directory = tempfile::tempdir().unwrap();
        let place = Place::make(directory.path()).unwrap();
        let (listener, old) = place.bind("vm").unwrap().split();
        drop(listener);
        let (_listener, new) = place.bind("vm").unwrap().split();
        drop(old);
        assert_eq!(place.ids().unwrap(), ["vm"]);
        drop(new);
        assert!(place.ids().unwrap().is_empty());
    }

    #[test]
    fn a_directory_that_others_can_write_to_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        for mode in [0o777, 0o770, 0o702, 0o1777] {
            fs::set_permissions(directory.path(), fs::Permissions::from_mode(mode)).unwrap();
            let error = Place::make(directory.path()).unwrap_err();
            assert!(matches!(error, PlaceError::Unsafe { .. }), "{mode:o}: {error}");
        }
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        Place::make(directory.path()).unwrap();
        assert!(Place::at(&directory.path().join("none")).unwrap().is_none());
    }

    #[test]
    fn a_name_leads_nowhere_else() {
        for bad in ["", ".", "..", "../vm", "a/b", "-rf", ".hidden", "vm\n", "vm 1", &"x".repeat(65)] {
            assert!(check_id(bad).is_err(), "{bad:?}");
        }
        for good in ["vm1", "source-4711", "a.b_c-d", "X"] {
            assert!(check_id(good).is_ok(), "{good:?}");
        }
    }
}
