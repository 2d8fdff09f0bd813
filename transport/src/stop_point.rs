//! Stop points: named places in the protocol at which a process can be told to freeze itself, so that a test strikes it exactly there.
//!
//! A process that was told nothing pays one relaxed load at each. One that was told a name (`--stop-at NAME[:N]`) says so on stderr
//! when it comes there for the N-th time, and stops as a whole by a SIGSTOP to the very thread that is there: nothing behind the point
//! has happened. Whoever struck lets it go on by SIGCONT. A point stops a process once.

use std::io::Write;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// What the line on stderr starts with; the point's name follows.
pub const ANNOUNCED: &str = "belay: stopped at ";

static ARMED: AtomicBool = AtomicBool::new(false);
static WANTED: OnceLock<Wanted> = OnceLock::new();

struct Wanted {
    name: String,
    /// Times the point is still passed by before it stops the process.
    left: AtomicU32,
}

/// A text that names no stop point.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not NAME or NAME:N with an N from 1; a process stops at one point")]
pub struct NotAPoint(String);

/// Has this process stop at `NAME` or `NAME:N`. Once a process.
pub fn arm(text: &str) -> Result<(), NotAPoint> {
    let refused = || NotAPoint(text.to_owned());
    let (name, times) = match text.split_once(':') {
        Some((name, times)) => (name, times.parse::<u32>().map_err(|_| refused())?),
        None => (text, 1),
    };
    if name.is_empty() || times == 0 {
        return Err(refused());
    }
    let wanted = Wanted { name: name.to_owned(), left: AtomicU32::new(times - 1) };
    WANTED.set(wanted).map_err(|_| refused())?;
    ARMED.store(true, Ordering::Release);
    Ok(())
}

/// The stop point `name`.
#[inline]
pub fn reached(name: &str) {
    if ARMED.load(Ordering::Relaxed) {
        look(name);
    }
}

/// Whether this process was told to stop at `name` and has not come there yet: for who must see to it that it can.
#[inline]
pub fn is_awaited(name: &str) -> bool {
    ARMED.load(Ordering::Relaxed) && WANTED.get().is_some_and(|wanted| wanted.name == name)
}

#[cold]
fn look(name: &str) {
    let Some(wanted) = WANTED.get().filter(|wanted| wanted.name == name) else { return };
    if wanted.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok() {
        return;
    }
    // Once: whoever comes next passes by.
    if !ARMED.swap(false, Ordering::SeqCst) {
        return;
    }
    // Whoever waits for this line and has gone has nothing to wait for; the stop is seen by waitid(2) too.
    let _ = writeln!(std::io::stderr().lock(), "{ANNOUNCED}{name}");
    let process = rustix::process::getpid().as_raw_nonzero().get();
    let thread = rustix::thread::gettid().as_raw_nonzero().get();
    // SAFETY: takes no pointers; a thread of this process sends itself a signal, which stops the process before the call returns.
    unsafe { libc::syscall(libc::SYS_tgkill, process, thread, libc::SIGSTOP) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_that_names_no_point_is_refused_and_a_process_that_was_told_nothing_passes_by() {
        for text in ["", ":1", "x:0", "x:many"] {
            assert_eq!(arm(text), Err(NotAPoint(text.to_owned())));
        }
        reached("anything");
        assert!(!is_awaited("anything"));
    }
}
