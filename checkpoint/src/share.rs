//! Work on many pages, shared out to a few threads.
//!
//! Copying and checking pages is bound by one core's way to memory. The pieces are taken one by one by whoever is free: on a host that has
//! other work a thread that is not let run yet holds up nothing but its own end.

use belay_transport::PAGE_SIZE;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What is less is done by one thread: starting another costs as much as copying some hundred pages.
const PARALLEL_BYTES: usize = 4096 * PAGE_SIZE;
const MOST_THREADS: usize = 4;

/// How many threads are worth it for so many bytes.
pub(crate) fn threads_for(bytes: usize) -> usize {
    match bytes {
        ..PARALLEL_BYTES => 1,
        _ => std::thread::available_parallelism().map_or(1, |cores| cores.get().min(MOST_THREADS)),
    }
}

/// Does `work` for each of `pieces` pieces by so many threads, each with what `own` makes for it. This thread is among them, and calls
/// `between` after each of its own. Where a thread cannot be had the others do its part.
pub(crate) fn share<T>(
    threads: usize,
    pieces: usize,
    own: impl Fn() -> T + Sync,
    work: impl Fn(&mut T, usize) + Sync,
    mut between: impl FnMut(usize),
) {
    let next = AtomicUsize::new(0);
    let take = || Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&piece| piece < pieces);
    std::thread::scope(|scope| {
        for _ in 1..threads.min(pieces) {
            let helper = || {
                let mut own = own();
                while let Some(piece) = take() {
                    work(&mut own, piece);
                }
            };
            // Refused for want of memory or of a thread: a catch goes on without.
            let _ = std::thread::Builder::new().name("belay-pages".to_owned()).spawn_scoped(scope, helper);
        }
        let mut own = own();
        while let Some(piece) = take() {
            work(&mut own, piece);
            between(piece);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_piece_is_done_once_by_whichever_thread() {
        for (threads, pieces) in [(1, 0), (1, 5), (4, 0), (4, 1), (4, 1000)] {
            let done: Vec<_> = (0..pieces).map(|_| AtomicUsize::new(0)).collect();
            let mut own = 0;
            share(threads, pieces, || (), |(), piece| _ = done[piece].fetch_add(1, Ordering::Relaxed), |_| own += 1);
            assert!(done.into_iter().all(|times| times.into_inner() == 1) && own <= pieces, "{threads} for {pieces}");
        }
    }
}
