//! `belay soak`: seeded runs of real migrations that are struck in a known place, each judged against the promises.
//!
//! `case.rs` says what is tried, `points.rs` where, `pace.rs` how fast, `conduct.rs` makes a run of what `launch.rs`
//! starts, `strike.rs` strikes, `takeover.rs` has others go on for the dead, `second.rs` migrates once more, `verdict.rs` judges, `tally.rs` sums
//! up, `stage.rs` keeps a run's processes and files from outliving it.

mod actor;
mod case;
mod conduct;
mod doctor;
mod launch;
mod pace;
pub mod points;
mod relay;
mod second;
mod stage;
mod strike;
mod takeover;
mod tally;
mod verdict;

use crate::exit::Exit;
use crate::options::{FabricChoice, FabricOptions};
use crate::{fabric, report, signals};
use belay_transport::explain;
use belay_transport::session::{Address, Security};
use belay_vmm_glue::migrate::observation::Observer;
use case::{Case, plan};
use clap::{Args, ValueEnum};
use pace::Pace;
use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tally::{Memory, Tally};
use verdict::{Outcome, RunReport};

/// A run that has not ended by now (longer at a slower pace) is ended, with all its processes.
const RUN_BOUND: Duration = Duration::from_secs(90);
/// How often a run is made again whose lease ran out by itself.
const MOST_TRIES: u32 = 4;
/// Most that a run's report may take.
const MOST_REPORT: u64 = 256 << 10;
/// What a run needs at most: guest RAM twice, its overflow reservation, ring, staging, and the checker's copy.
const RUN_BYTES: u64 = 600 << 20;
/// Left to everybody else on this host.
const SPARE_BYTES: u64 = 512 << 20;
/// How long memory may be waited for.
const MEMORY_BOUND: Duration = Duration::from_secs(60);
/// After so many broken runs there is nothing more to learn.
const MOST_BROKEN: u64 = 10;
/// Between two lines of progress.
const PROGRESS: Duration = Duration::from_secs(10);

/// Break seeded migrations in known places and judge what becomes of each
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct SoakArgs {
    /// How many runs
    #[arg(long, value_name = "N", default_value_t = 286, conflicts_with = "until_stopped", value_parser = clap::value_parser!(u64).range(1..))]
    runs: u64,
    /// Go on until SIGINT or SIGTERM, then sum up
    #[arg(long)]
    until_stopped: bool,
    /// Runs at a time; each takes a core and up to 600 MiB
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    jobs: u16,
    /// Fabrics to try
    #[arg(long, value_enum, value_name = "FABRIC", value_delimiter = ',', default_values_t = [FabricChoice::Local, FabricChoice::Tcp])]
    fabric: Vec<FabricChoice>,
    /// Seed of the whole soak
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// This run alone, as a report names it: FABRIC/PHASE/STRIKE/SEED
    #[arg(long, value_name = "CASE")]
    case: Vec<Case>,
    /// For a host that is N times slower than one with processors of its own (an emulated one): leases, checkpoint periods and every bound
    /// are N times longer, and the guest writes N times fewer pages a second
    #[arg(long, value_name = "N", default_value_t, value_parser = pace::parse)]
    slow_host: Pace,
    /// Say which runs these would be and when each is struck, and make none
    #[arg(long, conflicts_with_all = ["until_stopped", "json"])]
    plan: bool,
    /// Every run and the sum as JSON lines on stdout
    #[arg(long)]
    json: bool,
    /// One run, in namespaces of its own
    #[arg(long, hide = true, value_name = "CASE")]
    conduct: Option<Case>,
    /// That run, once it is in there
    #[arg(long, hide = true, requires = "conduct")]
    inside: bool,
    /// Judge the run again with each of these lies in its evidence: it is broken if every one is found out (tries the verdict)
    #[arg(long, hide = true, value_enum, value_delimiter = ',')]
    lie: Vec<doctor::Lie>,
}

const EXAMPLES: &str = "\
Examples:
  belay soak                                       286 runs over local and tcp, two at a time
  belay soak --fabric verbs --runs 40 --jobs 1     through this host's RDMA device
  belay soak --plan --runs 26 --seed 7             what would be tried
  belay soak --until-stopped --seed 7              until Ctrl-C
  belay soak --case tcp/commit/freeze/123          one run again, as a failure names it

Needs root: each run has namespaces of its own, so that nothing of it is left, however it ends.";

/// Runs the command.
pub fn run(args: &SoakArgs) -> Exit {
    match args.conduct {
        Some(case) if args.inside => conduct(case, args.slow_host, &args.lie),
        Some(_) => outer(),
        None => {
            let observer = report::reporter("soak", args.json);
            if args.fabric.contains(&FabricChoice::Auto) {
                report::failed_text(&observer, "--fabric auto", "Name the fabrics to try: local, tcp, verbs.");
                return report::ended(&observer, Exit::Usage);
            }
            if args.plan {
                return tell_plan(args);
            }
            // Told once, and not by each run.
            let verbs = args.case.iter().any(|case| case.fabric == FabricChoice::Verbs)
                || (args.case.is_empty() && args.fabric.contains(&FabricChoice::Verbs));
            match verbs.then(lacks_verbs).flatten() {
                Some(refused) => report::ended(&observer, refused.told(&observer)),
                None => manage(args, &observer),
            }
        }
    }
}

/// Why nothing can run over verbs here.
fn lacks_verbs() -> Option<fabric::Refused> {
    let options = FabricOptions { fabric: Some(FabricChoice::Verbs), trusted_fabric: true, ..FabricOptions::default() };
    fabric::session(&options, Security::LoopbackOnly, &Address::Tcp("127.0.0.1:0".to_owned())).err()
}

/// The process that makes a run's namespaces.
fn outer() -> Exit {
    let arguments: Vec<_> = std::env::args().skip(1).chain(["--inside".to_owned()]).collect();
    match stage::outer(&arguments) {
        Ok(0) => Exit::Done,
        Ok(_) => Exit::Failed,
        Err(error) => {
            eprintln!("belay: no namespaces for a run: {error}");
            Exit::Missing
        }
    }
}

/// One run; its report on stdout.
fn conduct(case: Case, pace: Pace, lies: &[doctor::Lie]) -> Exit {
    let made = stage::inner().map_err(|error| error.to_string());
    let made = made.and_then(|()| conduct::run(case, pace, lies).map_err(|error| explain(&error)));
    match made {
        Ok(report) => {
            let line = serde_json::to_string(&report).expect("a report is plain data");
            // A manager that went away has taken this process with it.
            let _ = writeln!(std::io::stdout().lock(), "{line}");
            Exit::Done
        }
        Err(why) => {
            eprintln!("belay: {why}");
            Exit::Failed
        }
    }
}

/// The runs that were asked for, in order.
fn cases(args: &SoakArgs) -> Box<dyn Iterator<Item = Case> + '_> {
    match (&args.case[..], args.until_stopped) {
        ([], true) => Box::new(plan(args.seed, &args.fabric)),
        ([], false) => Box::new(plan(args.seed, &args.fabric).take(usize::try_from(args.runs).unwrap_or(usize::MAX))),
        (cases, _) => Box::new(cases.iter().copied()),
    }
}

/// One line a run: its case, and the moment of its strike.
fn tell_plan(args: &SoakArgs) -> Exit {
    let mut out = std::io::stdout().lock();
    for case in cases(args) {
        // A reader that went away has read enough.
        let script = case.script();
        let takeover = script.takeover.map(|takeover| takeover.words(case.strike)).unwrap_or_default();
        if writeln!(out, "{case}  {}{takeover}", script.moment).is_err() {
            break;
        }
    }
    Exit::Done
}

/// What the workers share.
struct Soak<'a> {
    args: &'a SoakArgs,
    next: AtomicU64,
    stop: Arc<AtomicBool>,
    tally: Mutex<Tally>,
    memory: Mutex<Memory>,
    told_at: Mutex<Instant>,
    began: Instant,
}

fn manage(args: &SoakArgs, observer: &Observer) -> Exit {
    let fail = |what: &str, advice: &str, exit: Exit| {
        report::failed_text(observer, what, advice);
        report::ended(observer, exit)
    };
    if !rustix::process::geteuid().is_root() {
        return fail("a soak needs root", "Its runs have PID and mount namespaces of their own.", Exit::Missing);
    }
    let words = match signals::termination() {
        Ok(words) => words,
        Err(error) => return fail(&error.to_string(), "Nothing was started.", Exit::Failed),
    };
    let stop = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&stop);
    std::thread::spawn(move || {
        // Ends with the first signal; the runs under way are finished.
        if words.recv().is_ok() {
            told.store(true, Ordering::SeqCst);
        }
    });
    let (available, shared) = memory();
    let start = Memory {
        available_at_start: available,
        available_least: available,
        available_at_end: available,
        shared_at_start: shared,
        shared_most: shared,
        shared_at_end: shared,
    };
    let soak = Soak {
        args,
        next: AtomicU64::new(0),
        stop,
        tally: Mutex::default(),
        memory: Mutex::new(start),
        told_at: Mutex::new(Instant::now()),
        began: Instant::now(),
    };
    std::thread::scope(|scope| {
        for _ in 0..args.jobs {
            scope.spawn(|| soak.work(observer));
        }
    });
    soak.sample();
    soak.sum_up(observer)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is kept under a lock here is counters and reports.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Soak<'_> {
    fn case(&self, index: u64) -> Option<Case> {
        cases(self.args).nth(index as usize)
    }

    fn work(&self, observer: &Observer) {
        while !self.stop.load(Ordering::SeqCst) {
            let Some(case) = self.case(self.next.fetch_add(1, Ordering::SeqCst)) else { return };
            if !self.await_memory(observer) {
                return self.stop.store(true, Ordering::SeqCst);
            }
            for attempt in 1..=MOST_TRIES {
                let mut report = self.one(case);
                if report.outcome == Outcome::Void && attempt == MOST_TRIES {
                    report.outcome = Outcome::Broken;
                    report.wrong.push(format!("{MOST_TRIES} tries in a row did not come to the strike"));
                }
                self.take(&report);
                if report.outcome != Outcome::Void {
                    break;
                }
            }
        }
    }

    fn take(&self, report: &RunReport) {
        self.sample();
        if self.args.json {
            let line = serde_json::to_string(report).expect("a report is plain data");
            let _ = writeln!(std::io::stdout().lock(), "{line}");
        } else if report.outcome == Outcome::Broken {
            eprintln!("{}", failure(report, self.args.slow_host));
        }
        let counts = {
            let mut tally = lock(&self.tally);
            tally.add(report);
            tally.counts()
        };
        if counts.1 >= MOST_BROKEN {
            self.stop.store(true, Ordering::SeqCst);
        }
        let mut told_at = lock(&self.told_at);
        if !self.args.json && told_at.elapsed() > PROGRESS {
            *told_at = Instant::now();
            let (held, broken, void) = counts;
            eprintln!("{:>6.0} s  {held} held, {broken} broken, {void} made again", self.began.elapsed().as_secs_f64());
        }
    }

    /// Makes one run in a process of its own; one that says nothing usable is a broken run.
    fn one(&self, case: Case) -> RunReport {
        let begun = Instant::now();
        let broken = |why: String, story: Vec<String>| RunReport {
            case,
            outcome: Outcome::Broken,
            wrong: vec![why],
            landed: String::new(),
            home: None,
            silence_us: None,
            succession: None,
            killed_again: false,
            succession_silence_us: None,
            caught_epoch: None,
            recovered_pages: None,
            fenced: None,
            commits_told: 0,
            refused: None,
            folding: false,
            second: false,
            took_ms: begun.elapsed().as_millis() as u64,
            dropped: 0,
            story,
        };
        match self.conducted(case) {
            Ok((text, complaints)) => match text.lines().last().map(serde_json::from_str) {
                Some(Ok(report)) => report,
                _ => broken("its conductor gave no report".to_owned(), complaints.lines().map(str::to_owned).collect()),
            },
            Err(error) => broken(format!("its conductor could not be run: {error}"), Vec::new()),
        }
    }

    /// What the conductor of a run says on stdout and stderr. Ended when its time is over.
    fn conducted(&self, case: Case) -> std::io::Result<(String, String)> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["soak", "--conduct", &case.to_string(), "--slow-host", &self.args.slow_host.to_string()]);
        for lie in &self.args.lie {
            command.args(["--lie", lie.to_possible_value().expect("none is skipped").get_name()]);
        }
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let pid = rustix::process::Pid::from_child(&child);
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
        let streams: [Option<Box<dyn Read + Send>>; 2] =
            [child.stdout.take().map(|out| Box::new(out) as _), child.stderr.take().map(|err| Box::new(err) as _)];
        let [text, complaints] = std::thread::scope(|scope| {
            let readers = streams.map(|stream| {
                scope.spawn(move || {
                    let mut bytes = Vec::new();
                    let Some(mut stream) = stream else { return bytes };
                    // What is beyond the bound is taken and dropped, so that nobody waits for a full pipe.
                    let _ = stream.by_ref().take(MOST_REPORT).read_to_end(&mut bytes);
                    let _ = std::io::copy(&mut stream, &mut std::io::sink());
                    bytes
                })
            });
            let bound =
                rustix::time::Timespec { tv_sec: self.args.slow_host.of(RUN_BOUND).as_secs() as i64, tv_nsec: 0 };
            let mut fds = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
            if !matches!(rustix::event::poll(&mut fds, Some(&bound)), Ok(1)) {
                let _ = rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL);
            }
            readers.map(|reader| reader.join().unwrap_or_default())
        });
        child.wait()?;
        let [text, complaints] = [text, complaints].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        Ok((text, complaints))
    }

    /// Waits until there is memory for a run beside those under way. False when there is none.
    fn await_memory(&self, observer: &Observer) -> bool {
        let end = Instant::now() + MEMORY_BOUND;
        loop {
            let (available, _) = memory();
            if available >= RUN_BYTES * u64::from(self.args.jobs) + SPARE_BYTES {
                return true;
            }
            if Instant::now() > end {
                let what = format!(
                    "{} of memory are available and {} runs at a time need {} each",
                    report::bytes(available),
                    self.args.jobs,
                    report::bytes(RUN_BYTES)
                );
                report::failed_text(observer, &what, "Choose fewer --jobs, or find out who has taken the memory.");
                return false;
            }
            // Nobody tells when memory becomes free.
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn sample(&self) {
        let (available, shared) = memory();
        let mut memory = lock(&self.memory);
        memory.available_least = memory.available_least.min(available);
        memory.shared_most = memory.shared_most.max(shared);
        (memory.available_at_end, memory.shared_at_end) = (available, shared);
    }

    fn sum_up(&self, observer: &Observer) -> Exit {
        let (tally, memory) = (lock(&self.tally), *lock(&self.memory));
        let text = match self.args.json {
            true => serde_json::to_string(&tally.sum(memory)).expect("a sum is plain data") + "\n",
            false => tally.text(&memory),
        };
        let _ = std::io::stdout().lock().write_all(text.as_bytes());
        let (held, broken, _) = tally.counts();
        let all = self.args.until_stopped || self.stop.load(Ordering::SeqCst);
        match (broken, held) {
            (0, 1..) => Exit::Done,
            (0, 0) if all => Exit::Interrupted,
            (0, 0) => Exit::Failed,
            _ => {
                let what = format!("{broken} of {} runs broke a promise", held + broken);
                report::failed_text(observer, &what, "Each is made again by the command that stands with it.");
                Exit::CheckFailed
            }
        }
    }
}

/// A broken run, for a person, with the command that makes it again.
fn failure(report: &RunReport, pace: Pace) -> String {
    let RunReport { case, wrong, landed, home, took_ms, story, .. } = report;
    let wrong = wrong.iter().map(|wrong| format!("  WRONG {wrong}\n")).collect::<String>();
    let story = story.iter().map(|line| format!("        {line}\n")).collect::<String>();
    format!(
        "{case} ({landed}; {home:?}; {took_ms} ms)\n{wrong}{story}  again: belay soak{} --case {case}",
        pace.option()
    )
}

/// Memory that could be had without swapping, and what files in memory take (MemAvailable and Shmem of proc_meminfo(5)), in bytes.
fn memory() -> (u64, u64) {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()
    };
    (kib("MemAvailable:").unwrap_or(u64::MAX >> 10) << 10, kib("Shmem:").unwrap_or(0) << 10)
}
