//! The packet port: the one device of the kvm VMM. It turns doorbell writes into packets and paces the guest.
//!
//! Each vCPU has a window of its own (`DEVICE_STRIDE` bytes apart):
//!
//! | offset | access | |
//! |---|---|---|
//! | 0x00 … 0x38 | write | eight words of the packet to come |
//! | 0x40 [`DOORBELL`] | write n | sends the first n words |
//! | 0x48 [`PACE`] | read | waits until the guest may go on, then gives the nonce of the guest's incarnation |
//!
//! State that belongs to the guest, and is saved with it: the count of packets, the words in the windows, the count of PACE
//! reads. When the next batch is due is *not* part of it, because that is a matter of this host's clock: after a load the guest
//! starts to be paced anew. The port never writes guest memory.

use super::control::{Control, Waited};
use super::guests::{DEVICE_GPA, DEVICE_STRIDE, GuestSpec};
use belay_checkpoint::guest::{Packet, PacketSink};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Offset of the doorbell.
pub const DOORBELL: u64 = 0x40;
/// Offset of the PACE register.
pub const PACE: u64 = 0x48;

const WORDS: usize = 8;
/// Steps, and packets, that no guest comes to: a billion a second for nine years. What counts them from a state of another host's cannot
/// overflow below.
pub(super) const MOST_STEPS: u64 = 1 << 58;

/// What a guest did that the port does not have.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PortError {
    #[error("a read of {len} bytes at {gpa:#x}, where there is neither memory nor a register to read")]
    Read { gpa: u64, len: usize },
    #[error("a write of {len} bytes at {gpa:#x}, where there is neither memory nor a register to write")]
    Write { gpa: u64, len: usize },
    #[error("a packet of {0} words, where the window has {WORDS}")]
    Words(u64),
}

/// The guest's part of the port's state.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct PortState {
    /// Sequence number of the next packet.
    pub sequence: u64,
    /// The windows' words, by vCPU.
    pub windows: Vec<[u64; WORDS]>,
    /// PACE reads so far, by vCPU.
    pub paces: Vec<u64>,
}

/// The port. One for all vCPUs.
pub(super) struct Port {
    state: Mutex<Guarded>,
    sink: Arc<dyn PacketSink>,
    batch_steps: u64,
    batch_time: Duration,
}

struct Guarded {
    guest: PortState,
    nonce: u64,
    /// How often a state was loaded: what vCPU threads remember of another state is void.
    loads: u64,
}

/// Paces one vCPU; lives on its thread.
///
/// A stop completes a PACE read before its time. What the vCPU was waiting for still holds when it is to run again, so it waits for
/// the rest of it then, outside KVM_RUN and with the read complete ([`Port::wait_out`]): stops make no guest run faster.
#[derive(Debug, Default)]
pub(super) struct Pacer {
    due: Option<Instant>,
    /// A wait was cut short, of the guest with this [`Guarded::loads`].
    cut: Option<u64>,
}

impl Pacer {
    /// How far behind its schedule a guest may fall and still catch up, by running batches without waiting.
    const CATCH_UP: Duration = Duration::from_millis(20);

    fn next_due(&mut self, batch_time: Duration) {
        let now = Instant::now();
        let due = match self.due {
            Some(due) => (due + batch_time).max(now.checked_sub(Self::CATCH_UP).unwrap_or(now)),
            None => now + batch_time,
        };
        self.due = Some(due);
    }
}

impl Port {
    pub fn new(spec: &GuestSpec, sink: Arc<dyn PacketSink>) -> Self {
        let vcpus = usize::from(spec.vcpus);
        let guest = PortState { sequence: 0, windows: vec![[0; WORDS]; vcpus], paces: vec![0; vcpus] };
        let batch_time = match spec.rate_pages_per_s {
            0 => Duration::ZERO,
            rate => Duration::from_secs_f64(spec.batch_steps as f64 * vcpus as f64 / rate as f64),
        };
        Self {
            state: Mutex::new(Guarded { guest, nonce: 0, loads: 0 }),
            sink,
            batch_steps: spec.batch_steps,
            batch_time,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Guarded> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state that belongs to the guest.
    pub fn save(&self) -> PortState {
        self.lock().guest.clone()
    }

    /// Takes such a state; `false` when it is of a guest with another number of vCPUs, or counts what no guest ever comes to.
    pub fn load(&self, state: PortState) -> bool {
        let mut guarded = self.lock();
        let vcpus = guarded.guest.windows.len();
        let comes_to = |paces: u64| paces.checked_mul(self.batch_steps).is_some_and(|steps| steps <= MOST_STEPS);
        let fits = state.windows.len() == vcpus
            && state.paces.len() == vcpus
            && state.sequence <= MOST_STEPS
            && state.paces.iter().all(|&paces| comes_to(paces));
        if fits {
            guarded.guest = state;
            guarded.loads += 1;
        }
        fits
    }

    /// What PACE reads give from now on.
    pub fn set_nonce(&self, nonce: u64) {
        self.lock().nonce = nonce;
    }

    /// Steps each vCPU had done at its last PACE read.
    pub fn steps(&self) -> Vec<u64> {
        self.lock().guest.paces.iter().map(|paces| paces * self.batch_steps).collect()
    }

    /// Packets so far.
    pub fn sequence(&self) -> u64 {
        self.lock().guest.sequence
    }

    /// A write by a vCPU.
    pub fn write(&self, gpa: u64, data: &[u8]) -> Result<(), PortError> {
        let refused = PortError::Write { gpa, len: data.len() };
        let Ok(word) = data.try_into().map(u64::from_le_bytes) else { return Err(refused) };
        let Some((vcpu, register)) = self.register(gpa) else { return Err(refused) };
        match register {
            DOORBELL => self.emit(vcpu, word),
            _ if register < DOORBELL && register.is_multiple_of(8) => {
                self.lock().guest.windows[vcpu][register as usize / 8] = word;
                Ok(())
            }
            _ => Err(refused),
        }
    }

    /// A read by a vCPU; may take as long as the guest is to be held back, but ends at once when the vCPU is to stop.
    pub fn read(&self, gpa: u64, data: &mut [u8], control: &Control, pacer: &mut Pacer) -> Result<(), PortError> {
        let refused = PortError::Read { gpa, len: data.len() };
        let Some((vcpu, PACE)) = self.register(gpa) else { return Err(refused) };
        if data.len() != 8 {
            return Err(refused);
        }
        let nonce = self.pace(vcpu, control, pacer);
        data.copy_from_slice(&nonce.to_le_bytes());
        Ok(())
    }

    /// A PACE read of a vCPU.
    pub fn pace(&self, vcpu: usize, control: &Control, pacer: &mut Pacer) -> u64 {
        self.lock().guest.paces[vcpu] += 1;
        pacer.next_due(self.batch_time);
        self.wait(vcpu, control, pacer);
        self.lock().nonce
    }

    /// Waits for what is left of a wait that a stop cut short, if one was; the vCPU is about to run. [`Waited::Stop`]: it is to
    /// stand still again.
    pub fn wait_out(&self, vcpu: usize, control: &Control, pacer: &mut Pacer) -> Waited {
        if pacer.cut.take().is_some_and(|loads| loads == self.lock().loads) {
            return self.wait(vcpu, control, pacer);
        }
        Waited::Due
    }

    fn wait(&self, vcpu: usize, control: &Control, pacer: &mut Pacer) -> Waited {
        let (step, loads) = {
            let guarded = self.lock();
            (guarded.guest.paces[vcpu] * self.batch_steps, guarded.loads)
        };
        let due = pacer.due.unwrap_or_else(Instant::now);
        let waited = control.wait_at_pace(vcpu, step, due, || self.sink.has_room());
        if waited == Waited::Stop {
            pacer.cut = Some(loads);
        }
        waited
    }

    /// Emits a packet of a vCPU's first `words` words. Numbered and handed over under one lock, so that the sink sees the
    /// numbers in order.
    fn emit(&self, vcpu: usize, words: u64) -> Result<(), PortError> {
        let mut guarded = self.lock();
        let guest = &mut guarded.guest;
        let window = usize::try_from(words).ok().and_then(|words| guest.windows[vcpu].get(..words));
        let bytes = window.ok_or(PortError::Words(words))?.iter().flat_map(|word| word.to_le_bytes()).collect();
        let sequence = guest.sequence;
        guest.sequence += 1;
        self.sink.emit(Packet { sequence, bytes });
        Ok(())
    }

    /// Emits a packet of the given words (a host thread's way to do what a vCPU does by stores).
    pub fn send(&self, vcpu: usize, words: &[u64]) -> Result<(), PortError> {
        {
            let mut guarded = self.lock();
            let window = guarded.guest.windows[vcpu].get_mut(..words.len());
            window.ok_or(PortError::Words(words.len() as u64))?.copy_from_slice(words);
        }
        self.emit(vcpu, words.len() as u64)
    }

    fn register(&self, gpa: u64) -> Option<(usize, u64)> {
        let offset = gpa.checked_sub(DEVICE_GPA)?;
        let vcpu = usize::try_from(offset / DEVICE_STRIDE).ok()?;
        (vcpu < self.lock().guest.windows.len()).then_some((vcpu, offset % DEVICE_STRIDE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Collect(Mutex<Vec<Packet>>);

    impl PacketSink for Collect {
        fn emit(&self, packet: Packet) {
            self.0.lock().unwrap().push(packet);
        }
        fn has_room(&self) -> bool {
            true
        }
    }

    #[test]
    fn packets_are_numbered_over_all_vcpus_and_hold_the_words_written() {
        let sink = Arc::new(Collect(Mutex::new(Vec::new())));
        let port = Port::new(&GuestSpec { vcpus: 2, ..GuestSpec::default() }, sink.clone());
        let window = |vcpu: u64, register: u64| DEVICE_GPA + vcpu * DEVICE_STRIDE + register;
        port.write(window(0, 0), &7u64.to_le_bytes()).unwrap();
        port.write(window(1, 0), &8u64.to_le_bytes()).unwrap();
        port.write(window(1, 8), &9u64.to_le_bytes()).unwrap();
        port.write(window(1, DOORBELL), &2u64.to_le_bytes()).unwrap();
        port.write(window(0, DOORBELL), &1u64.to_le_bytes()).unwrap();
        let bytes = |words: &[u64]| words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<_>>();
        let expected = [Packet { sequence: 0, bytes: bytes(&[8, 9]) }, Packet { sequence: 1, bytes: bytes(&[7]) }];
        assert_eq!(*sink.0.lock().unwrap(), expected);
    }

    #[test]
    fn accesses_the_port_does_not_have_are_refused() {
        let port = Port::new(&GuestSpec::default(), Arc::new(Collect(Mutex::new(Vec::new()))));
        let (control, mut pacer) = (Control::new(1), Pacer::default());
        let write = |gpa: u64, data: &[u8]| port.write(gpa, data).unwrap_err();
        assert_eq!(write(DEVICE_GPA, &[0; 4]), PortError::Write { gpa: DEVICE_GPA, len: 4 });
        assert_eq!(write(DEVICE_GPA + 4, &[0; 8]), PortError::Write { gpa: DEVICE_GPA + 4, len: 8 });
        assert_eq!(write(DEVICE_GPA + PACE, &[0; 8]), PortError::Write { gpa: DEVICE_GPA + PACE, len: 8 });
        let beyond = DEVICE_GPA + DEVICE_STRIDE;
        assert_eq!(write(beyond, &[0; 8]), PortError::Write { gpa: beyond, len: 8 });
        assert_eq!(write(DEVICE_GPA + DOORBELL, &9u64.to_le_bytes()), PortError::Words(9));
        let mut data = [0; 8];
        let read = port.read(DEVICE_GPA, &mut data, &control, &mut pacer);
        assert_eq!(read.unwrap_err(), PortError::Read { gpa: DEVICE_GPA, len: 8 });
    }
}
