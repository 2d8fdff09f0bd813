//! What a fabric's set-up obtained, for the operator: the registers a person compares with what was asked for.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Device, port and address a session's data path got.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FabricDetails {
    /// As `ibv_devinfo -l` lists it.
    pub device: String,
    /// From 1.
    pub port: u8,
    /// `InfiniBand`, `RoCE v1`, `RoCE v2` or `iWARP`.
    pub link: String,
    /// Index into the port's GID table; none on iWARP.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub gid_index: Option<u8>,
    /// The GID at that index, in text.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub gid: Option<String>,
    /// Our address and port that rdma_cm bound.
    pub address: String,
    /// Path MTU of the queue pairs.
    pub mtu_bytes: u32,
    /// Operations a queue pair can have on the wire as initiator (READ depth).
    pub read_depth: u8,
}

impl fmt::Display for FabricDetails {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { device, port, link, address, mtu_bytes, read_depth, .. } = self;
        write!(f, "{device} port {port}, {link}")?;
        if let (Some(index), Some(gid)) = (self.gid_index, &self.gid) {
            write!(f, ", GID {index} ({gid})")?;
        }
        write!(f, ", address {address}, MTU {mtu_bytes}, READ depth {read_depth}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_registers_are_told_in_one_line() {
        let roce = FabricDetails {
            device: "rxe0".into(),
            port: 1,
            link: "RoCE v2".into(),
            gid_index: Some(1),
            gid: Some("::ffff:10.0.0.1".into()),
            address: "10.0.0.1:40001".into(),
            mtu_bytes: 4096,
            read_depth: 16,
        };
        assert_eq!(
            roce.to_string(),
            "rxe0 port 1, RoCE v2, GID 1 (::ffff:10.0.0.1), address 10.0.0.1:40001, MTU 4096, READ depth 16"
        );
        let iwarp = FabricDetails { link: "iWARP".into(), gid_index: None, gid: None, ..roce };
        assert_eq!(iwarp.to_string(), "rxe0 port 1, iWARP, address 10.0.0.1:40001, MTU 4096, READ depth 16");
    }
}
