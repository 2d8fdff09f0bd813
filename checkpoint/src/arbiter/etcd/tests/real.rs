//! A real etcd on loopback.

use super::*;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};

/// Where etcd is; says why and is none where it is not.
fn etcd() -> Option<PathBuf> {
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
    let first = 20_000 + (std::process::id() % 1000) as u16 * 10;
    let mut free = std::iter::repeat_with(|| 20_000 + (first - 20_000 + NEXT.fetch_add(1, Ordering::Relaxed)) % 12_000)
        .filter(|&port| TcpListener::bind(("127.0.0.1", port)).is_ok());
    [(); 2].map(|()| free.next().expect("one after the other"))
}

/// One that dies with the test.
struct Server {
    program: PathBuf,
    folder: tempfile::TempDir,
    ports: [u16; 2],
    child: Child,
}

impl Server {
    fn start(program: PathBuf) -> Self {
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

    fn client(&self) -> Etcd {
        Etcd::new(format!("http://127.0.0.1:{}", self.ports[0]).parse().expect("an endpoint"))
    }

    /// Waits until it answers; false if it ended before.
    fn answers(&mut self) -> bool {
        let end = Instant::now() + Duration::from_secs(60);
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

    fn kill(&mut self) {
        self.child.kill().expect("ours");
        self.child.wait().expect("ours");
    }

    fn start_again(&mut self) {
        self.child = Self::spawn(&self.program, &self.folder, self.ports);
        assert!(self.answers(), "etcd ended as it was started again");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ours(verdict: Result<Verdict, ArbiterError>) -> Held {
    match verdict.expect("an answer") {
        Verdict::Ours(held) => held,
        Verdict::Not(other) => panic!("it is {other:?}"),
    }
}

#[test]
fn p2_of_all_who_claim_a_guest_over_one_version_exactly_one_has_it() {
    let Some(program) = etcd() else { return };
    let server = Server::start(program);
    let first = ours(server.client().claim(&vm1(), &claim_of("source", 0), None, None, soon()));
    assert_eq!(server.client().who(&vm1(), soon()).expect("an answer"), Some(first.clone()));
    let mut version = Some(first.version);
    for round in 1..=10 {
        let claimants: Vec<_> = (0..4)
            .map(|number| {
                let mut client = server.client();
                std::thread::spawn(move || {
                    client.claim(&vm1(), &claim_of(&format!("host-{number}"), round), version, None, soon())
                })
            })
            .collect();
        let verdicts = claimants.into_iter().map(|claimant| claimant.join().expect("no panic").expect("an answer"));
        let (won, lost): (Vec<_>, Vec<_>) = verdicts.partition(|verdict| matches!(verdict, Verdict::Ours(_)));
        let [Verdict::Ours(held)] = won.as_slice() else { panic!("{won:?}") };
        assert!(lost.iter().all(|other| *other == Verdict::Not(Some(held.clone()))), "{lost:?}");
        assert_eq!(server.client().who(&vm1(), soon()).expect("an answer").as_ref(), Some(held));
        version = Some(held.version);
    }
    // Nobody claims over what they have not read, and nobody over nothing where there is something.
    for over in [Some(first.version), None] {
        let late = server.client().claim(&vm1(), &claim_of("late", 99), over, None, soon()).expect("an answer");
        assert!(matches!(late, Verdict::Not(Some(_))), "{late:?}");
    }
}

#[test]
fn a_claim_outlives_its_arbiter_and_may_be_made_again() {
    let Some(program) = etcd() else { return };
    let mut server = Server::start(program);
    let mut client = server.client();
    let mine = claim_of("host-b", 2);
    let held = ours(client.claim(&vm1(), &mine, None, Some(Duration::from_secs(3600)), soon()));
    assert!(held.lease.is_some());
    server.kill();
    let bound = Duration::from_secs(2);
    assert!(
        client.who(&vm1(), Deadline::after(bound)).is_err()
            && client.renew(&vm1(), &held, Deadline::after(bound)).is_err()
    );
    server.start_again();
    assert_eq!(client.who(&vm1(), soon()).expect("an answer"), Some(held.clone()));
    assert_eq!(ours(client.renew(&vm1(), &held, soon())), held);
    // As if its first answer had been lost.
    assert_eq!(ours(client.claim(&vm1(), &mine, None, None, soon())), held);
    let other = client.claim(&vm1(), &claim_of("host-a", 2), None, None, soon()).expect("an answer");
    assert_eq!(other, Verdict::Not(Some(held)));
}

#[test]
fn a_claim_that_nobody_renews_is_nobodys_in_the_end_and_renewing_it_says_so() {
    let Some(program) = etcd() else { return };
    let server = Server::start(program);
    let mut client = server.client();
    let held = ours(client.claim(&vm1(), &claim_of("host-b", 1), None, Some(Duration::from_secs(1)), soon()));
    let end = Instant::now() + Duration::from_secs(60);
    while let Some(still) = client.who(&vm1(), soon()).expect("an answer") {
        assert_eq!(still, held);
        assert!(Instant::now() < end, "it does not run out");
        std::thread::sleep(Duration::from_millis(50));
    }
    let next = ours(client.claim(&vm1(), &claim_of("host-a", 2), None, None, soon()));
    let late = client.renew(&vm1(), &held, soon()).expect("an answer");
    assert_eq!(late, Verdict::Not(Some(next)));
}
