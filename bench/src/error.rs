//! Why a measurement could not be made.

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::time::Duration;

#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    #[error(transparent)]
    Region(#[from] belay_transport::region::RegionError),
    #[error(transparent)]
    Session(#[from] belay_transport::session::SessionError),
    #[error(transparent)]
    Fabric(#[from] belay_transport::fabric::FabricError),
    #[error(transparent)]
    Uffd(#[from] belay_transport::uffd::UffdError),
    #[error(transparent)]
    Pages(#[from] belay_transport::pages::PagesError),
    #[error(transparent)]
    Plan(#[from] belay_transport::pull::PlanError),
    #[error(transparent)]
    Wait(#[from] belay_transport::pull::WaitError),
    #[error(transparent)]
    Stop(#[from] belay_transport::pull::StopError),
    #[error(transparent)]
    Guest(#[from] belay_checkpoint::guest::GuestError),
    #[error(transparent)]
    Ring(#[from] belay_checkpoint::ring::RingError),
    #[error(transparent)]
    RingShape(#[from] belay_checkpoint::ring::RingTooSmall),
    #[error(transparent)]
    Ship(#[from] belay_checkpoint::ring::ShipError),
    #[error(transparent)]
    Stage(#[from] belay_checkpoint::staging::StageError),
    #[error(transparent)]
    Tether(#[from] belay_checkpoint::epoch::TetherError),
    #[error("a checkpoint did not commit in time{}", .why.as_ref().map(|why| format!(": {why}")).unwrap_or_default())]
    NoCommit { why: Option<Arc<belay_checkpoint::epoch::TetherError>> },
    #[error("the guest made no step within {0:?}")]
    NoSteps(Duration),
    #[error("{dropped} of {rounds} rounds did not meet the guest while it watched its clock: nothing can be said")]
    TooNoisy { dropped: usize, rounds: usize },
    #[error("page {page} of the source is not what the guest has after {epoch}")]
    Stale { page: usize, epoch: belay_checkpoint::guest::Epoch },
    #[error("page {page} reads as {found}, the source has {expected}")]
    Wrong { page: usize, found: u64, expected: u64 },
    #[error("moving the guest by {way} failed (QEMU at the source said: {}; at the destination: {})", .said[0], .said[1])]
    NotMoved { way: &'static str, said: [String; 2], source: Box<BenchError> },
    #[error("the guest found page {page} of its working set not as it had left it")]
    GuestFoundWrong { page: u64 },
    #[error("this host has no RDMA device to use (`belay check` says what it has)")]
    Device(#[from] belay_transport::fabric::verbs::inventory::Trouble),
    #[error("page {page} that was written reads as {found:#x} at the server, {expected:#x} was written")]
    WrongAtServer { page: u64, found: u64, expected: u64 },
    #[error("what called is not a belay-bench of this version")]
    NotABench,
    #[error("the other side hung up without a word")]
    BellClosed,
    #[error("nobody called within {0:?}")]
    NobodyCalled(Duration),
    #[error("the other side: {why}")]
    Peer { why: String },
    #[error("refused: {why}")]
    Refused { why: String },
    #[error("the server could not open a session to this host: {why}{}", if .ours.is_empty() { String::new() } else { format!(" (this side: {})", .ours) })]
    NotMet { why: String, ours: String },
    #[error("nothing completed within {0:?}")]
    Stuck(Duration),
    #[error("{what}: {why}")]
    Options { what: &'static str, why: String },
    #[error("{0} ended in a panic")]
    Thread(&'static str),
    #[error("{doing}")]
    Io {
        doing: &'static str,
        #[source]
        source: io::Error,
    },
}

impl BenchError {
    /// The message and those of its causes, on one line.
    pub fn with_causes(&self) -> String {
        let (mut text, mut cause) = (self.to_string(), self.source());
        while let Some(inner) = cause {
            text = format!("{text}: {inner}");
            cause = inner.source();
        }
        text
    }

    pub fn io(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { doing, source }
    }
}
