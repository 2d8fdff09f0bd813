//! The rule for every fault, by the state of the frame it is for.
//!
//! | state | MINOR, or MISSING with bounce landing | MISSING where RAM was allocated up front |
//! |---|---|---|
//! | Absent | claim and READ (a zero frame: show) | discard: zero it, never read the source for it |
//! | InFlight | shown when the READ lands | discard wanted: settled when the READ is over |
//! | Landed | show again (bounce: as on the right) | discard, if a zero frame could be put there |
//! | Discarded | show again (bounce: zero it) | zero it again |
//! | Failed | waits: nothing false is ever shown | discard |
//!
//! A MISSING event may be old: two threads at one page, the first one's fault served in between. So on a frame that has
//! landed a zero frame is *tried*: the kernel puts it there only where there is none (EEXIST otherwise), and only its success is a
//! discard.

use super::guard::zero_missing;
use super::plan::{PageClass, reads_a_frame};
use super::shard::{Shard, Waiting};
use super::shared::{Counters, PullFailure};
use super::slots::{LaneOf, Slot};
use crate::pages::State;
use crate::uffd::{FaultKind, Stop};
use crate::units::{FrameIndex, PAGE_SHIFT, PageIndex};

impl Shard {
    /// Serves one fault, as far as can be done now.
    pub(super) fn serve(&mut self, waiting: Waiting) -> Result<(), PullFailure> {
        let Waiting { region, frame, kind, .. } = waiting;
        let in_place = self.shared.regions[region].in_place();
        let hole = kind == FaultKind::Missing && in_place;
        match self.shared.states.state_at(region, FrameIndex(frame)) {
            State::Absent | State::Failed if hole => self.discarded(waiting),
            State::Absent => self.demand(waiting),
            State::Failed => Ok(()),
            State::InFlight | State::DiscardWanted => {
                if hole {
                    self.shared.states.discard(region, FrameIndex(frame));
                    self.shared.discards.record(region, FrameIndex(frame));
                }
                self.wait_for_slot(waiting);
                Ok(())
            }
            // Landed and still in its slot: it is about to be shown.
            State::Landed | State::Discarded if self.wait_for_slot(waiting) => Ok(()),
            State::Landed | State::Discarded if kind == FaultKind::Missing => self.zero_if_missing(waiting),
            State::Landed | State::Discarded => self.show_again(waiting),
        }
    }

    /// Marks the slot a frame is on its way in as waited for. Whether there is one.
    fn wait_for_slot(&mut self, waiting: Waiting) -> bool {
        let Some(slot) = self.slots.covering(waiting.region, waiting.frame) else { return false };
        slot.waited_since_ns.get_or_insert(waiting.read_ns);
        true
    }

    /// An absent frame somebody needs: claimed, and its READ staged for this round's post.
    fn demand(&mut self, waiting: Waiting) -> Result<(), PullFailure> {
        let Waiting { region, frame, read_ns, .. } = waiting;
        let (class, _) = self.shared.regions[region].classes.run(frame, 1);
        let zero = class == PageClass::Zero;
        let parts = if zero { 0 } else { reads_a_frame(&self.shared.regions[region]) };
        if !zero {
            // Without a lane the fault waits: a failure has been told.
            let Some(lane) = &self.fault_lane else { return Ok(()) };
            if lane.window() - lane.outstanding() < self.staged.len() + parts {
                return self.defer(waiting);
            }
        }
        if !self.slots.room(LaneOf::Demand) {
            return self.defer(waiting);
        }
        if !self.shared.states.claim(region, FrameIndex(frame)) {
            // Given up by the guest this instant: the rule for that state is next.
            return self.defer(waiting);
        }
        let slot = Slot {
            lane: LaneOf::Demand,
            region,
            first: frame,
            frames: 1,
            parts_left: parts as u32,
            zero,
            landed: false,
            shown: 0,
            waited_since_ns: Some(read_ns),
            posted_ns: read_ns,
            completed_ns: read_ns,
        };
        let index = self.slots.insert(slot);
        if zero {
            self.land(index);
            return self.show(index);
        }
        let mut staged = std::mem::take(&mut self.staged);
        self.reads(index, &slot, &mut staged);
        self.staged = staged;
        self.staged_slots.push(index);
        Counters::add(&self.counters().demand_reads, 1);
        self.sweep.fault(&self.shared.regions, region, frame);
        Ok(())
    }

    /// A frame that was allocated and is missing: the guest gave it up before anything was read for it.
    fn discarded(&mut self, waiting: Waiting) -> Result<(), PullFailure> {
        self.shared.discards.record(waiting.region, FrameIndex(waiting.frame));
        self.shared.states.discard(waiting.region, FrameIndex(waiting.frame));
        self.zero_if_missing(waiting)
    }

    /// Puts a zero frame where there is none and takes that for the discard it is; else wakes who waits. It is suspected
    /// first: a guest that has seen the zeroes must not be harvested without them, and this may be an old event.
    fn zero_if_missing(&mut self, waiting: Waiting) -> Result<(), PullFailure> {
        let region = &self.shared.regions[waiting.region];
        let page = PageIndex(waiting.frame << (region.shift() - PAGE_SHIFT));
        self.shared.observer.given_up(region.plan.id, page);
        self.shared.discards.suspect(waiting.region, FrameIndex(waiting.frame));
        let start = region.plan.vmm_address + (waiting.frame << region.shift());
        let outcome =
            zero_missing(&self.uffd, start, region.plan.page_size, &self.zeroes, self.shared.install.always_protects())
                .map_err(|source| self.uffd_failed(source))?;
        if matches!(outcome.stop, Stop::Done) {
            self.shared.discards.settle(waiting.region, FrameIndex(waiting.frame), outcome.present == 0);
        }
        match outcome.stop {
            Stop::Done if outcome.present == 0 => {
                self.shared.states.discard(waiting.region, FrameIndex(waiting.frame));
                self.answered(waiting);
                Ok(())
            }
            // The file has the frame after all (an old event, or the guard was first); the page table may not.
            Stop::Done if region.in_place() => self.show_again(waiting),
            Stop::Done => {
                self.answered(waiting);
                Ok(())
            }
            Stop::EventsPending | Stop::NoFrame => self.defer(waiting),
            Stop::Gone => Err(PullFailure::VmmGone { shard: self.index }),
        }
    }

    /// The page table lost a page the file has. It may have been written since it was first shown, and must not count as clean: it
    /// is shown without write protection (which is what written means to asynchronous tracking), or whoever tracks is told.
    fn show_again(&mut self, waiting: Waiting) -> Result<(), PullFailure> {
        let region = &self.shared.regions[waiting.region];
        let page_size = region.plan.page_size;
        let start = region.plan.vmm_address + (waiting.frame << region.shift());
        let protect = self.shared.install.always_protects();
        if protect {
            let page = PageIndex(waiting.frame << (region.shift() - PAGE_SHIFT));
            self.shared.observer.shown_again(region.plan.id, page);
        }
        let outcome = self
            .uffd
            .continue_range(start, page_size.bytes() as u64, page_size, protect)
            .map_err(|source| self.uffd_failed(source))?;
        match outcome.stop {
            Stop::Done => {
                Counters::add(&self.counters().shown_again, 1);
                self.answered(waiting);
                Ok(())
            }
            Stop::EventsPending => self.defer(waiting),
            // Given up between the fault and now: whoever waits is woken, and comes again as a MISSING fault.
            Stop::NoFrame => self.uffd.wake(start, page_size.bytes() as u64).map_err(|source| self.uffd_failed(source)),
            Stop::Gone => Err(PullFailure::VmmGone { shard: self.index }),
        }
    }

    /// A fault at a page that was there, or is nothing but zeroes, has been answered.
    fn answered(&self, waiting: Waiting) {
        if self.shared.log.is_some() {
            self.note_shown(waiting.region, waiting.frame, 1, self.shared.now_ns());
        }
    }

    /// A write to a protected page belongs to whoever protected it.
    pub(super) fn write_fault(&mut self, region: usize, address: u64) -> Result<(), PullFailure> {
        let plan = &self.shared.regions[region].plan;
        let page = PageIndex::containing((address - plan.vmm_address) as usize);
        match self.shared.observer.write_fault(&self.uffd, plan.id, page) {
            true => Ok(()),
            false => Err(PullFailure::UnhandledWriteFault { shard: self.index, address }),
        }
    }
}
