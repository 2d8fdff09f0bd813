//! Who may connect a queue pair at the owner, and the thread that lets them: the owner's steward.
//!
//! ```text
//!   connect request ── proof wrong, not a request ──────────────────────────────> refused
//!                   ── lane not permitted yet ──> waits (bounded) ── permitted ─┐
//!                   ── lane permitted ──────────────────────────────────────────┴> queue pair, accepted, once a lane
//! ```
//! The state is behind one lock that no operation ever takes: only set-up, ends and the owner's own calls do.

use super::address::{Host, Local};
use super::burial::{Burial, GIVE_BACK_BOUND, Mortal};
use super::cm::{CmEvent, EventChannel, Id, Terms};
use super::device::{AsyncEvent, AsyncEvents, Pd};
use super::endpoint::{Endpoint, Use};
use super::error::{RefusedLane, VerbsError};
use super::exports_stream::{Ended, ExportsStream, FromInitiator, FromOwner};
use super::proof::{self, Challenge, Subject};
use crate::deadline::Deadline;
use crate::fabric::{FabricDetails, FabricError, LaneId};
use crate::session::BindingKey;
use belay_verbs_sys::rdma_cm_event_type as kind;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Requests for lanes that are not permitted yet.
pub(super) const MAX_WAITING: usize = 64;
/// How long such a request waits.
const WAITING_BOUND: Duration = Duration::from_secs(10);
/// Refused requests kept for the operator.
const MAX_REFUSALS: usize = 16;
/// Tables that wait to be sent.
const MAX_UNSENT: usize = 4;

/// A connection of the session's.
struct Connection {
    lane: LaneId,
    endpoint: Mortal<Endpoint>,
    /// Its end has been told, or is our own doing.
    told: bool,
}

/// A request that waits for its lane to be permitted.
struct Waiting {
    id: Id,
    subject: Subject,
    terms: (u8, u8),
    until: Deadline,
}

#[derive(Default)]
struct State {
    permitted: Vec<LaneId>,
    waiting: Vec<Waiting>,
    connections: Vec<Connection>,
    failures: Vec<FabricError>,
    refusals: VecDeque<FabricError>,
    unsent: VecDeque<FromOwner>,
    acknowledged: u64,
    /// The exports connection has ended.
    ended: bool,
    /// This host's port: no end by itself, but a reason for silence.
    port_down: bool,
    revoked: bool,
    /// Queue pairs of a revoked session that would not stop: until they are given back, nobody can say that the peer is shut out.
    unstopped: Vec<(LaneId, Burial)>,
    port: u16,
    details: Option<FabricDetails>,
}

/// What the owner and its steward share.
pub(super) struct Shared {
    key: BindingKey,
    challenge: Challenge,
    pd: Arc<Pd>,
    host: Host,
    local: Local,
    state: Mutex<State>,
    changed: Condvar,
    stop: AtomicBool,
    /// Wakes the steward.
    wake: Arc<OwnedFd>,
    /// Readable once a lane has ended by itself.
    broken: OwnedFd,
}

fn new_eventfd() -> Result<OwnedFd, FabricError> {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map_err(|error| FabricError::Io { doing: "making an eventfd".to_owned(), source: error.into() })
}

fn signal(fd: impl AsFd) {
    // A full counter is readable too.
    let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
}

impl Shared {
    pub(super) fn new(
        key: BindingKey,
        challenge: Challenge,
        pd: Arc<Pd>,
        host: Host,
        local: Local,
    ) -> Result<Self, FabricError> {
        Ok(Self {
            key,
            challenge,
            pd,
            host,
            local,
            state: Mutex::default(),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
            wake: Arc::new(new_eventfd()?),
            broken: new_eventfd()?,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each step under the lock leaves the state whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn challenge(&self) -> Challenge {
        self.challenge
    }

    pub(super) fn set_port(&self, port: u16) {
        self.lock().port = port;
    }

    pub(super) fn details(&self) -> Option<FabricDetails> {
        self.lock().details.clone()
    }

    /// Connections, and requests that wait.
    #[cfg(test)]
    pub(super) fn held(&self) -> (usize, usize) {
        let state = self.lock();
        (state.connections.len(), state.waiting.len())
    }

    /// Has the steward do nothing for as long as this is kept.
    #[cfg(test)]
    pub(super) fn pause(&self) -> impl Sized + '_ {
        self.lock()
    }

    pub(super) fn broken(&self) -> BorrowedFd<'_> {
        self.broken.as_fd()
    }

    pub(super) fn take_failures(&self) -> Vec<FabricError> {
        let mut state = self.lock();
        let mut told = Vec::new();
        if state.port_down {
            // First: the lanes' ends follow from it.
            let device = self.pd.context().name().to_owned();
            told.push(VerbsError::OwnPortDown { device, port: self.local.port }.into());
        }
        told.append(&mut state.failures);
        told.extend(state.refusals.drain(..));
        told
    }

    /// Lets `lane` be connected, once.
    pub(super) fn permit(&self, lane: LaneId) -> Result<(), FabricError> {
        let mut state = self.lock();
        if state.permitted.contains(&lane) {
            return Err(VerbsError::LaneTwice { lane }.into());
        }
        state.permitted.push(lane);
        if state.ended {
            return Err(FabricError::PeerClosed { lane });
        }
        if let Some(at) = state.waiting.iter().position(|waiting| waiting.subject.lane == lane) {
            let Waiting { id, subject, terms, .. } = state.waiting.swap_remove(at);
            self.accept(&mut state, id, subject, terms);
        }
        Ok(())
    }

    /// Has the steward send a frame.
    pub(super) fn publish(&self, frame: FromOwner) -> Result<(), FabricError> {
        let mut state = self.lock();
        if state.unsent.len() >= MAX_UNSENT {
            return Err(VerbsError::NotAcknowledged { bound: Duration::ZERO }.into());
        }
        state.unsent.push_back(frame);
        drop(state);
        signal(&*self.wake);
        Ok(())
    }

    /// Waits until the peer has taken a table.
    pub(super) fn await_acknowledgement(
        &self,
        version: u64,
        deadline: Deadline,
        bound: Duration,
    ) -> Result<(), FabricError> {
        let mut state = self.lock();
        loop {
            if state.acknowledged >= version {
                return Ok(());
            }
            if state.ended {
                return Err(FabricError::PeerClosed { lane: super::EXPORTS });
            }
            let left = deadline.left();
            if left.is_zero() {
                return Err(VerbsError::NotAcknowledged { bound }.into());
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Stops every queue pair and gives it back, and admits no other from now on. Once it returns without an error nothing more is read
    /// or begins to be written by the peer; a queue pair that has stopped but is still held by the kernel is not waited for beyond a
    /// short bound. May be called again after an error.
    pub(super) fn revoke(&self, deadline: Deadline) -> Result<(), FabricError> {
        let bound = deadline.left();
        let (connections, waiting, mut unstopped) = {
            let mut state = self.lock();
            state.revoked = true;
            let connections = std::mem::take(&mut state.connections);
            (connections, std::mem::take(&mut state.waiting), std::mem::take(&mut state.unstopped))
        };
        // All are stopped before any is waited for.
        let mut held = Vec::new();
        for Connection { lane, endpoint, .. } in connections {
            match endpoint.bury() {
                (true, burial) => held.push(burial),
                (false, burial) => unstopped.push((lane, burial)),
            }
        }
        // Dropped, which refuses them.
        held.push(Burial::of(waiting));
        signal(&*self.wake);
        let short = Deadline::after(GIVE_BACK_BOUND).min(deadline);
        for burial in held {
            burial.wait(short);
        }
        unstopped.retain(|(_, burial)| !burial.wait(deadline));
        let first = unstopped.first().map(|(lane, _)| *lane);
        self.lock().unstopped = unstopped;
        first.map_or(Ok(()), |lane| Err(VerbsError::NotStopped { lane, bound }.into()))
    }

    /// Judges a connect request.
    fn request(&self, state: &mut State, mut id: Id, event: &CmEvent) {
        let data = &event.data;
        let number = if self.pd.context().is_iwarp() { 0 } else { data.queue_pair };
        let judged = proof::check_request(&self.key, &self.challenge, number, &data.private_data).and_then(|subject| {
            let taken = state.connections.iter().any(|connection| connection.lane == subject.lane);
            match (state.revoked, taken) {
                (true, _) => Err(RefusedLane::Revoked),
                (_, true) => Err(RefusedLane::Twice),
                _ => Ok(subject),
            }
        });
        if let Ok(subject) = &judged {
            // Whoever asks again has given up asking before; only the session's own peer can ask at all.
            state.waiting.retain(|waiting| waiting.subject.lane != subject.lane);
        }
        let terms = (data.responder_resources, data.initiator_depth);
        match judged {
            Err(reason) => self.refuse(state, &mut id, reason),
            Ok(subject) if state.permitted.contains(&subject.lane) => self.accept(state, id, subject, terms),
            Ok(_) if state.waiting.len() >= MAX_WAITING => self.refuse(state, &mut id, RefusedLane::Busy),
            Ok(subject) => {
                let until = Deadline::after(WAITING_BOUND);
                state.waiting.push(Waiting { id, subject, terms, until });
            }
        }
    }

    fn refuse(&self, state: &mut State, id: &mut Id, reason: RefusedLane) {
        // If it cannot be told, its own deadline tells it.
        let _ = id.reject(&proof::refusal(reason));
        if state.refusals.len() == MAX_REFUSALS {
            state.refusals.pop_front();
        }
        state.refusals.push_back(VerbsError::RefusedRequest { reason }.into());
    }

    /// Makes the queue pair that answers, and accepts. What fails is told to the peer and to the operator.
    fn accept(&self, state: &mut State, id: Id, subject: Subject, (responder_resources, _): (u8, u8)) {
        let lane = subject.lane;
        let mut endpoint = match Endpoint::new(id, &self.pd, &Use::Respond) {
            Ok(endpoint) => Mortal::new(endpoint),
            // Its identifier went with it, which refuses the request.
            Err(error) => {
                state.failures.push(error.into());
                signal(&self.broken);
                return;
            }
        };
        let private_data = subject.acceptance(&self.key, endpoint.number());
        let most = self.pd.context().limits().max_responder_resources;
        let terms = Terms {
            private_data: &private_data,
            responder_resources: responder_resources.min(most),
            initiator_depth: 0,
        };
        if let Err(error) = endpoint.id_mut().accept(&terms) {
            state.failures.push(error.into());
            signal(&self.broken);
            return;
        }
        if state.details.is_none() {
            match endpoint.details(&self.host, &self.local, state.port) {
                Ok(details) => state.details = Some(details),
                Err(error) => {
                    state.failures.push(error.into());
                    signal(&self.broken);
                    return;
                }
            }
        }
        state.connections.push(Connection { lane, endpoint, told: false });
    }

    /// What rdma_cm says of a connection.
    fn connection_event(&self, state: &mut State, event: &CmEvent) {
        let Some(connection) = state.connections.iter_mut().find(|one| one.endpoint.id().token() == event.of) else {
            // An asker that has given up.
            state.waiting.retain(|waiting| waiting.id.token() != event.of);
            return;
        };
        let lane = connection.lane;
        let failure = match event.kind {
            kind::RDMA_CM_EVENT_DISCONNECTED => FabricError::PeerClosed { lane },
            kind::RDMA_CM_EVENT_DEVICE_REMOVAL => {
                VerbsError::DeviceLost { device: self.pd.context().name().to_owned() }.into()
            }
            kind::RDMA_CM_EVENT_CONNECT_ERROR | kind::RDMA_CM_EVENT_UNREACHABLE | kind::RDMA_CM_EVENT_REJECTED => {
                VerbsError::NotConnected { lane, step: "rdma_accept", event: event.name(), status: event.status }.into()
            }
            _ => return,
        };
        if !std::mem::replace(&mut connection.told, true) {
            state.failures.push(failure);
            signal(&self.broken);
        }
    }

    /// Tells the end of every lane that has not been told.
    fn all_end(&self, state: &mut State, error: impl Fn(LaneId) -> FabricError) {
        let tell = |connection: &mut Connection| {
            (!std::mem::replace(&mut connection.told, true)).then(|| error(connection.lane))
        };
        let failures: Vec<_> = state.connections.iter_mut().filter_map(tell).collect();
        if !failures.is_empty() {
            state.failures.extend(failures);
            signal(&self.broken);
        }
    }

    fn device_event(&self, state: &mut State, event: AsyncEvent) {
        let device = || self.pd.context().name().to_owned();
        match event {
            AsyncEvent::Device => self.all_end(state, |_| VerbsError::DeviceLost { device: device() }.into()),
            AsyncEvent::QueuePair(at) => {
                let found = state.connections.iter_mut().find(|one| one.endpoint.as_ptrs().0 as usize == at);
                // A remote access error moves the answering queue pair into its error state: its initiator is told by its own.
                if let Some(connection) = found
                    && !std::mem::replace(&mut connection.told, true)
                {
                    let lane = connection.lane;
                    state.failures.push(VerbsError::QueuePair { lane }.into());
                    signal(&self.broken);
                }
            }
            AsyncEvent::PortDown(port) if port == self.local.port => state.port_down = true,
            AsyncEvent::PortUp(port) if port == self.local.port => state.port_down = false,
            AsyncEvent::CompletionQueue(_) | AsyncEvent::PortDown(_) | AsyncEvent::PortUp(_) => {}
        }
    }
}

/// The owner's steward: asleep unless something is said. Dropping it ends the exports connection.
pub(super) struct Steward {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Steward {
    pub(super) fn start(
        shared: Arc<Shared>,
        stream: ExportsStream,
        channel: Arc<EventChannel>,
        events: &Arc<AsyncEvents>,
    ) -> Result<Self, FabricError> {
        let events = Arc::clone(events);
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("belay-admission".to_owned())
            .spawn(move || run(&for_thread, stream, &channel, &events))
            .map_err(|source| FabricError::Io { doing: "starting the owner's steward".to_owned(), source })?;
        Ok(Self { shared, thread: Some(thread) })
    }
}

impl Drop for Steward {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        signal(&*self.shared.wake);
        if let Some(thread) = self.thread.take() {
            // It waits for nothing but its descriptors, so it ends at once; a panic in it has been told by the hook.
            let _ = thread.join();
        }
    }
}

fn run(shared: &Shared, stream: ExportsStream, channel: &Arc<EventChannel>, events: &AsyncEvents) {
    let mut seen = events.listen(&shared.wake);
    let mut stream = Some(stream);
    while !shared.stop.load(Ordering::Acquire) {
        if shared.lock().revoked {
            // Its end tells the initiator at once, whatever rdma_cm's messages do.
            stream = None;
        }
        if let Some(open) = &mut stream
            && let Err(end) = talk(shared, open)
        {
            stream = None;
            let mut state = shared.lock();
            state.ended = true;
            if !state.revoked {
                shared.all_end(&mut state, |lane| end.error(lane));
            }
            shared.changed.notify_all();
        }
        // Each event is read (and acknowledged) without the lock: destroying an identifier under it waits for acknowledgements.
        while let Ok(Some(mut event)) = channel.next() {
            let mut state = shared.lock();
            match event.new.take() {
                Some(id) => shared.request(&mut state, id, &event),
                None => shared.connection_event(&mut state, &event),
            }
        }
        for event in events.take(&mut seen) {
            shared.device_event(&mut shared.lock(), event);
        }
        let next = expire(shared);
        sleep(shared, stream.as_ref(), channel, events, next);
    }
}

/// Sends what is to be sent and takes what has come.
fn talk(shared: &Shared, stream: &mut ExportsStream) -> Result<(), Ended> {
    let unsent = std::mem::take(&mut shared.lock().unsent);
    for frame in unsent {
        stream.queue(&frame).map_err(|error| Ended::Faulty(error.to_string()))?;
    }
    stream.flush()?;
    while let Some(FromInitiator::Acknowledged { version }) = stream.receive()? {
        shared.lock().acknowledged = version;
        shared.changed.notify_all();
    }
    Ok(())
}

/// Refuses requests that have waited too long; when the next one will have.
fn expire(shared: &Shared) -> Option<Deadline> {
    let mut state = shared.lock();
    let mut at = 0;
    while at < state.waiting.len() {
        if state.waiting[at].until.expired() {
            let mut waiting = state.waiting.swap_remove(at);
            shared.refuse(&mut state, &mut waiting.id, RefusedLane::NotServed);
        } else {
            at += 1;
        }
    }
    state.waiting.iter().map(|waiting| waiting.until).min()
}

fn sleep(
    shared: &Shared,
    stream: Option<&ExportsStream>,
    channel: &EventChannel,
    events: &AsyncEvents,
    until: Option<Deadline>,
) {
    let mut fds = vec![
        PollFd::new(&*shared.wake, PollFlags::IN),
        PollFd::from_borrowed_fd(channel.as_fd(), PollFlags::IN),
        PollFd::from_borrowed_fd(events.as_fd(), PollFlags::IN),
    ];
    fds.extend(stream.map(|stream| PollFd::from_borrowed_fd(stream.as_fd(), stream.interest())));
    let timeout = until.map(|until| crate::session::timespec(until.left()));
    // An interrupted poll looks like one that found nothing; the loop comes round again.
    let _ = poll(&mut fds, timeout.as_ref());
    let _ = rustix::io::read(&*shared.wake, &mut [0; 8]);
}
