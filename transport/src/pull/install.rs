//! From bytes in place to a page the guest sees: land (publish the state), then show (CONTINUE or COPY).

use super::plan::LandingPlan;
use super::shard::Shard;
use super::shared::{Counters, PullFailure, Shared};
use crate::pages::State;
use crate::uffd::{Installed, Stop, UffdError};
use crate::units::FrameIndex;

/// Whether a slot could be shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shown {
    All,
    /// The address space is changing; its events have to be read first.
    Later,
}

impl Shard {
    /// Publishes a slot's frames as Landed, before they are shown. Frames the guest gave up while they were read are zeroed
    /// (through the alias: nobody has seen them yet) and settled instead.
    pub(super) fn land(&mut self, index: usize) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        slot.landed = true;
        let slot = *slot;
        let shared = &self.shared;
        let mut zero = |frame| zero_alias(shared, slot.region, frame);
        shared.states.land_run(slot.region, FrameIndex(slot.first), slot.frames, &mut zero);
        let counters = self.counters();
        match slot.zero {
            true => Counters::add(&counters.zero_frames, slot.frames),
            false => Counters::add(&counters.bytes_pulled, slot.frames << self.shared.regions[slot.region].shift()),
        }
    }
}

/// Zeroes a frame through the alias. With bounce landing there is nothing to zero: the bytes never reached the guest.
pub(super) fn zero_alias(shared: &Shared, region: usize, frame: FrameIndex) {
    let plan = &shared.regions[region].plan;
    if let LandingPlan::InPlace { alias, .. } = &plan.landing {
        alias.zero(frame.offset(plan.page_size), plan.page_size.bytes());
    }
}

/// Shows what is left of a landed slot.
pub(super) fn show(shard: &mut Shard, index: usize) -> Result<Shown, PullFailure> {
    while let Some(slot) = shard.slots.at(index).filter(|slot| slot.shown < slot.frames) {
        let region = &shard.shared.regions[slot.region];
        let (first, left) = (slot.first + slot.shown, slot.frames - slot.shown);
        let start = region.plan.vmm_address + (first << region.shift());
        let outcome = match &region.plan.landing {
            LandingPlan::InPlace { .. } => {
                let protect = shard.shared.install.protects();
                shard.uffd.continue_range(start, left << region.shift(), region.plan.page_size, protect)
            }
            LandingPlan::Bounce { .. } => copy(shard, index, slot.region, first, left),
        };
        let outcome = outcome.map_err(|source| shard.uffd_failed(source))?;
        let shown = outcome.bytes >> region.shift();
        let at_hole = FrameIndex(first + shown);
        match outcome.stop {
            Stop::Gone => return Err(PullFailure::VmmGone { shard: shard.index }),
            Stop::EventsPending => {
                advance(shard, index, shown);
                return Ok(Shown::Later);
            }
            Stop::Done => advance(shard, index, shown),
            Stop::NoFrame => {
                // Landed, and its frame is gone: given up since, or the READ went into an orphaned frame. Whoever waits
                // comes again as a MISSING fault, which finds Discarded and gets zeroes.
                shard.shared.states.discard(slot.region, at_hole);
                shard.shared.discards.record(slot.region, at_hole);
                let hole = start + outcome.bytes;
                let page = region.plan.page_size.bytes() as u64;
                shard.uffd.wake(hole, page).map_err(|source| shard.uffd_failed(source))?;
                advance(shard, index, shown + 1);
            }
        }
    }
    Ok(Shown::All)
}

fn advance(shard: &mut Shard, index: usize, frames: u64) {
    if let Some(slot) = shard.slots.get_mut(index) {
        slot.shown += frames;
    }
}

/// One run of frames in the same state, by COPY: landed ones from the bounce buffer, zero ones from zeroes. Frames given up
/// meanwhile are only woken: they come again as a fault on a Discarded frame.
fn copy(shard: &Shard, index: usize, region: usize, first: u64, most: u64) -> Result<Installed, UffdError> {
    let plan = &shard.shared.regions[region].plan;
    let page_size = plan.page_size;
    let states = &shard.shared.states;
    let landed = |frame: u64| states.state_at(region, FrameIndex(frame)) == State::Landed;
    let copied = landed(first);
    let run = (first..first + most).take_while(|frame| landed(*frame) == copied).count() as u64;
    let (start, bytes) = (plan.vmm_address + (first << page_size.shift()), run << page_size.shift());
    if !copied {
        shard.uffd.wake(start, bytes)?;
        return Ok(Installed { bytes, present: 0, stop: Stop::Done });
    }
    let protect = shard.shared.install.protects();
    let Some(slot) = shard.slots.at(index) else { return Ok(Installed { bytes, present: 0, stop: Stop::Done }) };
    let LandingPlan::Bounce { buffers, .. } = &plan.landing else { unreachable!("only bounce landings are copied") };
    if slot.zero && !protect && page_size == crate::units::PageSize::Small {
        return shard.uffd.zeropage(start, bytes);
    }
    let source = if slot.zero {
        assert!(shard.zeroes.len() as u64 >= bytes, "a zero chunk is no longer than a slot");
        shard.zeroes.as_ptr()
    } else {
        let offset = shard.bounce_offset(index) + ((first - slot.first) << page_size.shift()) as usize;
        assert!(offset as u64 + bytes <= buffers.len() as u64, "a slot's buffer lies inside the bounce buffers");
        buffers.as_ptr().wrapping_add(offset).cast_const()
    };
    // SAFETY: `bytes` are readable there, in the zeroes or in the slot's bounce buffer (both asserted).
    unsafe { shard.uffd.copy(start, source.cast(), bytes, page_size, protect) }
}
