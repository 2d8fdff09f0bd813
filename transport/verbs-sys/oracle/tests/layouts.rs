//! Every structure and constant of ours, against rdma-sys and ibverbs-sys.

use std::mem::{align_of, offset_of, size_of};

include!(concat!(env!("OUT_DIR"), "/lists.rs"));

/// What differs, told all at once.
#[derive(Default)]
struct Differences {
    compared: usize,
    found: Vec<String>,
}

impl Differences {
    fn compare(&mut self, what: impl FnOnce() -> String, ours: i128, theirs: i128) {
        self.compared += 1;
        if ours != theirs {
            self.found.push(format!("{}: ours {ours}, theirs {theirs}", what()));
        }
    }

    fn assert_none(self, at_least: usize) {
        eprintln!("{} compared", self.compared);
        assert!(self.found.is_empty(), "{:#?}", self.found);
        assert!(self.compared > at_least, "only {} compared", self.compared);
    }
}

macro_rules! layouts {
    ($differences:ident, $theirs:ident, $grown:expr, { $($name:ident { $($field:ident)* })* }) => {
        $(
            let (ours, theirs) = (size_of::<belay_verbs_sys::$name>(), size_of::<$theirs::$name>());
            // A structure that has grown since is filled only as far as ours goes, because its size goes with it (or it is
            // only ever pointed to).
            if !$grown.contains(&stringify!($name)) {
                $differences.compare(|| concat!("size of ", stringify!($name)).into(), ours as i128, theirs as i128);
            } else {
                assert!(theirs > ours, "{} has not grown", stringify!($name));
            }
            let (ours, theirs) = (align_of::<belay_verbs_sys::$name>(), align_of::<$theirs::$name>());
            $differences.compare(|| concat!("alignment of ", stringify!($name)).into(), ours as i128, theirs as i128);
            $(
                let ours = offset_of!(belay_verbs_sys::$name, $field);
                let theirs = offset_of!($theirs::$name, $field);
                $differences.compare(
                    || concat!(stringify!($name), ".", stringify!($field)).into(),
                    ours as i128,
                    theirs as i128,
                );
            )*
        )*
    };
}

#[test]
fn layouts_are_those_of_rdma_sys() {
    const GROWN: &[&str] = &[];
    let mut differences = Differences::default();
    macro_rules! check { ($($all:tt)*) => { layouts!(differences, rdma_sys, GROWN, { $($all)* }) } }
    structs_of_rdma_sys!(check);
    differences.assert_none(400);
}

#[test]
fn layouts_are_those_of_ibverbs_sys_made_of_a_later_rdma_core() {
    const GROWN: &[&str] = &["ibv_port_attr", "ibv_qp_ex"];
    let mut differences = Differences::default();
    macro_rules! check { ($($all:tt)*) => { layouts!(differences, ibverbs_sys, GROWN, { $($all)* }) } }
    structs_of_ibverbs_sys!(check);
    differences.assert_none(300);
}

macro_rules! constants {
    ($differences:ident, $theirs:ident, { $($ours:expr => $there:expr,)* }) => {{
        $(
            let ours = { use belay_verbs_sys::*; ($ours) as i128 };
            let theirs = { use $theirs::*; ($there) as i128 };
            $differences.compare(|| stringify!($ours).into(), ours, theirs);
        )*
    }};
}

#[test]
fn constants_are_those_of_rdma_sys() {
    let mut differences = Differences::default();
    macro_rules! check { ($($all:tt)*) => { constants!(differences, rdma_sys, { $($all)* }) } }
    constants_of_rdma_sys!(check);
    differences.assert_none(250);
}

#[test]
fn constants_are_those_of_ibverbs_sys_made_of_a_later_rdma_core() {
    let mut differences = Differences::default();
    macro_rules! check { ($($all:tt)*) => { constants!(differences, ibverbs_sys, { $($all)* }) } }
    constants_of_ibverbs_sys!(check);
    differences.assert_none(200);
}
