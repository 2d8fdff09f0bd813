//! The leanest loop that serves a fault over a lane: read the event, one READ, poll, CONTINUE. No states, no background, no
//! bookkeeping: what the engine is measured against where READ and userfaultfd do not simply add up (one core for both threads and
//! a software device, caches that went cold while the wire was waited for).

use crate::error::BenchError;
use crate::floor::{Faults, PAGE};
use crate::rig::{BOUND, Landing};
use belay_transport::PageSize;
use belay_transport::fabric::{Lane, Read, ReadKey};
use belay_transport::region::Mapping;
use belay_transport::uffd::Event;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Empty looks at the userfaultfd before the loop sleeps, as the floor's.
const SPINS: u32 = 200;

/// Touches the pages of `order` one after the other while the loop serves them.
pub fn faults(
    mut lane: Box<dyn Lane>,
    remote: ReadKey,
    landing: &Landing,
    guest: &Mapping,
    order: &[usize],
) -> Result<Faults, BenchError> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let server = scope.spawn(|| serve(lane.as_mut(), remote, landing, order.len(), &stop));
        let mut toucher = Vec::with_capacity(order.len());
        let mut wrong = None;
        for page in order {
            let mut word = [0; 8];
            let start = Instant::now();
            guest.read(page * PAGE, &mut word);
            toucher.push(start.elapsed().as_nanos() as u64);
            let (found, expected) = (u64::from_ne_bytes(word), *page as u64 + 1);
            if found != expected {
                wrong = Some(BenchError::Wrong { page: *page, found, expected });
            }
        }
        stop.store(true, Ordering::Release);
        let server = server.join().map_err(|_| BenchError::Thread("the lean loop"))??;
        wrong.map_or(Ok(Faults { toucher, server }), Err)
    })
}

fn serve(
    lane: &mut dyn Lane,
    remote: ReadKey,
    landing: &Landing,
    count: usize,
    stop: &AtomicBool,
) -> Result<Vec<u64>, BenchError> {
    let mut times = Vec::with_capacity(count);
    let mut events = [Event::Remove { start: 0, end: 0 }; 1];
    let mut empty = 0_u32;
    while !stop.load(Ordering::Relaxed) {
        if landing.uffd.read_events(&mut events)? == 0 {
            empty += 1;
            if empty > SPINS {
                let wait = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
                // Interrupted or not, the next look tells.
                let _ = poll(&mut [PollFd::from_borrowed_fd(landing.uffd.as_fd(), PollFlags::IN)], Some(&wait));
            }
            continue;
        }
        empty = 0;
        let Event::Fault { address, .. } = events[0] else { continue };
        let start = Instant::now();
        let offset = (address - landing.guest_address) & !(PAGE as u64 - 1);
        let (local, len) = (landing.key, PAGE as u32);
        lane.post_reads(&[Read { id: 0, remote, remote_offset: offset, local, local_offset: offset, len }])?;
        let mut done = [0; 1];
        while lane.poll(&mut done)? == 0 {
            if start.elapsed() > BOUND {
                return Err(BenchError::Stuck(BOUND));
            }
        }
        landing.uffd.continue_range(landing.guest_address + offset, PAGE as u64, PageSize::Small, false)?;
        times.push(start.elapsed().as_nanos() as u64);
    }
    Ok(times)
}
