//! What the operator says about the RDMA fabric.

/// Which device carries a session, and what was said of its network.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VerbsSettings {
    /// RDMA device, as `ibv_devinfo -l` lists it (perftest's `-d`). Without one, the device behind the session's own address,
    /// or else the first with an active port that has an address.
    pub device: Option<String>,
    /// Port of the device, from 1 (perftest's `-i`).
    pub port: Option<u8>,
    /// Index into the port's GID table (perftest's `-x`): chooses the address, and with it the RoCE version.
    pub gid_index: Option<u8>,
    /// The operator has said that nobody on this network reads or forges packets: RDMA carries guest memory in clear.
    pub trusted: bool,
}
