//! Why a measurement could not be made.

use std::io;

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
    #[error("page {page} reads as {found}, the source has {expected}")]
    Wrong { page: usize, found: u64, expected: u64 },
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
    pub fn io(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { doing, source }
    }
}
