//! The functions that libibverbs and librdmacm export, once: every build makes of this list what it needs.
//!
//! Each with the symbol version that these bindings speak. A library may keep older versions of a symbol beside it for old
//! programs (`ibv_open_device@IBVERBS_1.0`), with other structures behind the same name.

/// Hands the list to a macro: `verbs` and `rdmacm` have the functions rdma-sys has too, `verbs_only` those it lacks.
macro_rules! functions {
    ($to:ident) => {
        $to! {
            verbs {
                "IBVERBS_1.1" fn ibv_get_device_list(num_devices: *mut c_int) -> *mut *mut ibv_device;
                "IBVERBS_1.1" fn ibv_free_device_list(list: *mut *mut ibv_device) -> ();
                "IBVERBS_1.1" fn ibv_get_device_name(device: *mut ibv_device) -> *const c_char;
                "IBVERBS_1.1" fn ibv_get_device_guid(device: *mut ibv_device) -> __be64;
                "IBVERBS_1.1" fn ibv_open_device(device: *mut ibv_device) -> *mut ibv_context;
                "IBVERBS_1.1" fn ibv_close_device(context: *mut ibv_context) -> c_int;
                "IBVERBS_1.1" fn ibv_get_async_event(context: *mut ibv_context, event: *mut ibv_async_event) -> c_int;
                "IBVERBS_1.1" fn ibv_ack_async_event(event: *mut ibv_async_event) -> ();
                "IBVERBS_1.1" fn ibv_query_device(context: *mut ibv_context, device_attr: *mut ibv_device_attr) -> c_int;
                "IBVERBS_1.1" fn ibv_query_port(
                    context: *mut ibv_context,
                    port_num: u8,
                    port_attr: *mut _compat_ibv_port_attr,
                ) -> c_int;
                "IBVERBS_1.1" fn ibv_query_gid(
                    context: *mut ibv_context,
                    port_num: u8,
                    index: c_int,
                    gid: *mut ibv_gid,
                ) -> c_int;
                "IBVERBS_1.1" fn ibv_query_pkey(
                    context: *mut ibv_context,
                    port_num: u8,
                    index: c_int,
                    pkey: *mut __be16,
                ) -> c_int;
                "IBVERBS_1.1" fn ibv_alloc_pd(context: *mut ibv_context) -> *mut ibv_pd;
                "IBVERBS_1.1" fn ibv_dealloc_pd(pd: *mut ibv_pd) -> c_int;
                "IBVERBS_1.1" fn ibv_reg_mr(
                    pd: *mut ibv_pd,
                    addr: *mut c_void,
                    length: usize,
                    access: c_int,
                ) -> *mut ibv_mr;
                "IBVERBS_1.7" fn ibv_reg_mr_iova(
                    pd: *mut ibv_pd,
                    addr: *mut c_void,
                    length: usize,
                    iova: u64,
                    access: c_int,
                ) -> *mut ibv_mr;
                "IBVERBS_1.8" fn ibv_reg_mr_iova2(
                    pd: *mut ibv_pd,
                    addr: *mut c_void,
                    length: usize,
                    iova: u64,
                    access: c_uint,
                ) -> *mut ibv_mr;
                "IBVERBS_1.1" fn ibv_rereg_mr(
                    mr: *mut ibv_mr,
                    flags: c_int,
                    pd: *mut ibv_pd,
                    addr: *mut c_void,
                    length: usize,
                    access: c_int,
                ) -> c_int;
                "IBVERBS_1.1" fn ibv_dereg_mr(mr: *mut ibv_mr) -> c_int;
                "IBVERBS_1.0" fn ibv_create_comp_channel(context: *mut ibv_context) -> *mut ibv_comp_channel;
                "IBVERBS_1.0" fn ibv_destroy_comp_channel(channel: *mut ibv_comp_channel) -> c_int;
                "IBVERBS_1.1" fn ibv_create_cq(
                    context: *mut ibv_context,
                    cqe: c_int,
                    cq_context: *mut c_void,
                    channel: *mut ibv_comp_channel,
                    comp_vector: c_int,
                ) -> *mut ibv_cq;
                "IBVERBS_1.1" fn ibv_resize_cq(cq: *mut ibv_cq, cqe: c_int) -> c_int;
                "IBVERBS_1.1" fn ibv_destroy_cq(cq: *mut ibv_cq) -> c_int;
                "IBVERBS_1.1" fn ibv_get_cq_event(
                    channel: *mut ibv_comp_channel,
                    cq: *mut *mut ibv_cq,
                    cq_context: *mut *mut c_void,
                ) -> c_int;
                "IBVERBS_1.1" fn ibv_ack_cq_events(cq: *mut ibv_cq, nevents: c_uint) -> ();
                "IBVERBS_1.1" fn ibv_create_qp(
                    pd: *mut ibv_pd,
                    qp_init_attr: *mut ibv_qp_init_attr,
                ) -> *mut ibv_qp;
                "IBVERBS_1.1" fn ibv_modify_qp(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, attr_mask: c_int) -> c_int;
                "IBVERBS_1.1" fn ibv_query_qp(
                    qp: *mut ibv_qp,
                    attr: *mut ibv_qp_attr,
                    attr_mask: c_int,
                    init_attr: *mut ibv_qp_init_attr,
                ) -> c_int;
                "IBVERBS_1.1" fn ibv_destroy_qp(qp: *mut ibv_qp) -> c_int;
                "IBVERBS_1.1" fn ibv_fork_init() -> c_int;
                "IBVERBS_1.1" fn ibv_node_type_str(node_type: ibv_node_type::Type) -> *const c_char;
                "IBVERBS_1.1" fn ibv_port_state_str(port_state: ibv_port_state::Type) -> *const c_char;
                "IBVERBS_1.1" fn ibv_wc_status_str(status: ibv_wc_status::Type) -> *const c_char;
            }
            verbs_only {
                "IBVERBS_1.1" fn ibv_event_type_str(event: c_uint) -> *const c_char;
                "IBVERBS_1.11" fn _ibv_query_gid_ex(
                    context: *mut ibv_context,
                    port_num: u32,
                    gid_index: u32,
                    entry: *mut ibv_gid_entry,
                    flags: u32,
                    entry_size: usize,
                ) -> c_int;
                "IBVERBS_1.11" fn _ibv_query_gid_table(
                    context: *mut ibv_context,
                    entries: *mut ibv_gid_entry,
                    max_entries: usize,
                    flags: u32,
                    entry_size: usize,
                ) -> isize;
            }
            rdmacm {
                "RDMACM_1.0" fn rdma_create_event_channel() -> *mut rdma_event_channel;
                "RDMACM_1.0" fn rdma_destroy_event_channel(channel: *mut rdma_event_channel) -> ();
                "RDMACM_1.0" fn rdma_create_id(
                    channel: *mut rdma_event_channel,
                    id: *mut *mut rdma_cm_id,
                    context: *mut c_void,
                    ps: rdma_port_space::Type,
                ) -> c_int;
                "RDMACM_1.0" fn rdma_destroy_id(id: *mut rdma_cm_id) -> c_int;
                "RDMACM_1.0" fn rdma_bind_addr(id: *mut rdma_cm_id, addr: *mut sockaddr) -> c_int;
                "RDMACM_1.0" fn rdma_resolve_addr(
                    id: *mut rdma_cm_id,
                    src_addr: *mut sockaddr,
                    dst_addr: *mut sockaddr,
                    timeout_ms: c_int,
                ) -> c_int;
                "RDMACM_1.0" fn rdma_resolve_route(id: *mut rdma_cm_id, timeout_ms: c_int) -> c_int;
                "RDMACM_1.0" fn rdma_create_qp(
                    id: *mut rdma_cm_id,
                    pd: *mut ibv_pd,
                    qp_init_attr: *mut ibv_qp_init_attr,
                ) -> c_int;
                "RDMACM_1.0" fn rdma_destroy_qp(id: *mut rdma_cm_id) -> ();
                "RDMACM_1.0" fn rdma_connect(id: *mut rdma_cm_id, conn_param: *mut rdma_conn_param) -> c_int;
                "RDMACM_1.2" fn rdma_establish(id: *mut rdma_cm_id) -> c_int;
                "RDMACM_1.0" fn rdma_listen(id: *mut rdma_cm_id, backlog: c_int) -> c_int;
                "RDMACM_1.0" fn rdma_accept(id: *mut rdma_cm_id, conn_param: *mut rdma_conn_param) -> c_int;
                "RDMACM_1.0" fn rdma_reject(
                    id: *mut rdma_cm_id,
                    private_data: *const c_void,
                    private_data_len: u8,
                ) -> c_int;
                "RDMACM_1.0" fn rdma_disconnect(id: *mut rdma_cm_id) -> c_int;
                "RDMACM_1.0" fn rdma_get_cm_event(
                    channel: *mut rdma_event_channel,
                    event: *mut *mut rdma_cm_event,
                ) -> c_int;
                "RDMACM_1.0" fn rdma_ack_cm_event(event: *mut rdma_cm_event) -> c_int;
                "RDMACM_1.0" fn rdma_get_src_port(id: *mut rdma_cm_id) -> __be16;
                "RDMACM_1.0" fn rdma_get_dst_port(id: *mut rdma_cm_id) -> __be16;
                "RDMACM_1.0" fn rdma_get_devices(num_devices: *mut c_int) -> *mut *mut ibv_context;
                "RDMACM_1.0" fn rdma_free_devices(list: *mut *mut ibv_context) -> ();
                "RDMACM_1.0" fn rdma_event_str(event: rdma_cm_event_type::Type) -> *const c_char;
                "RDMACM_1.0" fn rdma_set_option(
                    id: *mut rdma_cm_id,
                    level: c_int,
                    optname: c_int,
                    optval: *mut c_void,
                    optlen: usize,
                ) -> c_int;
                "RDMACM_1.0" fn rdma_migrate_id(id: *mut rdma_cm_id, channel: *mut rdma_event_channel) -> c_int;
                "RDMACM_1.2" fn rdma_init_qp_attr(
                    id: *mut rdma_cm_id,
                    qp_attr: *mut ibv_qp_attr,
                    qp_attr_mask: *mut c_int,
                ) -> c_int;
            }
        }
    };
}
pub(crate) use functions;
