//! Running belay's own processes in tests: each listened to, ended by its pid, and none left behind.

// Each file of tests uses its part.
#![allow(dead_code)]

use belay_vmm_glue::migrate::observation::Observation;
use belay_vmm_glue::witness::observer::{Seen, log};
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub const BELAY: &str = env!("CARGO_BIN_EXE_belay");
/// Longest that anything a test waits for may take. Generous: the machine may be busy with other tests.
pub const BOUND: Duration = Duration::from_secs(40);
/// Marks every process of one test, those that belay starts beside itself included.
const MARK: &str = "BELAY_TEST_MARK";

pub fn has_kvm() -> bool {
    File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

/// What `belay observe --log` wrote.
pub fn packets(path: &Path) -> Vec<Seen> {
    let file = File::open(path).expect("the observer has written what it saw");
    log::read(BufReader::new(file)).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A test's own directory, and the mark of its processes.
pub struct Place {
    pub directory: tempfile::TempDir,
    mark: String,
}

impl Place {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let mark = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        Self { directory: tempfile::tempdir().expect("a temporary directory can be made"), mark }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).to_str().expect("temporary paths are UTF-8").to_owned()
    }

    /// Starts belay with these arguments.
    pub fn belay(&self, arguments: &[&str]) -> Process {
        let mut command = Command::new(BELAY);
        command.args(arguments);
        self.start(command)
    }

    /// Starts a command that becomes belay, or runs it.
    pub fn start(&self, mut command: Command) -> Process {
        command.env(MARK, &self.mark);
        Process::start(command)
    }

    /// Processes of this test that run: pid and command line.
    pub fn running(&self) -> Vec<(i32, String)> {
        let mark = format!("{MARK}={}", self.mark);
        let entries = std::fs::read_dir("/proc").expect("/proc is there").flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let marked = pids.filter(|pid| {
            let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment.split(|&byte| byte == 0).any(|variable| variable == mark.as_bytes())
        });
        let line = |pid| std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        marked.map(|pid| (pid, String::from_utf8_lossy(&line(pid)).replace('\0', " "))).collect()
    }

    /// Fails if a process of this test does not end by itself soon.
    pub fn expect_nothing_left(&self) {
        let end = Instant::now() + Duration::from_secs(5);
        loop {
            let running = self.running();
            if running.is_empty() {
                return;
            }
            assert!(Instant::now() < end, "left behind: {running:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for (pid, _) in self.running() {
            kill(pid, libc::SIGKILL);
        }
    }
}

pub fn kill(pid: i32, signal: i32) {
    // SAFETY: kill takes no pointers; `pid` is a process of this test.
    unsafe { libc::kill(pid, signal) };
}

/// Whether `pid` runs (a process that has ended and was not waited for does not).
pub fn is_running(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
}

/// One belay process that was asked for JSON events.
pub struct Process {
    child: Child,
    events: Receiver<Value>,
    /// Everything it has said so far that a test has taken.
    pub seen: Vec<Value>,
    complaints: Arc<Mutex<String>>,
    listening: Option<JoinHandle<()>>,
}

impl Process {
    fn start(mut command: Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("belay starts");
        let stdout = BufReader::new(child.stdout.take().expect("stdout is a pipe"));
        let stderr = BufReader::new(child.stderr.take().expect("stderr is a pipe"));
        let (say, events) = channel();
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                // What belay itself could not read back is no event: whoever waits for it waits in vain, and says so.
                let is_read_back = !line.starts_with("{\"id\":") || serde_json::from_str::<Observation>(&line).is_ok();
                if let Ok(event) = serde_json::from_str(&line)
                    && is_read_back
                    && say.send(event).is_err()
                {
                    return;
                }
            }
        });
        let complaints = Arc::new(Mutex::new(String::new()));
        let text = Arc::clone(&complaints);
        let listening = std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                let mut text = text.lock().unwrap();
                text.push_str(&line);
                text.push('\n');
            }
        });
        Self { child, events, seen: Vec::new(), complaints, listening: Some(listening) }
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn signal(&self, signal: i32) {
        kill(self.pid(), signal);
    }

    /// What it wrote on stderr, once it has ended.
    pub fn complaints(&mut self) -> String {
        if let Some(listening) = self.listening.take() {
            listening.join().unwrap();
        }
        self.complaints.lock().unwrap().clone()
    }

    /// Waits until a destination has so many percent of the pages that it pulls, lacks some, and three checkpoints have committed.
    pub fn await_mid_pull(&mut self, landed_percent: u64) {
        let mut commits = 0;
        self.wait_for("a pull under way with three checkpoints", |event| {
            commits += u64::from(event["event"] == "committed");
            let landed = event["landed_frames"].as_u64().unwrap_or(0);
            let absent = event["absent_frames"].as_u64().unwrap_or(0);
            commits >= 3 && absent > 0 && landed * 100 >= (landed + absent) * landed_percent
        });
    }

    /// Waits for an event; everything up to it is in `seen` afterwards.
    pub fn wait_for(&mut self, what: &str, mut is_it: impl FnMut(&Value) -> bool) -> Value {
        let end = Instant::now() + BOUND;
        loop {
            match self.events.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(event) => {
                    self.seen.push(event.clone());
                    if is_it(&event) {
                        return event;
                    }
                }
                Err(error) => panic!("waited for {what}: {error}; it said {}", self.story()),
            }
        }
    }

    pub fn wait_for_event(&mut self, name: &str) -> Value {
        self.wait_for(name, |event| event["event"] == name)
    }

    /// Waits for an event, or for the end of the process; nothing if that came first.
    pub fn wait_for_event_or_end(&mut self, name: &str) -> Option<Value> {
        let end = Instant::now() + BOUND;
        loop {
            match self.events.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(event) => {
                    self.seen.push(event.clone());
                    if event["event"] == name {
                        return Some(event);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(error) => panic!("waited for {name}: {error}; it said {}", self.story()),
            }
        }
    }

    /// Takes what it has said so far.
    pub fn hear(&mut self) {
        self.seen.extend(self.events.try_iter());
    }

    /// Whether it has not ended.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    pub fn wait_for_state(&mut self, state: &str) -> Value {
        self.wait_for(state, |event| event["event"] == "state" && event["state"] == state)
    }

    /// Waits until it has ended and everything it said is in `seen`; its exit code, or minus the signal that ended it.
    pub fn end(&mut self) -> i32 {
        use std::os::unix::process::ExitStatusExt;
        let end = Instant::now() + BOUND;
        let status: ExitStatus = loop {
            // Its pipe must not fill while it is waited for.
            self.seen.extend(self.events.recv_timeout(Duration::from_millis(5)));
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                break status;
            }
            assert!(Instant::now() < end, "it does not end; it said {}", self.story());
        };
        while let Ok(event) = self.events.recv_timeout(Duration::from_secs(5)) {
            self.seen.push(event);
        }
        status.code().unwrap_or_else(|| -status.signal().expect("ended by a signal if not by itself"))
    }

    /// Ends it by SIGKILL, as a crash would.
    pub fn crash(&mut self) {
        self.signal(libc::SIGKILL);
        assert_eq!(self.end(), -libc::SIGKILL);
    }

    pub fn events<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Value> {
        self.seen.iter().filter(move |event| event["event"] == name)
    }

    pub fn was(&self, state: &str) -> bool {
        self.events("state").any(|event| event["state"] == state)
    }

    /// Its guest was looked at (`--check`), and every byte was what it must be.
    pub fn expect_whole(&self) {
        let checked = self.events("checked").last().unwrap_or_else(|| panic!("it never looked: {}", self.story()));
        assert_eq!((&checked["wrong_pages"], &checked["detail"]), (&0.into(), &"".into()), "{}", self.story());
    }

    /// What it said, without what comes all the time.
    pub fn story(&self) -> String {
        let rare = |event: &&Value| !["pull", "committed", "latency"].contains(&event["event"].as_str().unwrap_or(""));
        let lines: Vec<_> = self.seen.iter().filter(rare).map(Value::to_string).collect();
        format!("{}\n{}", lines.join("\n"), self.complaints.lock().unwrap())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}
