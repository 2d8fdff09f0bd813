//! Scans large ranges with several threads. A scan grows with guest size and the guest is stopped for it, so it is shared out.
//!
//! The threads and their buffers are made once; a scan allocates nothing. A buffer travels to a thread with a piece of the range
//! and comes back with what was found there, so no two threads ever touch the same set.

use super::pagemap::{self, PageRegion, Written};
use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// Runs of written pages a buffer holds; a scan that finds more comes back for the rest.
const RUNS_A_BUFFER: usize = 4096;
/// What one thread takes at a time: small enough that all end together, large enough that a hand-over costs nothing against it.
const PIECE_BYTES: u64 = 128 << 20;
/// More memory than this a thread, or threads are not worth their wake-up.
const BYTES_A_THREAD: u64 = 1 << 30;
/// A scan that large guests need tens of ms for; a thread that has not answered by then never will.
const SCAN_BOUND: Duration = Duration::from_secs(30);
const MOST_THREADS: usize = 8;

struct Piece {
    written: Written,
    range: Range<u64>,
    buffer: Box<[PageRegion]>,
}

struct Scanned {
    piece: Piece,
    outcome: Result<(usize, u64), Errno>,
}

/// Threads that scan, or the caller's own where the range is small.
pub(super) struct Scanners {
    pagemap: Arc<OwnedFd>,
    buffers: Vec<Box<[PageRegion]>>,
    pool: Option<Pool>,
    /// Ranges of less than this altogether are not shared out.
    alone_below: u64,
}

struct Pool {
    work: Option<Sender<Piece>>,
    done: Receiver<Scanned>,
    threads: Vec<JoinHandle<()>>,
}

impl Scanners {
    /// For ranges of `bytes` altogether.
    pub(super) fn new(pagemap: Arc<OwnedFd>, bytes: u64) -> io::Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let wanted = usize::try_from(bytes / BYTES_A_THREAD).unwrap_or(MOST_THREADS);
        Self::with_threads(pagemap, wanted.min(cores).min(MOST_THREADS))
    }

    fn with_threads(pagemap: Arc<OwnedFd>, threads: usize) -> io::Result<Self> {
        let buffer = || vec![PageRegion { start: 0, end: 0, categories: 0 }; RUNS_A_BUFFER].into_boxed_slice();
        // Two a thread: one is being filled while the other is being emptied.
        let buffers: Vec<_> = std::iter::repeat_with(buffer).take((threads * 2).max(1)).collect();
        let pool = if threads > 1 { Some(Pool::start(&pagemap, threads, buffers.len())?) } else { None };
        Ok(Self { pagemap, buffers, pool, alone_below: BYTES_A_THREAD })
    }

    /// Gives every run of written pages in `ranges` to `each`, in no order. Where they are protected, some may have been without having been given
    /// to `each` after an error: the caller must not go on as if nothing was.
    pub(super) fn scan(
        &mut self,
        written: Written,
        ranges: &[Range<u64>],
        mut each: impl FnMut(&PageRegion),
    ) -> Result<(), Errno> {
        let bytes: u64 = ranges.iter().map(|range| range.end - range.start).sum();
        match &self.pool {
            Some(pool) if bytes >= self.alone_below => pool.scan(&mut self.buffers, written, ranges, &mut each),
            _ => {
                let buffer = &mut self.buffers[0];
                for mut range in ranges.iter().cloned() {
                    while !range.is_empty() {
                        let (runs, walked) = pagemap::scan(&self.pagemap, written, range.start, range.end, buffer)?;
                        buffer[..runs].iter().for_each(&mut each);
                        range.start = walked;
                    }
                }
                Ok(())
            }
        }
    }
}

impl Pool {
    fn start(pagemap: &Arc<OwnedFd>, threads: usize, buffers: usize) -> io::Result<Self> {
        let (work, pieces) = bounded::<Piece>(buffers);
        let (scanned, done) = bounded::<Scanned>(buffers);
        let spawn = |number| {
            let (pagemap, pieces, scanned) = (Arc::clone(pagemap), pieces.clone(), scanned.clone());
            std::thread::Builder::new().name(format!("belay-scan-{number}")).spawn(move || {
                for mut piece in pieces {
                    let Range { start, end } = piece.range;
                    let outcome = pagemap::scan(&pagemap, piece.written, start, end, &mut piece.buffer);
                    if scanned.send(Scanned { piece, outcome }).is_err() {
                        return;
                    }
                }
            })
        };
        let threads = (0..threads).map(spawn).collect::<io::Result<_>>()?;
        Ok(Self { work: Some(work), done, threads })
    }

    fn scan(
        &self,
        buffers: &mut Vec<Box<[PageRegion]>>,
        written: Written,
        ranges: &[Range<u64>],
        each: &mut impl FnMut(&PageRegion),
    ) -> Result<(), Errno> {
        let work = self.work.as_ref().expect("the pool is only closed when it is dropped");
        let mut pieces = ranges.iter().flat_map(|range| {
            let Range { start, end } = range.clone();
            (start..end).step_by(PIECE_BYTES as usize).map(move |at| at..end.min(at + PIECE_BYTES))
        });
        let (mut in_flight, mut failed) = (0_usize, None);
        loop {
            while failed.is_none()
                && let Some(buffer) = buffers.pop()
            {
                let Some(range) = pieces.next() else {
                    buffers.push(buffer);
                    break;
                };
                work.send(Piece { written, range, buffer }).map_err(|_| Errno::PIPE)?;
                in_flight += 1;
            }
            if in_flight == 0 {
                return failed.map_or(Ok(()), Err);
            }
            let Scanned { mut piece, outcome } = self.done.recv_timeout(SCAN_BOUND).map_err(|_| Errno::TIMEDOUT)?;
            in_flight -= 1;
            match outcome {
                Ok((runs, walked)) => {
                    piece.buffer[..runs].iter().for_each(&mut *each);
                    piece.range.start = walked;
                    if !piece.range.is_empty() && failed.is_none() {
                        work.send(piece).map_err(|_| Errno::PIPE)?;
                        in_flight += 1;
                        continue;
                    }
                }
                Err(errno) => failed = Some(errno),
            }
            buffers.push(piece.buffer);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.work = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
impl Scanners {
    /// With this many threads, whatever the size.
    pub(super) fn for_test(pagemap: Arc<OwnedFd>, threads: usize) -> Self {
        Self { alone_below: 0, ..Self::with_threads(pagemap, threads).expect("threads") }
    }
}
