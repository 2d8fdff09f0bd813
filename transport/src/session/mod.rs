//! (being built)
#[derive(Debug, thiserror::Error)]
pub enum SessionError {}
