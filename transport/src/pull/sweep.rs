//! Which frames the background pulls next: around the newest faults first, then a sweep through everything.
//!
//! A fault starts a *bubble* that grows both ways from it in doubling steps, because a guest that touched a page will touch its
//! neighbours; when its budget is spent the sweep goes on where it was. Frames never become absent again, so one pass of
//! the sweep's cursor over all ranges proves that none is left. Zero frames cost no READ and come after all others.

use super::plan::{PageClass, Region};
use crate::pages::{PageStates, State};
use crate::units::FrameIndex;
use std::ops::Range;

/// Bubbles kept: the newest faults.
const BUBBLES: usize = 4;
/// Bytes of its first step.
const FIRST_STEP_BYTES: u64 = 16 << 10;
/// Settled frames stepped over in one call, so that a fault never waits for a long scan.
const SCAN: u64 = 8192;

/// Claimed frames, to be read (or, when zero, only shown).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chunk {
    pub region: usize,
    pub first: u64,
    pub frames: u64,
    pub class: PageClass,
}

/// What a call of [`Sweep::next`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    Chunk(Chunk),
    /// Only settled frames so far; call again.
    Scanning,
    /// No frame of this shard is absent any more.
    Done,
}

#[derive(Debug, Clone, Copy)]
struct Bubble {
    region: usize,
    /// Frames of the range it may grow in.
    bounds: (u64, u64),
    low: u64,
    high: u64,
    step: u64,
    left: u64,
    upwards: bool,
}

#[derive(Debug)]
pub(super) struct Sweep {
    ranges: Vec<(usize, Range<u64>)>,
    bubbles: [Option<Bubble>; BUBBLES],
    newest: usize,
    /// Bytes a bubble grows to; there are none where it is 0.
    bubble_bytes: u64,
    /// Index into `ranges` and frame, for the pass over peer frames and the one over zero frames.
    cursors: [(usize, u64); 2],
    pass: usize,
}

impl Sweep {
    /// Over `ranges`: region index and frames. `bubble_bytes`: [`super::Tuning::bubble_bytes`].
    pub(super) fn new(ranges: Vec<(usize, Range<u64>)>, bubble_bytes: u64) -> Self {
        let start = (0, ranges.first().map_or(0, |(_, frames)| frames.start));
        Self { ranges, bubbles: [None; BUBBLES], newest: 0, bubble_bytes, cursors: [start; 2], pass: 0 }
    }

    /// Whether both passes are over.
    pub(super) fn done(&self) -> bool {
        self.pass == 2
    }

    /// A demand fault at `frame`.
    #[inline]
    pub(super) fn fault(&mut self, regions: &[Region], region: usize, frame: u64) {
        if self.bubble_bytes == 0 {
            return;
        }
        let inside = |(at, frames): &&(usize, Range<u64>)| *at == region && frames.contains(&frame);
        let Some((_, frames)) = self.ranges.iter().find(inside) else { return };
        // A fault inside a living bubble is what the bubble is for.
        let held = |bubble: &Bubble| bubble.region == region && (bubble.low..bubble.high).contains(&frame);
        if self.bubbles.iter().flatten().any(held) {
            return;
        }
        let shift = regions[region].shift();
        self.newest = (self.newest + 1) % BUBBLES;
        self.bubbles[self.newest] = Some(Bubble {
            region,
            bounds: (frames.start, frames.end),
            low: frame,
            high: frame + 1,
            step: (FIRST_STEP_BYTES >> shift).max(1),
            left: (self.bubble_bytes >> shift).max(2),
            upwards: true,
        });
    }

    /// Claims the next chunk of at most `most_bytes`.
    pub(super) fn next(&mut self, regions: &[Region], states: &PageStates, most_bytes: u64) -> Next {
        for back in 0..BUBBLES {
            let index = (self.newest + BUBBLES - back) % BUBBLES;
            if let Some(mut bubble) = self.bubbles[index].take() {
                let found = bubble.grow(regions, states, most_bytes);
                if bubble.left > 0 {
                    self.bubbles[index] = Some(bubble);
                }
                if let Some(chunk) = found {
                    return Next::Chunk(chunk);
                }
            }
        }
        self.scan(regions, states, most_bytes)
    }

    /// Moves the cursor over settled frames without claiming any, so that the end is noticed while the background is paused.
    pub(super) fn skip_settled(&mut self, states: &PageStates) {
        let mut budget = SCAN;
        while let Some((region, frame, _)) = self.position() {
            if budget == 0 || states.state_at(region, FrameIndex(frame)) == State::Absent {
                return;
            }
            self.advance(1);
            budget -= 1;
        }
    }

    fn scan(&mut self, regions: &[Region], states: &PageStates, most_bytes: u64) -> Next {
        let mut budget = SCAN;
        while let Some((region, frame, end)) = self.position() {
            if budget == 0 {
                return Next::Scanning;
            }
            let most = (most_bytes >> regions[region].shift()).max(1);
            let (class, run) = regions[region].classes.run(frame, (end - frame).min(SCAN));
            let wanted = if self.pass == 0 { PageClass::Peer } else { PageClass::Zero };
            if class != wanted {
                self.advance(run);
                budget = budget.saturating_sub(run.div_ceil(64));
                continue;
            }
            let frames = states.claim_run(region, FrameIndex(frame), run.min(most));
            self.advance(frames.max(1));
            if frames > 0 {
                return Next::Chunk(Chunk { region, first: frame, frames, class });
            }
            budget -= 1;
        }
        Next::Done
    }

    /// Region, frame and end of its range under the current cursor; moves on to the next range and pass at their ends.
    fn position(&mut self) -> Option<(usize, u64, u64)> {
        while self.pass < 2 {
            let (range, frame) = self.cursors[self.pass];
            match self.ranges.get(range) {
                Some((region, frames)) if frame < frames.end => return Some((*region, frame, frames.end)),
                Some(_) => {
                    let start = self.ranges.get(range + 1).map_or(0, |(_, frames)| frames.start);
                    self.cursors[self.pass] = (range + 1, start);
                }
                None => self.pass += 1,
            }
        }
        None
    }

    fn advance(&mut self, frames: u64) {
        self.cursors[self.pass].1 += frames;
    }
}

impl Bubble {
    /// One step up or down, in turn; the first run of absent peer frames in it is claimed.
    fn grow(&mut self, regions: &[Region], states: &PageStates, most_bytes: u64) -> Option<Chunk> {
        let most = (most_bytes >> regions[self.region].shift()).max(1);
        let step = self.step.min(most);
        self.step = (self.step * 2).min(most);
        self.left = self.left.saturating_sub(step);
        let (from, to) = match self.upwards {
            true => (self.high, (self.high + step).min(self.bounds.1)),
            false => (self.low.saturating_sub(step).max(self.bounds.0), self.low),
        };
        if self.upwards {
            self.high = to;
        } else {
            self.low = from;
        }
        self.upwards = !self.upwards;
        if self.low == self.bounds.0 && self.high == self.bounds.1 {
            self.left = 0;
        }
        let mut frame = from;
        while frame < to {
            let (class, run) = regions[self.region].classes.run(frame, to - frame);
            if class == PageClass::Peer {
                let end = frame + run;
                while frame < end {
                    let frames = states.claim_run(self.region, FrameIndex(frame), end - frame);
                    if frames > 0 {
                        return Some(Chunk { region: self.region, first: frame, frames, class });
                    }
                    frame += 1;
                }
            } else {
                frame += run;
            }
        }
        None
    }
}
