//! Notices discards that happen under a READ.
//!
//! The trap: the VMM punches a hole (no userfaultfd event tells) while a READ of that frame is in flight, or before one is
//! posted. The READ's copy through the alias then *allocates a new frame* and puts the source's old content there, and
//! CONTINUE would show it. The guest's own mapping cannot tell: by the time it faults the frame is there.
//!
//! The alias can. All frames were allocated up front, so a MISSING fault on the alias means one thing: the frame was given up.
//! The alias is registered with a userfaultfd of our own; this thread marks the frame, gives the copy a zero page to go on
//! with, and whoever lands the READ finds the mark, zeroes the frame again and settles it as Discarded. A NIC does not fault:
//! it writes the orphaned frame, and CONTINUE then meets a hole, which is the same rule in `install`.

use super::plan::LandingPlan;
use super::shared::{PullFailure, Shared, drain, signal};
use crate::uffd::{Event, Faults, Features, Installed, OpenMode, RegisterModes, Stop, Uffd, UffdError};
use crate::units::{FrameIndex, PAGE_SHIFT, PageIndex, PageSize};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Longest sleep, so that a missed wake-up costs this and no more.
const IDLE: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };

pub(super) struct Guard {
    uffd: Uffd,
    shared: Arc<Shared>,
    wake: Arc<OwnedFd>,
    /// As large as the largest frame.
    zeroes: Vec<u8>,
}

impl Guard {
    /// Registers every alias; `None` when no region lands in place.
    pub(super) fn new(shared: Arc<Shared>, wake: Arc<OwnedFd>) -> Result<Option<Self>, UffdError> {
        if !shared.regions.iter().any(|region| region.in_place()) {
            return Ok(None);
        }
        let asked = Features::MISSING_SHMEM.union(Features::MISSING_HUGETLBFS);
        // Without privilege only copies made in user mode are watched; one made in the kernel (recv) then fails with EFAULT,
        // which ends the lane: never stale either.
        let uffd = match Uffd::open(OpenMode::All, asked) {
            Err(UffdError::NoPermission(_)) => Uffd::open(OpenMode::UserModeOnly, asked)?,
            other => other?,
        };
        for region in &shared.regions {
            if let LandingPlan::InPlace { alias, .. } = &region.plan.landing {
                let modes = RegisterModes { faults: Faults::Missing, write_protect: false };
                uffd.register(alias.address(), region.plan.bytes, modes)?;
            }
        }
        let largest = shared.regions.iter().map(|region| region.plan.page_size.bytes()).max().unwrap_or(0);
        Ok(Some(Self { uffd, shared, wake, zeroes: vec![0; largest] }))
    }

    /// Until the engine stops. Closing the userfaultfd at the end frees any thread that still waits.
    pub(super) fn run(self) {
        if let Err(source) = self.serve() {
            self.shared.fail(PullFailure::Guard(source));
        }
        signal(&self.shared.ended_fd);
    }

    fn serve(&self) -> Result<(), UffdError> {
        let mut events = [Event::Remove { start: 0, end: 0 }; 16];
        while !self.shared.stop.load(Ordering::Acquire) {
            let mut descriptors =
                [PollFd::new(&self.uffd, PollFlags::IN), PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::IN)];
            // A failed poll only means looking sooner.
            let _ = poll(&mut descriptors, Some(&IDLE));
            drain(&self.wake);
            let count = self.uffd.read_events(&mut events)?;
            for event in &events[..count] {
                if let Event::Fault { address, .. } = *event {
                    self.discarded(address)?;
                }
            }
        }
        Ok(())
    }

    /// The frame behind alias address `address` is gone: mark first, then let the copy go on.
    fn discarded(&self, address: u64) -> Result<(), UffdError> {
        for (index, region) in self.shared.regions.iter().enumerate() {
            let LandingPlan::InPlace { alias, .. } = &region.plan.landing else { continue };
            let Some(offset) = address.checked_sub(alias.address()).filter(|offset| *offset < region.plan.bytes) else {
                continue;
            };
            let page_size = region.plan.page_size;
            let frame = FrameIndex::containing(offset as usize, page_size);
            let page = PageIndex(frame.0 << (page_size.shift() - PAGE_SHIFT));
            self.shared.observer.given_up(region.plan.id, page);
            self.shared.states.discard(index, frame);
            self.shared.discards.suspect(index, frame);
            let start = alias.address() + frame.offset(page_size) as u64;
            let outcome = loop {
                match zero_missing(&self.uffd, start, page_size, &self.zeroes, false)? {
                    Installed { stop: Stop::EventsPending, .. } => std::thread::yield_now(),
                    outcome => break outcome,
                }
            };
            self.shared.discards.settle(index, frame, outcome.present == 0);
        }
        Ok(())
    }
}

/// A zero frame where there is none, write-protected if `protect`. Where there is one (EEXIST) nothing changes: this can never destroy what a guest wrote.
pub(super) fn zero_missing(
    uffd: &Uffd,
    start: u64,
    page_size: PageSize,
    zeroes: &[u8],
    protect: bool,
) -> Result<Installed, UffdError> {
    let len = page_size.bytes();
    if page_size == PageSize::Small && !protect {
        return uffd.zeropage(start, len as u64);
    }
    assert!(zeroes.len() >= len, "{} zeroes for a frame of {len} bytes", zeroes.len());
    // SAFETY: `zeroes` is readable for a whole frame (asserted).
    unsafe { uffd.copy(start, zeroes.as_ptr().cast(), len as u64, page_size, protect) }
}
