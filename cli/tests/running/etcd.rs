//! An etcd of a test's own, on loopback: it can be killed, started again with what it had, and made to stand still.

use crate::running::{BOUND, kill};
use belay_checkpoint::arbiter::etcd::Etcd;
use belay_checkpoint::arbiter::{Arbiter, GuestName, Held, Standing};
use belay_transport::Deadline;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

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

/// Two that nobody has now. They lie below what the kernel gives out by itself, and apart from those of other tests that start an etcd;
/// whoever takes one all the same makes etcd end, and other ones are tried.
fn free_ports() -> [u16; 2] {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = (std::process::id() % 700) as u16 * 16;
    let mut free = std::iter::repeat_with(|| 8_000 + (first + NEXT.fetch_add(1, Ordering::Relaxed)) % 11_500)
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

    fn client(&self) -> Etcd {
        Etcd::new(self.address().parse().expect("an endpoint"))
    }

    /// Waits until it answers; false if it ended before.
    fn answers(&mut self) -> bool {
        let end = Instant::now() + BOUND;
        let nobody: GuestName = "nobody".parse().expect("a name");
        loop {
            match self.client().who(&nobody, Deadline::after(Duration::from_secs(5))) {
                Ok(_) => return true,
                Err(_) if !matches!(self.child.try_wait(), Ok(None)) => return false,
                Err(error) => assert!(Instant::now() < end, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
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

    /// It hears and does not answer.
    pub fn freeze(&self) {
        kill(self.child.id() as i32, libc::SIGSTOP);
    }

    pub fn thaw(&self) {
        kill(self.child.id() as i32, libc::SIGCONT);
    }

    /// Its record of `guest`.
    pub fn record(&self, guest: &str) -> Option<Held> {
        self.client().who(&guest.parse().expect("a name"), Deadline::after(BOUND)).expect("it answers")
    }

    pub fn standing(&self, guest: &str) -> Option<Standing> {
        self.record(guest).map(|held| held.claim.standing)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
