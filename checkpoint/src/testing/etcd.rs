//! An etcd of a test's own, on loopback, which can be killed, started again with what it had, and made to stand still. The command line's tests
//! take this file as it is, so nothing of this crate is used in it.
#![allow(dead_code, reason = "whoever takes it uses its part")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

/// Only a broken etcd takes so long to start.
const START_BOUND: Duration = Duration::from_secs(60);

/// Where etcd is; says why a test is skipped and is none where it is not.
pub fn etcd() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join("etcd")).find(|path| path.is_file());
    let found = found.or_else(|| Some(PathBuf::from("/usr/bin/etcd")).filter(|path| path.is_file()));
    if found.is_none() {
        eprintln!("skipped: there is no etcd in PATH (Debian: etcd-server)");
    }
    found
}

/// Two that nobody has now. They lie below what the kernel gives out by itself, so that no listener of another test takes one meanwhile;
/// whoever else does makes etcd end, and other ones are tried.
fn free_ports() -> [u16; 2] {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = (std::process::id() % 1400) as u16 * 16;
    let mut free = std::iter::repeat_with(|| 8_000 + (first + NEXT.fetch_add(1, Ordering::Relaxed)) % 24_000)
        .filter(|&port| TcpListener::bind(("127.0.0.1", port)).is_ok());
    [(); 2].map(|()| free.next().expect("one after the other"))
}

/// Dies with the test.
pub struct Server {
    program: PathBuf,
    folder: tempfile::TempDir,
    ports: [u16; 2],
    child: Child,
}

impl Server {
    pub fn start(program: PathBuf) -> Self {
        for _ in 0..50 {
            let folder = tempfile::tempdir().expect("a temporary directory");
            let ports = free_ports();
            let child = Self::spawn(&program, &folder, ports);
            let mut server = Self { program: program.clone(), folder, ports, child };
            if server.answers() {
                return server;
            }
        }
        panic!("etcd does not start");
    }

    fn spawn(program: &PathBuf, folder: &tempfile::TempDir, [client, peer]: [u16; 2]) -> Child {
        let (client, peer) = (format!("http://127.0.0.1:{client}"), format!("http://127.0.0.1:{peer}"));
        let mut command = Command::new(program);
        command
            .args(["--name", "one", "--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("one={peer}"), "--data-dir"])
            .arg(folder.path().join("data"))
            .args(["--log-level", "error", "--unsafe-no-fsync"])
            .env_remove("ETCD_NAME")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let die_with_the_test = || {
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).map_err(Into::into)
        };
        // SAFETY: prctl(2) allocates nothing and touches no memory of this process: it may be called between fork and exec.
        unsafe { command.pre_exec(die_with_the_test) };
        command.spawn().expect("etcd starts")
    }

    pub fn address(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports[0])
    }

    /// Waits until it answers; false if it ended before.
    fn answers(&mut self) -> bool {
        let end = Instant::now() + START_BOUND;
        while !self.is_healthy() {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return false;
            }
            assert!(Instant::now() < end, "etcd runs and answers nothing");
            std::thread::sleep(Duration::from_millis(20));
        }
        true
    }

    /// By its own word: it has a leader and takes writes.
    fn is_healthy(&self) -> bool {
        let bound = Duration::from_secs(5);
        let ask = || -> std::io::Result<String> {
            let mut stream = TcpStream::connect_timeout(&SocketAddr::from(([127, 0, 0, 1], self.ports[0])), bound)?;
            stream.set_read_timeout(Some(bound))?;
            stream.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
            let mut answer = String::new();
            stream.take(64 << 10).read_to_string(&mut answer)?;
            Ok(answer)
        };
        ask().is_ok_and(|answer| answer.contains(r#""health":"true""#))
    }

    pub fn kill(&mut self) {
        self.child.kill().expect("ours");
        self.child.wait().expect("ours");
    }

    /// With everything it had.
    pub fn start_again(&mut self) {
        self.child = Self::spawn(&self.program, &self.folder, self.ports);
        assert!(self.answers(), "etcd ended as it was started again");
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
