//! `belay-vmm-glue` plugs transport and checkpoint into VMMs: the two roles of a migration as mirror images, one folder a VMM,
//! the guard that outlives a VMM, and the witness that tests believe. Thin: mechanism lives below, decisions of a command above.

pub mod fence_hook;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
#[cfg(test)]
#[path = "../../transport/src/golden.rs"]
mod golden;
pub mod guard;
pub mod kvm;
pub mod migrate;
pub mod qemu;
pub mod witness;
