//! How a lane ends when its own queue does not say so: what the steward hears of the peer and of the device, told to the lane's thread.

use super::device::AsyncEvent;
use super::error::VerbsError;
use crate::fabric::FabricError;
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

/// Why a lane is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Cause {
    /// The peer disconnected it, or the session's connection has ended.
    PeerClosed = 1,
    DeviceLost = 2,
    QueuePair = 3,
    CompletionQueue = 4,
}

const ALL: [Cause; 4] = [Cause::PeerClosed, Cause::DeviceLost, Cause::QueuePair, Cause::CompletionQueue];

/// Shared by a lane and the steward. Set once.
#[derive(Debug)]
pub(super) struct Fate {
    cause: AtomicU8,
    port_down: AtomicBool,
    wake: OwnedFd,
}

impl Fate {
    pub(super) fn new() -> Result<Self, FabricError> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| FabricError::Io { doing: "making an eventfd".to_owned(), source: error.into() })?;
        Ok(Self { cause: AtomicU8::new(0), port_down: AtomicBool::new(false), wake })
    }

    /// Ends the lane, unless something else has.
    pub(super) fn end(&self, cause: Cause) {
        if self.cause.compare_exchange(0, cause as u8, Ordering::Release, Ordering::Relaxed).is_ok() {
            // A full counter is readable too.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }

    /// Why the lane is over, if it is.
    #[inline]
    pub(super) fn cause(&self) -> Option<Cause> {
        match self.cause.load(Ordering::Acquire) {
            0 => None,
            set => ALL.into_iter().find(|cause| *cause as u8 == set),
        }
    }

    /// Remembers whether the port is down: not an end by itself, since retries outlive a short one.
    pub(super) fn set_port_down(&self, down: bool) {
        self.port_down.store(down, Ordering::Relaxed);
    }

    pub(super) fn port_is_down(&self) -> bool {
        self.port_down.load(Ordering::Relaxed)
    }

    /// What an event of the device means for the lane with that queue pair and completion queue, on that port.
    pub(super) fn hear(&self, event: AsyncEvent, queue_pair: usize, completion_queue: usize, port: u8) {
        match event {
            AsyncEvent::QueuePair(at) if at == queue_pair => self.end(Cause::QueuePair),
            AsyncEvent::CompletionQueue(at) if at == completion_queue => self.end(Cause::CompletionQueue),
            AsyncEvent::Device => self.end(Cause::DeviceLost),
            AsyncEvent::PortDown(at) if at == port => self.set_port_down(true),
            AsyncEvent::PortUp(at) if at == port => self.set_port_down(false),
            _ => {}
        }
    }
}

impl Cause {
    /// The error that tells it.
    pub(super) fn error(self, lane: crate::fabric::LaneId, device: &str) -> FabricError {
        match self {
            Self::PeerClosed => FabricError::PeerClosed { lane },
            Self::DeviceLost => VerbsError::DeviceLost { device: device.to_owned() }.into(),
            Self::QueuePair => VerbsError::QueuePair { lane }.into(),
            Self::CompletionQueue => VerbsError::CompletionQueue { lane }.into(),
        }
    }
}

impl AsFd for Fate {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}
