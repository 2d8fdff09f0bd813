//! Operations of one shard: a fixed table, so that nothing is allocated once it runs.

/// Which lane an operation went to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LaneOf {
    Demand,
    Bulk,
}

/// Frames on their way from claim to shown.
#[derive(Debug, Clone, Copy)]
pub(super) struct Slot {
    pub lane: LaneOf,
    pub region: usize,
    pub first: u64,
    pub frames: u64,
    /// READs that have not completed.
    pub parts_left: u32,
    /// Zero frames: nothing is read.
    pub zero: bool,
    pub landed: bool,
    /// Frames shown so far.
    pub shown: u64,
    /// A fault waits for it, since then.
    pub waited_since_ns: Option<u64>,
    pub posted_ns: u64,
    pub completed_ns: u64,
}

impl Slot {
    /// Whether it still has to show this frame.
    pub(super) fn covers(&self, region: usize, frame: u64) -> bool {
        self.region == region && (self.first + self.shown..self.first + self.frames).contains(&frame)
    }
}

/// The table. Demand slots come first; an index is part of a READ's id.
#[derive(Debug)]
pub(super) struct Slots {
    table: Vec<Option<Slot>>,
    demand: usize,
    free_demand: Vec<usize>,
    free_bulk: Vec<usize>,
}

impl Slots {
    pub(super) fn new(demand: usize, bulk: usize) -> Self {
        Self {
            table: vec![None; demand + bulk],
            demand,
            free_demand: (0..demand).rev().collect(),
            free_bulk: (demand..demand + bulk).rev().collect(),
        }
    }

    fn free(&mut self, lane: LaneOf) -> &mut Vec<usize> {
        match lane {
            LaneOf::Demand => &mut self.free_demand,
            LaneOf::Bulk => &mut self.free_bulk,
        }
    }

    /// Whether a slot of this lane is free.
    pub(super) fn room(&self, lane: LaneOf) -> bool {
        match lane {
            LaneOf::Demand => !self.free_demand.is_empty(),
            LaneOf::Bulk => !self.free_bulk.is_empty(),
        }
    }

    /// Whether a demand slot is in use.
    pub(super) fn demand_in_use(&self) -> bool {
        self.free_demand.len() < self.demand
    }

    /// Bulk slots in use.
    pub(super) fn bulk_in_use(&self) -> usize {
        self.table.len() - self.demand - self.free_bulk.len()
    }

    /// Whether none is in use.
    pub(super) fn idle(&self) -> bool {
        self.free_demand.len() + self.free_bulk.len() == self.table.len()
    }

    /// Puts a slot in; the caller has asked for [`Slots::room`].
    pub(super) fn insert(&mut self, slot: Slot) -> usize {
        let index = self.free(slot.lane).pop().expect("room was asked for first");
        self.table[index] = Some(slot);
        index
    }

    pub(super) fn remove(&mut self, index: usize) {
        let slot = self.table[index].take().expect("only a used slot is removed");
        self.free(slot.lane).push(index);
    }

    pub(super) fn get_mut(&mut self, index: usize) -> Option<&mut Slot> {
        self.table.get_mut(index)?.as_mut()
    }

    /// The slot a frame is on its way in.
    pub(super) fn covering(&mut self, region: usize, frame: u64) -> Option<&mut Slot> {
        self.table.iter_mut().flatten().find(|slot| slot.covers(region, frame))
    }

    /// Used slots and their indexes.
    pub(super) fn used(&self) -> impl Iterator<Item = (usize, &Slot)> {
        self.table.iter().enumerate().filter_map(|(index, slot)| Some((index, slot.as_ref()?)))
    }

    /// Whatever slot is in use, by index.
    pub(super) fn at(&self, index: usize) -> Option<Slot> {
        self.table.get(index).copied().flatten()
    }

    pub(super) fn len(&self) -> usize {
        self.table.len()
    }
}
