//! The source's side: a thread that reads a guard's connection and knows its words when it hears them.

use super::process::wait_readable;
use super::watcher::run_soon;
use super::{GuardError, Secrets, io_error};
use belay_transport::Deadline;
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use zeroize::Zeroizing;

/// How often the thread looks whether it shall stop, should the shut-down of its socket not have woken it.
const LOOK: Duration = Duration::from_millis(500);

/// What a guard's connection said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// A watched process is dying: begin the catch. Not a proof.
    DeathSign,
    /// Every watched process has provably ended.
    DeathProven,
    /// The connection ended, failed, or carried something that is no word of the guard's. Says nothing about the guest.
    GuardGone { why: String },
}

/// Listens to one guard until it has gone.
#[derive(Debug)]
pub struct DeathWatch {
    connection: Arc<OwnedFd>,
    order: Zeroizing<[u8; 32]>,
    stop: Arc<AtomicBool>,
    listening: Option<JoinHandle<()>>,
}

impl DeathWatch {
    /// Listens on `connection` and hands each notice to `notify`, on a thread of its own, the moment it comes.
    /// That thread runs at real-time priority where it may, so `notify` must only pass the notice on. [`Notice::GuardGone`] is the last. Nothing is said after [`DeathWatch::stop`].
    pub fn spawn(
        connection: OwnedFd,
        secrets: Secrets,
        mut notify: impl FnMut(Notice) + Send + 'static,
    ) -> Result<Self, GuardError> {
        let connection = Arc::new(connection);
        let order = Zeroizing::new(secrets.fence);
        let stop = Arc::new(AtomicBool::new(false));
        let listening = {
            let (connection, stop) = (Arc::clone(&connection), Arc::clone(&stop));
            let listen = move || {
                run_soon();
                let mut say = |notice| {
                    if !stop.load(Ordering::SeqCst) {
                        notify(notice);
                    }
                };
                let why = match listen(&connection, &secrets, &stop, &mut say) {
                    Ok(why) => why.to_owned(),
                    Err(error) => error.to_string(),
                };
                say(Notice::GuardGone { why });
            };
            std::thread::Builder::new()
                .name("belay-death".into())
                .spawn(listen)
                .map_err(io_error("start the thread that listens to the guard"))?
        };
        Ok(Self { connection, order, stop, listening: Some(listening) })
    }

    /// Orders the guard to end what it watches. What comes of it is heard as [`Notice::DeathProven`]; nothing does where the guard is not
    /// armed or out of reach. Whether the order could be sent.
    pub fn fence(&self) -> bool {
        let sent = rustix::net::send(&*self.connection, &self.order[..], SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        sent == Ok(self.order.len())
    }

    /// Ends the listening; no notice comes after this returns. Not to be called from the callback.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the thread; a socket that is not connected any more has woken it already.
        let _ = rustix::net::shutdown(&*self.connection, Shutdown::Both);
        if let Some(listening) = self.listening.take() {
            let _ = listening.join();
        }
    }
}

impl Drop for DeathWatch {
    fn drop(&mut self) {
        self.end();
    }
}

/// Reads words until there are no more; why there are none.
pub(super) fn listen(
    connection: impl AsFd,
    secrets: &Secrets,
    stop: &AtomicBool,
    say: &mut impl FnMut(Notice),
) -> std::io::Result<&'static str> {
    for (secret, notice) in [(&secrets.sign, Notice::DeathSign), (&secrets.proof, Notice::DeathProven)] {
        let mut word = [0; 32];
        if !read_word(&connection, &mut word, stop)? {
            return Ok("its connection ended");
        }
        if !same(&word, secret) {
            return Ok("what came over its connection was no word of the guard's");
        }
        say(notice);
    }
    Ok("it has said all it had to say")
}

/// Fills `word`; false when the connection ends first.
fn read_word(connection: &impl AsFd, word: &mut [u8; 32], stop: &AtomicBool) -> std::io::Result<bool> {
    let mut filled = 0;
    while filled < word.len() {
        if stop.load(Ordering::SeqCst) {
            return Ok(false);
        }
        if !wait_readable(connection, Deadline::after(LOOK))? {
            continue;
        }
        match rustix::io::read(connection, &mut word[filled..]) {
            Ok(0) => return Ok(false),
            Ok(count) => filled += count,
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(true)
}

/// Compares in a time that does not depend on where the two differ.
pub(super) fn same(a: &[u8; 32], b: &[u8; 32]) -> bool {
    let differing = a.iter().zip(b).fold(0, |differing, (a, b)| differing | (a ^ b));
    std::hint::black_box(differing) == 0
}
