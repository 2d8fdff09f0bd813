//! Libraries that are not there, or are not what they should be. Only where they are opened at run time.
#![cfg(not(any(feature = "linked", feature = "rdma-sys")))]

use belay_verbs_sys::{IBVERBS_SONAME, LoadError, load, try_open};
use std::path::Path;

#[test]
fn a_library_that_is_not_there_is_named_with_the_package_that_has_it() {
    let nowhere = Path::new("/nonexistent/libibverbs.so.1");
    let error = try_open(nowhere, nowhere).expect_err("not there");
    let LoadError::NoLibrary { library, package, reason } = &error else { panic!("{error:?}") };
    assert_eq!((library.as_path(), *package), (nowhere, "libibverbs1"));
    assert!(reason.contains("No such file"), "{reason}");
    assert!(error.to_string().contains("install") && error.to_string().contains("libibverbs1"), "{error}");
}

#[test]
fn a_library_without_the_symbols_is_told_each_symbol_that_it_lacks() {
    // A library that is on every machine, is already open, and knows nothing of verbs.
    let other = Path::new("libc.so.6");
    let error = try_open(other, other).expect_err("not libibverbs");
    let LoadError::NoSymbols { library, symbols, .. } = &error else { panic!("{error:?}") };
    assert_eq!(library, other);
    assert!(symbols.contains(&"ibv_open_device@IBVERBS_1.1") && symbols.contains(&"ibv_reg_mr_iova2@IBVERBS_1.8"));
    assert!(error.to_string().contains("_ibv_query_gid_ex@IBVERBS_1.11"), "{error}");
}

#[test]
fn the_connection_manager_is_missed_by_its_own_name() {
    if let Err(error) = load() {
        eprintln!("skipped: {error}");
        return;
    }
    let nowhere = Path::new("/nonexistent/librdmacm.so.1");
    let error = try_open(Path::new(IBVERBS_SONAME), nowhere).expect_err("not there");
    assert!(matches!(&error, LoadError::NoLibrary { package: "librdmacm1", .. }), "{error:?}");
}
