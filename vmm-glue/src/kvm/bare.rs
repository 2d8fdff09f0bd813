//! What all ways of running a bare guest have in common beyond [`Guest`]: starting one, and having it stand where its memory is
//! known.

use super::guests::{Filler, GuestSpec, Layout, low_pages, rules, text};
use belay_checkpoint::guest::{Guest, GuestError};
use belay_transport::region::Mapping;
use belay_transport::{Deadline, PAGE_SIZE, PageIndex};

/// A bare guest, however it is run.
pub trait BareGuest: Guest {
    /// What the guest was asked to do.
    fn spec(&self) -> &GuestSpec;

    /// Puts the guest at its very start: tables, text and parameters into memory (through the alias), registers into the vCPUs.
    /// Memory must be all holes, the guest paused.
    fn boot(&mut self) -> Result<(), GuestError>;

    /// Has every vCPU wait at its first PACE read at or behind `step`; there its memory is an exact function of its steps.
    fn park_at_step(&mut self, step: u64) -> Result<(), GuestError>;

    /// Lets parked vCPUs on.
    fn unpark(&mut self) -> Result<(), GuestError>;

    /// Waits until every vCPU is parked; gives the steps each has done. The guest must be running.
    fn wait_parked(&mut self, deadline: Deadline) -> Result<Vec<u64>, GuestError>;

    /// Steps each vCPU had done at its last PACE read.
    fn steps(&mut self) -> Result<Vec<u64>, GuestError>;

    /// Why the guest failed, if it did.
    fn failure(&mut self) -> Option<String>;
}

/// Writes what a guest finds in its memory at its very start.
pub(super) fn write_first_content(memory: &Mapping, spec: &GuestSpec, layout: &Layout) {
    for low in low_pages(layout, spec, text()) {
        memory.write(low.page.offset(), &low.bytes);
    }
    if spec.filler == Filler::Host {
        for page in layout.data_first()..layout.pages() {
            fill_page(memory, spec, page);
        }
    }
}

/// Fills a page of data, unless it is to stay a hole.
pub(super) fn fill_page(memory: &Mapping, spec: &GuestSpec, page: u64) {
    let Some(base) = rules::fill_base(spec.seed, page, spec.filled_of_256) else { return };
    let mut bytes = [0; PAGE_SIZE];
    for (word, bytes) in bytes.chunks_exact_mut(8).enumerate() {
        bytes.copy_from_slice(&base.wrapping_add((word as u64).wrapping_mul(rules::GOLDEN)).to_le_bytes());
    }
    memory.write(PageIndex(page).offset(), &bytes);
}
