//! outbox
use serde::{Deserialize, Serialize};
/// mode
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum OutputMode {
    Commit,
    Lease,
}
