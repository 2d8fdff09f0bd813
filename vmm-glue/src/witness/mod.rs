//! What the demo, the tests and the benchmarks believe: the checker of memory and the observer of output.

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
pub mod model;
pub mod observer;
pub mod packet;
pub mod proof;
