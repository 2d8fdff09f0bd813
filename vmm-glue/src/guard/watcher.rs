//! The guard process' own main: gets what it needs over its standard input, watches, says what there is to say, ends.
//!
//! Hand-over (a Unix stream socket as standard input): the first message is the secrets and the bound of the fence, with the page's and
//! the connections' descriptors beside them; each message after that is one byte, a slot to watch, answered by the same byte once it is
//! watched ([`REFUSED`] when nobody holds it), or [`DISMISSED`].

use super::death_watch::same;
use super::page::{Got, LifePage, MOST_SLOTS};
use super::process::proof_of_death;
use super::{Arms, GuardError, Secrets, io_error};
use belay_transport::Deadline;
use crossbeam_channel::{Receiver, Sender, unbounded};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::mm::MlockAllFlags;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use zeroize::Zeroizing;

/// Most connections a guard speaks on.
pub(super) const MOST_CONNECTIONS: usize = 8;
/// Answer to a slot that cannot be watched.
pub(super) const REFUSED: u8 = 0xff;
/// A word that sends the guard home.
pub(super) const DISMISSED: u8 = 0xfe;
/// Length of the first message.
pub(super) const HAND_OVER_BYTES: usize = 3 * 32 + 8;
/// How often a VMM is looked at whose page server has died.
const GATE_LOOK: Duration = Duration::from_millis(1);
/// Longest a dying process is waited for. The address space of a guest of a TiB takes minutes.
const PROOF_BOUND: Duration = Duration::from_secs(600);

const _: () = assert!(MOST_SLOTS < DISMISSED as usize && DISMISSED < REFUSED);

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
    let guard = Arc::new(take_over(std::io::stdin())?);
    let (tell, events) = unbounded();
    if guard.arms != Arms::None {
        for index in 0..guard.connections.len() {
            let guard = Arc::clone(&guard);
            let obey = move || {
                run_soon();
                obey(&guard, index);
            };
            std::thread::Builder::new().name("fence".into()).spawn(obey).map_err(io_error("start a thread"))?;
        }
    }
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
pub(super) struct Shared {
    pub(super) secrets: Secrets,
    pub(super) page: LifePage,
    pub(super) connections: Vec<OwnedFd>,
    pub(super) arms: Arms,
    /// What is watched now, by slot: what the fence would end.
    pub(super) watched: Mutex<Vec<(usize, Arc<OwnedFd>)>>,
    /// The sign has been given.
    pub(super) signed: AtomicBool,
}

impl Shared {
    fn watched(&self) -> MutexGuard<'_, Vec<(usize, Arc<OwnedFd>)>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends everything that is watched. The watchers see the deaths and their proofs, and say so.
    fn fence(&self) {
        for (_, pidfd) in &*self.watched() {
            // One that has ended meanwhile is as good.
            let _ = pidfd_send_signal(pidfd, Signal::KILL);
        }
    }
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

pub(super) fn take_over(stdin: impl AsFd) -> Result<Shared, GuardError> {
    let mut bytes = Zeroizing::new([0; HAND_OVER_BYTES]);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_CONNECTIONS + 1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let into = &mut [IoSliceMut::new(&mut bytes[..])];
    let got = rustix::net::recvmsg(stdin, into, &mut control, RecvFlags::CMSG_CLOEXEC)
        .map_err(io_error("receive the hand-over"))?;
    if got.bytes != HAND_OVER_BYTES {
        return Err(GuardError::BadHandOver { what: "secrets of the wrong length" });
    }
    let mut fds = control.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
        _ => vec![],
    });
    let page = LifePage::from_fd(fds.next().ok_or(GuardError::BadHandOver { what: "no page" })?)?;
    let connections: Vec<_> = fds.collect();
    let mut secrets = Secrets::none();
    for (secret, bytes) in secrets.each().into_iter().zip(bytes.chunks_exact(32)) {
        secret.copy_from_slice(bytes);
    }
    let bound_ms = u64::from_le_bytes(bytes[96..].try_into().expect("eight bytes are left"));
    let arms = match bound_ms {
        0 => Arms::None,
        ms => Arms::Fence { gate_bound: Duration::from_millis(ms) },
    };
    let (watched, signed) = (Mutex::default(), AtomicBool::new(false));
    Ok(Shared { secrets, page, connections, arms, watched, signed })
}

/// Waits for the order on one connection. Anything else that comes ends the waiting: a source says nothing else.
fn obey(guard: &Shared, index: usize) {
    let connection = &guard.connections[index];
    let (mut word, mut filled) = (Zeroizing::new([0; 32]), 0);
    while filled < word.len() {
        match rustix::io::read(connection, &mut word[filled..]) {
            Ok(0) => return,
            Ok(count) => filled += count,
            Err(Errno::INTR) => {}
            Err(_) => return,
        }
    }
    if same(&word, &guard.secrets.fence) {
        guard.fence();
    }
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
        if number == DISMISSED {
            std::process::exit(0);
        }
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
        Got::Busy => Some(Arc::new(pidfd.map_err(io_error("pidfd_open"))?)),
        Got::OwnerDied => None,
        Got::Free => {
            page.unlock(slot).map_err(io_error("give the mutex back"))?;
            return Err(GuardError::NotHeld { slot });
        }
    };
    if let Some(pidfd) = &pidfd {
        guard.watched().push((slot, Arc::clone(pidfd)));
    }
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
        guard.watched().retain(|(watched, _)| *watched != slot);
        if !died || page.orderly(slot) {
            let _ = tell.send(Event::Ended { stood_down: true, proven: false });
            return;
        }
        if !guard.signed.swap(true, Ordering::SeqCst) {
            say(&guard.connections, &guard.secrets.sign);
        }
        if let Arms::Fence { gate_bound } = guard.arms {
            quieten(&guard, slot, Deadline::after(gate_bound));
        }
        let proven = pidfd.is_some_and(|pidfd| proof_of_death(&*pidfd, Deadline::after(PROOF_BOUND)).unwrap_or(false));
        let _ = tell.send(Event::Ended { stood_down: false, proven });
    };
    std::thread::Builder::new().name(format!("watch-{slot}")).spawn(watch).map_err(io_error("start a thread"))?;
    Ok(())
}

/// The process of slot `dead` has died. Whoever else is watched is a VMM without its page server now: it has until the deadline to say that
/// its gate is shut and its guest ordered to stop, and is ended if it does not.
fn quieten(guard: &Shared, dead: usize, deadline: Deadline) {
    let loud = |guard: &Shared| -> Vec<Arc<OwnedFd>> {
        let watched = guard.watched();
        let loud = watched.iter().filter(|(slot, _)| *slot != dead && !guard.page.quiet(*slot));
        loud.map(|(_, pidfd)| Arc::clone(pidfd)).collect()
    };
    while !loud(guard).is_empty() {
        if deadline.expired() {
            for pidfd in loud(guard) {
                let _ = pidfd_send_signal(&*pidfd, Signal::KILL);
            }
            return;
        }
        std::thread::sleep(GATE_LOOK);
    }
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
