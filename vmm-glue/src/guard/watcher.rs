//! The guard process' own main: gets what it needs over its standard input, watches, says what there is to say, ends.
//!
//! Hand-over (a Unix stream socket as standard input): the first message is the two secrets with the page's and the connections'
//! descriptors beside them; each message after that is one byte, a slot to watch, answered by the same byte once it is watched
//! ([`REFUSED`] when nobody holds it).

use super::page::{Got, LifePage, MOST_SLOTS};
use super::process::proof_of_death;
use super::{GuardError, Secrets, io_error};
use belay_transport::Deadline;
use crossbeam_channel::{Receiver, Sender, unbounded};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::mm::MlockAllFlags;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use zeroize::Zeroizing;

/// Most connections a guard speaks on.
pub(super) const MOST_CONNECTIONS: usize = 8;
/// Answer to a slot that cannot be watched.
pub(super) const REFUSED: u8 = 0xff;
/// Longest a dying process is waited for. The address space of a guest of a TiB takes minutes.
const PROOF_BOUND: Duration = Duration::from_secs(600);

const _: () = assert!(MOST_SLOTS < REFUSED as usize);

/// What the threads of the guard tell its main one.
enum Event {
    /// A slot is being watched.
    Watching,
    /// Its process has stood down, or has ended; `proven`: surely.
    Ended { stood_down: bool, proven: bool },
    /// Nothing more will be given to watch.
    HandOverClosed,
}

/// The body of the hidden command that runs as the guard process. Returns once everything it watched has ended, or its parent has
/// without giving it anything to watch.
pub fn guard_main() -> Result<(), GuardError> {
    ignore_signals();
    // Best effort: a page of the guard's that must be read from disk first would cost the time it is there to save.
    let _ = rustix::mm::mlockall(MlockAllFlags::CURRENT);
    let (secrets, page, connections) = take_over(std::io::stdin())?;
    let guard = Arc::new(Shared { secrets, page, connections, signed: AtomicBool::new(false) });
    let (tell, events) = unbounded();
    {
        let (guard, tell) = (Arc::clone(&guard), tell.clone());
        std::thread::Builder::new()
            .name("hand-over".into())
            .spawn(move || {
                serve_hand_over(&guard, &tell);
                // The main thread lives as long as the process.
                let _ = tell.send(Event::HandOverClosed);
            })
            .map_err(io_error("start a thread"))?;
    }
    if wait_for_all(&events) && guard.signed.load(Ordering::SeqCst) {
        say(&guard.connections, &guard.secrets.proof);
    }
    Ok(())
}

/// What every thread of the guard needs.
struct Shared {
    secrets: Secrets,
    page: LifePage,
    connections: Vec<OwnedFd>,
    /// The sign has been given.
    signed: AtomicBool,
}

/// SIGINT and SIGTERM reach the whole terminal or unit; whoever is watched decides what they mean, and the guard outlives it.
fn ignore_signals() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGPIPE] {
        // SAFETY: SIG_IGN installs no handler of ours.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// Asks, where that is allowed, to run before everything ordinary: on a host full of vCPUs a thread may wait milliseconds for its turn,
/// and these threads run for a few microseconds in their whole life.
pub(super) fn run_soon() {
    let parameter = libc::sched_param { sched_priority: 1 };
    // SAFETY: 0 is the calling thread; the parameter is plain data. A refusal (EPERM) leaves things as they were.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, &parameter) };
}

pub(super) fn take_over(stdin: impl AsFd) -> Result<(Secrets, LifePage, Vec<OwnedFd>), GuardError> {
    let mut bytes = Zeroizing::new([0; 64]);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_CONNECTIONS + 1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got =
        rustix::net::recvmsg(stdin, &mut [IoSliceMut::new(&mut bytes[..])], &mut control, RecvFlags::CMSG_CLOEXEC)
            .map_err(io_error("receive the hand-over"))?;
    if got.bytes != bytes.len() {
        return Err(GuardError::BadHandOver { what: "secrets of the wrong length" });
    }
    let mut fds = control.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
        _ => vec![],
    });
    let page = LifePage::from_fd(fds.next().ok_or(GuardError::BadHandOver { what: "no page" })?)?;
    let connections: Vec<_> = fds.collect();
    let mut secrets = Secrets { sign: [0; 32], proof: [0; 32] };
    secrets.sign.copy_from_slice(&bytes[..32]);
    secrets.proof.copy_from_slice(&bytes[32..]);
    Ok((secrets, page, connections))
}

fn serve_hand_over(guard: &Arc<Shared>, tell: &Sender<Event>) {
    let stdin = std::io::stdin();
    let mut slot = [0_u8];
    loop {
        match rustix::io::read(&stdin, &mut slot) {
            Ok(1) => {}
            Err(Errno::INTR) => continue,
            Ok(_) | Err(_) => return,
        }
        let [number] = slot;
        let answer = if watch(guard, usize::from(number), tell).is_ok() { number } else { REFUSED };
        if rustix::io::write(&stdin, &[answer]).is_err() {
            return;
        }
    }
}

/// Begins to watch a slot.
fn watch(guard: &Arc<Shared>, slot: usize, tell: &Sender<Event>) -> Result<(), GuardError> {
    let page = &guard.page;
    page.check_slot(slot)?;
    let pid = i32::try_from(page.pid(slot)).ok().and_then(Pid::from_raw).ok_or(GuardError::NotHeld { slot })?;
    // The pidfd is that of the holder only if the holder still holds after it was opened: a number may have been given again.
    let pidfd = pidfd_open(pid, PidfdFlags::empty());
    let pidfd = match page.try_lock(slot).map_err(io_error("look at the slot's mutex"))? {
        Got::Busy => Some(pidfd.map_err(io_error("pidfd_open"))?),
        Got::OwnerDied => None,
        Got::Free => {
            page.unlock(slot).map_err(io_error("give the mutex back"))?;
            return Err(GuardError::NotHeld { slot });
        }
    };
    let _ = tell.send(Event::Watching);
    let (guard, tell) = (Arc::clone(guard), tell.clone());
    let watch = move || {
        run_soon();
        let page = &guard.page;
        let died = match pidfd {
            None => true,
            Some(_) => {
                let got = page.lock(slot);
                // A mutex that cannot be waited for gives no sign; the connection's end says that the guard has gone.
                if got.is_ok() && page.unlock(slot).is_ok() { matches!(got, Ok(Got::OwnerDied)) } else { false }
            }
        };
        if !died || page.orderly(slot) {
            let _ = tell.send(Event::Ended { stood_down: true, proven: false });
            return;
        }
        if !guard.signed.swap(true, Ordering::SeqCst) {
            say(&guard.connections, &guard.secrets.sign);
        }
        let proven = pidfd.is_some_and(|pidfd| proof_of_death(&pidfd, Deadline::after(PROOF_BOUND)).unwrap_or(false));
        let _ = tell.send(Event::Ended { stood_down: false, proven });
    };
    std::thread::Builder::new().name(format!("watch-{slot}")).spawn(watch).map_err(io_error("start a thread"))?;
    Ok(())
}

/// Waits until all that was watched has ended; whether every death among it is proven.
fn wait_for_all(events: &Receiver<Event>) -> bool {
    let (mut watching, mut more_may_come, mut all_proven) = (0_usize, true, true);
    // Ends by itself when the hand-over thread and all watchers have.
    for event in events {
        match event {
            Event::Watching => watching += 1,
            Event::Ended { stood_down, proven } => {
                watching -= 1;
                all_proven &= stood_down || proven;
                // When the last has ended nothing more comes: a guard is for one migration.
                more_may_come = false;
            }
            Event::HandOverClosed => more_may_come = false,
        }
        if watching == 0 && !more_may_come {
            break;
        }
    }
    all_proven
}

/// A connection that does not take 32 bytes at once is full or broken; the others must not wait for it.
fn say(connections: &[OwnedFd], secret: &[u8; 32]) {
    for connection in connections {
        let _ = rustix::net::send(connection, secret, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    }
}
