//! What carries a measurement's bytes, as the command line says it.

use crate::error::BenchError;
use crate::floor;
use belay_transport::fabric::FabricKind;
use belay_transport::fabric::verbs::VerbsSettings;
use belay_transport::fabric::verbs::inventory::Inventory;
use belay_transport::session::{Address, NoVerbs, Security, SessionConfig};
use clap::Args;

/// Which RDMA device, in perftest's letters.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "RDMA")]
pub struct Device {
    /// RDMA device, as `ibv_devinfo -l` lists it
    #[arg(short = 'd', long, value_name = "DEVICE")]
    ib_dev: Option<String>,
    /// Port of the device
    #[arg(short = 'i', long, value_name = "PORT", value_parser = clap::value_parser!(u8).range(1..))]
    ib_port: Option<u8>,
    /// Index into the port's GID table: chooses the address, and with it the RoCE version
    #[arg(short = 'x', long, value_name = "INDEX")]
    gid_index: Option<u8>,
}

impl Device {
    fn named(&self) -> bool {
        self.ib_dev.is_some() || self.ib_port.is_some() || self.gid_index.is_some()
    }
}

/// A fabric, and the device it is to have if it is `verbs`.
#[derive(Debug, Clone)]
pub struct Carrier {
    /// Without one: the best that both sides have.
    pub only: Option<FabricKind>,
    pub device: Device,
    /// The operator vouches for the network.
    pub trusted: bool,
}

impl Carrier {
    /// `kind`, between two ends on this host: there is no network to vouch for.
    pub fn within_this_host(kind: FabricKind, device: Device) -> Self {
        Self { only: Some(kind), device, trusted: true }
    }

    /// What the floor of `wire` is a floor of.
    pub fn beside(wire: floor::Wire) -> Self {
        let kind = match wire {
            floor::Wire::Memory => FabricKind::Local,
            floor::Wire::Tcp => FabricKind::Tcp,
        };
        Self::within_this_host(kind, Device::default())
    }

    /// The configuration of a session with `address`. A device that was named and is not there is an error even where TCP would
    /// do: it may be misspelt.
    pub fn session(&self, security: Security, address: &Address) -> Result<SessionConfig, BenchError> {
        let Device { ib_dev, ib_port, gid_index } = self.device.clone();
        let settings = VerbsSettings { device: ib_dev, port: ib_port, gid_index, trusted: self.trusted };
        let mut config =
            SessionConfig { only: self.only, verbs: Some(settings.clone()), ..SessionConfig::new(security) };
        config.check(address)?;
        if !matches!(self.only, None | Some(FabricKind::Verbs)) {
            config.verbs = None;
        } else if let Err(why) = Inventory::of_this_host().choose(&settings, 0) {
            if self.device.named() || self.only.is_some() {
                return Err(why.into());
            }
            (config.verbs, config.no_verbs) = (None, Some(NoVerbs::Unusable { why: why.to_string() }));
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(only: Option<FabricKind>, trusted: bool, named: bool) -> Result<SessionConfig, BenchError> {
        let device = Device { ib_dev: named.then(|| "no-such-device".to_owned()), ..Device::default() };
        Carrier { only, device, trusted }.session(Security::LoopbackOnly, &Address::Tcp("127.0.0.1:0".into()))
    }

    #[test]
    fn rdma_is_never_taken_without_trust_and_a_device_that_is_not_there_is_said() {
        assert!(config(Some(FabricKind::Verbs), false, false).unwrap_err().to_string().contains("--trusted-fabric"));
        assert!(config(None, true, true).unwrap_err().with_causes().contains("RDMA"));
        let tcp = config(Some(FabricKind::Tcp), true, false).unwrap();
        assert!(tcp.verbs.is_none() && tcp.only == Some(FabricKind::Tcp));
    }
}
