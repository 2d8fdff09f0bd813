//! libibverbs and librdmacm for Rust, under their own names: types, constants, functions and the inline operations of their
//! headers. Everything is as unsafe as it is in C; safety is made one level up, in the transport's verbs fabric.
//!
//! # What it is made from
//! [`types`]' bindings are those of Debian 12's rdma-core 44 (`<infiniband/verbs.h>`, `<rdma/rdma_cma.h>`), made once by
//! `regenerate` with bindgen 0.72 and committed, so that building needs neither headers nor libclang. Sizes, alignments and
//! offsets are asserted when they compile; `oracle/` compares them with two other crates' bindings of the headers at hand.
//!
//! # What it rests on
//! rdma-core's ABI promise: the libraries' names (`libibverbs.so.1`, `librdmacm.so.1`) stand since 2006; a function that
//! changes gets a new symbol version and the old one stays, and each function here is looked up in the version it was bound
//! in; structures given to a function grow only at their end and with their size or a mask beside them; a device's extended
//! context grows at its head (see [`verbs_get_ctx`]). So any rdma-core from 32 (2020) on will do, newer ones included.
//!
//! # Three builds, the same call sites
//! | build | types | functions |
//! |---|---|---|
//! | default | ours | opened at run time by [`load`]: a host without RDMA builds and runs, and is told what it lacks |
//! | feature `linked` | ours | the executable depends on both libraries, as distributions want it |
//! | feature `rdma-sys` | rdma-sys 0.3's | its functions; [`extended_available`] is false and extended operations answer as on a device that has none |
//!
//! In each, [`load`] comes first. Callers make structures with [`zeroed`] and set fields, compare [`ibv_wc_status`]-like
//! constants as `u32`, and read an asynchronous event's number with [`async_event_number`].

// Names are C's.
#![allow(non_camel_case_types, non_snake_case, non_upper_case_globals)]

#[cfg(not(feature = "rdma-sys"))]
#[allow(unused_qualifications, clippy::all)]
mod bindings;
mod data_path;
mod functions;
mod inline;
mod load;
#[cfg(all(test, not(any(feature = "linked", feature = "rdma-sys"))))]
mod made_library;
pub mod symbols;
pub mod types;
mod zeroed;

#[cfg(not(any(feature = "linked", feature = "rdma-sys")))]
pub use load::try_open;
pub use load::{BUILD, Build, IBVERBS_SONAME, LoadError, RDMACM_SONAME, Verbs, load};
pub use symbols::*;
pub use types::*;
pub use zeroed::{Zeroed, zeroed};

// Named one by one: what a header's macro puts in front of an exported function must hide that function here too.
pub use data_path::{ibv_poll_cq, ibv_post_recv, ibv_post_send, ibv_req_notify_cq};
pub use inline::{
    async_event_number, extended_available, ibv_advise_mr, ibv_cq_ex_to_cq, ibv_create_cq_ex, ibv_create_qp_ex,
    ibv_query_device_ex, ibv_query_gid_ex, ibv_query_gid_table, ibv_query_port, ibv_reg_mr, ibv_reg_mr_iova,
    rdma_get_local_addr, rdma_get_peer_addr, verbs_get_ctx,
};
