//! The destination's side of `verbs`: local memory registered, the owner's table kept, lanes connected with proof.

use super::address::{Host, Local};
use super::burial::Mortal;
use super::cm::{CmEvent, EventChannel, Id, Terms, socket_address};
use super::device::{AsyncEvents, Context, Pd};
use super::endpoint::{Endpoint, Use};
use super::error::VerbsError;
use super::exports_stream::{Ended, ExportsStream, FromInitiator, FromOwner, Offer};
use super::fate::{Cause, Fate};
use super::lane::{Locals, Parts, SharedTable, VerbsLane};
use super::memory_region::PdRegistrar;
use super::proof::{self, Subject};
use super::queue_pair::QueuePair;
use super::registration::{self, Access, Registered, RegistrationOptions};
use super::table::{RemoteTable, Span};
use super::{ACKNOWLEDGEMENT_TIMEOUT, EXPORTS};
use crate::deadline::Deadline;
use crate::fabric::{
    FabricDetails, FabricError, FabricKind, Initiator, Lane, LaneId, LocalKey, MAX_WINDOW, RegistrationObserver,
};
use crate::region::{Mapping, RamFile};
use crate::session::{BindingKey, LaneAcceptor, random, wait_for};
use crate::units::PageSize;
use belay_verbs_sys::rdma_cm_event_type as kind;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;

/// Requests that a send queue holds at least, so that operations split at chunk borders flow.
const LEAST_DEPTH: u32 = 128;

/// The destination's side.
pub struct VerbsInitiator {
    acceptor: LaneAcceptor,
    pub(super) key: BindingKey,
    host: Host,
    pub(super) local: Local,
    pub(super) context: Arc<Context>,
    pub(super) pd: Arc<Pd>,
    observer: Option<RegistrationObserver>,
    pinned_bytes: u64,
    mappings: Vec<Arc<Mapping>>,
    registered: Vec<Registered>,
    /// Taken and not spoken on yet: a first lane that was not opened in time leaves it for the next.
    stream: Option<ExportsStream>,
    /// From the first lane on.
    pub(super) session: Option<Open>,
    details: Option<FabricDetails>,
    opened: Vec<LaneId>,
}

/// What the first lane's opening has made.
pub(super) struct Open {
    pub(super) offer: Offer,
    locals: Arc<Locals>,
    pub(super) table: Arc<SharedTable>,
    steward: Arc<Steward>,
}

impl VerbsInitiator {
    /// `session` is the address that the session's control connection has on this host.
    pub(in crate::fabric) fn new(acceptor: LaneAcceptor, session: Option<IpAddr>) -> Result<Self, FabricError> {
        let settings = acceptor.config().verbs.clone().unwrap_or_default();
        if !settings.trusted {
            return Err(VerbsError::NotTrusted.into());
        }
        let key = acceptor.binding().cloned().ok_or(VerbsError::Unbound)?;
        let host = Host::this()?;
        let local = host.choose(&settings, session)?;
        let context = Context::of(&local)?;
        let pd = Pd::new(&context)?;
        Ok(Self {
            acceptor,
            key,
            host,
            local,
            context,
            pd,
            observer: None,
            pinned_bytes: 0,
            mappings: Vec::new(),
            registered: Vec::new(),
            stream: None,
            session: None,
            details: None,
            opened: Vec::new(),
        })
    }

    fn register(&mut self, mapping: &Arc<Mapping>) -> Result<Registered, FabricError> {
        let limits = self.context.limits();
        let access = if mapping.is_writable() { Access::landing(self.context.is_iwarp()) } else { Access::ORIGIN };
        let options = RegistrationOptions {
            pinned_before: self.pinned_bytes,
            progress: self.observer.clone(),
            ..RegistrationOptions::for_device(limits.max_mr, limits.max_mr_size, PageSize::Small)
        };
        let registrar = PdRegistrar(Arc::clone(&self.pd));
        let registered =
            registration::register_whole(&registrar, mapping, access, &options).map_err(VerbsError::from)?;
        self.pinned_bytes += registered.report().pinned_bytes;
        Ok(registered)
    }

    /// Receives the owner's offer and starts the steward.
    fn begin(&mut self, deadline: Deadline) -> Result<Open, FabricError> {
        if self.stream.is_none() {
            self.stream = Some(ExportsStream::new(self.acceptor.take(EXPORTS, deadline)?));
        }
        let offer = receive_offer(self.stream.as_mut().expect("taken above"), deadline)?;
        let mut stream = self.stream.take().expect("taken above");
        let table = Arc::new(SharedTable::new(RemoteTable::checked(offer.exports.clone())?, offer.version));
        stream.queue(&FromInitiator::Acknowledged { version: offer.version })?;
        let read_back = self.read_back()?;
        let spans = |registered: &Registered| -> Box<[Span]> {
            let span = |chunk: &registration::Chunk| Span {
                offset: chunk.offset,
                len: chunk.len,
                address: chunk.addr,
                key: chunk.lkey,
            };
            registered.chunks().iter().map(span).collect()
        };
        let registered = std::mem::take(&mut self.registered);
        let locals = Arc::new(Locals {
            mappings: self.mappings.clone(),
            spans: registered.iter().map(spans).collect(),
            read_back,
            _regions: Mutex::new(registered),
        });
        let steward = Arc::new(Steward::start(stream, Arc::clone(&table), self.context.events())?);
        Ok(Open { offer, locals, table, steward })
    }

    /// Registers a place for iWARP's READ-backs; its index among the local mappings' spans.
    fn read_back(&mut self) -> Result<Option<usize>, FabricError> {
        if !self.context.is_iwarp() {
            return Ok(None);
        }
        let io = |source| FabricError::Io { doing: "making a place for READ-backs".to_owned(), source };
        let file = RamFile::memfd("belay-read-back", PageSize::Small.bytes(), PageSize::Small)
            .map_err(|error| io(std::io::Error::other(error)))?;
        let mapping = Arc::new(file.map().map_err(io)?);
        let registered = self.register(&mapping)?;
        self.registered.push(registered);
        Ok(Some(self.registered.len() - 1))
    }
}

/// Waits for the first frame.
fn receive_offer(stream: &mut ExportsStream, deadline: Deadline) -> Result<Offer, FabricError> {
    let bound = deadline.left();
    loop {
        match stream.receive::<FromOwner>() {
            Ok(Some(FromOwner::Offer(offer))) => return Ok(offer),
            Ok(Some(FromOwner::Table { .. })) => {
                let what = "a table came before the offer".to_owned();
                return Err(FabricError::Protocol { lane: EXPORTS, what });
            }
            Ok(None) => {}
            Err(end) => return Err(end.error(EXPORTS)),
        }
        let ready = wait_for(stream.as_fd(), stream.interest(), deadline);
        match ready {
            Ok(true) => {}
            Ok(false) => return Err(FabricError::TimedOut { lane: EXPORTS, bound }),
            Err(source) => return Err(FabricError::Io { doing: "waiting for the owner's offer".to_owned(), source }),
        }
    }
}

impl Initiator for VerbsInitiator {
    fn kind(&self) -> FabricKind {
        FabricKind::Verbs
    }

    fn details(&self) -> Option<FabricDetails> {
        self.details.clone()
    }

    fn numa_node(&self) -> Option<u32> {
        self.context.numa_node()
    }

    fn observe_registration(&mut self, observer: RegistrationObserver) {
        self.observer = Some(observer);
    }

    fn register_local(&mut self, mapping: &Arc<Mapping>) -> Result<LocalKey, FabricError> {
        if self.session.is_some() {
            return Err(FabricError::TooLate { what: "local memory registered" });
        }
        let registered = self.register(mapping)?;
        let key = crate::fabric::register(&mut self.mappings, false, mapping)?;
        self.registered.push(registered);
        Ok(key)
    }

    fn open_lane(&mut self, id: LaneId, window: usize, deadline: Deadline) -> Result<Box<dyn Lane>, FabricError> {
        if self.opened.contains(&id) {
            return Err(VerbsError::LaneTwice { lane: id }.into());
        }
        if self.session.is_none() {
            self.session = Some(self.begin(deadline)?);
        }
        let open = self.session.as_ref().expect("begun above");
        let window = window.clamp(1, MAX_WINDOW);
        let limits = self.context.limits();
        // A completion queue as deep as the send queue cannot overrun.
        let depth = (window as u32 + 2).max(LEAST_DEPTH).min(limits.max_qp_wr).min(limits.max_cqe);
        let connecting =
            Connecting { id, key: &self.key, local: &self.local, pd: &self.pd, offer: &open.offer, deadline };
        let (mut endpoint, channel) = connecting.connect(depth)?;
        endpoint.works_on(Arc::clone(&open.locals));
        if self.details.is_none() {
            self.details = Some(endpoint.details(&self.host, &self.local, endpoint.id().own_port())?);
        }
        self.opened.push(id);
        let fate = Arc::new(Fate::new()?);
        let (qp, cq) = endpoint.as_ptrs();
        open.steward.watch(Watched {
            channel: Arc::downgrade(&channel),
            fate: Arc::downgrade(&fate),
            queue_pair: qp as usize,
            completion_queue: cq as usize,
            port: self.context.port(),
        });
        let max_inline = endpoint.max_inline();
        // SAFETY: queue pair and completion queue are the endpoint's, which keeps them.
        let queue_pair = unsafe { QueuePair::new(qp, cq, max_inline, Box::new(endpoint)) };
        let lane = VerbsLane::new(Parts {
            id,
            queue_pair,
            window,
            depth,
            max_message: limits.max_message,
            device: self.context.name().to_owned(),
            port: self.context.port(),
            locals: Arc::clone(&open.locals),
            table: Arc::clone(&open.table),
            fate,
            session: Box::new((channel, Arc::clone(&open.steward))),
        })?;
        Ok(Box::new(lane))
    }
}

/// One lane on its way to the owner.
pub(super) struct Connecting<'a> {
    pub id: LaneId,
    pub key: &'a BindingKey,
    pub local: &'a Local,
    pub pd: &'a Arc<Pd>,
    pub offer: &'a Offer,
    pub deadline: Deadline,
}

impl Connecting<'_> {
    pub(super) fn connect(&self, depth: u32) -> Result<(Mortal<Endpoint>, Arc<EventChannel>), FabricError> {
        let channel = EventChannel::new()?;
        let mut id = Id::new(&channel)?;
        let scope = match self.local.address {
            SocketAddr::V6(v6) => v6.scope_id(),
            SocketAddr::V4(_) => 0,
        };
        let to = socket_address(self.offer.ip, self.offer.port, scope);
        id.resolve_address(self.local.address, to, self.deadline)?;
        self.expect(&channel, "rdma_resolve_addr", kind::RDMA_CM_EVENT_ADDR_RESOLVED)?;
        // Where there is none (iWARP), TCP has its own.
        let _ = id.set_acknowledgement_timeout(ACKNOWLEDGEMENT_TIMEOUT);
        id.resolve_route(self.deadline)?;
        self.expect(&channel, "rdma_resolve_route", kind::RDMA_CM_EVENT_ROUTE_RESOLVED)?;
        let mut endpoint = Mortal::new(Endpoint::new(id, self.pd, &Use::Initiate { depth })?);
        let subject =
            Subject { challenge: self.offer.challenge, lane: self.id, nonce: random()?, queue_pair: endpoint.number() };
        let limits = self.pd.context().limits();
        let request = subject.request(self.key);
        // The owner posts nothing, so it needs no resources here; some devices refuse a queue pair with none.
        let terms =
            Terms { private_data: &request, responder_resources: 1, initiator_depth: limits.max_initiator_depth };
        endpoint.id_mut().connect(&terms)?;
        let accepted = self.expect(&channel, "rdma_connect", kind::RDMA_CM_EVENT_ESTABLISHED)?;
        let number = if self.pd.context().is_iwarp() { 0 } else { accepted.data.queue_pair };
        if !subject.is_accepted_by(self.key, number, &accepted.data.private_data) {
            return Err(VerbsError::WrongProof { lane: self.id }.into());
        }
        Ok((endpoint, channel))
    }

    /// Waits for the event that a step leads to.
    fn expect(&self, channel: &Arc<EventChannel>, step: &'static str, wanted: u32) -> Result<CmEvent, VerbsError> {
        let (lane, bound) = (self.id, self.deadline.left());
        let Some(event) = channel.wait(self.deadline)? else {
            return Err(VerbsError::NoAnswer { lane, step, bound });
        };
        if event.kind == wanted && event.status == 0 {
            return Ok(event);
        }
        if event.kind == kind::RDMA_CM_EVENT_REJECTED
            && let Some(reason) = proof::read_refusal(&event.data.private_data)
        {
            return Err(VerbsError::LaneRefused { lane, reason });
        }
        Err(VerbsError::NotConnected { lane, step, event: event.name(), status: event.status })
    }
}

/// What the steward watches of a lane.
struct Watched {
    channel: Weak<EventChannel>,
    fate: Weak<Fate>,
    queue_pair: usize,
    completion_queue: usize,
    port: u8,
}

/// The initiator's steward: hears of the peer's end, of lanes that were disconnected, and of the device. Lanes hold it; with the last
/// one it ends, and the exports connection with it.
struct Steward {
    shared: Arc<StewardShared>,
    thread: Option<JoinHandle<()>>,
}

struct StewardShared {
    watched: Mutex<Vec<Watched>>,
    /// The exports connection has ended.
    ended: AtomicBool,
    stop: AtomicBool,
    wake: Arc<OwnedFd>,
}

impl StewardShared {
    fn lock(&self) -> MutexGuard<'_, Vec<Watched>> {
        // Pushes and removals only: whole whatever happens.
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn signal(&self) {
        // A full counter is readable too.
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
    }

    fn end_all(&self, cause: Cause) {
        for fate in self.lock().iter().filter_map(|one| one.fate.upgrade()) {
            fate.end(cause);
        }
    }
}

impl Steward {
    fn start(stream: ExportsStream, table: Arc<SharedTable>, events: &Arc<AsyncEvents>) -> Result<Self, FabricError> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| FabricError::Io { doing: "making an eventfd".to_owned(), source: error.into() })?;
        let shared = Arc::new(StewardShared {
            watched: Mutex::default(),
            ended: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            wake: Arc::new(wake),
        });
        let (for_thread, events) = (Arc::clone(&shared), Arc::clone(events));
        let thread = std::thread::Builder::new()
            .name("belay-steward".to_owned())
            .spawn(move || run(&for_thread, stream, &table, &events))
            .map_err(|source| FabricError::Io { doing: "starting the initiator's steward".to_owned(), source })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    fn watch(&self, lane: Watched) {
        let fate = lane.fate.upgrade();
        self.shared.lock().push(lane);
        if let Some(fate) = fate.filter(|_| self.shared.ended.load(Ordering::Acquire)) {
            fate.end(Cause::PeerClosed);
        }
        self.shared.signal();
    }
}

impl Drop for Steward {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.signal();
        if let Some(thread) = self.thread.take() {
            // It waits for nothing but its descriptors, so it ends at once; a panic in it has been told by the hook.
            let _ = thread.join();
        }
    }
}

fn run(shared: &StewardShared, stream: ExportsStream, table: &SharedTable, events: &AsyncEvents) {
    let mut seen = events.listen(&shared.wake);
    let mut stream = Some(stream);
    while !shared.stop.load(Ordering::Acquire) {
        if let Some(open) = &mut stream
            && talk(open, table).is_err()
        {
            // Closed, or not what was agreed: nothing more can be believed of this peer.
            stream = None;
            shared.ended.store(true, Ordering::Release);
            shared.end_all(Cause::PeerClosed);
        }
        let channels = lanes_events(shared);
        for event in events.take(&mut seen) {
            for watched in shared.lock().iter() {
                if let Some(fate) = watched.fate.upgrade() {
                    fate.hear(event, watched.queue_pair, watched.completion_queue, watched.port);
                }
            }
        }
        sleep(shared, stream.as_ref(), &channels, events);
        drop(channels);
    }
}

/// Takes tables, and acknowledges each once lanes see it.
fn talk(stream: &mut ExportsStream, table: &SharedTable) -> Result<(), Ended> {
    while let Some(frame) = stream.receive::<FromOwner>()? {
        let FromOwner::Table { version, exports } = frame else {
            return Err(Ended::Faulty("a second offer".to_owned()));
        };
        let newer = RemoteTable::checked(exports).map_err(|error| Ended::Faulty(error.to_string()))?;
        if !newer.has_the_keys_of(&table.get()) {
            return Err(Ended::Faulty("a table with other keys".to_owned()));
        }
        table.replace(newer, version);
        let acknowledged = FromInitiator::Acknowledged { version };
        stream.queue(&acknowledged).map_err(|error| Ended::Faulty(error.to_string()))?;
    }
    stream.flush()
}

/// Reads what rdma_cm says of the lanes, forgets those that are gone, and gives the channels of the others.
fn lanes_events(shared: &StewardShared) -> Vec<Arc<EventChannel>> {
    let mut lanes = Vec::new();
    shared.lock().retain(|watched| match (watched.channel.upgrade(), watched.fate.upgrade()) {
        (Some(channel), Some(fate)) => {
            lanes.push((channel, fate));
            true
        }
        _ => false,
    });
    for (channel, fate) in &lanes {
        while let Ok(Some(event)) = channel.next() {
            match event.kind {
                kind::RDMA_CM_EVENT_DISCONNECTED => fate.end(Cause::PeerClosed),
                kind::RDMA_CM_EVENT_DEVICE_REMOVAL => fate.end(Cause::DeviceLost),
                _ => {}
            }
        }
    }
    lanes.into_iter().map(|(channel, _)| channel).collect()
}

fn sleep(shared: &StewardShared, stream: Option<&ExportsStream>, channels: &[Arc<EventChannel>], events: &AsyncEvents) {
    let mut fds =
        vec![PollFd::new(&*shared.wake, PollFlags::IN), PollFd::from_borrowed_fd(events.as_fd(), PollFlags::IN)];
    fds.extend(channels.iter().map(|channel| PollFd::from_borrowed_fd(channel.as_fd(), PollFlags::IN)));
    fds.extend(stream.map(|stream| PollFd::from_borrowed_fd(stream.as_fd(), stream.interest())));
    // An interrupted poll looks like one that found nothing; the loop comes round again.
    let _ = poll(&mut fds, None);
    let _ = rustix::io::read(&*shared.wake, &mut [0; 8]);
}
