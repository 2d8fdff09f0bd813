//! The bare programs that the kvm VMM runs, and everything that must be known about them: what they are asked to do
//! ([`GuestSpec`]), where things lie in their memory ([`Layout`]) and what they compute ([`rules`]).
//!
//! A program runs in ring 3 from its first instruction, with paging on and no kernel beneath it. Its memory is at every moment a
//! known function of how far it has run, which is what makes a lost, stale or doubled page visible.

mod layout;
pub mod rules;
mod spec;
mod text;

pub use layout::{
    DEVICE_GPA, DEVICE_STRIDE, DEVICE_VA, Layout, LowMapping, MEMORY_HOLE_START, METRONOME_GAP_TICKS,
    METRONOME_LOG_ENTRIES, NONCE_LOG_CAPACITY, NONCE_LOG_PAGES, PARAMETER_BYTES, Parameter, SECOND_MEMORY_START,
    gpa_of, low_pages, page_of_gpa,
};
pub use spec::{Filler, GuestSpec, MAX_VCPUS, Program, SpecError};
pub use text::{LEDGER_ENTRY, SCANNER_ENTRY, text};
