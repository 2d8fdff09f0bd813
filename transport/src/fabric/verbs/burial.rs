//! Queue pairs given back on threads of their own, because the kernel may hold them for a minute.
//!
//! Destroying a queue pair waits in the kernel for all that still refers to it. On SoftRoCE that is every frame it has sent, until the card
//! has taken it: a card or a neighbour table that keeps one back when the peer loses its power keeps the queue pair, and whoever destroys
//! it, for up to fifty seconds. A guest that must be fenced or caught does not wait for that.
//!
//! ```text
//!   stop (error state) ── cannot be ──> given back, waited for as long as the caller has, since nothing else shuts the peer out
//!          │ done: nothing of the peer's is done any more, nothing of ours lands any more (InfiniBand specification, 10.3.1)
//!          └──> given back by a thread, waited for no longer than [`GIVE_BACK_BOUND`]; the thread ends whenever the kernel lets it
//! ```
//! The thread owns all that the queue pair works on, so that memory and regions outlive it, however long it takes.

use crate::deadline::Deadline;
use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};
use std::any::Any;
use std::ops::{Deref, DerefMut};
use std::time::Duration;

/// How long anybody waits for what has stopped to be given back: many times what it takes where nothing holds it.
pub(super) const GIVE_BACK_BOUND: Duration = Duration::from_millis(50);
/// How long dropping waits for what could not be stopped.
const UNSTOPPED_BOUND: Duration = Duration::from_secs(5);

/// What works by itself until it is stopped, and is given back by being dropped.
pub(super) trait Stop: Send + 'static {
    /// Ends its work, without waiting for the peer or for what refers to it; whether that is certain.
    fn stop(&mut self) -> bool;
}

/// Something that is being given back.
#[derive(Debug)]
pub(super) struct Burial {
    ended: Receiver<()>,
}

impl Burial {
    /// Begins. Where no thread can be had, `what` has been given back when this returns.
    pub(super) fn of(what: impl Send + 'static) -> Self {
        let (tell, ended) = bounded(0);
        let work = move || {
            drop(what);
            drop(tell);
        };
        // A thread that is not to be had drops the work, and with it what it was to give back.
        let _ = std::thread::Builder::new().name("belay-give-back".to_owned()).spawn(work);
        Self { ended }
    }

    /// Waits until it has been given back; `false` once `deadline` has passed. The thread goes on in either case.
    pub(super) fn wait(&self, deadline: Deadline) -> bool {
        // Nothing is ever said: the other end goes away with the thread.
        !matches!(self.ended.recv_timeout(deadline.left()), Err(RecvTimeoutError::Timeout))
    }
}

/// Owns something that is stopped and given back when it is dropped, within a bound, together with what it works on.
pub(super) struct Mortal<T: Stop> {
    inner: Option<T>,
    works_on: Option<Box<dyn Any + Send>>,
}

impl<T: Stop> Mortal<T> {
    pub(super) fn new(inner: T) -> Self {
        Self { inner: Some(inner), works_on: None }
    }

    /// Keeps `what` until it has been given back.
    pub(super) fn works_on(&mut self, what: impl Any + Send) {
        self.works_on = Some(Box::new(what));
    }

    /// Stops it and begins to give it back; whether it has certainly stopped.
    pub(super) fn bury(mut self) -> (bool, Burial) {
        self.begin().expect("buried once, because that consumes it")
    }

    fn begin(&mut self) -> Option<(bool, Burial)> {
        let mut inner = self.inner.take()?;
        let stopped = inner.stop();
        // A tuple drops from left to right.
        Some((stopped, Burial::of((inner, self.works_on.take()))))
    }
}

impl<T: Stop> Deref for Mortal<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.inner.as_ref().expect("there until it is buried, which consumes it")
    }
}

impl<T: Stop> DerefMut for Mortal<T> {
    fn deref_mut(&mut self) -> &mut T {
        self.inner.as_mut().expect("there until it is buried, which consumes it")
    }
}

impl<T: Stop> Drop for Mortal<T> {
    fn drop(&mut self) {
        if let Some((stopped, burial)) = self.begin() {
            burial.wait(Deadline::after(if stopped { GIVE_BACK_BOUND } else { UNSTOPPED_BOUND }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::{Sender, unbounded};
    use std::sync::Arc;
    use std::time::Instant;

    /// Something whose end waits until it is let go, as a queue pair's whose frame a card keeps.
    struct Held {
        let_go: Receiver<()>,
        said: Sender<&'static str>,
    }

    impl Stop for Held {
        fn stop(&mut self) -> bool {
            self.said.send("stopped").is_ok()
        }
    }

    impl Drop for Held {
        fn drop(&mut self) {
            let _ = self.let_go.recv();
            let _ = self.said.send("given back");
        }
    }

    fn held() -> (Sender<()>, Receiver<&'static str>, Mortal<Held>) {
        let ((let_go, waits), (said, heard)) = (unbounded(), unbounded());
        (let_go, heard, Mortal::new(Held { let_go: waits, said }))
    }

    #[test]
    fn what_does_not_end_is_waited_for_no_longer_than_was_said_and_ends_by_itself() {
        let (let_go, heard, mut mortal) = held();
        let memory = Arc::new(());
        mortal.works_on(Arc::clone(&memory));
        let begun = Instant::now();
        drop(mortal);
        let took = begun.elapsed();
        assert!(took >= GIVE_BACK_BOUND && took < Duration::from_secs(5), "{took:?}");
        assert_eq!(heard.try_recv(), Ok("stopped"), "before anybody waits");
        assert!(heard.try_recv().is_err(), "held, and not given back");
        assert_eq!(Arc::strong_count(&memory), 2, "what it works on is kept as long");
        drop(let_go);
        assert_eq!(heard.recv_timeout(Duration::from_secs(10)), Ok("given back"));
        assert!(heard.recv_timeout(Duration::from_secs(10)).is_err(), "the thread's end has dropped the other end");
        let until = Instant::now() + Duration::from_secs(10);
        while Arc::strong_count(&memory) > 1 && Instant::now() < until {
            std::thread::yield_now();
        }
        assert_eq!(Arc::strong_count(&memory), 1);
    }

    #[test]
    fn what_ends_at_once_is_gone_when_the_wait_returns() {
        let (let_go, heard, mortal) = held();
        drop(let_go);
        let (stopped, burial) = mortal.bury();
        assert!(stopped && burial.wait(Deadline::after(Duration::from_secs(10))));
        assert_eq!(heard.try_iter().collect::<Vec<_>>(), ["stopped", "given back"]);
    }

    #[test]
    fn several_that_do_not_end_are_waited_for_together_and_not_one_after_the_other() {
        let (several, burials): (Vec<_>, Vec<_>) = (0..8)
            .map(|_| {
                let (let_go, heard, mortal) = held();
                ((let_go, heard), mortal.bury().1)
            })
            .unzip();
        let deadline = Deadline::after(Duration::from_millis(20));
        assert!(burials.iter().all(|burial| !burial.wait(deadline)));
        drop(several);
        assert!(burials.iter().all(|burial| burial.wait(Deadline::after(Duration::from_secs(10)))));
    }
}
