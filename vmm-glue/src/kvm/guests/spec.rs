//! What a guest is asked to do.

use super::Layout;
use super::rules::Pattern;
use belay_transport::PAGE_SIZE;
use serde::{Deserialize, Serialize};

/// Most vCPUs a guest may have.
pub const MAX_VCPUS: u16 = 64;
/// Most memory a guest may have: one page directory page a GiB, all below one PDPT.
const MAX_MEMORY_BYTES: u64 = 64 << 30;

/// Which bare program the guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Program {
    /// Scattered read-modify-writes in chains: each new word depends on the old one, so a stale or lost page shows for ever.
    Ledger,
    /// Reads and checks everything, again and again; writes nothing.
    Scanner,
    /// A ledger that dirties one batch, then watches its own clock until the next one and logs every gap it sees.
    Metronome,
    /// A ledger whose steps go from one end of its working set to the other, again and again.
    Sequential,
    /// A ledger that writes a few pages much more often than the rest.
    Zipf,
    /// A ledger that goes about it in one way for a while, and then in another.
    Phases,
}

impl Program {
    /// Where the steps of a ledger go; none of a program that writes nothing.
    pub fn pattern(self) -> Option<Pattern> {
        match self {
            Self::Ledger | Self::Metronome => Some(Pattern::Random),
            Self::Sequential => Some(Pattern::Sequential),
            Self::Zipf => Some(Pattern::Zipf),
            Self::Phases => Some(Pattern::Phases),
            Self::Scanner => None,
        }
    }
}

/// Who writes the first content of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Filler {
    /// The guest itself, before its first step.
    Guest,
    /// The VMM, before the guest starts: quicker for a large guest.
    Host,
}

/// A guest: with the nonces it was given and how far each vCPU ran, this determines every byte of its memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestSpec {
    pub program: Program,
    pub memory_bytes: u64,
    /// What the steps are scattered over. At most the guest's memory without its low pages.
    pub working_set_bytes: u64,
    /// Steps (page writes, or pages read by the scanner) a second over all vCPUs; 0: as fast as it goes.
    pub rate_pages_per_s: u64,
    /// Steps between two reads of the PACE register.
    pub batch_steps: u64,
    /// Steps between two packets of a vCPU; a multiple of the batch. The scanner emits one a pass instead.
    pub packet_interval_steps: u64,
    pub vcpus: u16,
    pub seed: u64,
    /// Of 256 pages how many are filled at the start; the others stay holes until the guest writes there.
    pub filled_of_256: u16,
    pub filler: Filler,
    /// How long the metronome watches its clock after a batch, in ticks of the guest's TSC. Other programs do not look at it.
    pub metronome_spin_ticks: u64,
}

impl Default for GuestSpec {
    fn default() -> Self {
        Self {
            program: Program::Ledger,
            memory_bytes: 256 << 20,
            working_set_bytes: 64 << 20,
            rate_pages_per_s: 20_000,
            batch_steps: 64,
            packet_interval_steps: 256,
            vcpus: 1,
            seed: 1,
            filled_of_256: 192,
            filler: Filler::Guest,
            metronome_spin_ticks: 2_000_000,
        }
    }
}

/// Why a guest cannot be what was asked.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum SpecError {
    #[error("guest memory of {0} bytes is not a multiple of {PAGE_SIZE} between {min} and {MAX_MEMORY_BYTES}", min = Layout::MIN_MEMORY_BYTES)]
    Memory(u64),
    #[error(
        "a working set of {working_set_bytes} bytes is not a page or more for each of {vcpus} vCPUs within the {usable_bytes} bytes that are not the guest's own tables"
    )]
    WorkingSet { working_set_bytes: u64, usable_bytes: u64, vcpus: u16 },
    #[error("{0} vCPUs: there can be 1 to {MAX_VCPUS}")]
    Vcpus(u16),
    #[error("a batch of {0} steps: it must be 1 to 2^32")]
    Batch(u64),
    #[error("a packet every {interval} steps is not a multiple of the batch of {batch}")]
    PacketInterval { interval: u64, batch: u64 },
    #[error("{0} of 256 pages filled: at most 256 can be")]
    Filled(u16),
}

impl GuestSpec {
    /// Checks that all values fit together, and gives the memory layout that follows from them.
    pub fn layout(&self) -> Result<Layout, SpecError> {
        let page = PAGE_SIZE as u64;
        let memory_fits = (Layout::MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&self.memory_bytes);
        if !self.memory_bytes.is_multiple_of(page) || !memory_fits {
            return Err(SpecError::Memory(self.memory_bytes));
        }
        if self.vcpus == 0 || self.vcpus > MAX_VCPUS {
            return Err(SpecError::Vcpus(self.vcpus));
        }
        if self.batch_steps == 0 || self.batch_steps > 1 << 32 {
            return Err(SpecError::Batch(self.batch_steps));
        }
        if self.packet_interval_steps == 0 || !self.packet_interval_steps.is_multiple_of(self.batch_steps) {
            return Err(SpecError::PacketInterval { interval: self.packet_interval_steps, batch: self.batch_steps });
        }
        if self.filled_of_256 > 256 {
            return Err(SpecError::Filled(self.filled_of_256));
        }
        let layout = Layout::new(self.memory_bytes / page, self.working_set_bytes / page, self.vcpus);
        let usable_bytes = layout.pages().saturating_sub(layout.data_first()) * page;
        if self.working_set_bytes > usable_bytes || self.working_set_bytes / page < u64::from(self.vcpus) {
            let (working_set_bytes, vcpus) = (self.working_set_bytes, self.vcpus);
            return Err(SpecError::WorkingSet { working_set_bytes, usable_bytes, vcpus });
        }
        Ok(layout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_cannot_be_is_refused_with_the_reason() {
        let good = GuestSpec::default();
        assert!(good.layout().is_ok());
        let refuse = |change: fn(&mut GuestSpec)| {
            let mut spec = good.clone();
            change(&mut spec);
            spec.layout().unwrap_err()
        };
        assert_eq!(refuse(|s| s.memory_bytes += 1), SpecError::Memory(good.memory_bytes + 1));
        assert_eq!(refuse(|s| s.memory_bytes = 4096), SpecError::Memory(4096));
        assert!(matches!(refuse(|s| s.working_set_bytes = s.memory_bytes), SpecError::WorkingSet { .. }));
        assert!(matches!(refuse(|s| s.working_set_bytes = 0), SpecError::WorkingSet { .. }));
        assert_eq!(refuse(|s| s.vcpus = 0), SpecError::Vcpus(0));
        assert_eq!(refuse(|s| s.vcpus = 65), SpecError::Vcpus(65));
        assert_eq!(refuse(|s| s.batch_steps = 0), SpecError::Batch(0));
        assert_eq!(refuse(|s| s.packet_interval_steps = 65), SpecError::PacketInterval { interval: 65, batch: 64 });
        assert_eq!(refuse(|s| s.filled_of_256 = 257), SpecError::Filled(257));
    }
}
