//! Tests against libraries compiled here: what cannot be seen on a machine without a device, and must not depend on one.
//!
//! The calls of this crate's unit tests all go to the made libraries; `tests/` has the machine's own.

use crate::functions::functions;
use crate::load::LoadError;
use crate::symbols::Tables;
use crate::*;
use libc::{EINVAL, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr;

macro_rules! names {
    (
        verbs { $($v:literal fn $verbs:ident($($va:tt)*) -> $vr:ty;)* }
        verbs_only { $($o:literal fn $only:ident($($oa:tt)*) -> $or:ty;)* }
        rdmacm { $($c:literal fn $cm:ident($($ca:tt)*) -> $cr:ty;)* }
    ) => {
        const VERBS: &[(&str, &str)] = &[$((stringify!($verbs), $v),)* $((stringify!($only), $o),)*];
        const RDMACM: &[(&str, &str)] = &[$((stringify!($cm), $c),)*];
    };
}
functions!(names);

/// What the made functions return, so that a test sees which one was called.
const PLAIN: usize = 1;
const IOVA: usize = 2;
const OPTIONAL: usize = 3;
const QUEUE_PAIR: usize = 4;
/// What they write into the first byte of attributes.
const WRITTEN: u8 = 7;

/// Functions of libibverbs that do something.
const BODIES: &[(&str, &str)] = &[
    ("ibv_reg_mr", "void *ibv_reg_mr(void *pd, void *at, unsigned long n, int access) { return (void *)1; }"),
    (
        "ibv_reg_mr_iova",
        "void *ibv_reg_mr_iova(void *pd, void *at, unsigned long n, unsigned long iova, int access) { return (void *)2; }",
    ),
    (
        "ibv_reg_mr_iova2",
        "void *ibv_reg_mr_iova2(void *pd, void *at, unsigned long n, unsigned long iova, unsigned access) { return iova ? (void *)3 : 0; }",
    ),
    (
        "ibv_query_port",
        "int ibv_query_port(void *c, unsigned char port, unsigned char *attr) { attr[0] = 7; return port; }",
    ),
    ("ibv_query_device", "int ibv_query_device(void *c, unsigned char *attr) { attr[0] = 7; return 0; }"),
    ("ibv_create_qp", "void *ibv_create_qp(void *pd, void *attr) { return (void *)4; }"),
];

/// Compiles a library that exports `names` in their versions.
fn compile(dir: &Path, file: &str, names: &[(&str, &str)], more: &str) -> PathBuf {
    let body = |name: &str| BODIES.iter().find(|(of, _)| *of == name).map(|(_, body)| (*body).to_owned());
    let source: String =
        names.iter().map(|(name, _)| body(name).unwrap_or(format!("void {name}(void) {{}}")) + "\n").collect();
    let mut versions: Vec<&str> = names.iter().map(|(_, version)| *version).collect();
    versions.sort_unstable();
    versions.dedup();
    let script: String = versions
        .iter()
        .map(|version| {
            let of = names.iter().filter(|(_, of)| of == version);
            let list: String = of.map(|(name, _)| format!("{name}; ")).collect();
            format!("{version} {{ global: {list} }};\n")
        })
        .collect();
    let (c, map, library) = (dir.join(format!("{file}.c")), dir.join(format!("{file}.map")), dir.join(file));
    std::fs::write(&c, source + more).expect("source");
    std::fs::write(&map, script + "TEST_9.0 { global: ibv_fork_init; local: *; };\n").expect("version script");
    let compiler = Command::new("cc")
        .args(["-shared", "-fPIC", "-w", "-o"])
        .arg(&library)
        .arg(&c)
        .arg(format!("-Wl,--version-script={}", map.display()))
        .output()
        .expect("cc, which also links this test");
    assert!(compiler.status.success(), "{}", String::from_utf8_lossy(&compiler.stderr));
    library
}

/// Makes every call go to made libraries; the first test to come compiles them.
fn made() -> &'static Tables {
    static ONCE: std::sync::OnceLock<&'static Tables> = std::sync::OnceLock::new();
    ONCE.get_or_init(|| {
        // Loaded and mapped when this returns: the files are needed no more.
        let dir = tempfile::tempdir().expect("tempdir");
        let ibverbs = compile(dir.path(), "libibverbs.so.1", VERBS, "");
        let rdmacm = compile(dir.path(), "librdmacm.so.1", RDMACM, "");
        Tables::global(&ibverbs, &rdmacm).expect("all functions are there")
    })
}

/// A context that is not extended, so that every operation takes the older way.
fn plain_context() -> Box<ibv_context> {
    // SAFETY: numbers, nullable pointers, optional functions and a mutex, whose zero bytes are its initializer.
    Box::new(unsafe { std::mem::zeroed() })
}

#[test]
fn the_files_found_are_the_files_opened() {
    let found = made().found();
    assert!(found.ibverbs.ends_with("libibverbs.so.1") && found.rdmacm.ends_with("librdmacm.so.1"), "{found:?}");
}

#[test]
fn each_symbol_that_is_missing_is_named_and_no_other() {
    let dir = tempfile::tempdir().expect("tempdir");
    let rdmacm = compile(dir.path(), "librdmacm.so.1", RDMACM, "");
    for (missing, version) in [("ibv_reg_mr_iova2", "IBVERBS_1.8"), ("_ibv_query_gid_ex", "IBVERBS_1.11")] {
        let rest: Vec<(&str, &str)> = VERBS.iter().copied().filter(|(name, _)| *name != missing).collect();
        let ibverbs = compile(dir.path(), &format!("without-{missing}.so"), &rest, "");
        let error = Tables::open(&ibverbs, &rdmacm).err().expect("one is missing");
        let LoadError::NoSymbols { library, symbols, .. } = error else { panic!("{error:?}") };
        assert_eq!((library, symbols), (ibverbs, vec![&*format!("{missing}@{version}")]));
    }
}

/// A later libibverbs may give a function another meaning under the same name; the old one stays in its version.
#[test]
#[cfg(target_env = "gnu")]
fn a_function_is_taken_in_the_version_it_was_bound_in_not_in_the_newest() {
    let dir = tempfile::tempdir().expect("tempdir");
    let rest: Vec<(&str, &str)> = VERBS.iter().copied().filter(|(name, _)| *name != "ibv_fork_init").collect();
    let two = "int ours(void) { return 11; }\nint newer(void) { return 90; }\n\
               __asm__(\".symver ours, ibv_fork_init@IBVERBS_1.1\");\n\
               __asm__(\".symver newer, ibv_fork_init@@TEST_9.0\");\n";
    let ibverbs = compile(dir.path(), "libibverbs.so.1", &rest, two);
    let rdmacm = compile(dir.path(), "librdmacm.so.1", RDMACM, "");
    let tables = Tables::open(&ibverbs, &rdmacm).expect("all functions are there");
    assert_eq!(tables.fork_init(), 11);

    // SAFETY: a library made above, without initializers.
    let library = unsafe { libloading::Library::new(&ibverbs) }.expect("opens");
    // SAFETY: this is its signature.
    let default = unsafe { library.get::<extern "C" fn() -> c_int>(b"ibv_fork_init") }.expect("there");
    assert_eq!(default(), 90, "else this test shows nothing");
}

#[test]
fn optional_access_flags_go_through_the_call_that_may_carry_them() {
    made();
    let pd = ptr::dangling_mut::<ibv_pd>();
    let at = ptr::without_provenance_mut::<c_void>(0x5000);
    let register = |access: ibv_access_flags| {
        // SAFETY: the made functions look at nothing that is pointed to.
        (
            unsafe { ibv_reg_mr(pd, at, 4096, access.0.cast_signed()) }.addr(),
            // SAFETY: as above.
            unsafe { ibv_reg_mr_iova(pd, at, 4096, 0x7000, access.0.cast_signed()) }.addr(),
        )
    };
    let plain = ibv_access_flags::IBV_ACCESS_LOCAL_WRITE | ibv_access_flags::IBV_ACCESS_REMOTE_READ;
    assert_eq!(register(plain), (PLAIN, IOVA));
    assert_eq!(register(plain | ibv_access_flags::IBV_ACCESS_RELAXED_ORDERING), (OPTIONAL, OPTIONAL));
    for bit in 0..31 {
        let optional = (20..30).contains(&bit);
        let expected = if optional { (OPTIONAL, OPTIONAL) } else { (PLAIN, IOVA) };
        assert_eq!(register(ibv_access_flags(1 << bit)), expected, "bit {bit}");
    }
}

#[test]
fn a_port_of_an_older_library_leaves_what_it_does_not_know_zero() {
    made();
    let mut context = plain_context();
    // SAFETY: bytes of a structure of numbers.
    let mut attr: ibv_port_attr = unsafe { std::mem::transmute([0xee_u8; size_of::<ibv_port_attr>()]) };
    // SAFETY: both are valid.
    assert_eq!(unsafe { ibv_query_port(&raw mut *context, 3, &raw mut attr) }, 3, "its answer comes back");
    assert_eq!(attr.state.to_ne_bytes()[0], WRITTEN);
    assert_eq!((attr.gid_tbl_len, attr.link_layer, attr.port_cap_flags2), (0, 0, 0));
}

#[test]
fn a_device_without_extended_attributes_answers_with_the_plain_ones_and_zero_for_the_rest() {
    made();
    let mut context = plain_context();
    let mut attr: ibv_device_attr_ex = zeroed();
    attr.odp_caps.general_caps = 1;
    // SAFETY: all valid; the input is null.
    assert_eq!(unsafe { ibv_query_device_ex(&raw mut *context, ptr::null(), &raw mut attr) }, 0);
    assert_eq!(attr.orig_attr.fw_ver[0].cast_unsigned(), WRITTEN);
    assert_eq!(attr.odp_caps.general_caps, 0, "what was there before is no answer");

    let mut input: ibv_query_device_ex_input = zeroed();
    input.comp_mask = 1;
    // SAFETY: all valid.
    let answer = unsafe { ibv_query_device_ex(&raw mut *context, &raw const input, &raw mut attr) };
    assert_eq!(answer, EINVAL, "no input is defined");
}

#[test]
fn a_queue_pair_with_nothing_extended_is_a_plain_one() {
    made();
    let mut context = plain_context();
    let mut attr: ibv_qp_init_attr_ex = zeroed();
    attr.comp_mask = ibv_qp_init_attr_mask::IBV_QP_INIT_ATTR_PD.0;
    // SAFETY: both are valid; the made function looks at neither.
    assert_eq!(unsafe { ibv_create_qp_ex(&raw mut *context, &raw mut attr) }.addr(), QUEUE_PAIR);
    attr.comp_mask |= ibv_qp_init_attr_mask::IBV_QP_INIT_ATTR_CREATE_FLAGS.0;
    // SAFETY: both are valid.
    assert!(unsafe { ibv_create_qp_ex(&raw mut *context, &raw mut attr) }.is_null());
    let errno: Option<c_int> = std::io::Error::last_os_error().raw_os_error();
    assert_eq!(errno, Some(libc::EOPNOTSUPP));
}
