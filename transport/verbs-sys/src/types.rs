//! Where the types come from: our bindings, or the crate that stands in for them.

#[cfg(not(feature = "rdma-sys"))]
pub use crate::bindings::*;

#[cfg(feature = "rdma-sys")]
pub use rdma_sys::{
    __be16, __be32, __be64, _compat_ibv_port_attr, IBV_FORK_DISABLED, IBV_FORK_ENABLED, IBV_FORK_UNNEEDED,
    IBV_GID_TYPE_IB, IBV_GID_TYPE_ROCE_V1, IBV_GID_TYPE_ROCE_V2, ib_uverbs_access_flags, ib_uverbs_advise_mr_advice,
    ibv_access_flags, ibv_ah, ibv_ah_attr, ibv_async_event, ibv_atomic_cap, ibv_comp_channel, ibv_context,
    ibv_context_ops, ibv_cq, ibv_cq_ex, ibv_cq_init_attr_ex, ibv_cq_init_attr_mask, ibv_create_cq_attr_flags,
    ibv_create_cq_wc_flags, ibv_device, ibv_device_attr, ibv_device_attr_ex, ibv_device_cap_flags, ibv_event_type,
    ibv_gid, ibv_gid_entry, ibv_global_route, ibv_mig_state, ibv_mr, ibv_mtu, ibv_mw, ibv_mw_type, ibv_node_type,
    ibv_odp_caps, ibv_odp_general_caps, ibv_odp_transport_cap_bits, ibv_pd, ibv_port_attr, ibv_port_cap_flags,
    ibv_port_cap_flags2, ibv_port_state, ibv_qp, ibv_qp_attr, ibv_qp_attr_mask, ibv_qp_cap, ibv_qp_create_flags,
    ibv_qp_create_send_ops_flags, ibv_qp_init_attr, ibv_qp_init_attr_ex, ibv_qp_init_attr_mask, ibv_qp_state,
    ibv_qp_type, ibv_query_device_ex_input, ibv_rate, ibv_recv_wr, ibv_rereg_mr_err_code, ibv_rereg_mr_flags,
    ibv_send_flags, ibv_send_wr, ibv_sge, ibv_srq, ibv_srq_attr_mask, ibv_srq_type, ibv_transport_type, ibv_wc,
    ibv_wc_flags, ibv_wc_opcode, ibv_wc_status, ibv_wr_opcode, rdma_addr, rdma_cm_event, rdma_cm_event_type,
    rdma_cm_id, rdma_conn_param, rdma_event_channel, rdma_ib_addr, rdma_port_space, rdma_route, rdma_ud_param,
    verbs_context,
};

/// Advice for [`crate::ibv_advise_mr`].
pub type ibv_advise_mr_advice = ib_uverbs_advise_mr_advice::Type;

/// Access flags a kernel may not know and then ignores; only [`crate::ibv_reg_mr_iova2`] may carry them.
pub const IBV_ACCESS_OPTIONAL_RANGE: u32 = ib_uverbs_access_flags::IB_UVERBS_ACCESS_OPTIONAL_RANGE.0;

/// Constants of anonymous enumerations in C, which rdma-sys does not carry over.
#[cfg(feature = "rdma-sys")]
mod anonymous {
    /// Level of [`crate::rdma_set_option`]: the identifier itself.
    pub const RDMA_OPTION_ID: u32 = 0;
    /// Option of the identifier: `u8`, IP type of service (RFC 2474).
    pub const RDMA_OPTION_ID_TOS: u32 = 0;
    /// Option of the identifier: `int`, as SO_REUSEADDR.
    pub const RDMA_OPTION_ID_REUSEADDR: u32 = 1;
    /// Option of the identifier: `int`, as IPV6_V6ONLY.
    pub const RDMA_OPTION_ID_AFONLY: u32 = 2;
    /// Option of the identifier: `u8`, the queue pair's acknowledgement timeout, 4.096 µs times two to its power.
    pub const RDMA_OPTION_ID_ACK_TIMEOUT: u32 = 3;
    /// Most READs that a responder may be told to hold ready.
    pub const RDMA_MAX_RESP_RES: u32 = 0xff;
    /// Most READs that an initiator may be told to have outstanding.
    pub const RDMA_MAX_INIT_DEPTH: u32 = 0xff;
    /// Link layer of a port: not said, which means InfiniBand.
    pub const IBV_LINK_LAYER_UNSPECIFIED: u32 = 0;
    /// Link layer of a port: InfiniBand.
    pub const IBV_LINK_LAYER_INFINIBAND: u32 = 1;
    /// Link layer of a port: Ethernet, so RoCE or iWARP.
    pub const IBV_LINK_LAYER_ETHERNET: u32 = 2;
}
#[cfg(feature = "rdma-sys")]
pub use anonymous::*;
