//! The exported functions under their own names, in whichever way this build reaches them. Each is documented by its manual
//! page (`man ibv_reg_mr`); calling one means keeping what that page asks for.

#[cfg(any(feature = "linked", feature = "rdma-sys"))]
mod linked;
#[cfg(not(any(feature = "linked", feature = "rdma-sys")))]
mod opened;

#[cfg(any(feature = "linked", feature = "rdma-sys"))]
pub use linked::*;
#[cfg(not(any(feature = "linked", feature = "rdma-sys")))]
pub use opened::*;
