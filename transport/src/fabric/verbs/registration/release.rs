//! Gives registrations back in the background: unpinning hundreds of gigabytes takes seconds, and a guest that is caught does not wait
//! for that.

use super::{Registered, RegistrationReport};
use crate::deadline::Deadline;
use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};
use std::io;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long dropping a [`Releasing`] waits for the end. (1 TiB takes some ten seconds. Beyond it the thread goes on by itself; it
/// owns all that it needs.)
const RELEASE_BOUND: Duration = Duration::from_secs(30);

/// Deregistration under way. Queue pairs that could still use the memory have been destroyed before.
#[derive(Debug)]
pub(in crate::fabric::verbs) struct Releasing {
    ended: Receiver<RegistrationReport>,
    thread: Option<JoinHandle<()>>,
}

impl Releasing {
    /// Begins. Where no thread can be had, all is given back before this returns the error.
    pub(in crate::fabric::verbs) fn start(registered: Vec<Registered>) -> io::Result<Self> {
        let (tell, ended) = bounded(1);
        let work = move || {
            let begun = Instant::now();
            let mut report = RegistrationReport::default();
            for one in registered {
                report.pinned_bytes += one.report().pinned_bytes;
                report.regions += one.report().regions;
            }
            report.took = begun.elapsed();
            // Nobody may be listening any more.
            let _ = tell.send(report);
        };
        let thread = std::thread::Builder::new().name("belay-unpin".to_owned()).spawn(work)?;
        Ok(Self { ended, thread: Some(thread) })
    }

    /// Waits until all is given back; what it was and how long it took. `None`: not in time.
    pub(in crate::fabric::verbs) fn wait(&mut self, deadline: Deadline) -> Option<RegistrationReport> {
        match self.ended.recv_timeout(deadline.left()) {
            Err(RecvTimeoutError::Timeout) => None,
            told => {
                if let Some(thread) = self.thread.take() {
                    // It has said its last word, or has panicked in a device library; either way it is over.
                    let _ = thread.join();
                }
                Some(told.unwrap_or_default())
            }
        }
    }
}

impl Drop for Releasing {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.wait(Deadline::after(RELEASE_BOUND));
        }
    }
}
