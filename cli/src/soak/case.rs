//! What one run of the soak does: phase × strike × fabric, and a seed from which everything else about it follows.

use super::points::{self, At, Point};
use super::takeover::Takeover;
use crate::options::FabricChoice;
use belay_checkpoint::tracker::{REQUIRED_FEATURES, SYNC_FEATURES};
use belay_transport::uffd::{OpenMode, Uffd};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::sync::LazyLock;

macro_rules! named {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum $name { $($(#[$vdoc])* $variant),+ }

        impl $name {
            /// All of them, in order.
            pub const ALL: &[Self] = &[$(Self::$variant),+];
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $text),+ })
            }
        }

        impl FromStr for $name {
            type Err = String;
            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $($text => Ok(Self::$variant),)+
                    _ => Err(format!(concat!("{:?} is none of", $(" ", $text),+), text)),
                }
            }
        }
    };
}

named! {
    /// Where in a migration the strike lands.
    Phase {
        /// From the handshake to the switch.
        Prepare = "prepare",
        /// From the pause to the word that the guest may run at the destination.
        Switch = "switch",
        /// That word is out; until the tether has started.
        Handover = "handover",
        /// Pages are coming; told by how many are there.
        Pull = "pull",
        /// A page is in place and not shown yet, or was asked for and is not here.
        Landing = "landing",
        /// The guest is stopped for a checkpoint, or between two of them.
        Epoch = "epoch",
        /// A record is half written.
        Record = "record",
        /// Around the write of the trailer.
        Commit = "commit",
        /// A packet may leave and has not, or has and is not known to have.
        Output = "output",
        /// The source takes a record in.
        Fold = "fold",
        /// Everything has landed, and the tether is kept.
        Tethered = "tethered",
        /// Around the release record.
        Release = "release",
        /// A second blow while the source catches the guest.
        Catch = "catch",
    }
}

named! {
    /// What happens to the migration.
    Strike {
        /// SIGKILL to the page server and its VMM; the guard tells.
        DestinationKill = "destination-kill",
        /// The same, and nobody tells: the guard goes first.
        HostKill = "host-kill",
        /// SIGKILL to the page server alone; the VMM apart waits for ever.
        ServerKill = "server-kill",
        /// SIGKILL to the source's belay.
        SourceKill = "source-kill",
        /// The same, and `belay send --takeover` goes on in its place.
        SourceTakeover = "source-takeover",
        /// SIGKILL to the page server alone, and `belay receive --takeover` goes on with the VMM apart.
        ServerTakeover = "server-takeover",
        /// SIGKILL to the guard.
        GuardKill = "guard-kill",
        /// The observer's connections are cut once.
        ObserverCut = "observer-cut",
        /// Every connection between the hosts is cut; nobody dies.
        LinkCut = "link-cut",
        /// Every connection between the hosts stays open and swallows what is sent.
        HalfOpen = "half-open",
        /// The destination stands still until the source has caught the guest, then goes on.
        Freeze = "freeze",
    }
}

impl Strike {
    /// Whether somebody must take the guest back for it.
    pub fn is_deadly(self) -> bool {
        !matches!(self, Self::GuardKill | Self::ObserverCut)
    }

    /// Whether somebody takes over from whoever it kills.
    pub fn is_takeover(self) -> bool {
        matches!(self, Self::SourceTakeover | Self::ServerTakeover)
    }

    /// Whether it ends the destination's page server for good.
    pub fn kills_destination(self) -> bool {
        matches!(self, Self::DestinationKill | Self::HostKill | Self::ServerKill)
    }
}

/// One run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Case {
    pub fabric: FabricChoice,
    pub phase: Phase,
    pub strike: Strike,
    pub seed: u64,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}/{}", self.fabric, self.phase, self.strike, self.seed)
    }
}

impl FromStr for Case {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<_> = text.split('/').collect();
        let [fabric, phase, strike, seed] = parts[..] else {
            return Err("write FABRIC/PHASE/STRIKE/SEED, as a run's report does".to_owned());
        };
        let case = Self {
            fabric: FabricChoice::from_str(fabric, false)?,
            phase: phase.parse()?,
            strike: strike.parse()?,
            seed: seed.parse().map_err(|error| format!("the seed {seed:?}: {error}"))?,
        };
        if case.fabric == FabricChoice::Auto {
            return Err("the fabric of a run is local, tcp or verbs".to_owned());
        }
        match strikes(case.phase, case.fabric).contains(&case.strike) {
            true => Ok(case),
            false => Err(format!("{} is not tried in phase {} over {}", case.strike, case.phase, case.fabric)),
        }
    }
}

/// What is tried in a phase over a fabric. Left out is what would only wait: before the hand-over nothing but bounds of ten seconds
/// and more notices a host that stands still, and after a release nobody has to.
pub fn strikes(phase: Phase, fabric: FabricChoice) -> Vec<Strike> {
    let fits = |strike: &Strike| match strike {
        Strike::HalfOpen => {
            // Only a stream can be swallowed: shared memory has no middle, and what RDMA carries does not pass through a relay.
            let waits = matches!(phase, Phase::Prepare | Phase::Switch | Phase::Handover | Phase::Release);
            fabric == FabricChoice::Tcp && !waits
        }
        Strike::Freeze => !matches!(phase, Phase::Prepare | Phase::Switch),
        Strike::LinkCut => fabric != FabricChoice::Verbs,
        _ => true,
    };
    Strike::ALL.iter().copied().filter(fits).collect()
}

/// The cases of a soak, in order and without end: the phases of each fabric in turn, the strikes of each phase in turn.
pub fn plan(seed: u64, fabrics: &[FabricChoice]) -> impl Iterator<Item = Case> + use<'_> {
    (0..).map(move |index: u64| {
        let (fabric, rest) = (index % fabrics.len() as u64, index / fabrics.len() as u64);
        let (phase, round) = (rest % Phase::ALL.len() as u64, rest / Phase::ALL.len() as u64);
        let (fabric, phase) = (fabrics[fabric as usize], Phase::ALL[phase as usize]);
        let strikes = strikes(phase, fabric);
        // Each phase begins elsewhere in the list, so that few rounds have every strike somewhere.
        let strike = strikes[(round + phase as u64 + seed) as usize % strikes.len()];
        Case { fabric, phase, strike, seed: mix(seed ^ mix(index)) % 1_000_000_000 }
    })
}

/// splitmix64's finaliser.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// The trackers that are drawn from: where this kernel lacks what one needs (`uffd-wp`: 6.7), another stands in its place.
static TRACKERS: LazyLock<[&str; 4]> = LazyLock::new(|| {
    let has = |features| Uffd::open(OpenMode::UserModeOnly, features).is_ok();
    let or_log = |name, features| if has(features) { name } else { "kvm-log" };
    ["kvm-ring", "kvm-log", or_log("uffd-wp", REQUIRED_FEATURES), or_log("uffd-sync", SYNC_FEATURES)]
});

/// Percent of RAM by which a moment comes before the pull is held: the last page of a share need not come by itself.
pub const SHORT_OF_HOLD: u64 = 2;

/// Percent of RAM at which the pull is held, from and below, where the strike waits for a guest that misses pages: its working set is the
/// first 37 of them, and on a busy host the background brings what it may before the guest has missed any.
const HELD_FOR_DEMAND: std::ops::Range<u64> = 12..24;

/// When the strike lands.
#[derive(Debug, Clone, Copy)]
pub enum Moment {
    /// When a role stands at a stop point for the N-th time.
    At { point: Point, times: u32 },
    /// When so much of RAM has landed and three checkpoints have committed.
    Landed { percent: u64 },
    /// When all of it has.
    AllLanded,
}

/// What follows from a case's seed.
#[derive(Debug, Clone, Copy)]
pub struct Script {
    pub moment: Moment,
    /// After the moment, unless it is a stop point.
    pub delay_ms: u64,
    /// Hold the background pull at this share of pages, so that the migration stays in its middle.
    pub hold_at: Option<u64>,
    /// Keep the tether when everything has landed.
    pub keep_tether: bool,
    pub apart: bool,
    pub tracker: &'static str,
    pub guest_seed: u64,
    /// How whoever dies is replaced.
    pub takeover: Option<Takeover>,
    /// Both hosts have certificates: half of the runs that a network carries.
    pub tls: bool,
}

impl Case {
    /// What this run does in detail: always the same (but for the tracker, where the kernel lacks the one that was drawn).
    pub fn script(&self) -> Script {
        let mut state = self.seed;
        let mut draw = |below: u64| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            mix(state) % below
        };
        let percent = 12 + draw(60);
        let delay_ms = draw(25);
        let points = points::of(self.phase);
        // There is no guard yet where the destination has only just been asked.
        let fits = |point: &&Point| {
            self.strike != Strike::GuardKill || !matches!(point.name, "source-connected" | "prepare-heard")
        };
        let points: Vec<_> = points.iter().filter(fits).collect();
        let moment = match self.phase {
            Phase::Pull => Moment::Landed { percent: percent - SHORT_OF_HOLD },
            Phase::Tethered => Moment::AllLanded,
            _ => {
                let point = *points[draw(points.len() as u64) as usize];
                Moment::At { point, times: 1 + draw(u64::from(point.times)) as u32 }
            }
        };
        let waits_for_demand = matches!(moment, Moment::At { point, .. } if point.name == "demand-posted");
        let percent = match waits_for_demand {
            true => HELD_FOR_DEMAND.start + percent % (HELD_FOR_DEMAND.end - HELD_FOR_DEMAND.start),
            false => percent,
        };
        let in_the_middle =
            !matches!(self.phase, Phase::Prepare | Phase::Switch | Phase::Handover | Phase::Tethered | Phase::Release);
        let apart = draw(3) == 0 || matches!(self.strike, Strike::ServerKill | Strike::ServerTakeover);
        let (tracker, guest_seed) = (TRACKERS[draw(TRACKERS.len() as u64) as usize], 1 + draw(1 << 40));
        let takeover = Takeover::draw(self, &moment, &mut draw);
        Script {
            moment,
            delay_ms,
            hold_at: in_the_middle.then_some(percent),
            keep_tether: self.phase == Phase::Tethered,
            apart,
            tracker,
            guest_seed,
            takeover,
            tls: self.fabric == FabricChoice::Tcp && draw(2) == 0,
        }
    }

    /// Whether a second migration follows it, in the same directories: half of the runs that may leave more in them than a killed process's
    /// files, as the seed has it. It takes a third of a run's time.
    pub fn is_followed(&self) -> bool {
        let leaves = self.strike.is_takeover() || matches!(self.phase, Phase::Catch | Phase::Release);
        leaves && self.seed % 2 == 1
    }

    /// Whether the migration goes to its release if nothing deadly happens.
    pub fn goes_to_release(&self) -> bool {
        matches!(self.phase, Phase::Prepare | Phase::Switch | Phase::Handover | Phase::Release)
    }
}

impl Moment {
    /// The role that is told to stop, and where.
    pub fn stop_at(&self) -> Option<(At, String)> {
        match self {
            Self::At { point, times } => Some((point.at, format!("{}:{times}", point.name))),
            Self::Landed { .. } | Self::AllLanded => None,
        }
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At { point, times } => write!(f, "at {} number {times}", point.name),
            Self::Landed { percent } => write!(f, "with {percent} % landed"),
            Self::AllLanded => f.write_str("with everything landed"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FABRICS: [FabricChoice; 2] = [FabricChoice::Local, FabricChoice::Tcp];

    #[test]
    fn a_case_reads_back_as_it_is_written_and_a_plan_is_the_same_every_time() {
        let cases: Vec<_> = plan(7, &FABRICS).take(600).collect();
        assert_eq!(cases, plan(7, &FABRICS).take(600).collect::<Vec<_>>());
        for case in cases {
            assert_eq!(case.to_string().parse(), Ok(case));
        }
        for text in ["", "tcp/pull/link-cut", "auto/pull/link-cut/1", "local/pull/half-open/1", "tcp/x/link-cut/1"] {
            assert!(text.parse::<Case>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_runs_of_a_whole_soak_have_every_phase_of_both_fabrics_eleven_times_and_every_strike_in_each() {
        let cases: Vec<_> = plan(1, &FABRICS).take(286).collect();
        for fabric in FABRICS {
            for &phase in Phase::ALL {
                let these: Vec<_> = cases.iter().filter(|c| c.fabric == fabric && c.phase == phase).collect();
                assert_eq!(these.len(), 11, "{fabric} {phase}");
                for strike in strikes(phase, fabric) {
                    assert!(these.iter().any(|case| case.strike == strike), "{fabric} {phase} {strike}");
                }
                let encrypted = these.iter().filter(|case| case.script().tls).count();
                let both_ways = (2..=9).contains(&encrypted);
                assert!(both_ways || fabric == FabricChoice::Local && encrypted == 0, "{fabric} {phase} {encrypted}");
            }
        }
    }
}
