//! What comes from the other host of a migration, and what was recorded of one, under any bytes.

mod control;
mod traces;

pub(crate) use control::control;
#[cfg(test)]
pub(crate) use control::seeds as control_seeds;
#[cfg(test)]
pub(crate) use traces::seeds as trace_seeds;
pub(crate) use traces::traces;
