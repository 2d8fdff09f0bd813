//! Functions found at run time: a table a library, filled once, and a function for each entry that calls through it.

use crate::functions::functions;
use crate::load::{LoadError, Opened, Verbs};
use crate::types::*;
use libc::{c_char, c_int, c_uint, c_void, sockaddr};
use std::ffi::CStr;
use std::mem::transmute;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::{Mutex, OnceLock};

static TABLES: OnceLock<Tables> = OnceLock::new();

/// The functions of both libraries.
pub(crate) struct Tables {
    verbs: IbverbsTable,
    rdmacm: RdmacmTable,
    found: Verbs,
}

fn tables() -> &'static Tables {
    TABLES.get().expect("load() has succeeded before any other function of this crate is called")
}

/// `text` ends in a NUL and has no other: it is made from the list of functions when this compiles.
const fn c_str(text: &'static str) -> &'static CStr {
    match CStr::from_bytes_with_nul(text.as_bytes()) {
        Ok(text) => text,
        Err(_) => panic!("a name with a NUL in it"),
    }
}

macro_rules! table {
    ($table:ident { $($version:literal fn $name:ident($($arg:ident: $ty:ty),* $(,)?) -> $ret:ty;)* }) => {
        struct $table {
            $($name: unsafe extern "C" fn($($ty),*) -> $ret,)*
        }

        impl $table {
            fn find(library: &Opened) -> Result<Self, LoadError> {
                let mut missing = vec![];
                $(
                    let $name = library.symbol(
                        const { c_str(concat!(stringify!($name), "\0")) },
                        const { c_str(concat!($version, "\0")) },
                    );
                    if $name.is_none() {
                        missing.push(concat!(stringify!($name), "@", $version));
                    }
                )*
                if !missing.is_empty() {
                    return Err(library.lacks(missing));
                }
                let address = |found: Option<NonNull<c_void>>| found.expect("none is missing").as_ptr();
                Ok(Self {
                    $($name: {
                        // SAFETY: the library exports this function, in the version whose signature the list gives, and is
                        // never closed.
                        unsafe { transmute::<*mut c_void, unsafe extern "C" fn($($ty),*) -> $ret>(address($name)) }
                    },)*
                })
            }
        }
    };
}

macro_rules! calls {
    ($field:ident { $($version:literal fn $name:ident($($arg:ident: $ty:ty),* $(,)?) -> $ret:ty;)* }) => {
        $(
            #[doc = concat!("`", stringify!($name), "(3)`, ", $version, ".")]
            ///
            /// # Safety
            /// What the manual page asks for; and [`crate::load`] has succeeded.
            #[inline]
            pub unsafe fn $name($($arg: $ty),*) -> $ret {
                // SAFETY: the caller keeps what the function asks for.
                unsafe { (tables().$field.$name)($($arg),*) }
            }
        )*
    };
}

macro_rules! both {
    (verbs { $($verbs:tt)* } verbs_only { $($only:tt)* } rdmacm { $($rdmacm:tt)* }) => {
        table! { IbverbsTable { $($verbs)* $($only)* } }
        table! { RdmacmTable { $($rdmacm)* } }
        calls! { verbs { $($verbs)* $($only)* } }
        calls! { rdmacm { $($rdmacm)* } }
    };
}
functions!(both);

impl Tables {
    /// Opens two libraries and finds every function in them.
    pub(crate) fn open(ibverbs: &Path, rdmacm: &Path) -> Result<Self, LoadError> {
        let library = Opened::open(ibverbs, "libibverbs1")?;
        let verbs = IbverbsTable::find(&library)?;
        let cm_library = Opened::open(rdmacm, "librdmacm1")?;
        let rdmacm = RdmacmTable::find(&cm_library)?;
        let found = Verbs::at(verbs.ibv_open_device as *const c_void, rdmacm.rdma_create_id as *const c_void);
        Ok(Self { verbs, rdmacm, found })
    }

    /// One call that takes nothing, through this table and not the global one.
    #[cfg(test)]
    pub(crate) fn fork_init(&self) -> c_int {
        // SAFETY: takes nothing.
        unsafe { (self.verbs.ibv_fork_init)() }
    }

    /// Where the libraries are.
    pub(crate) fn found(&self) -> &Verbs {
        &self.found
    }

    /// The tables that every call goes through, made by the first call of this that succeeds.
    pub(crate) fn global(ibverbs: &Path, rdmacm: &Path) -> Result<&'static Self, LoadError> {
        static OPENING: Mutex<()> = Mutex::new(());
        let _one_at_a_time = OPENING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(tables) = TABLES.get() {
            return Ok(tables);
        }
        let tables = Self::open(ibverbs, rdmacm)?;
        Ok(TABLES.get_or_init(|| tables))
    }
}
