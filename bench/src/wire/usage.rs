//! What this process has used of its CPU: the proof that the owner's side does nothing for a page.

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use std::io;
use std::mem::MaybeUninit;
use std::path::Path;

/// CPU time and context switches since a process or a thread began, or between two looks.
///
/// The kernel charges softirq work to whoever it interrupts (Documentation/accounting/cgroupstats.rst's tick accounting), so a
/// software RDMA device can show up here; a process that sleeps is not interrupted, the idle task is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Used {
    pub cpu_ns: u64,
    pub voluntary_switches: u64,
    pub involuntary_switches: u64,
}

impl Used {
    fn since(self, earlier: Self) -> Self {
        Self {
            cpu_ns: self.cpu_ns.saturating_sub(earlier.cpu_ns),
            voluntary_switches: self.voluntary_switches.saturating_sub(earlier.voluntary_switches),
            involuntary_switches: self.involuntary_switches.saturating_sub(earlier.involuntary_switches),
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            cpu_ns: self.cpu_ns + other.cpu_ns,
            voluntary_switches: self.voluntary_switches + other.voluntary_switches,
            involuntary_switches: self.involuntary_switches + other.involuntary_switches,
        }
    }
}

/// A thread that is there, by the kernel's name for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Thread {
    pub id: u32,
    pub name: String,
    pub used: Used,
}

/// One look at a process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// With the threads that have ended.
    pub process: Used,
    /// All threads that are there but the one that looked: who only answers questions between two looks is not counted.
    pub others: Used,
    pub threads: Vec<Thread>,
}

impl Usage {
    /// This process now: CLOCK_PROCESS_CPUTIME_ID, getrusage(2), and /proc/self/task for its threads.
    pub fn now() -> io::Result<Self> {
        let cpu = clock_gettime(ClockId::ProcessCPUTime);
        let mut usage = MaybeUninit::<libc::rusage>::zeroed();
        // SAFETY: the pointer is valid for one rusage.
        if unsafe { libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: zeroed, which is a valid rusage, and filled by the kernel.
        let usage = unsafe { usage.assume_init() };
        let process = Used {
            cpu_ns: cpu.tv_sec as u64 * 1_000_000_000 + cpu.tv_nsec as u64,
            voluntary_switches: usage.ru_nvcsw as u64,
            involuntary_switches: usage.ru_nivcsw as u64,
        };
        let mut threads = Vec::new();
        for entry in std::fs::read_dir("/proc/self/task")? {
            let path = entry?.path();
            // One that ended meanwhile is in the process's sums all the same.
            threads.extend(thread(&path).ok());
        }
        threads.sort_by_key(|thread| thread.id);
        let looking = rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned();
        let others = threads.iter().filter(|thread| thread.id != looking);
        let others = others.fold(Used::default(), |sum, thread: &Thread| sum.plus(thread.used));
        Ok(Self { process, others, threads })
    }

    /// What was used between `earlier` and this look; of threads, those that are there now.
    pub fn since(&self, earlier: &Self) -> Self {
        let threads = self.threads.iter().map(|now| {
            let before = earlier.threads.iter().find(|thread| thread.id == now.id).map(|thread| thread.used);
            Thread { used: now.used.since(before.unwrap_or_default()), ..now.clone() }
        });
        let (process, others) = (self.process.since(earlier.process), self.others.since(earlier.others));
        Self { process, others, threads: threads.collect() }
    }

    /// Adds another stretch; threads go by name, because every session has new ones.
    pub fn add(&mut self, other: Self) {
        self.process = self.process.plus(other.process);
        self.others = self.others.plus(other.others);
        for thread in other.threads {
            match self.threads.iter_mut().find(|have| have.name == thread.name) {
                Some(have) => have.used = have.used.plus(thread.used),
                None => self.threads.push(thread),
            }
        }
    }
}

fn thread(task: &Path) -> io::Result<Thread> {
    let text = |name: &str| std::fs::read_to_string(task.join(name));
    let wrong = || io::Error::new(io::ErrorKind::InvalidData, format!("{} is not what proc(5) says", task.display()));
    let id = task.file_name().and_then(|name| name.to_str()?.parse().ok()).ok_or_else(wrong)?;
    let (status, schedstat) = (text("status")?, text("schedstat")?);
    let field = |name: &str| -> Option<u64> {
        status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')?.trim().parse().ok())
    };
    Ok(Thread {
        id,
        name: text("comm")?.trim_end().to_owned(),
        used: Used {
            cpu_ns: schedstat.split(' ').next().and_then(|ns| ns.parse().ok()).ok_or_else(wrong)?,
            voluntary_switches: field("voluntary_ctxt_switches").ok_or_else(wrong)?,
            involuntary_switches: field("nonvoluntary_ctxt_switches").ok_or_else(wrong)?,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::hint::black_box;
    use std::time::{Duration, Instant};

    #[test]
    fn work_between_two_looks_is_seen_in_the_process_and_in_its_thread() {
        let before = Usage::now().unwrap();
        let own = std::thread::current().name().map(|name| name[..15.min(name.len())].to_owned()).unwrap();
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(30) {
            black_box(0);
        }
        let used = Usage::now().unwrap().since(&before);
        assert!(used.process.cpu_ns >= 3_000_000, "{used:?}");
        let mine = used.threads.iter().find(|thread| thread.name == own).expect("this thread is there");
        assert!(mine.used.cpu_ns >= 3_000_000 && mine.used.cpu_ns <= used.process.cpu_ns, "{used:?}");
    }

    #[test]
    fn stretches_of_different_sessions_add_up_by_the_threads_names() {
        let used = |cpu_ns| Used { cpu_ns, voluntary_switches: 1, involuntary_switches: 0 };
        let of = |id, ns| Usage {
            process: used(ns + 5),
            others: used(ns),
            threads: vec![Thread { id, name: "lane".into(), used: used(ns) }],
        };
        let mut sum = of(1, 10);
        sum.add(of(2, 20));
        assert_eq!((sum.process.cpu_ns, sum.threads.len(), sum.threads[0].used.cpu_ns), (40, 1, 30));
    }
}
