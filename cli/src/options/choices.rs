//! The values of options: how each is written, on the command line and in a file.

use crate::metrics::MetricsAddress;
use crate::quantity::Span;
use belay_checkpoint::guest::TrackerKind;
use belay_checkpoint::outbox::OutputMode;
use belay_checkpoint::policy::PolicySpec;
use belay_checkpoint::staging::Staging;
use belay_transport::PageSize;
use belay_transport::numa::NumaChoice;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// When a checkpoint is taken, or never.
#[derive(Debug, Clone, PartialEq)]
pub enum PolicyChoice {
    None,
    Take(PolicySpec),
}

impl std::str::FromStr for PolicyChoice {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            text => text
                .parse()
                .map(Self::Take)
                .map_err(|error: belay_checkpoint::policy::PolicyParseError| error.to_string()),
        }
    }
}

impl std::fmt::Display for PolicyChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Take(policy) => policy.fmt(f),
        }
    }
}

/// When the tether is let go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReleaseChoice {
    WhenLanded,
    Never,
    After(Span),
}

impl std::str::FromStr for ReleaseChoice {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "when-landed" => Ok(Self::WhenLanded),
            "never" => Ok(Self::Never),
            text => text.parse().map(Self::After).map_err(|error| format!("when-landed, never, or a time: {error}")),
        }
    }
}

impl std::fmt::Display for ReleaseChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::WhenLanded => f.write_str("when-landed"),
            Self::Never => f.write_str("never"),
            Self::After(span) => span.fmt(f),
        }
    }
}

/// A NUMA node, auto or off. In a file a node is text too: numa-node = "1".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NumaWish(pub NumaChoice);

impl std::str::FromStr for NumaWish {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        text.parse().map(Self)
    }
}

impl std::fmt::Display for NumaWish {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

macro_rules! text_serde {
    ($type:ty) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
        impl Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
    };
}
text_serde!(PolicyChoice);
text_serde!(ReleaseChoice);
text_serde!(NumaWish);
text_serde!(MetricsAddress);

macro_rules! choice {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize, Serialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum $name { $($(#[$vdoc])* $variant),+ }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.to_possible_value().expect("no variant is skipped").get_name())
            }
        }
    };
}

choice! {
    /// When output leaves.
    OutputChoice {
        /// Held until the checkpoint that covers it has committed
        Commit,
        /// Let go while the lease is good
        Lease,
    }
}
choice! {
    /// How dirty pages are found.
    TrackerChoice {
        /// KVM's dirty bitmap: a bit a page
        KvmLog,
        /// KVM's dirty ring: cost follows what was written
        KvmRing,
        /// userfaultfd async write-protect and PAGEMAP_SCAN: for any VMM, Linux 6.7
        UffdWp,
        /// userfaultfd sync write-protect of groups of pages that grow where they are written together; kvm VMM only
        UffdSync,
    }
}
choice! {
    /// When a checkpoint's pages are copied.
    StagingChoice {
        /// On write where the tracker can (uffd-sync) and there are many, else in the pause
        Auto,
        /// In the pause
        Copy,
        /// When the guest has gone on, or before it writes one; needs --tracker uffd-sync at the source
        Cow,
    }
}
choice! {
    /// Programs of the proof guest.
    ProgramChoice {
        /// Scattered writes, each depending on what was there before
        Ledger,
        /// The same from one end to the other, again and again
        Sequential,
        /// The same, a few pages much more often than the rest
        Zipf,
        /// The same, in each of these ways in turns
        Phases,
        /// Reads and checks everything, writes nothing
        Scanner,
    }
}
choice! {
    /// Page size of guest RAM.
    PageSizeChoice {
        /// Ordinary pages
        #[value(name = "4k")]
        #[serde(rename = "4k")]
        Small,
        /// Huge pages
        #[value(name = "2M")]
        #[serde(rename = "2M")]
        Huge,
    }
}
choice! {
    /// Where the VMM runs.
    VmmPlace {
        /// In the page server's process
        InProcess,
        /// In a process of its own, which outlives the page server
        Apart,
    }
}
choice! {
    /// What drives guest memory.
    Drive {
        /// KVM where it works, else threads
        Auto,
        /// KVM or an error
        Kvm,
        /// Host threads that write the same memory
        Threads,
    }
}
choice! {
    /// What becomes of a guest whose source is lost.
    SourceLossChoice {
        /// It stays stopped here, its memory kept
        Fence,
        /// It goes on here once the arbiter agrees
        Continue,
    }
}
choice! {
    /// What carries pages and checkpoints.
    FabricChoice {
        /// verbs where both hosts can and trust the network, else tcp
        Auto,
        /// Shared memory on one host
        Local,
        /// TCP
        Tcp,
        /// RDMA: InfiniBand, RoCE, iWARP
        Verbs,
    }
}

impl From<PageSizeChoice> for PageSize {
    fn from(choice: PageSizeChoice) -> Self {
        match choice {
            PageSizeChoice::Small => Self::Small,
            PageSizeChoice::Huge => Self::Huge,
        }
    }
}

impl From<OutputChoice> for OutputMode {
    fn from(choice: OutputChoice) -> Self {
        match choice {
            OutputChoice::Commit => Self::Commit,
            OutputChoice::Lease => Self::Lease,
        }
    }
}

impl From<StagingChoice> for Staging {
    fn from(choice: StagingChoice) -> Self {
        match choice {
            StagingChoice::Auto => Self::Auto,
            StagingChoice::Copy => Self::Copy,
            StagingChoice::Cow => Self::Cow,
        }
    }
}

impl From<TrackerChoice> for TrackerKind {
    fn from(choice: TrackerChoice) -> Self {
        match choice {
            TrackerChoice::KvmLog => Self::KvmLog,
            TrackerChoice::KvmRing => Self::KvmRing,
            TrackerChoice::UffdWp => Self::UffdWp,
            TrackerChoice::UffdSync => Self::UffdSync,
        }
    }
}
