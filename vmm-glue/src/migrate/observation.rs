//! What happened, told as it happens (P9): each observation has an id, its cause's id, a time and a kind with its values.
//!
//! Ids name their process (`source-4711-3`), so that a story can be followed across both hosts: a message carries the id of the
//! observation that made the peer send it, and what follows from it there names that id as its parent.

use crate::kvm::guests::GuestSpec;
use belay_checkpoint::ownership::Named;
use belay_transport::fabric::FabricDetails;
use belay_transport::session::{Agreed, NoVerbs, WithoutVerbs};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Identifies one observation among all of both hosts.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ObservationId(pub String);

/// One thing that happened.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Observation {
    pub id: ObservationId,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub parent: Option<ObservationId>,
    /// CLOCK_MONOTONIC of the host it happened on, in microseconds. Comparable within one host only.
    pub at_us: u64,
    #[serde(flatten)]
    pub kind: Kind,
}

/// What happened.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Kind {
    /// A state of `ownership` was entered.
    State { state: String, why: String },
    /// The operator can reach this process.
    Operable { name: String, socket: String },
    /// Metrics are served.
    Metrics { address: String },
    /// The destination listens.
    Listening { address: String },
    /// A network relay's gate, and what has just happened there.
    Relay { gate: String, why: String },
    /// The guest runs, before any migration.
    GuestStarted { nonce: u64, driven_by: String, spec: GuestSpec },
    /// The VMM runs in a process of its own.
    VmmStarted { pid: u32 },
    /// A VMM was started, and its RAM allocated, before its guest came.
    VmmReady { pid: u32 },
    /// A tethered guest's output through this tap is held in the kernel: frames that are let go and lost with this host are not sent again.
    TapGated { tap: String },
    /// A running QEMU whose guest is to be moved was found.
    QemuFound { pid: u32, version: String, machine: String, vcpus: u32, ram_bytes: u64 },
    /// The QEMU into which the guest would be caught waits, as process `pid`.
    StandbyStarted { pid: u32, monitor: String, took_us: u64 },
    /// The guest is in the QEMU of process `pid`, which goes on by itself. Its monitor, where belay made it.
    QemuLeft {
        pid: u32,
        #[serde(skip_serializing_if = "Option::is_none", default)]
        monitor: Option<String>,
    },
    /// This page server goes on with the VMM that a dead one left, which is process `pid`. The guest is stopped.
    TookOver { pid: u32, landed_frames: u64, missing_frames: u64, held_packets: u64 },
    /// The two hosts have agreed on a session.
    Connected {
        peer: String,
        fabric: String,
        tls: bool,
        protocol: u16,
        /// Why the fabric is not `verbs`, where it could have been.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        without_verbs: Option<String>,
    },
    /// The RDMA device, port, GID and address that the session's queue pairs got.
    Fabric(FabricDetails),
    /// Destination RAM is being allocated.
    Allocating { done_bytes: u64, total_bytes: u64 },
    /// Destination RAM has been allocated.
    Allocated { bytes: u64, took_us: u64 },
    /// Memory is being registered with an RDMA device: how far one mapping is, its memory regions, and what the session has pinned.
    Registering { done_bytes: u64, total_bytes: u64, regions: u64, pinned_bytes: u64 },
    /// Memory has been registered with an RDMA device. At the switch: what the guest has populated since, and what it had given
    /// up and populated again (`stale_bytes`).
    Registered { bytes: u64, regions: u64, pinned_bytes: u64, stale_bytes: u64, took_us: u64 },
    /// Where the session's threads and buffers go, and why.
    Placed {
        #[serde(skip_serializing_if = "Option::is_none", default)]
        node: Option<u32>,
        what: String,
    },
    /// Everything before the switch is done.
    Prepared { took_us: u64 },
    /// The guest is paused for the switch.
    Paused { steps: Vec<u64> },
    /// The switch was sent: pages by class, and bytes of device state.
    SwitchSent { peer_frames: u64, zero_frames: u64, device_state_bytes: u64 },
    /// The destination serves faults and has loaded the guest's state; the guest is still stopped.
    Loaded { took_us: u64 },
    /// The guest runs at the destination.
    Resumed { nonce: u64 },
    /// What the guest went without, seen by the source: pause to the destination's word that it runs.
    Blackout { took_us: u64 },
    /// How far the pull is.
    Pull { landed_frames: u64, absent_frames: u64, faults: u64, bytes: u64, held_packets: u64, released_packets: u64 },
    /// Every frame has landed.
    AllLanded { took_us: u64, bytes: u64, faults: u64 },
    /// A checkpoint has committed.
    Committed {
        epoch: u64,
        pages: u64,
        bytes: u64,
        pause_us: u64,
        /// How long the guest was held back before it ran in it, beside its pause: it wrote more than the link carried.
        held_back_us: u64,
        commit_us: u64,
        age_us: u64,
        /// Where its pages were copied when the guest had gone on (`--staging`): how many before that, because it was about to write them.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        copied_on_write: Option<u64>,
    },
    /// A checkpoint has been taken into the source's RAM.
    Folded { epoch: u64, pages: u64, took_us: u64 },
    /// The destination is thought dead, and what said so.
    Noticed { by: String },
    /// The old destination is shut out.
    Revoked { took_us: u64 },
    /// Every committed checkpoint is in RAM, and the guest's state loaded, which is `load_us` of the time it took.
    Recovered { epoch: u64, pages: u64, total_pages: u64, took_us: u64, load_us: u64, resent_packets: u64 },
    /// The guest runs at the source again.
    Caught { epoch: u64, nonce: u64, noticed_to_running_us: u64, steps: Vec<u64> },
    /// This process goes on with a migration whose process died, and where that one stood.
    TakenOver { migration: String, was: String },
    /// A destination that was cut off goes on, over another session: from this epoch on, which the source has.
    TetheredAgain { committed: u64 },
    /// Guest memory is kept in files with names, so that another process can take over from this one; or why not.
    Kept {
        migration: String,
        #[serde(skip_serializing_if = "Option::is_none", default)]
        memory: Option<String>,
    },
    /// The release is on disk: this host will never resume this guest.
    ReleaseRecorded { path: String },
    /// The destination owns the guest.
    Released { total_us: u64 },
    /// All of RAM and every step was compared with what it must be; of a fenced guest what it has of it.
    Checked {
        pages: u64,
        /// Not here, or not known to be: of a fenced guest.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        not_compared: Option<u64>,
        wrong_pages: u64,
        /// Steps done by each vCPU; of a fenced guest, which stands anywhere, at its last PACE read.
        steps: Vec<u64>,
        /// (step, nonce) as each vCPU saw them.
        nonces: Vec<Vec<(u64, u64)>>,
        /// Every nonce issued, in order.
        issued: Vec<u64>,
        detail: String,
        took_us: u64,
    },
    /// A latency distribution, in microseconds.
    Latency {
        what: String,
        count: u64,
        p50_us: f64,
        p90_us: f64,
        p99_us: f64,
        p999_us: f64,
        max_us: f64,
        buckets: Vec<(f64, u64)>,
    },
    /// How the tether went.
    TetherSummary {
        epochs: u64,
        pages: u64,
        bytes: u64,
        pause_p50_us: f64,
        pause_p99_us: f64,
        commit_p50_us: f64,
        age_p50_us: f64,
        age_p99_us: f64,
        /// All pauses together, and for how long the guest was held back beside them.
        pause_total_us: u64,
        held_back_us: u64,
        /// How long its packets were held, where there were any.
        output_delay_p50_us: Option<f64>,
        output_delay_p99_us: Option<f64>,
    },
    /// Processor time this process has used.
    CpuTime { user_us: u64, system_us: u64 },
    /// Something failed; what to do is said with it.
    Failed { what: String, advice: String },
    /// The process ends.
    Ended { outcome: String, exit_code: u8 },
    /// Something that a later belay notes and this one knows nothing of, read back: what else it said is not kept.
    #[serde(other)]
    Unknown,
}

/// Takes observations. Cheap to clone; every part of a process shares one.
#[derive(Clone)]
pub struct Observer {
    inner: Arc<Inner>,
}

struct Inner {
    prefix: String,
    next: AtomicU64,
    /// The number noted last; 0 before the first.
    latest: AtomicU64,
    provoked: Mutex<Allowance>,
    take: Box<dyn Fn(&Observation) + Send + Sync>,
}

impl Observer {
    /// An observer whose ids start with `role` and this process's number.
    pub fn new(role: &str, take: impl Fn(&Observation) + Send + Sync + 'static) -> Self {
        let prefix = format!("{role}-{}", std::process::id());
        Self {
            inner: Arc::new(Inner {
                prefix,
                next: AtomicU64::new(1),
                latest: AtomicU64::new(0),
                provoked: Mutex::new(Allowance::default()),
                take: Box::new(take),
            }),
        }
    }

    /// One that drops everything (for tests and benches that look elsewhere).
    pub fn silent() -> Self {
        Self::new("silent", |_| {})
    }

    /// Notes `kind`, caused by `parent`, and gives the id under which it goes.
    pub fn note(&self, parent: Option<&ObservationId>, kind: Kind) -> ObservationId {
        let number = self.inner.next.fetch_add(1, Ordering::Relaxed);
        let id = ObservationId(format!("{}-{number}", self.inner.prefix));
        let observation = Observation { id: id.clone(), parent: parent.cloned(), at_us: monotonic_us(), kind };
        (self.inner.take)(&observation);
        self.inner.latest.fetch_max(number, Ordering::Relaxed);
        id
    }

    /// Notes a state of this name that somebody else provoked, as often as that is worth: a stranger or a peer that repeats it must
    /// not fill a disk. What was left out is told with the next.
    pub fn note_provoked(&self, parent: Option<&ObservationId>, state: &str, why: String) -> Option<ObservationId> {
        let left_out = self.inner.provoked.lock().unwrap_or_else(PoisonError::into_inner).take(monotonic_us())?;
        let why = if left_out == 0 {
            why
        } else {
            format!("{why} (and {left_out} more like it since the last that was told)")
        };
        Some(self.note(parent, Kind::State { state: state.to_owned(), why }))
    }

    /// The observation noted last, as the cause of what has no better one.
    pub fn latest(&self) -> Option<ObservationId> {
        match self.inner.latest.load(Ordering::Relaxed) {
            0 => None,
            number => Some(ObservationId(format!("{}-{number}", self.inner.prefix))),
        }
    }
}

/// How many provoked observations may still be told.
#[derive(Debug)]
struct Allowance {
    left: u64,
    filled_at_us: u64,
    left_out: u64,
}

impl Default for Allowance {
    fn default() -> Self {
        Self { left: Self::MOST, filled_at_us: monotonic_us(), left_out: 0 }
    }
}

impl Allowance {
    const MOST: u64 = 20;
    /// One more comes so often.
    const REFILL_US: u64 = 500_000;

    /// How many were left out before this one, or nothing if this one is too.
    fn take(&mut self, now_us: u64) -> Option<u64> {
        let more = now_us.saturating_sub(self.filled_at_us) / Self::REFILL_US;
        self.left = (self.left + more).min(Self::MOST);
        self.filled_at_us += more * Self::REFILL_US;
        if self.left == 0 {
            self.left_out += 1;
            return None;
        }
        self.left -= 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

impl std::fmt::Debug for Observer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Observer").field("prefix", &self.inner.prefix).finish()
    }
}

/// What two hosts have agreed on, for the operator: also why not on `verbs`, unless that was their own wish.
pub fn connected(peer: String, agreed: &Agreed, tls: bool) -> Kind {
    let unwished = |why: &&WithoutVerbs| !matches!(why, WithoutVerbs::Ours(NoVerbs::NotWanted));
    Kind::Connected {
        peer,
        fabric: agreed.fabric.to_string(),
        tls,
        protocol: agreed.protocol,
        without_verbs: agreed.without_verbs.as_ref().filter(unwished).map(ToString::to_string),
    }
}

/// A state that an operator hears of, as events name it: `SwitchTakenBack` is `switch-taken-back`.
pub fn named_state(named: Named) -> String {
    let name = format!("{named:?}");
    let mut kebab = String::with_capacity(name.len() + 4);
    for (at, letter) in name.char_indices() {
        if letter.is_uppercase() && at > 0 {
            kebab.push('-');
        }
        kebab.extend(letter.to_lowercase());
    }
    kebab
}

/// CLOCK_MONOTONIC in microseconds.
pub fn monotonic_us() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1000
}

/// A duration in whole microseconds.
pub fn us(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// A histogram of nanoseconds as an observation, in power-of-two buckets of microseconds as QEMU's own statistics have them;
/// nothing if it is empty.
pub fn latency(what: &str, histogram: &Histogram<u64>) -> Option<Kind> {
    if histogram.is_empty() {
        return None;
    }
    let at = |quantile: f64| histogram.value_at_quantile(quantile) as f64 / 1e3;
    let mut buckets: Vec<(f64, u64)> = Vec::new();
    for recorded in histogram.iter_recorded() {
        let microseconds = recorded.value_iterated_to() as f64 / 1e3;
        let upper = microseconds.max(1.0).log2().floor().exp2() * 2.0;
        match buckets.last_mut() {
            Some((last, count)) if *last == upper => *count += recorded.count_at_value(),
            _ => buckets.push((upper, recorded.count_at_value())),
        }
    }
    Some(Kind::Latency {
        what: what.to_owned(),
        count: histogram.len(),
        p50_us: at(0.5),
        p90_us: at(0.9),
        p99_us: at(0.99),
        p999_us: at(0.999),
        max_us: histogram.max() as f64 / 1e3,
        buckets,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p7_what_others_provoke_is_told_now_and_then_and_counted() {
        let (say, said) = crossbeam_channel::unbounded();
        let observer = Observer::new("destination", move |seen| drop(say.send(seen.kind.clone())));
        for _ in 0..10_000 {
            observer.note_provoked(None, "turned-away", "a stranger".to_owned());
        }
        let told = said.try_iter().count() as u64;
        assert!((Allowance::MOST..Allowance::MOST + 10).contains(&told), "{told} of 10000");
        let mut allowance = Allowance::default();
        let begun = allowance.filled_at_us;
        assert!((0..Allowance::MOST).all(|_| allowance.take(begun) == Some(0)));
        assert_eq!((allowance.take(begun), allowance.take(begun)), (None, None));
        assert_eq!(allowance.take(begun + Allowance::REFILL_US), Some(2), "what was left out is told of");
    }

    #[test]
    fn what_the_fabric_obtained_reads_back_from_its_event() {
        let details = FabricDetails {
            device: "rxe0".into(),
            port: 1,
            link: "RoCE v2".into(),
            gid_index: Some(1),
            gid: Some("::ffff:10.0.0.1".into()),
            address: "10.0.0.1:40001".into(),
            mtu_bytes: 4096,
            read_depth: 16,
        };
        let iwarp = FabricDetails { gid_index: None, gid: None, ..details.clone() };
        for details in [details, iwarp] {
            let event = serde_json::to_value(Kind::Fabric(details.clone())).expect("plain data");
            assert_eq!(
                (&event["event"], &event["device"]),
                (&"fabric".into(), &"rxe0".into()),
                "fields beside the name"
            );
            match serde_json::from_value(event).expect("reads back") {
                Kind::Fabric(again) => assert_eq!(again, details),
                other => panic!("{other:?}"),
            }
        }
    }
}
