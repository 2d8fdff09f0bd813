//! Watching a guest from outside: the page it keeps count in, read in the file that is its memory.
//!
//! read(2) of a page that is not there yet gives zeros and puts nothing there, so a destination's memory can be watched while it is filled.

use super::layout::{BUCKET_COUNT, BUCKETS, STEPS, WORDS, WRONG, mixed, shortest};
use crate::error::BenchError;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const PAGE: usize = belay_transport::PAGE_SIZE;
/// How often a pulse is felt.
const EVERY: Duration = Duration::from_micros(200);
/// What a point of its course stands for.
pub const STRETCH: Duration = Duration::from_millis(10);
/// Points of the longest: five minutes.
const LONGEST_COURSE: usize = 30_000;

/// What the guest has counted so far.
#[derive(Clone)]
pub struct Count {
    pub steps: u64,
    pub buckets: Vec<u64>,
}

/// A guest's page, in one file.
pub struct Page {
    file: File,
    at: u64,
}

impl Page {
    /// Looks for it in the guest's memory, which it is in since the guest has said that it is ready.
    pub fn find(ram: &Path, nonce: u64) -> Result<Self, BenchError> {
        let file = File::open(ram).map_err(BenchError::io("open the guest's memory"))?;
        let bytes = file.metadata().map_err(BenchError::io("look at the guest's memory"))?.len();
        let begins: Vec<u8> = (0..STEPS as u64).flat_map(|index| mixed(nonce, index).to_le_bytes()).collect();
        let mut chunk = vec![0; 4 << 20];
        for begun in (0..bytes).step_by(chunk.len()) {
            let read = file.read_at(&mut chunk, begun).map_err(BenchError::io("read the guest's memory"))?;
            if let Some(page) = chunk[..read].chunks(PAGE).position(|page| page.starts_with(&begins)) {
                return Ok(Self { file, at: begun + (page * PAGE) as u64 });
            }
        }
        Err(BenchError::Refused { why: "the guest is ready, and the page it counts in is not in its memory".into() })
    }

    /// The same page of the guest in another file.
    pub fn in_file(&self, ram: &Path) -> Result<Self, BenchError> {
        File::open(ram).map(|file| Self { file, at: self.at }).map_err(BenchError::io("open the guest's memory"))
    }

    fn word(&self, word: usize) -> Result<u64, BenchError> {
        let mut bytes = [0; 8];
        let read = self.file.read_exact_at(&mut bytes, self.at + word as u64 * 8);
        read.map_err(BenchError::io("read what the guest counts")).map(|()| u64::from_le_bytes(bytes))
    }

    /// All of it. An error if the guest has found its memory to be wrong.
    pub fn count(&self) -> Result<Count, BenchError> {
        let mut bytes = [0; WORDS * 8];
        self.file.read_exact_at(&mut bytes, self.at).map_err(BenchError::io("read what the guest counts"))?;
        let words: Vec<u64> =
            bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("chunks of 8"))).collect();
        match words[WRONG] {
            0 => Ok(Count { steps: words[STEPS], buckets: words[BUCKETS..BUCKETS + BUCKET_COUNT].to_vec() }),
            page => Err(BenchError::GuestFoundWrong { page: page - 1 }),
        }
    }
}

/// How long each write took that was done between two counts, in nanoseconds, those under `least` left out; in order.
pub fn times_between(before: &Count, after: &Count, least: u64) -> Vec<u64> {
    let pairs = before.buckets.iter().zip(&after.buckets).enumerate();
    let done = pairs.map(|(bucket, (before, after))| (shortest(bucket), after.saturating_sub(*before)));
    done.filter(|(ns, _)| *ns >= least).flat_map(|(ns, times)| (0..times).map(move |_| ns)).collect()
}

/// What was felt.
#[derive(Debug, Clone)]
pub struct Felt {
    /// The longest that the guest made no step.
    pub longest: Duration,
    pub steps: u64,
    pub time: Duration,
    /// Steps of each [`STRETCH`], from the first on.
    pub course: Vec<u64>,
}

impl Felt {
    /// Counts steps that were found at such a time. What comes after [`LONGEST_COURSE`] is not drawn.
    fn stepped(&mut self, at: Duration, steps: u64) {
        self.steps += steps;
        let stretch = (at.as_nanos() / STRETCH.as_nanos()) as usize;
        if stretch < LONGEST_COURSE {
            if stretch >= self.course.len() {
                self.course.resize(stretch + 1, 0);
            }
            self.course[stretch] += steps;
        }
    }
}

/// A thread that feels a guest's pulse wherever it is.
pub struct Pulse {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Felt, BenchError>>,
}

impl Pulse {
    /// From now on, in both files: the guest runs where it has got further.
    pub fn watch(here: Page, there: Page) -> Result<Self, BenchError> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let watch = move || {
            let steps = || Ok::<u64, BenchError>(here.word(STEPS)?.max(there.word(STEPS)?));
            let (begun, mut last) = (Instant::now(), steps()?);
            let mut felt = Felt { longest: Duration::ZERO, steps: 0, time: Duration::ZERO, course: Vec::new() };
            let mut moved_at = begun;
            loop {
                // Read first: what stands still when the watch ends counts up to its end.
                let over = stopped.load(Ordering::Acquire);
                let is = steps()?;
                let now = Instant::now();
                felt.longest = felt.longest.max(now - moved_at);
                felt.time = now - begun;
                felt.stepped(felt.time, is.saturating_sub(last));
                if is != last {
                    (moved_at, last) = (now, is);
                }
                if over {
                    return Ok(felt);
                }
                std::thread::sleep(EVERY);
            }
        };
        let thread = std::thread::Builder::new().name("pulse".into()).spawn(watch);
        Ok(Self { stop, thread: thread.map_err(BenchError::io("start a thread"))? })
    }

    /// Ends the watch.
    pub fn stop(self) -> Result<Felt, BenchError> {
        self.stop.store(true, Ordering::Release);
        self.thread.join().map_err(|_| BenchError::Thread("the pulse"))?
    }
}

#[cfg(test)]
mod tests {
    use super::super::layout::{BUCKET_COUNT, bucket, shortest};
    use super::*;

    #[test]
    fn a_time_is_in_the_bucket_whose_shortest_is_the_last_not_above_it() {
        for ns in (0..4096)
            .chain((12..36).flat_map(|power| [(1 << power) - 1, 1 << power, (1 << power) + (1 << (power - 2))]))
        {
            let bucket = bucket(ns);
            assert!(shortest(bucket) <= ns, "{ns} in {bucket}");
            assert!(bucket + 1 == BUCKET_COUNT || ns < shortest(bucket + 1), "{ns} in {bucket}");
        }
    }

    #[test]
    fn a_course_has_the_steps_of_each_stretch_and_those_without_any() {
        let mut felt = Felt { longest: Duration::ZERO, steps: 0, time: Duration::ZERO, course: Vec::new() };
        for (stretch, steps) in [(0, 2), (0, 3), (3, 4), (LONGEST_COURSE as u32, 5)] {
            felt.stepped(STRETCH * stretch, steps);
        }
        assert_eq!((felt.steps, felt.course), (14, vec![5, 0, 0, 4]));
    }

    #[test]
    fn times_between_two_counts_are_those_of_the_second_that_the_first_does_not_have() {
        let count = |times: &[u64]| {
            let mut buckets = vec![0; BUCKET_COUNT];
            times.iter().for_each(|ns| buckets[bucket(*ns)] += 1);
            Count { steps: times.len() as u64, buckets }
        };
        let (before, after) = (count(&[8, 1024, 4096]), count(&[8, 8, 1024, 4096, 4096, 65536]));
        assert_eq!(times_between(&before, &after, 0), [8, 4096, 65536]);
        assert_eq!(times_between(&before, &after, 10_000), [65536]);
    }

    #[test]
    fn a_guest_that_stands_is_felt_to_stand_and_is_followed_into_the_other_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let page = |steps: u64| {
            let words: Vec<u64> = (0..4).map(|index| mixed(7, index)).chain([steps]).collect();
            let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            bytes.resize(PAGE, 0);
            bytes
        };
        let sized = |name: &str| {
            std::fs::write(path(name), vec![0; 3 * PAGE]).unwrap();
            File::options().write(true).open(path(name)).unwrap()
        };
        let (here, there) = (sized("here"), sized("there"));
        here.write_all_at(&page(100), PAGE as u64).unwrap();
        let found = Page::find(&path("here"), 7).unwrap();
        assert!(Page::find(&path("here"), 8).is_err());
        let pulse =
            Pulse::watch(found.in_file(&path("here")).unwrap(), found.in_file(&path("there")).unwrap()).unwrap();
        std::thread::sleep(Duration::from_millis(30));
        there.write_all_at(&page(140), PAGE as u64).unwrap();
        let felt = pulse.stop().unwrap();
        assert_eq!(felt.steps, 40);
        assert!(felt.longest >= Duration::from_millis(29) && felt.longest <= felt.time, "{felt:?}");
    }
}
