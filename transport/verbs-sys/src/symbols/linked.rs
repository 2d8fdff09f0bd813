//! Functions of libraries that the executable itself depends on: the loader has found them before `main`.

use crate::functions::functions;
use crate::types::*;
use libc::{c_char, c_int, c_uint, c_void, sockaddr};

/// Our own declarations.
macro_rules! declare {
    ($library:literal { $($version:literal fn $name:ident($($arg:ident: $ty:ty),* $(,)?) -> $ret:ty;)* }) => {
        #[link(name = $library)]
        unsafe extern "C" {
            $(
                #[doc = concat!("`", stringify!($name), "(3)`, ", $version, ".")]
                pub fn $name($($arg: $ty),*) -> $ret;
            )*
        }
    };
}

#[cfg(not(feature = "rdma-sys"))]
macro_rules! both {
    (verbs { $($verbs:tt)* } verbs_only { $($only:tt)* } rdmacm { $($rdmacm:tt)* }) => {
        declare! { "ibverbs" { $($verbs)* $($only)* } }
        declare! { "rdmacm" { $($rdmacm)* } }
    };
}

/// That crate's declarations, each checked against the signature in our list; ours where it has none.
#[cfg(feature = "rdma-sys")]
macro_rules! theirs {
    ($($version:literal fn $name:ident($($arg:ident: $ty:ty),* $(,)?) -> $ret:ty;)*) => {
        $(
            pub use rdma_sys::$name;
            const _: unsafe extern "C" fn($($ty),*) -> $ret = rdma_sys::$name;
        )*
    };
}

#[cfg(feature = "rdma-sys")]
macro_rules! both {
    (verbs { $($verbs:tt)* } verbs_only { $($only:tt)* } rdmacm { $($rdmacm:tt)* }) => {
        theirs! { $($verbs)* }
        declare! { "ibverbs" { $($only)* } }
        theirs! { $($rdmacm)* }
    };
}

functions!(both);
