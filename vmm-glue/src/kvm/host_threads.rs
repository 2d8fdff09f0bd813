//! A bare guest without KVM: host threads do what the ledger's text does, in Rust, on the same memory.
//!
//! For machines without /dev/kvm. Memory, packets, pacing and the model are the same as the kvm VMM's; a fault of a thread on
//! the guest's mapping goes to userfaultfd as a vCPU's would. Threads stop between two steps, so a thread that waits for a page
//! cannot be stopped and [`Guest::pause`] says so at its deadline.

use super::bare::{self, BareGuest};
use super::control::{Control, Waited, Wish};
use super::device::{MOST_STEPS, Pacer, Port, PortState};
use super::guests::{Filler, GuestSpec, Layout, NONCE_LOG_CAPACITY, Program, rules};
use super::machine::failed;
use belay_checkpoint::dirty::DirtySet;
use belay_checkpoint::guest::{DirtyTracker, Guest, GuestError, PacketSink, RamBlock, TrackerKind};
use belay_transport::region::{Mapping, RamFile};
use belay_transport::{Deadline, PageIndex, RegionId};
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

const MAGIC: &[u8; 8] = b"BELAYHST";
const VERSION: u16 = 1;

/// What a thread does next. Between two of these it may be stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Next {
    /// Fill this many-th page of its share.
    Fill(u64),
    /// Say that memory is filled.
    Filled,
    /// One step of a batch.
    Step,
    /// Add the batch to the shared counters.
    Count,
    /// Read the PACE register.
    Pace,
    /// Take note of the nonce that was read, and emit a packet if one is due.
    Note(u64),
}

/// What a vCPU's registers would hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    next: Next,
    step: u64,
    digest: u64,
    last_hash: u64,
    last_nonce: u64,
    packet_batches_left: u64,
}

/// The saved state: everything but memory.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    registers: Vec<Registers>,
    port: PortState,
}

impl Saved {
    fn write(&self, out: &mut Vec<u8>) -> Result<(), GuestError> {
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        out.extend(postcard::to_stdvec(self).map_err(|error| GuestError::BadState(error.to_string()))?);
        Ok(())
    }

    fn read(state: &[u8]) -> Result<Self, GuestError> {
        let head = [MAGIC.as_slice(), &VERSION.to_le_bytes()].concat();
        let body = state.strip_prefix(head.as_slice());
        let body = body.ok_or_else(|| GuestError::BadState("not of host threads, or of another version".into()))?;
        match postcard::take_from_bytes(body).map_err(|error| GuestError::BadState(error.to_string()))? {
            (saved, []) => Ok(saved),
            (_, rest) => Err(GuestError::BadState(format!("{} bytes too many", rest.len()))),
        }
    }
}

struct Shared {
    control: Control,
    port: Port,
    spec: GuestSpec,
    pattern: rules::Pattern,
    layout: Layout,
    memory: Arc<Mapping>,
    /// Set while threads are to stop: what a kick is to a vCPU.
    stopping: AtomicBool,
    registers: Vec<Mutex<Registers>>,
}

impl Shared {
    fn new(
        spec: &GuestSpec,
        pattern: rules::Pattern,
        layout: Layout,
        memory: Arc<Mapping>,
        sink: Arc<dyn PacketSink>,
    ) -> Self {
        let vcpus = usize::from(spec.vcpus);
        let mut shared = Self {
            control: Control::new(vcpus),
            port: Port::new(spec, sink),
            spec: spec.clone(),
            pattern,
            layout,
            memory,
            stopping: AtomicBool::new(true),
            registers: Vec::new(),
        };
        shared.registers = (0..vcpus).map(|_| Mutex::new(shared.first_registers())).collect();
        shared
    }

    fn registers(&self, vcpu: usize) -> MutexGuard<'_, Registers> {
        self.registers[vcpu].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what another host's threads were at, if these could ever come there.
    fn load(&self, saved: Saved) -> Result<(), GuestError> {
        let (got, vcpus) = (saved.registers.len(), self.registers.len());
        if got != vcpus {
            return Err(GuestError::BadState(format!("{got} threads; this guest has {vcpus}")));
        }
        let most = self.spec.packet_interval_steps / self.spec.batch_steps;
        if let Some(vcpu) = saved
            .registers
            .iter()
            .position(|registers| registers.step > MOST_STEPS || !(1..=most).contains(&registers.packet_batches_left))
        {
            let registers = &saved.registers[vcpu];
            return Err(GuestError::BadState(format!("thread {vcpu} never comes to {registers:x?}")));
        }
        if !self.port.load(saved.port) {
            return Err(GuestError::BadState("its packet port is of another guest".to_owned()));
        }
        for (vcpu, registers) in saved.registers.into_iter().enumerate() {
            *self.registers(vcpu) = registers;
        }
        Ok(())
    }

    fn first_registers(&self) -> Registers {
        let next = if self.spec.filler == Filler::Guest { Next::Fill(0) } else { Next::Filled };
        let packet_batches_left = self.spec.packet_interval_steps / self.spec.batch_steps;
        Registers { next, step: 0, digest: 0, last_hash: 0, last_nonce: 0, packet_batches_left }
    }

    fn run(&self, vcpu: usize) {
        let mut pacer = Pacer::default();
        let may_run = || self.stopping.store(false, Ordering::SeqCst);
        while self.control.stand_still(vcpu, may_run) {
            if self.port.wait_out(vcpu, &self.control, &mut pacer) == Waited::Stop {
                continue;
            }
            let mut registers = self.registers(vcpu);
            loop {
                if self.stopping.load(Ordering::SeqCst) && !self.control.may_go_on(may_run) {
                    break;
                }
                if let Err(error) = self.do_next(vcpu, &mut registers, &mut pacer) {
                    self.control.crash(format!("thread {vcpu}: {error}; {registers:x?}"));
                    self.stopping.store(true, Ordering::SeqCst);
                }
            }
        }
        self.control.ended(vcpu);
    }

    fn do_next(&self, vcpu: usize, now: &mut Registers, pacer: &mut Pacer) -> Result<(), super::device::PortError> {
        let (spec, own) = (&self.spec, self.layout.own_pages(vcpu as u16));
        now.next = match now.next {
            Next::Fill(index) => {
                let rest = self.layout.rest_pages(vcpu as u16);
                match own.chain(rest).nth(index as usize) {
                    Some(page) => {
                        bare::fill_page(&self.memory, spec, page);
                        Next::Fill(index + 1)
                    }
                    None => Next::Filled,
                }
            }
            Next::Filled => {
                self.packet(vcpu, rules::kind::FILLED, now)?;
                Next::Step
            }
            Next::Step => {
                let seed = rules::step_seed(spec.seed, vcpu as u16);
                let (page, word, hash) = rules::step(self.pattern, seed, now.step, own.end - own.start);
                let word = self.memory.atomic_u64(PageIndex(own.start + page).offset() + word * 8);
                let old = word.load(Ordering::Relaxed);
                now.digest = rules::fold(now.digest, old);
                word.store(rules::chain(old, hash), Ordering::Relaxed);
                now.last_hash = hash;
                now.step += 1;
                if now.step.is_multiple_of(spec.batch_steps) { Next::Count } else { Next::Step }
            }
            Next::Count => {
                if spec.vcpus > 1 {
                    let counters = self.layout.shared_counters().offset();
                    let counter = counters + rules::shared_counter(now.last_hash) * 8;
                    self.memory.atomic_u64(counter).fetch_add(now.last_hash, Ordering::SeqCst);
                    self.memory.atomic_u64(counters + 512).fetch_add(spec.batch_steps, Ordering::SeqCst);
                }
                Next::Pace
            }
            Next::Pace => Next::Note(self.port.pace(vcpu, &self.control, pacer)),
            Next::Note(nonce) => {
                self.note(vcpu, nonce, now);
                now.packet_batches_left -= 1;
                if now.packet_batches_left == 0 {
                    now.packet_batches_left = spec.packet_interval_steps / spec.batch_steps;
                    self.packet(vcpu, rules::kind::PROGRESS, now)?;
                }
                Next::Step
            }
        };
        Ok(())
    }

    fn nonce_log_word(&self, vcpu: usize, word: u64) -> &std::sync::atomic::AtomicU64 {
        self.memory.atomic_u64(self.layout.nonce_log(vcpu as u16).offset() + word as usize * 8)
    }

    fn note(&self, vcpu: usize, nonce: u64, now: &mut Registers) {
        if nonce == now.last_nonce {
            return;
        }
        now.last_nonce = nonce;
        let count = self.nonce_log_word(vcpu, 0).load(Ordering::Relaxed);
        if count < NONCE_LOG_CAPACITY {
            now.digest = rules::fold(now.digest, nonce);
            self.nonce_log_word(vcpu, 0).store(count + 1, Ordering::Relaxed);
            self.nonce_log_word(vcpu, 2 + count * 2).store(now.step, Ordering::Relaxed);
            self.nonce_log_word(vcpu, 3 + count * 2).store(nonce, Ordering::Relaxed);
        }
    }

    fn packet(&self, vcpu: usize, kind: u64, now: &Registers) -> Result<(), super::device::PortError> {
        let nonces = self.nonce_log_word(vcpu, 0).load(Ordering::Relaxed);
        self.port.send(vcpu, &[(vcpu as u64) << 8 | kind, now.step, now.digest, nonces, now.last_nonce])
    }
}

/// See the module. Runs ledgers only.
pub struct HostGuest {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    blocks: Vec<RamBlock>,
}

impl HostGuest {
    /// Like [`super::KvmGuest::new`].
    pub fn new(
        spec: &GuestSpec,
        file: Arc<RamFile>,
        alias: Arc<Mapping>,
        sink: Arc<dyn PacketSink>,
    ) -> Result<Self, GuestError> {
        let layout = spec.layout().map_err(|error| GuestError::Unsupported(error.to_string()))?;
        let pattern = match spec.program {
            Program::Metronome => None,
            program => program.pattern(),
        };
        let Some(pattern) = pattern else {
            return Err(GuestError::Unsupported(format!("host threads run ledgers, not the {:?}", spec.program)));
        };
        if file.len() as u64 != spec.memory_bytes || alias.len() != file.len() {
            let (asked, file, alias) = (spec.memory_bytes, file.len(), alias.len());
            return Err(GuestError::Unsupported(format!(
                "a guest of {asked} bytes in a file of {file}, mapped {alias}"
            )));
        }
        let memory = Arc::new(file.map().map_err(failed("mapping guest memory"))?);
        let page_size = file.page_size();
        let blocks = vec![RamBlock { id: RegionId(0), page_size, file, alias, vmm_address: memory.address() }];
        let shared = Shared::new(spec, pattern, layout, memory, sink);
        let mut guest = Self { shared: Arc::new(shared), threads: Vec::new(), blocks };
        for vcpu in 0..usize::from(spec.vcpus) {
            let shared = guest.shared.clone();
            let spawned = std::thread::Builder::new().name(format!("guest-{vcpu}")).spawn(move || shared.run(vcpu));
            guest.threads.push(spawned.map_err(failed("starting a guest thread"))?);
        }
        Ok(guest)
    }

    /// The mapping the threads use, for those who register it with userfaultfd.
    pub fn vmm_memory(&self) -> &Arc<Mapping> {
        &self.shared.memory
    }
}

impl Guest for HostGuest {
    fn pause(&mut self, deadline: Deadline) -> Result<(), GuestError> {
        let stopping = &self.shared.stopping;
        let kick = |_| stopping.store(true, Ordering::SeqCst);
        self.shared.control.stop(deadline, Wish::Withdrawn, kick, |_| stopping.store(false, Ordering::SeqCst))
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.shared.control.run()
    }

    fn save(&mut self, out: &mut Vec<u8>) -> Result<(), GuestError> {
        self.shared.control.check_paused("save")?;
        let registers = (0..self.shared.registers.len()).map(|vcpu| self.shared.registers(vcpu).clone()).collect();
        Saved { registers, port: self.shared.port.save() }.write(out)
    }

    fn load(&mut self, state: &[u8]) -> Result<(), GuestError> {
        self.shared.control.check_paused("load")?;
        self.shared.load(Saved::read(state)?)
    }

    fn set_incarnation(&mut self, nonce: u64) -> Result<(), GuestError> {
        self.shared.port.set_nonce(nonce);
        Ok(())
    }

    fn memory(&self) -> &[RamBlock] {
        &self.blocks
    }

    fn tracker(&mut self, kind: TrackerKind) -> Result<Box<dyn DirtyTracker>, GuestError> {
        let reason = match kind {
            TrackerKind::UffdWp | TrackerKind::UffdSync => {
                "it belongs to whoever serves this guest's pages, not to its VMM"
            }
            TrackerKind::KvmLog | TrackerKind::KvmRing => "these are host threads, without KVM",
        };
        Err(GuestError::NoTracker { kind, reason: reason.into() })
    }

    fn device_writes(&mut self, _into: &mut DirtySet) -> Result<(), GuestError> {
        // The packet port writes no guest memory.
        self.shared.control.check_paused("asking for device writes")
    }
}

impl BareGuest for HostGuest {
    fn spec(&self) -> &GuestSpec {
        &self.shared.spec
    }

    fn boot(&mut self) -> Result<(), GuestError> {
        self.shared.control.check_paused("boot")?;
        bare::write_first_content(&self.blocks[0].alias, &self.shared.spec, &self.shared.layout);
        for vcpu in 0..self.shared.registers.len() {
            *self.shared.registers(vcpu) = self.shared.first_registers();
        }
        Ok(())
    }

    fn park_at_step(&mut self, step: u64) -> Result<(), GuestError> {
        self.shared.control.set_park(Some(step));
        Ok(())
    }

    fn unpark(&mut self) -> Result<(), GuestError> {
        self.shared.control.set_park(None);
        Ok(())
    }

    fn wait_parked(&mut self, deadline: Deadline) -> Result<Vec<u64>, GuestError> {
        self.shared.control.wait_parked(deadline)?;
        self.steps()
    }

    fn steps(&mut self) -> Result<Vec<u64>, GuestError> {
        Ok(self.shared.port.steps())
    }

    fn failure(&mut self) -> Option<String> {
        self.shared.control.failure()
    }
}

impl Drop for HostGuest {
    fn drop(&mut self) {
        /// A thread that waits for a page nobody serves does not end; it then keeps the memory alive.
        const BOUND: Duration = Duration::from_secs(2);
        let stopping = &self.shared.stopping;
        if self.shared.control.exit(Deadline::after(BOUND), |_| stopping.store(true, Ordering::SeqCst)) {
            for thread in self.threads.drain(..) {
                let _ = thread.join();
            }
        }
    }
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::testing::Nowhere;
    use belay_transport::PageSize;

    /// As many threads as there are things that one can do next.
    fn guest() -> HostGuest {
        let bytes = 4 << 20;
        let packet_interval_steps = 8 * GuestSpec::default().batch_steps;
        let spec = GuestSpec {
            memory_bytes: bytes,
            working_set_bytes: 1 << 20,
            vcpus: 6,
            packet_interval_steps,
            ..GuestSpec::default()
        };
        let file = Arc::new(RamFile::memfd("belay-test-threads", bytes as usize, PageSize::Small).expect("memory"));
        let alias = Arc::new(file.map().expect("mapped"));
        HostGuest::new(&spec, file, alias, Arc::new(Nowhere)).expect("threads")
    }

    fn saved(guest: &mut HostGuest) -> Vec<u8> {
        let mut state = Vec::new();
        guest.save(&mut state).expect("it is stopped");
        state
    }

    #[test]
    fn a_saved_state_is_as_it_was_when_its_version_came_out() {
        let mut guest = guest();
        let next = [Next::Fill(300), Next::Filled, Next::Step, Next::Count, Next::Pace, Next::Note(0x1817_1615)];
        for (vcpu, next) in next.into_iter().enumerate() {
            let own = vcpu as u64 + 1;
            *guest.shared.registers(vcpu) = Registers {
                next,
                step: own << 8,
                digest: own << 40,
                last_hash: u64::MAX - own,
                last_nonce: own << 16,
                packet_batches_left: own,
            };
        }
        let port = PortState { sequence: 77, windows: vec![[1, 2, 3, 4, 5, 6, 7, 8]; 6], paces: vec![9; 6] };
        assert!(guest.shared.port.load(port));
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
        let state = saved(&mut guest);
        for (_, bytes) in crate::golden::compare(folder, VERSION, "host-threads-state", &[("state", state)]) {
            let mut into = self::guest();
            assert_ne!(saved(&mut into), bytes);
            into.load(&bytes).expect("read");
            assert_eq!(saved(&mut into), bytes);
            // Behind the head and the number of threads, the first thread's next: the number after the last is none yet.
            let mut unknown = bytes.clone();
            unknown[MAGIC.len() + 3] = next.len() as u8;
            assert!(into.load(&unknown).is_err(), "a thing to do next that is not in the file");
        }
    }
    #[test]
    fn a_state_that_no_thread_comes_to_is_refused_and_leaves_them_where_they_were() {
        let mut guest = guest();
        let before = saved(&mut guest);
        type Lie = fn(&mut Saved);
        let lies: [Lie; 6] = [
            |saved| saved.registers[3].packet_batches_left = 0,
            |saved| saved.registers[3].packet_batches_left = 9,
            |saved| saved.registers[3].step = u64::MAX,
            |saved| saved.port.sequence = u64::MAX,
            |saved| saved.port.paces[3] = u64::MAX / 2,
            |saved| saved.registers.truncate(5),
        ];
        for lie in lies {
            let (mut told, mut state) = (Saved::read(&before).expect("our own"), Vec::new());
            lie(&mut told);
            told.write(&mut state).expect("plain data");
            let refused = guest.load(&state);
            assert!(matches!(refused, Err(GuestError::BadState(_))), "{refused:?} of {told:?}");
            assert_eq!(saved(&mut guest), before);
        }
    }
}
