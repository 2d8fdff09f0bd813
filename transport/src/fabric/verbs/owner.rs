//! The source's side of `verbs`: exports registered, lanes admitted by proof, and the revocation that shuts all of it.
//!
//! *Revocation*, in this order: owner epoch bumped; every queue pair of the session stopped (its error state) and destroyed, after which its
//! device does nothing for the old initiator; the ring's regions deregistered, which also waits for a WRITE that was being placed; the ring
//! read for the last time; guest RAM deregistered in the background, because unpinning it takes seconds that a caught guest must not wait
//! for. A queue pair that has stopped but that the kernel does not let go is not waited for either (see [`super::burial`]).

use super::address::Host;
use super::admission::{Shared, Steward};
use super::burial::{Burial, GIVE_BACK_BOUND};
use super::cm::{EventChannel, Id};
use super::device::{Context, Pd};
use super::error::VerbsError;
use super::exports_stream::{ExportsStream, FromOwner, Offer};
use super::memory_region::PdRegistrar;
use super::registration::{self, Access, OnDemand, Registered, RegistrationOptions, Releasing};
use super::table::{ExportTable, Span};
use super::{EXPORTS, MAX_LANES_OF_A_KIND};
use crate::deadline::Deadline;
use crate::fabric::exports::{Exports, Right, check_owner_region};
use crate::fabric::{
    FabricDetails, FabricError, FabricKind, OWNER_EPOCH_OFFSET, Owner, ReadKey, RegistrationObserver, RevokedRing,
    RingKeys,
};
use crate::region::{Extent, Mapping, RamFile};
use crate::session::{LaneDialer, random};
use crate::units::PageSize;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Connect requests that the kernel keeps for the steward (net.rdma_ucm.max_backlog is 1024 too). One that does not fit is dropped without a
/// word, and its asker's kernel asks again only after 4.3 s: with fewer, a burst of strangers costs a lane that time.
const BACKLOG: i32 = 1024;
/// Longest wait for the peer's acknowledgement of a new table.
const ACKNOWLEDGEMENT_BOUND: Duration = Duration::from_secs(10);

/// One export's regions.
struct Exported {
    key: u64,
    right: Right,
    registered: Registered,
    options: RegistrationOptions,
}

impl Exported {
    fn table(&self) -> ExportTable {
        let span = |chunk: &registration::Chunk| Span {
            offset: chunk.offset,
            len: chunk.len,
            address: chunk.addr,
            key: chunk.rkey,
        };
        ExportTable {
            key: self.key,
            writable: self.right == Right::Write,
            spans: self.registered.chunks().iter().map(span).collect(),
        }
    }
}

/// The source's side.
pub struct VerbsOwner {
    dialer: LaneDialer,
    exports: Exports,
    /// By a key's place.
    exported: Vec<Exported>,
    observer: Option<RegistrationObserver>,
    pinned_bytes: u64,
    version: u64,
    pub(super) shared: Arc<Shared>,
    steward: Option<Steward>,
    listening: Option<Id>,
    pub(super) releasing: Option<Releasing>,
    /// The ring's regions, once a revocation gives them back.
    ring_given_back: Option<Burial>,
    revoking: bool,
    read_last: bool,
    pd: Arc<Pd>,
    context: Arc<Context>,
    local: super::address::Local,
}

impl VerbsOwner {
    /// `session` is the address that the session's control connection has on this host.
    pub(in crate::fabric) fn new(dialer: LaneDialer, session: Option<IpAddr>) -> Result<Self, FabricError> {
        let settings = dialer.config().verbs.clone().unwrap_or_default();
        if !settings.trusted {
            return Err(VerbsError::NotTrusted.into());
        }
        let key = dialer.binding().cloned().ok_or(VerbsError::Unbound)?;
        let host = Host::this()?;
        let local = host.choose(&settings, session)?;
        let context = Context::of(&local)?;
        let pd = Pd::new(&context)?;
        let shared = Shared::new(key, random()?, Arc::clone(&pd), host, local.clone())?;
        Ok(Self {
            dialer,
            exports: Exports::default(),
            exported: Vec::new(),
            observer: None,
            pinned_bytes: 0,
            version: 0,
            shared: Arc::new(shared),
            steward: None,
            listening: None,
            releasing: None,
            ring_given_back: None,
            revoking: false,
            read_last: false,
            pd,
            context,
            local,
        })
    }

    fn before_lanes(&self, what: &'static str) -> Result<(), FabricError> {
        if self.steward.is_none() && !self.revoking { Ok(()) } else { Err(FabricError::TooLate { what }) }
    }

    fn options(&self, page_size: PageSize, on_demand: OnDemand) -> RegistrationOptions {
        let limits = self.context.limits();
        RegistrationOptions {
            on_demand,
            pinned_before: self.pinned_bytes,
            progress: self.observer.clone(),
            ..RegistrationOptions::for_device(limits.max_mr, limits.max_mr_size, page_size)
        }
    }

    /// Registers and remembers one export, whose key has just been made.
    fn add(
        &mut self,
        key: u64,
        right: Right,
        mapping: &Arc<Mapping>,
        extents: &[Extent],
        access: Access,
        options: RegistrationOptions,
    ) -> Result<(), FabricError> {
        let registrar = PdRegistrar(Arc::clone(&self.pd));
        let registered =
            registration::register(&registrar, mapping, extents, access, &options).map_err(VerbsError::from)?;
        self.pinned_bytes += registered.report().pinned_bytes;
        self.exported.push(Exported { key, right, registered, options });
        Ok(())
    }

    fn tables(&self) -> Vec<ExportTable> {
        self.exported.iter().map(Exported::table).collect()
    }

    /// Listens, dials the exports connection and starts the steward. Waits for nothing but that connection.
    fn begin(&mut self, deadline: Deadline) -> Result<(), FabricError> {
        let channel = EventChannel::new()?;
        let mut listening = Id::new(&channel)?;
        listening.bind(self.local.address)?;
        let port = listening.listen(BACKLOG)?;
        self.shared.set_port(port);
        let mut stream = ExportsStream::new(self.dialer.dial_lane(EXPORTS, deadline)?);
        self.version = 1;
        let offer = Offer {
            ip: self.local.address.ip(),
            port,
            challenge: self.shared.challenge(),
            version: self.version,
            exports: self.tables(),
        };
        stream.queue(&FromOwner::Offer(offer))?;
        let steward = Steward::start(Arc::clone(&self.shared), stream, channel, self.context.events())?;
        self.steward = Some(steward);
        self.listening = Some(listening);
        Ok(())
    }
}

impl Owner for VerbsOwner {
    fn kind(&self) -> FabricKind {
        FabricKind::Verbs
    }

    fn details(&self) -> Option<FabricDetails> {
        self.shared.details()
    }

    fn numa_node(&self) -> Option<u32> {
        self.context.numa_node()
    }

    fn observe_registration(&mut self, observer: RegistrationObserver) {
        self.observer = Some(observer);
    }

    fn export_read(
        &mut self,
        file: &RamFile,
        mapping: &Arc<Mapping>,
        extents: &[Extent],
    ) -> Result<ReadKey, FabricError> {
        self.before_lanes("memory exported")?;
        // A mapping that nobody else touches, so that its page table tells of holes punched under the registration.
        let own =
            file.map().map_err(|source| FabricError::Io { doing: "mapping exported memory".to_owned(), source })?;
        let options = self.options(file.page_size(), OnDemand::of(self.context.limits().rc_odp));
        let key = self.exports.add_read(mapping, extents)?;
        self.add(key.0, Right::Read, &Arc::new(own), extents, Access::EXPORTED, options)?;
        Ok(key)
    }

    fn extend_read(&mut self, key: ReadKey, extents: &[Extent]) -> Result<(), FabricError> {
        self.exports.extend_read(key, extents)?;
        let registrar = PdRegistrar(Arc::clone(&self.pd));
        let found = self.exported.iter_mut().find(|exported| exported.key == key.0 && exported.right == Right::Read);
        let exported = found.ok_or(FabricError::UnknownKey { what: "extending an export", key: key.0 })?;
        let extension = exported.registered.extend(&registrar, extents, &exported.options).map_err(VerbsError::from)?;
        if self.steward.is_none() || !extension.changed {
            return Ok(());
        }
        self.version += 1;
        let deadline = Deadline::after(ACKNOWLEDGEMENT_BOUND);
        self.shared.publish(FromOwner::Table { version: self.version, exports: self.tables() })?;
        self.shared.await_acknowledgement(self.version, deadline, ACKNOWLEDGEMENT_BOUND)
    }

    fn export_ring(
        &mut self,
        (ring_file, ring): (&RamFile, &Arc<Mapping>),
        (region_file, owner_region): (&RamFile, &Arc<Mapping>),
    ) -> Result<RingKeys, FabricError> {
        self.before_lanes("the ring exported")?;
        check_owner_region(owner_region)?;
        let keys = self.exports.add_ring(ring, owner_region)?;
        let whole = |mapping: &Mapping| [Extent { offset: 0, len: mapping.len() as u64 }];
        let access = Access::ring(self.context.is_iwarp());
        let options = self.options(ring_file.page_size(), OnDemand::NONE);
        self.add(keys.ring.0, Right::Write, ring, &whole(ring), access, options)?;
        let options = self.options(region_file.page_size(), OnDemand::NONE);
        self.add(keys.owner_region.0, Right::Read, owner_region, &whole(owner_region), Access::EXPORTED, options)?;
        Ok(keys)
    }

    fn serve_lane(&mut self, id: crate::fabric::LaneId, deadline: Deadline) -> Result<(), FabricError> {
        if self.revoking {
            return Err(FabricError::TooLate { what: "a lane opened: the session is revoked, which is" });
        }
        if id.index >= MAX_LANES_OF_A_KIND {
            return Err(FabricError::Protocol {
                lane: id,
                what: format!("lanes are numbered below {MAX_LANES_OF_A_KIND}"),
            });
        }
        if self.steward.is_none() {
            self.begin(deadline)?;
        }
        self.shared.permit(id)
    }

    fn revoke(&mut self, last_read: &mut dyn FnMut(RevokedRing<'_>), deadline: Deadline) -> Result<(), FabricError> {
        if self.read_last {
            return Ok(());
        }
        let bound = deadline.left();
        if !std::mem::replace(&mut self.revoking, true)
            && let Some(region) = self.exports.owner_region()
        {
            region.mapping.atomic_u64(OWNER_EPOCH_OFFSET).fetch_add(1, Ordering::SeqCst);
        }
        // From here on the device does nothing more for the old initiator.
        self.shared.revoke(deadline)?;
        let ring = self.ring_given_back.get_or_insert_with(|| {
            let ring: Vec<_> = self.exported.extract_if(.., |exported| exported.right == Right::Write).collect();
            Burial::of(ring)
        });
        if !ring.wait(deadline) {
            return Err(VerbsError::StillRegistered { bound }.into());
        }
        self.read_last = true;
        if let Some(ring) = self.exports.ring() {
            // Where the device would not give it back, the queue pairs' error state has to do; what is read twice asks for more.
            last_read(if self.pd.has_let_go() { RevokedRing::still(ring) } else { RevokedRing::Shared(ring) });
        }
        let rest = self.exported.drain(..).map(|exported| exported.registered).collect();
        let releasing = Releasing::start(rest);
        self.releasing = Some(
            releasing.map_err(|source| FabricError::Io { doing: "starting to unpin guest RAM".to_owned(), source })?,
        );
        Ok(())
    }

    fn broken(&self) -> Option<BorrowedFd<'_>> {
        Some(self.shared.broken())
    }

    fn take_failures(&mut self) -> Vec<FabricError> {
        self.shared.take_failures()
    }
}

impl Drop for VerbsOwner {
    fn drop(&mut self) {
        // Nobody is left to be told of a queue pair that does not stop. Deregistering what it worked on shuts the peer out all the same.
        let _ = self.shared.revoke(Deadline::after(GIVE_BACK_BOUND));
        // Ends the exports connection, by which the initiator learns of it.
        drop(self.steward.take());
    }
}
