//! One migration, from the switch to the catch, and what must be so at its end.

use super::Rng;
use super::guest::{Delta, SHAPE, SimGuest, Vmm, at_the_switch, first_wrong, write_all};
use super::kit::{Kit, LEASE, OVERFLOW, RING, SLOTS, Shipper, begin_session, fold_target};
use super::lived::Lived;
use super::world::{Seen, World};
use crate::dirty::Harvested;
use crate::epoch::{Arrivals, Beats, harvest};
use crate::fold::{Catch, FoldState};
use crate::guest::Epoch;
use crate::outbox::{Bounds, Outbox, OutputMode};
use crate::record::kind;
use crate::ring::{OWNER_REGION_BYTES, RingReader, Spool, Step};
use crate::staging::{StageError, Stager};
use crate::testing::{finish, packet_bytes};
use belay_transport::{PAGE_SIZE, RegionId};
use std::collections::VecDeque;

/// An epoch that was taken and is not known to have committed.
struct Outstanding {
    epoch: u64,
    harvested: Harvested,
    delta: Delta,
    device_state: Vec<u8>,
    /// Packets that the guest had emitted by then.
    emitted: u64,
}

struct Life<'a> {
    kit: &'a mut Kit,
    rng: Rng,
    mode: OutputMode,
    guest: SimGuest,
    world: World,
    outbox: Outbox,
    shipper: Shipper,
    beats: Beats,
    nonce: u64,
    taken: u64,
    outstanding: VecDeque<Outstanding>,
    carried: Option<Harvested>,
    /// What the guest was at the newest epoch that is known to have committed.
    image: Vec<u8>,
    state: Vec<u8>,
    emitted: u64,
    acked: u64,
    lived: Lived,
}

fn sizes() -> [(RegionId, u64); 2] {
    [(RegionId(0), SHAPE[0] as u64), (RegionId(1), SHAPE[1] as u64)]
}

/// Plays the migration of `seed`. `Err`: which promise it broke, and how.
pub fn live(kit: &mut Kit, seed: u64) -> Result<Lived, String> {
    let mut rng = Rng(seed);
    let mode = if rng.once_in(4) { OutputMode::Lease } else { OutputMode::Commit };
    {
        let mut net = kit.wire.lock();
        net.ring.zero(0, RING);
        net.owner.zero(0, OWNER_REGION_BYTES);
        net.rng = Rng(rng.next());
        (net.source, net.refused, net.torn, net.now_ns) = (None, None, 0, 1_000_000_000);
        net.passes(0);
    }
    let image = at_the_switch(&mut rng);
    write_all(&kit.source, &image);
    kit.kept.forget();
    let spool = Spool::over(kit.overflow.try_clone().unwrap(), &kit.kept).unwrap().0;
    let nonce = rng.next();
    let reader = RingReader::with(spool, RING, nonce).unwrap();
    let state = b"state at the switch".to_vec();
    let (target, limits) = fold_target(&kit.source);
    let fold = FoldState::kept(target, limits, state.clone(), &kit.kept).unwrap();
    let (writer, beats) = begin_session(&mut kit.wire, (reader, fold), nonce, mode == OutputMode::Lease);
    let bounds = Bounds { bytes: 4096, packets: 24 };
    let outbox = Outbox::stepped((mode == OutputMode::Lease).then(|| beats.lease()), bounds);
    let world = World::default();
    world.lock().mode = mode;
    let free = std::mem::take(&mut kit.slots);
    let shipper = Shipper { writer, staged: VecDeque::new(), free, committed: vec![], failed: false, parts: 0 };
    let guest = SimGuest::new(&kit.source, &kit.destination, image.clone());
    let mut life = Life {
        kit,
        rng,
        mode,
        guest,
        world,
        outbox,
        shipper,
        beats,
        nonce,
        taken: 0,
        outstanding: VecDeque::new(),
        carried: None,
        image,
        state,
        emitted: 0,
        acked: 0,
        lived: Lived { lives: 1, ..Lived::default() },
    };
    let lived = life.lives_on();
    let Life { shipper, kit, .. } = life;
    kit.slots = shipper.staged.into_iter().chain(shipper.free).collect();
    assert_eq!(kit.slots.len(), SLOTS, "a slot was lost");
    kit.wire.lock().source = None;
    crate::clock::simulate(None);
    lived
}

impl Life<'_> {
    fn lives_on(&mut self) -> Result<Lived, String> {
        let most = 20 + self.rng.below(200);
        for _ in 0..2_000 {
            let good = self.something_happens()?;
            self.committed();
            self.refused()?;
            let struck = self.rng.once_in(150) || self.lived.epochs >= most;
            if good && !struck {
                continue;
            }
            let source_dies = self.rng.once_in(3);
            if good && self.rng.once_in(8) {
                self.release()?;
                break;
            }
            if self.lived.epochs >= most || self.rng.once_in(2) {
                self.catch(source_dies)?;
                break;
            }
            self.reattach(source_dies)?;
        }
        let net = self.kit.wire.lock();
        Ok(Lived { torn: net.torn, shown: self.world.lock().last, in_parts: self.shipper.parts, ..self.lived })
    }

    /// Whether the session is still good.
    fn something_happens(&mut self) -> Result<bool, String> {
        match self.rng.below(100) {
            0..20 => {
                let steps = if self.rng.once_in(40) { 60 } else { 1 + self.rng.below(5) };
                let sink = self.outbox.sink();
                (0..steps).try_for_each(|_| self.guest.step(&mut self.rng, sink.as_ref(), &self.world))?;
            }
            20..60 => return self.take_epoch(),
            60..76 => return Ok(self.shipper.ship()),
            76..86 => (0..4).try_for_each(|_| self.emit())?,
            86..92 => return Ok(self.beats.beat().is_ok()),
            92..95 => {
                self.kit.wire.lock().look();
            }
            95..97 => self.guest.comes_in_the_background(&mut self.rng)?,
            97 => self.world.lock().fail = Some(self.rng.once_in(2)),
            98 => {
                let ns = self.rng.below(2 * LEASE.as_nanos() as u64);
                self.kit.wire.lock().passes(ns);
            }
            // The destination dies after so many more bytes.
            _ if self.rng.once_in(2) => {
                self.lived.cut_short += 1;
                self.kit.wire.lock().life = self.rng.below(40_000);
            }
            _ => {}
        }
        Ok(true)
    }

    fn take_epoch(&mut self) -> Result<bool, String> {
        let Some(slot) = self.shipper.free.pop() else { return Ok(self.shipper.ship()) };
        self.taken += 1;
        self.lived.epochs += 1;
        let epoch = Epoch(self.taken);
        let mut harvested = Harvested::new(sizes());
        {
            let (mut tracker, mut pages) = self.guest.split();
            harvest(&mut Vmm, &mut tracker, &mut pages, &mut harvested.dirty, &mut harvested.discards)
                .expect("nothing fails");
            if let Some(mut carried) = self.carried.take() {
                carried.dirty.retain(|region, page| pages.landed(region, page));
                harvested.merge(&carried);
            }
        }
        let emitted = {
            let mut seen = self.world.lock();
            seen.emitted.iter_mut().rev().take_while(|packet| packet.epoch.is_none()).for_each(|packet| {
                packet.epoch = Some(epoch.0);
            });
            seen.emitted.len() as u64
        };
        let mut device_state = [self.guest.steps.to_le_bytes(), emitted.to_le_bytes()].concat();
        device_state.resize(16 + self.rng.below(300) as usize, self.taken as u8);
        let released = self.outbox.released_up_to();
        let output = packet_bytes(&self.outbox.close_epoch(epoch, false));
        let delta = self.guest.close_epoch();
        let (memory, now_ns) = (&self.kit.destination, self.kit.wire.lock().now_ns);
        let (mut dirty, mut discards) = (harvested.dirty.clone(), harvested.discards.clone());
        let staged = (|| {
            let mut stager = Stager::begin(slot, &mut self.shipper, epoch, memory.len(), now_ns, OVERFLOW as u64)?;
            stager.stream(kind::DEVICE_STATE, 0, &device_state)?;
            stager.stream(kind::HELD_OUTPUT, 0, &output)?;
            if let Some(released) = released {
                stager.stream(kind::RELEASED_UP_TO, 0, &released.to_le_bytes())?;
            }
            stager.discards(&mut discards, memory)?;
            stager.pages(&mut dirty, memory)?;
            stager.finish()
        })();
        self.outstanding.push_back(Outstanding { epoch: epoch.0, harvested, delta, device_state, emitted });
        match staged {
            Ok((slot, _)) => self.shipper.staged.push_back(slot),
            Err(StageError::ShippingEnded) => return Ok(false),
            Err(error) => return Err(format!("{epoch} could not be staged: {error}")),
        }
        Ok(true)
    }

    /// Tells the outbox of what has committed.
    fn committed(&mut self) {
        for epoch in std::mem::take(&mut self.shipper.committed) {
            self.comes_to(epoch);
            self.world.lock().acked = epoch;
            self.outbox.committed(Epoch(epoch));
        }
    }

    /// What is known of the guest at `epoch` is what a catch must give at least.
    fn comes_to(&mut self, epoch: u64) {
        while self.outstanding.front().is_some_and(|first| first.epoch <= epoch) {
            let Some(first) = self.outstanding.pop_front() else { return };
            for (at, bytes) in &first.delta {
                self.image[at * PAGE_SIZE..][..PAGE_SIZE].copy_from_slice(&bytes[..]);
            }
            (self.state, self.emitted, self.acked) = (first.device_state, first.emitted, first.epoch);
        }
    }

    fn emit(&mut self) -> Result<(), String> {
        {
            let net = self.kit.wire.lock();
            let mut seen = self.world.lock();
            seen.now_ns = net.now_ns;
            if let Some(source) = &net.source {
                seen.lease_ends_ns = source.changed_at_ns() + LEASE.as_nanos() as u64;
            }
        }
        self.outbox.emit_one(&mut self.world.clone());
        self.not_broken()
    }

    fn not_broken(&self) -> Result<(), String> {
        self.world.lock().broken.take().map_or(Ok(()), Err)
    }

    fn refused(&self) -> Result<(), String> {
        let net = self.kit.wire.lock();
        net.refused.as_ref().map_or(Ok(()), |error| Err(format!("P3: the source refused what was shipped: {error}")))
    }

    /// The source shuts the session out. Its folder stops, or its process dies and another goes on from what was kept; the ring as it was.
    fn revoke(&mut self, dies: bool) -> Result<(Catch, Vec<u8>), String> {
        let mut net = self.kit.wire.lock();
        let looking = net.source.take().ok_or("P3: the source has stopped")?;
        if !dies {
            return Ok((looking.into_catch(), net.revoke()));
        }
        self.lived.source_deaths += 1;
        let (mut reader, mut state) = looking.into_parts();
        // Where it had come to when it died: here and there in the next record, or between keeping its state and giving it up.
        for _ in 0..self.rng.below(12) {
            match reader.step(&*net.ring).map_err(|error| format!("P3: {error}"))? {
                Step::NotYet => break,
                Step::Spooled => {}
                Step::Committed(_) => {
                    let image = reader.record().expect("a committed record is there");
                    match self.rng.below(3) {
                        0 => {
                            state.fold_partly(image, &image, self.rng.below(6) as usize);
                            self.lived.halfway_through_a_fold += 1;
                            break;
                        }
                        kept => {
                            state.fold(image, || ()).map_err(|error| format!("P3: {error}"))?;
                            if kept == 1 {
                                break;
                            }
                            reader.clear();
                        }
                    }
                }
            }
        }
        drop((reader, state));
        let ring = net.revoke();
        drop(net);
        let (spool, at) =
            Spool::over(self.kit.overflow.try_clone().unwrap(), &self.kit.kept).map_err(|e| e.to_string())?;
        let at = at.ok_or("P3: the place in the ring was not kept")?;
        let reader = RingReader::resume(spool, at, RING).map_err(|error| error.to_string())?;
        let (target, limits) = fold_target(&self.kit.source);
        let state = FoldState::resume(target, limits, &self.kit.kept).map_err(|error| format!("P3: {error}"))?;
        let catch = Catch::resume(reader, state.ok_or("P3: no state was kept")?);
        Ok((catch.map_err(|error| format!("P3: {error}"))?, ring))
    }

    /// Whether the source has the guest as it was at `epoch`, which is none that is older than it may be.
    fn source_has(&mut self, epoch: u64, state: Option<&[u8]>) -> Result<(), String> {
        if epoch < self.acked {
            return Err(format!("P3: epoch {} has committed and the source has {epoch}", self.acked));
        }
        self.lived.not_yet_known += u64::from(epoch > self.acked);
        self.comes_to(epoch);
        if self.acked != epoch {
            return Err(format!("P3: the source has epoch {epoch}, of which nothing was ever taken"));
        }
        if state.is_some_and(|state| state != self.state) {
            return Err(format!("P3: the device state is not that of epoch {epoch}"));
        }
        first_wrong(&self.kit.source, &self.image)
            .map_or(Ok(()), |page| Err(format!("P3: page {page} is not that of epoch {epoch}")))
    }

    /// The session ends and another goes on.
    fn reattach(&mut self, source_dies: bool) -> Result<(), String> {
        self.lived.reattached += 1;
        self.outbox.shut();
        let (mut catch, ring) = self.revoke(source_dies)?;
        let epoch = catch.drain(&ring[..]).map_err(|error| format!("P3: {error}"))?.0;
        // What the destination does not know to have committed is in its next record again; some of it may have.
        let mut carried = self.carried.take().unwrap_or_else(|| Harvested::new(sizes()));
        self.outstanding.iter().for_each(|taken| carried.merge(&taken.harvested));
        self.source_has(epoch, None)?;
        self.outstanding.drain(..).for_each(|taken| self.guest.reopen(&taken.delta));
        self.carried = Some(carried);
        self.nonce = self.rng.next();
        let next = catch.next_session(RING, self.nonce).map_err(|error| error.to_string())?;
        let Self { shipper, .. } = self;
        shipper.free.extend(shipper.staged.drain(..));
        let granting = self.mode == OutputMode::Lease;
        (shipper.writer, self.beats) = begin_session(&mut self.kit.wire, next, self.nonce, granting);
        shipper.failed = false;
        self.taken = epoch;
        {
            let mut seen = self.world.lock();
            seen.acked = epoch;
            let later = |packet: &&mut super::world::Emitted| packet.epoch.is_some_and(|closed| closed > epoch);
            seen.emitted.iter_mut().filter(later).for_each(|packet| packet.epoch = None);
        }
        self.outbox.reopen_epochs(Epoch(epoch));
        self.outbox.renew_lease(self.beats.lease());
        self.outbox.reopen();
        Ok(())
    }

    /// Every page is here, and the guest is the destination's own from here on.
    fn release(&mut self) -> Result<(), String> {
        self.lived.released += 1;
        self.guest.all_comes()?;
        if let Some(page) = first_wrong(&self.kit.destination, &self.guest.truth) {
            return Err(format!("P1: page {page} of the destination's memory is not the guest's"));
        }
        self.world.lock().released = true;
        self.outbox.open_for_good();
        while self.outbox.emit_one(&mut self.world.clone()) {
            self.not_broken()?;
        }
        let Seen { last, ref emitted, .. } = *self.world.lock();
        if last == emitted.len() as u64 { Ok(()) } else { Err(format!("P6: {last} of {} packets left", emitted.len())) }
    }

    /// The source takes the guest back, whatever the destination still does.
    fn catch(&mut self, source_dies: bool) -> Result<(), String> {
        self.lived.caught += 1;
        let (catch, ring) = self.revoke(source_dies)?;
        // It does not know yet.
        while !self.shipper.staged.is_empty() {
            self.shipper.ship();
        }
        if !self.shipper.committed.is_empty() {
            return Err(format!("P5: {:?} committed after the revocation", self.shipper.committed));
        }
        let recovered = finish(catch, &ring, self.nonce & 1 == 0).map_err(|error| format!("P3: {error}"))?;
        self.source_has(recovered.epoch.0, Some(&recovered.device_state))?;
        if self.mode == OutputMode::Lease {
            return Ok(());
        }
        {
            let mut seen = self.world.lock();
            (seen.caught, seen.acked, seen.fail) = (Some(self.emitted), recovered.epoch.0, None);
        }
        // Its host is dead, or shows what it may as long as it can.
        let dead = self.rng.once_in(2);
        let late = if dead { 0 } else { self.rng.below(8) };
        (0..late).try_for_each(|_| self.emit())?;
        let source = Outbox::stepped(None, Bounds { bytes: u64::MAX, packets: usize::MAX });
        self.lived.sent_again += recovered.outputs_to_resend.len() as u64;
        source.resend(recovered.outputs_to_resend);
        while source.emit_one(&mut self.world.clone()) {
            self.not_broken()?;
        }
        (0..if dead { 0 } else { 64 }).try_for_each(|_| self.emit())?;
        let Seen { last, .. } = *self.world.lock();
        if last != self.emitted {
            let emitted = self.emitted;
            return Err(format!("P4: a gap: the guest goes on after packet {emitted}, the world has seen {last}"));
        }
        Ok(())
    }
}
