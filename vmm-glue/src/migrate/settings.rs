//! What a migration is asked to be. The source decides and proposes; the destination accepts or says why not.

use super::reattach::{Identity, Reattach};
use crate::kvm::guests::GuestSpec;
use crate::qemu::spec::{QemuDisk, QemuSpec, check_disks};
use belay_checkpoint::guest::TrackerKind;
use belay_checkpoint::outbox::OutputMode;
use belay_checkpoint::policy::PolicySpec;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// The source's wishes, in its Hello's opaque blob.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Proposal {
    /// [`super::protocol::PROTOCOL_VERSION`] of the source.
    pub protocol: u16,
    /// What the destination has to build to run the guest.
    pub vmm: VmmSpec,
    /// `None`: move without a tether (the guest is lost if the destination dies).
    pub tether: Option<TetherSettings>,
    /// Where the guest's output goes; the destination may have an address of its own for the same observer.
    pub output_to: Option<String>,
    pub release: ReleasePolicy,
    /// Userfaultfds and engine threads at the destination; the source dials one fault and one bulk lane for each.
    pub shards: u16,
    /// Incarnation nonces the guest was given so far, in order; its witness wants to know.
    pub nonces: Vec<u64>,
    /// By what both sides know each other again.
    pub identity: Identity,
    /// Not a new guest: the source of this one comes back.
    pub reattach: Option<Reattach>,
}

impl Proposal {
    /// Whether both sides can keep to it; if not, what is wrong. The peer's numbers become waits, threads and sizes here.
    pub fn check(&self) -> Result<(), String> {
        const LONGEST: Duration = Duration::from_secs(24 * 3600);
        if self.shards == 0 || self.shards > 64 {
            return Err(format!("{} shards; 1 to 64 are possible", self.shards));
        }
        match &self.vmm {
            VmmSpec::Kvm(guest) if guest.vcpus == 0 || guest.vcpus > 64 => {
                return Err(format!("{} vCPUs; 1 to 64 are possible", guest.vcpus));
            }
            VmmSpec::Kvm(_) => {}
            VmmSpec::Qemu(guest) => guest.check()?,
            VmmSpec::QemuWithDisks { guest, disks } => {
                guest.check()?;
                check_disks(disks)?;
            }
        }
        let Some(tether) = &self.tether else { return Ok(()) };
        if self.vmm.qemu().is_some() && tether.tracker != TrackerKind::UffdWp {
            return Err("a tracker that is not uffd-wp; what QEMU writes is seen by no other".to_owned());
        }
        let LeaseSettings { length, margin, heartbeat } = tether.lease;
        // Divided, not multiplied: five times what a peer says may be more than a time can be.
        if heartbeat < Duration::from_micros(100) || heartbeat > length / 5 || length > LONGEST || margin > LONGEST {
            return Err(format!(
                "a lease of {length:?} with a heartbeat every {heartbeat:?}; it must last five heartbeats at least, {LONGEST:?} at most"
            ));
        }
        if let ReleasePolicy::After(kept) = self.release
            && kept > LONGEST * 365
        {
            return Err(format!("a tether kept for {kept:?}; say never instead"));
        }
        match tether.policy {
            PolicySpec::Adaptive { .. } if tether.output == OutputMode::Lease => {
                Err("an adaptive policy with output by lease: it bounds how long output waits, and there none does; a fixed period bounds how old a \
                     checkpoint is".to_owned())
            }
            PolicySpec::Fixed { period: time }
            | PolicySpec::DirtyBudget { at_most: time, .. }
            | PolicySpec::OnEvent { at_most: time, .. }
            | PolicySpec::Adaptive { delay_bound: time }
                if time.is_zero() || time > LONGEST =>
            {
                Err(format!("a checkpoint period of {time:?}; more than nothing and at most {LONGEST:?} is possible"))
            }
            PolicySpec::Fixed { .. }
            | PolicySpec::DirtyBudget { .. }
            | PolicySpec::OnEvent { .. }
            | PolicySpec::Adaptive { .. } => Ok(()),
        }
    }
}

/// Which VMM, and what it needs to know. Later VMMs are added at the end.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum VmmSpec {
    Kvm(GuestSpec),
    Qemu(QemuSpec),
    /// With writable disks that the destination has to have too.
    QemuWithDisks {
        guest: QemuSpec,
        disks: Vec<QemuDisk>,
    },
}

impl VmmSpec {
    /// Of a QEMU whose writable disks, as their relays know them, are `disks`.
    pub fn of_qemu(guest: QemuSpec, disks: Vec<QemuDisk>) -> Self {
        if disks.is_empty() { Self::Qemu(guest) } else { Self::QemuWithDisks { guest, disks } }
    }

    /// A QEMU's guest, and its disks where the source has told any: one of before they were told has none here.
    pub fn qemu(&self) -> Option<(&QemuSpec, &[QemuDisk])> {
        match self {
            Self::Kvm(_) => None,
            Self::Qemu(guest) => Some((guest, &[])),
            Self::QemuWithDisks { guest, disks } => Some((guest, disks)),
        }
    }
}

/// How the guest is tethered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TetherSettings {
    pub tracker: TrackerKind,
    pub policy: PolicySpec,
    pub output: OutputMode,
    pub lease: LeaseSettings,
}

/// The lease and the signs of life it rests on. Clocks of the two hosts are never compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseSettings {
    /// How long a granted lease lasts, counted by the destination from when it posted the renewal.
    pub length: Duration,
    /// What the source waits beyond length and drift.
    pub margin: Duration,
    /// How often the destination renews.
    pub heartbeat: Duration,
}

impl Default for LeaseSettings {
    fn default() -> Self {
        Self { length: Duration::from_secs(1), margin: Duration::from_millis(100), heartbeat: Duration::from_millis(2) }
    }
}

impl LeaseSettings {
    /// A lease of this length. It is renewed 25 times in its length, and no more often than every 2 ms nor more seldom than every 40: an idle
    /// guest's tether costs little else.
    pub fn lasting(length: Duration) -> Self {
        let (most_often, most_seldom) = (Self::default().heartbeat, Duration::from_millis(40));
        Self { length, heartbeat: (length / 25).clamp(most_often, most_seldom), ..Self::default() }
    }

    /// Silence after which the source may hold the lease for run out: length, 200 ppm of drift (twice what a quartz clock is
    /// allowed), and margin.
    pub fn silence_bound(&self) -> Duration {
        self.length + self.length / 5000 + self.margin
    }
}

/// When the destination asks to be released.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReleasePolicy {
    /// As soon as every page has landed.
    WhenLanded,
    /// So long after every page has landed: the tether is kept meanwhile.
    After(Duration),
    /// Not by itself: the tether is kept until the operator ends it.
    Never,
}

/// Bounds of the waits of a migration (P7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Connecting, and each step of the handshake.
    pub handshake: Duration,
    /// Connected to Prepare, and Prepare to Prepared: registering RAM is in the one, allocating it in the other.
    pub prepare: Duration,
    /// Switch sent to Resumed.
    pub switch: Duration,
    /// One stop of the guest.
    pub stop: Duration,
    /// A release asked to its answer.
    pub release: Duration,
    /// Revocation.
    pub revoke: Duration,
    /// A demand read: beyond this the source is held for silent.
    pub demand: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(10),
            prepare: Duration::from_secs(120),
            switch: Duration::from_secs(10),
            stop: Duration::from_secs(2),
            release: Duration::from_secs(30),
            revoke: Duration::from_secs(5),
            demand: Duration::from_secs(5),
        }
    }
}
