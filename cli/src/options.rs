//! Options shared by `demo`, `send` and `receive`, and the configuration file that gives them defaults.
//!
//! Precedence: command line, then the file named by `--config`, then the built-in defaults. A key the file has and belay does not
//! know is an error, because a misspelt `output = "commit"` must not silently mean something else.

mod arbiter;
mod choices;
mod fencing;

use crate::operate::console::ConsoleOptions;
use crate::quantity::{BitRate, Bytes, PerSecond, Span};
pub use arbiter::{ArbiterOptions, ArbiterTable, SourceLossOptions};
use belay_transport::fabric::FabricKind;
use belay_transport::fabric::verbs::VerbsSettings;
use belay_transport::numa::NumaChoice;
use belay_transport::session::{Credentials, Security, SessionError};
pub use choices::{
    Drive, FabricChoice, NumaWish, OutputChoice, PageSizeChoice, PolicyChoice, ProgramChoice, ReleaseChoice,
    StagingChoice, TrackerChoice, VmmPlace,
};
use clap::Args;
pub use fencing::FenceOptions;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// How the guest is tethered, and what carries it.
#[derive(Debug, Clone, Default, Args, Deserialize, Serialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
#[command(next_help_heading = "Tether")]
pub struct TetherOptions {
    /// When a checkpoint is taken: fixed:10ms; dirty:4096,max=100ms (so many pages); event:4096,max=100ms (output waits, or so many pages);
    /// adaptive:50ms (as seldom as keeps the delay of output under that); or none (no tether) [default: adaptive:50ms; fixed:10ms with
    /// --output lease]
    #[arg(long, value_name = "POLICY")]
    pub policy: Option<PolicyChoice>,
    /// Shorthand for --policy fixed:TIME. Where stopping the guest takes most of that, it runs for as long as it was stopped, at most for TIME
    #[arg(long, value_name = "TIME", conflicts_with = "policy")]
    pub period: Option<Span>,
    /// When output may leave the guest: when its checkpoint has committed, or while the lease is good (faster, and after a catch
    /// the world may have seen output the guest does not remember) [default: commit]
    #[arg(long, value_enum)]
    pub output: Option<OutputChoice>,
    /// How dirty pages are found [default: kvm-ring, or uffd-wp where host threads drive the guest]
    #[arg(long, value_enum)]
    pub tracker: Option<TrackerChoice>,
    /// How long a lease lasts [default: 1s]
    #[arg(long, value_name = "TIME")]
    pub lease: Option<Span>,
    /// Size of the checkpoint ring at the source [default: 64M]
    #[arg(long, value_name = "BYTES")]
    pub ring: Option<Bytes>,
    /// Source memory for epochs larger than the ring [default: the guest's size]
    #[arg(long, value_name = "BYTES")]
    pub overflow: Option<Bytes>,
    /// When to let go of the tether: when-landed, never, or a time to keep it after the last page [default: when-landed]
    #[arg(long, value_name = "WHEN")]
    pub release: Option<ReleaseChoice>,
    /// Threads that serve faults at the destination, each with its own userfaultfd [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub shards: Option<u16>,
    /// Hold TCP to a link rate, for measuring: 1G, 10G [default: unpaced]
    #[arg(long, value_name = "RATE")]
    pub pace: Option<BitRate>,
}

/// What of a tether the destination decides.
#[derive(Debug, Clone, Default, Args, Deserialize, Serialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
#[command(next_help_heading = "Tether")]
pub struct StagingOptions {
    /// When the pages of a checkpoint are copied: in the pause; or once the guest has gone on, which makes the pause shorter and the first write
    /// to a page that was not copied yet slower [default: auto]
    #[arg(long, value_enum)]
    pub staging: Option<StagingChoice>,
}

/// The proof guest that the built-in VMM runs.
#[derive(Debug, Clone, Default, Args, Deserialize, Serialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
#[command(next_help_heading = "Guest")]
pub struct GuestOptions {
    /// Which program the guest runs [default: ledger]
    #[arg(long, value_enum)]
    pub guest: Option<ProgramChoice>,
    /// Guest RAM [default: 256M]
    #[arg(long, value_name = "BYTES")]
    pub memory: Option<Bytes>,
    /// Page size of guest RAM on both hosts; 2M needs reserved huge pages [default: 4k]
    #[arg(long, value_enum, value_name = "SIZE")]
    pub page_size: Option<PageSizeChoice>,
    /// The part of RAM the guest keeps writing to [default: half of RAM]
    #[arg(long, value_name = "BYTES")]
    pub working_set: Option<Bytes>,
    /// Page writes a second over all vCPUs; 0: as fast as it goes [default: 20k]
    #[arg(long, value_name = "RATE")]
    pub dirty_rate: Option<PerSecond>,
    /// Virtual CPUs [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub vcpus: Option<u16>,
    /// Seed of everything the guest does
    #[arg(long)]
    pub seed: Option<u64>,
    /// Run the VMM in the page server's process or in one of its own [default: in-process]
    #[arg(long, value_enum)]
    pub vmm: Option<VmmPlace>,
    /// What drives the guest's memory: kvm, or threads of the host where there is no KVM [default: auto]
    #[arg(long, value_enum)]
    pub drive: Option<Drive>,
}

/// What carries pages and checkpoints, and which RDMA device that is.
#[derive(Debug, Clone, Default, Args, Deserialize, Serialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
#[command(next_help_heading = "Fabric")]
pub struct FabricOptions {
    /// What carries pages and checkpoints: verbs (RDMA), tcp, or local (shared memory, over unix:/path). auto takes verbs where
    /// both hosts have a device and say --trusted-fabric, else tcp, and says why [default: auto; in the demo local]
    #[arg(long, value_enum)]
    pub fabric: Option<FabricChoice>,
    /// RDMA carries guest memory in clear. Say this if nobody but these two hosts can read or send packets on the RDMA network;
    /// verbs is not used without it
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub trusted_fabric: bool,
    /// RDMA device, as `ibv_devinfo -l` lists it [default: the one behind the session's own address]
    #[arg(short = 'd', long, value_name = "NAME")]
    pub ib_dev: Option<String>,
    /// Port of the RDMA device, from 1 [default: one that is active]
    #[arg(short = 'i', long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..))]
    pub ib_port: Option<u8>,
    /// Index into the port's GID table: chooses the address, and with it the RoCE version [default: the address's own]
    #[arg(short = 'x', long, value_name = "N")]
    pub gid_index: Option<u8>,
    /// NUMA node whose cores and memory serve the session: auto (the RDMA device's own), off, or a number [default: auto]
    #[arg(long, value_name = "NODE")]
    pub numa_node: Option<NumaWish>,
}

/// Who may talk to us, and who we are.
#[derive(Debug, Clone, Default, Args, Deserialize, Serialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
#[command(next_help_heading = "Security")]
pub struct SecurityOptions {
    /// Our own certificate (belay keygen makes it)
    #[arg(long, value_name = "FILE", requires_all = ["key", "peer_cert"])]
    pub cert: Option<PathBuf>,
    /// The key of our certificate
    #[arg(long, value_name = "FILE", requires_all = ["cert", "peer_cert"])]
    pub key: Option<PathBuf>,
    /// The one certificate the peer must show
    #[arg(long, value_name = "FILE", requires_all = ["cert", "key"])]
    pub peer_cert: Option<PathBuf>,
    /// Go without TLS beyond loopback: anybody on the link can read and change the guest
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub insecure: bool,
}

/// The configuration file: the same names as the long options, in tables by heading.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct ConfigFile {
    pub tether: TetherOptions,
    pub receive: StagingOptions,
    pub guest: GuestOptions,
    pub fabric: FabricOptions,
    pub security: SecurityOptions,
    pub operate: ConsoleOptions,
    pub fence: FenceOptions,
    pub arbiter: ArbiterTable,
}

/// Why a configuration file was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path} is not a belay configuration:\n{source}")]
    Parse { path: PathBuf, source: Box<toml::de::Error> },
    #[error("{path} has both a policy and a period in [tether]; a period is a policy, leave out one of them")]
    PolicyAndPeriod { path: PathBuf },
}

impl ConfigFile {
    /// Reads `path`.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.into(), source })?;
        let file: Self = toml::from_str(&text)
            .map_err(|source| ConfigError::Parse { path: path.into(), source: Box::new(source) })?;
        match (&file.tether.policy, &file.tether.period) {
            (Some(_), Some(_)) => Err(ConfigError::PolicyAndPeriod { path: path.into() }),
            _ => Ok(file),
        }
    }
}

macro_rules! or_from {
    ($self:ident, $file:ident: $($field:ident),+) => { $( if $self.$field.is_none() { $self.$field = $file.$field; } )+ };
}

impl TetherOptions {
    /// Fills what the command line left open from the file.
    pub fn or(mut self, mut file: Self) -> Self {
        // Policy and period are one choice: either of them on the command line overrides both of the file.
        if self.policy.is_some() || self.period.is_some() {
            (file.policy, file.period) = (None, None);
        }
        or_from!(self, file: policy, period, output, tracker, lease, ring, overflow, release, shards, pace);
        self
    }
}

impl StagingOptions {
    /// Fills what the command line left open from the file.
    pub fn or(mut self, file: Self) -> Self {
        or_from!(self, file: staging);
        self
    }
}

impl GuestOptions {
    /// Fills what the command line left open from the file.
    pub fn or(mut self, file: Self) -> Self {
        or_from!(self, file: guest, memory, page_size, working_set, dirty_rate, vcpus, seed, vmm, drive);
        self
    }
}

impl FabricOptions {
    /// Fills what the command line left open from the file.
    pub fn or(mut self, file: Self) -> Self {
        or_from!(self, file: fabric, ib_dev, ib_port, gid_index, numa_node);
        self.trusted_fabric |= file.trusted_fabric;
        self
    }

    /// The one fabric that was asked for; `None`: the best that both hosts have.
    pub fn only(&self) -> Option<FabricKind> {
        match self.fabric.unwrap_or(FabricChoice::Auto) {
            FabricChoice::Auto => None,
            FabricChoice::Local => Some(FabricKind::Local),
            FabricChoice::Tcp => Some(FabricKind::Tcp),
            FabricChoice::Verbs => Some(FabricKind::Verbs),
        }
    }

    /// Where threads and buffers go.
    pub fn numa(&self) -> NumaChoice {
        self.numa_node.map_or_else(NumaChoice::default, |wish| wish.0)
    }

    /// The RDMA device the operator described.
    pub fn verbs(&self) -> VerbsSettings {
        VerbsSettings {
            device: self.ib_dev.clone(),
            port: self.ib_port,
            gid_index: self.gid_index,
            trusted: self.trusted_fabric,
        }
    }
}

impl SecurityOptions {
    /// Who may be at the other end: the pinned certificate, anybody, or only this host.
    pub fn security(&self) -> Result<Security, SessionError> {
        match (&self.cert, &self.key, &self.peer_cert) {
            (Some(cert), Some(key), Some(peer)) => Ok(Security::Tls(Credentials::load(cert, key, peer)?)),
            _ if self.insecure => Ok(Security::Insecure),
            _ => Ok(Security::LoopbackOnly),
        }
    }

    /// Fills what the command line left open from the file.
    pub fn or(mut self, file: Self) -> Self {
        or_from!(self, file: cert, key, peer_cert);
        self.insecure |= file.insecure;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn profiles() -> Vec<(String, String)> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cluster-configs");
        let entries = std::fs::read_dir(&folder).expect("the profiles' folder").flatten();
        let files = entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|end| end == "toml"));
        let mut all: Vec<_> = files
            .map(|path| {
                let name = path.file_name().and_then(|name| name.to_str()).expect("an ASCII name").to_owned();
                (name, path.to_str().expect("a UTF-8 path").to_owned())
            })
            .collect();
        all.sort();
        all
    }

    #[test]
    fn every_host_profile_is_read_by_the_parser_of_config() {
        let profiles = profiles();
        let names: Vec<_> = profiles.iter().map(|(name, _)| &**name).collect();
        let there =
            ["infiniband.toml", "iwarp.toml", "one-host.toml", "plain-tcp.toml", "roce-v2.toml", "softroce.toml"];
        assert_eq!(names, there);
        for (name, path) in &profiles {
            let file = ConfigFile::read(Path::new(path)).unwrap_or_else(|error| panic!("{name}: {error}"));
            let fabric = match &**name {
                "one-host.toml" => FabricChoice::Local,
                "plain-tcp.toml" => FabricChoice::Tcp,
                _ => FabricChoice::Verbs,
            };
            assert_eq!(file.fabric.fabric, Some(fabric), "{name}");
            // Only the operator can know these; a file that was copied must not say them.
            assert!(!file.fabric.trusted_fabric && !file.security.insecure, "{name}");
            assert_eq!(file.fabric.ib_dev.is_some(), fabric == FabricChoice::Verbs, "{name}");
            assert!(file.tether.policy.is_some() && file.tether.lease.is_some(), "{name}");
        }
    }

    #[test]
    fn every_key_of_a_host_profile_is_explained_above_it_and_every_command_names_its_own_file() {
        for (name, path) in profiles() {
            let text = std::fs::read_to_string(&path).expect("read above");
            let mut comment = String::new();
            let mut keys = 0;
            for line in text.lines() {
                match line.split_once(" = ") {
                    _ if line.starts_with('#') => comment += line,
                    Some((key, _)) => {
                        assert!(comment.contains(&format!("# {key}: ")), "{name}: nothing above {key} explains it");
                        comment.clear();
                        keys += 1;
                    }
                    None => comment.clear(),
                }
            }
            assert!(keys >= 6, "{name}");
            for side in ["belay receive", "belay send"] {
                let command = text.lines().find(|line| line.contains(side)).expect("the command is told");
                assert!(command.contains(&format!("--config cluster-configs/{name}")), "{name}: {command}");
            }
            if text.contains("fabric = \"verbs\"") {
                assert!(text.matches("--trusted-fabric \\\n").count() == 2, "{name}: both commands say it");
                assert!(text.contains("ib_read_lat ") && text.contains("locked"), "{name}");
            }
        }
    }

    #[test]
    fn a_key_nobody_knows_is_an_error_in_every_table() {
        for table in ["tether", "guest", "fabric", "security", "operate", "fence", "arbiter"] {
            let error = toml::from_str::<ConfigFile>(&format!("[{table}]\ntrusted-fabrik = true\n")).expect_err(table);
            assert!(error.to_string().contains("trusted-fabrik"), "{error}");
        }
    }

    #[test]
    fn the_command_line_wins_over_the_file_key_by_key() {
        let file: FabricOptions =
            toml::from_str("fabric = \"verbs\"\nib-dev = \"mlx5_0\"\ngid-index = 3\nnuma-node = \"1\"").expect("reads");
        let line = FabricOptions { gid_index: Some(1), trusted_fabric: true, ..FabricOptions::default() };
        let both = line.or(file);
        assert_eq!((both.fabric, both.gid_index), (Some(FabricChoice::Verbs), Some(1)));
        assert_eq!((both.ib_dev.as_deref(), both.ib_port, both.trusted_fabric), (Some("mlx5_0"), None, true));
        assert_eq!((both.numa(), FabricOptions::default().numa()), (NumaChoice::Node(1), NumaChoice::Auto));
        let settings = both.verbs();
        assert_eq!((settings.gid_index, settings.trusted), (Some(1), true));
    }
}
