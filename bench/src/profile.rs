//! A profile of threads of this process: where they were, by function, how much of it was copying memory, in the kernel and out of it.
//!
//! That a page lands where the guest uses it, without a copy on the way, is proven by its content and by this: over verbs the threads
//! that pull must not be found in any function that copies, while over tcp, where the kernel copies out of its buffers, they must.
//!
//! *Whose work*: a software RDMA device (rxe) does the card's work in the kernel, in softirqs that fall on whoever runs and, for a request just
//! posted, in its own caller. So does a network card's interrupt. Samples in there are no thread's own: they are counted `apart`.

mod perf;
mod symbols;

use perf::{Sample, Sampler};
use serde::Serialize;
use std::collections::HashMap;
use std::io;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;
use symbols::{Kernel, Name, Program, copies};

/// Samples a second of a thread's CPU time; no divisor of any timer's.
const FREQUENCY: u64 = 1_999;
/// How often the rings are emptied: each has room for many times what comes in between.
const LOOK: Duration = Duration::from_millis(20);
/// Samples kept at most.
const MOST_SAMPLES: usize = 50_000;
/// Functions that a profile names.
const MOST_FUNCTIONS: usize = 12;
/// Modules that are RDMA devices in software.
const DEVICES: [&str; 2] = ["rdma_rxe", "siw"];
/// Where interrupts' work is done on whoever runs.
const INTERRUPTS: [&str; 5] =
    ["__do_softirq", "handle_softirqs", "do_softirq", "__common_interrupt", "common_interrupt"];

/// What was found.
#[derive(Debug, Clone, Serialize)]
pub struct Profile {
    /// The threads' own.
    pub samples: u64,
    /// In a device's or an interrupt's work, which is not theirs.
    pub apart: u64,
    /// The kernel had no room for, or were too many to be kept.
    pub lost: u64,
    /// Of `samples`.
    pub copying: u64,
    /// The functions in which the threads were most, by themselves.
    pub functions: Vec<Function>,
}

#[derive(Debug, Clone, Serialize)]
pub struct Function {
    pub name: String,
    /// `kernel`, a module of it, or a program's or library's file.
    pub of: String,
    pub samples: u64,
    pub copies: bool,
}

/// Part of all samples that was copying; 0 without any samples. Of several rounds together, because one in which hardly any sample was
/// the threads' own has no share worth a median.
pub fn copying_share(profiles: &[Profile]) -> f64 {
    let sum = |of: fn(&Profile) -> u64| profiles.iter().map(of).sum::<u64>() as f64;
    match sum(|profile| profile.samples) {
        0.0 => 0.0,
        samples => sum(|profile| profile.copying) / samples,
    }
}

/// The threads of this process whose kernel names begin with `prefix`.
pub fn threads_named(prefix: &str) -> io::Result<Vec<u32>> {
    let mut found = Vec::new();
    for task in std::fs::read_dir("/proc/self/task")? {
        let task = task?;
        // One that has ended meanwhile is none.
        let Ok(name) = std::fs::read_to_string(task.path().join("comm")) else { continue };
        let id: Option<u32> = task.file_name().to_str().and_then(|id| id.parse().ok());
        found.extend(id.filter(|_| name.starts_with(prefix)));
    }
    Ok(found)
}

/// Samples some threads until it is told to stop.
pub struct Profiler {
    stop: Sender<()>,
    thread: JoinHandle<(Vec<Sample>, u64)>,
}

impl Profiler {
    /// Fails where perf events or the kernel's addresses are not to be had (privilege, perf_event_paranoid, a container's filter).
    pub fn start(threads: &[u32]) -> io::Result<Self> {
        let mut samplers =
            threads.iter().map(|thread| Sampler::open(*thread, FREQUENCY)).collect::<io::Result<Vec<_>>>()?;
        let (stop, stopped) = channel();
        let collect = move || {
            let (mut samples, mut lost) = (Vec::new(), 0);
            loop {
                let told = stopped.recv_timeout(LOOK);
                for sampler in &mut samplers {
                    let mut over = 0;
                    lost += sampler.drain(&mut |sample| {
                        if samples.len() < MOST_SAMPLES { samples.push(sample) } else { over += 1 }
                    });
                    lost += over;
                }
                if told != Err(RecvTimeoutError::Timeout) {
                    return (samples, lost);
                }
            }
        };
        let thread = std::thread::Builder::new().name("profile".to_owned()).spawn(collect)?;
        Ok(Self { stop, thread })
    }

    /// Ends the sampling and names what was found.
    pub fn stop(self) -> io::Result<Profile> {
        drop(self.stop);
        let (samples, lost) = self.thread.join().map_err(|_| io::Error::other("the profile's thread panicked"))?;
        named(&samples, lost)
    }
}

fn named(samples: &[Sample], lost: u64) -> io::Result<Profile> {
    let (kernel, program) = (Kernel::read()?, Program::read()?);
    let mut names: HashMap<(bool, u64), Name> = HashMap::new();
    let mut functions: HashMap<Name, u64> = HashMap::new();
    let mut profile = Profile { samples: 0, apart: 0, lost, copying: 0, functions: Vec::new() };
    for sample in samples {
        if is_apart(&kernel, sample) {
            profile.apart += 1;
            continue;
        }
        let name = names.entry((sample.kernel, sample.address)).or_insert_with(|| match sample.kernel {
            true => {
                let (name, of) = kernel.name(sample.address).unwrap_or(("?", "kernel"));
                Name { name: name.to_owned(), of: of.to_owned() }
            }
            false => program.name(sample.address),
        });
        profile.samples += 1;
        profile.copying += u64::from(copies(&name.name));
        *functions.entry(name.clone()).or_default() += 1;
    }
    let mut most: Vec<_> = functions.into_iter().collect();
    most.sort_by(|(a, more), (b, less)| less.cmp(more).then_with(|| a.name.cmp(&b.name)));
    most.truncate(MOST_FUNCTIONS);
    let function = |(Name { name, of }, samples)| Function { copies: copies(&name), name, of, samples };
    profile.functions = most.into_iter().map(function).collect();
    Ok(profile)
}

fn is_apart(kernel: &Kernel, sample: &Sample) -> bool {
    let device = |address: &u64| {
        kernel.name(*address).is_some_and(|(name, of)| DEVICES.contains(&of) || INTERRUPTS.contains(&name))
    };
    sample.kernel && (device(&sample.address) || sample.chain.iter().any(device))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};
    use std::hint::black_box;
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Instant;

    /// Profiles a thread that does `work` over and over, until there is something to say or the time is up. `None`, with the reason said:
    /// this machine shows no profiles.
    fn profile_of(mut work: impl FnMut() + Send) -> Option<Profile> {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (tell, told) = channel();
            scope.spawn(|| {
                let tell = tell;
                tell.send(rustix::thread::gettid().as_raw_nonzero().get() as u32).expect("somebody listens");
                while !stop.load(Ordering::Relaxed) {
                    work();
                }
            });
            let thread = told.recv().expect("the thread's number");
            let profile = Kernel::read().and_then(|_| Profiler::start(&[thread])).and_then(|profiler| {
                // CPU time of a machine that others use too: as long as it takes it to have used some.
                let (used, until) =
                    (format!("/proc/self/task/{thread}/schedstat"), Instant::now() + Duration::from_secs(20));
                while Instant::now() < until {
                    let ns = std::fs::read_to_string(&used)?;
                    let ns: u64 = ns.split(' ').next().and_then(|ns| ns.parse().ok()).unwrap_or(0);
                    if ns > 400_000_000 {
                        break;
                    }
                    std::thread::yield_now();
                }
                profiler.stop()
            });
            stop.store(true, Ordering::Relaxed);
            match profile {
                Ok(profile) => Some(profile),
                Err(error) => {
                    let refused = [libc::EACCES, libc::EPERM, libc::ENOENT, libc::ENOSYS, libc::EOPNOTSUPP];
                    let shows_none = error.raw_os_error().is_none_or(|errno| refused.contains(&errno));
                    assert!(shows_none, "{error}");
                    eprintln!("skipped: no perf events or no kernel addresses here: {error}");
                    None
                }
            }
        })
    }

    fn samples_in(profile: &Profile, kernel: bool) -> u64 {
        let there = |function: &&Function| function.copies && (function.of == "kernel") == kernel;
        profile.functions.iter().filter(there).map(|function| function.samples).sum()
    }

    #[test]
    fn a_thread_that_copies_is_seen_copying_in_the_kernel_and_out_of_it() {
        const BYTES: usize = 4 << 20;
        let file = std::fs::File::from(memfd_create("copied", MemfdFlags::CLOEXEC).expect("memfd"));
        let (from, mut to) = (vec![0x55_u8; BYTES], vec![0_u8; BYTES]);
        file.write_all_at(&from, 0).expect("room");
        let Some(profile) = profile_of(|| {
            black_box(&mut to).copy_from_slice(black_box(&from));
            file.read_exact_at(black_box(&mut to), 0).expect("all of it is there");
        }) else {
            return;
        };
        assert!(profile.samples > 50, "{profile:?}");
        assert!(copying_share(std::slice::from_ref(&profile)) > 0.5, "{profile:?}");
        assert!(samples_in(&profile, true) > 5 && samples_in(&profile, false) > 5, "{profile:?}");
    }

    #[test]
    fn a_thread_that_computes_is_not_seen_copying_and_its_function_has_a_name() {
        #[inline(never)]
        fn turns_and_turns(mut word: u64) -> u64 {
            for turn in 0..100_000_u64 {
                word = word.rotate_left(7) ^ black_box(turn);
            }
            word
        }
        let Some(profile) = profile_of(|| {
            black_box(turns_and_turns(black_box(1)));
        }) else {
            return;
        };
        assert!(profile.samples > 50, "{profile:?}");
        assert!(copying_share(std::slice::from_ref(&profile)) < 0.02, "{profile:?}");
        // What was inlined into it may be named for itself, and then half of the samples are that one's.
        let first = &profile.functions[0];
        let of_the_same: u64 =
            profile.functions.iter().filter(|other| other.of == first.of).map(|other| other.samples).sum();
        let named = profile.functions.iter().any(|function| function.name.contains("turns_and_turns"));
        assert!(named && of_the_same * 2 > profile.samples, "{profile:?}");
    }
}
