//! A thread that says once that a data lane has broken, for a main loop that waits on channels.

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

/// Watches until a lane breaks or it is dropped.
pub struct LaneWatch {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl LaneWatch {
    /// Calls `broken` once `lanes` polls readable.
    pub fn start(lanes: BorrowedFd<'_>, broken: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let lanes = lanes.try_clone_to_owned()?;
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("lane-watch".into()).spawn(move || {
            loop {
                let mut fds = [PollFd::new(&lanes, PollFlags::IN), PollFd::new(&*stopped, PollFlags::IN)];
                // Unbounded on purpose: the other descriptor ends it.
                match poll(&mut fds, None) {
                    Err(rustix::io::Errno::INTR) => continue,
                    Err(_) => return,
                    Ok(_) if !fds[1].revents().is_empty() => return,
                    Ok(_) => break,
                }
            }
            broken();
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for LaneWatch {
    fn drop(&mut self) {
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
