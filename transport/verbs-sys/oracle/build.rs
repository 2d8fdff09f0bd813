//! Reads our bindings and writes what the tests go through: for each crate, every structure with its fields and every
//! constant, but for what is listed here with its reason.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::{env, fs};

/// What a crate has not, or has under another name.
struct Lacks {
    krate: &'static str,
    /// Structures, flags and modules.
    types: &'static [&'static str],
    /// A structure whose fields are not to be looked at: its size and alignment are compared only.
    fields_of: &'static [&'static str],
    fields: &'static [&'static str],
    /// Constants beginning so.
    constants: &'static [&'static str],
    /// Whose constants are not in a module of the enumeration's name (only where `all_modules` is not set).
    modules: &'static [&'static str],
    all_modules: bool,
    flags: &'static [&'static str],
    all_flags: bool,
}

const RDMA_SYS: Lacks = Lacks {
    krate: "rdma_sys",
    // Its names for the unions and what is in them are shared by several structures, or private.
    types: &["ibv_ops_wr", "ibv_wc_imm_t", "ibv_send_wr_imm_t", "ibv_odp_per_transport_caps_t", "verbs_ex_private"],
    fields_of: &[],
    fields: &["_bindgen_opaque_blob"],
    // Anonymous enumerations.
    constants: &["RDMA_OPTION_", "RDMA_MAX_", "IBV_LINK_LAYER_", "IB_UVERBS_ACCESS_OPTIONAL_"],
    modules: &[],
    all_modules: true,
    flags: &[],
    all_flags: true,
};

const IBVERBS_SYS: Lacks = Lacks {
    krate: "ibverbs_sys",
    // No rdma_cm, no extended context, none of the kernel's own names; unions are unnamed.
    types: &[
        "rdma_",
        "verbs_",
        "ib_",
        "ibv_sa_path_rec",
        "_compat_ibv_port_attr",
        "ibv_gid_global_t",
        "ibv_async_event_element_t",
        "ibv_wc_imm_t",
        "ibv_send_wr_imm_t",
        "ibv_odp_per_transport_caps_t",
        "wr_t",
        "qp_type_t",
        "atomic_t",
        "ud_t",
        "xrc_t",
        "bind_mw_t",
        "tso_t",
        "bind_mw_tso_union_t",
        "src_addr_union_t",
        "dst_addr_union_t",
        "addr_union_t",
        "param_t",
    ],
    // Written by hand there, with private fields.
    fields_of: &["ibv_wc"],
    fields: &["_bindgen_opaque_blob", "imm_data_invalidated_rkey_union", "bind_mw_tso_union"],
    constants: &["RDMA_", "IB_", "IBV_REREG_MR_ERR_"],
    modules: &["ibv_qp_type", "ibv_qp_state", "ibv_port_state", "ibv_wc_opcode", "ibv_wr_opcode", "ibv_wc_status"],
    all_modules: false,
    flags: &["ibv_access_flags", "ibv_qp_attr_mask", "ibv_wc_flags", "ibv_send_flags", "ibv_port_cap_flags"],
    all_flags: false,
};

/// What our bindings have.
#[derive(Default)]
struct Ours {
    structs: BTreeMap<String, Vec<String>>,
    flags: BTreeMap<String, Vec<String>>,
    modules: BTreeMap<String, Vec<String>>,
    constants: Vec<String>,
}

fn main() {
    let bindings = Path::new("../src/bindings.rs");
    println!("cargo:rerun-if-changed={}", bindings.display());
    let ours = Ours::read(&fs::read_to_string(bindings).expect("our bindings"));
    assert!(
        ours.structs.len() > 60 && ours.modules.len() > 15 && ours.flags.len() > 10,
        "they are read as rustfmt writes them"
    );
    let lists: String = [RDMA_SYS, IBVERBS_SYS].iter().map(|lacks| ours.lists(lacks)).collect();
    let out = env::var_os("OUT_DIR").expect("set by cargo");
    fs::write(Path::new(&out).join("lists.rs"), lists).expect("written");
}

impl Ours {
    fn read(text: &str) -> Self {
        let mut ours = Self::default();
        // Where a line inside braces goes.
        let mut inside: Option<(&str, String)> = None;
        for line in text.lines() {
            let word = |prefix: &str| {
                let rest = line.strip_prefix(prefix)?;
                Some(rest.split(|c: char| !c.is_alphanumeric() && c != '_').next()?.to_owned())
            };
            if let Some(name) = word("pub struct ") {
                // A tuple structure ends on its line; its constants come in an impl.
                if line.ends_with('{') {
                    inside = Some(("struct", name.clone()));
                    ours.structs.entry(name).or_default();
                }
            } else if let Some(name) = word("pub union ") {
                inside = Some(("struct", name.clone()));
                ours.structs.entry(name).or_default();
            } else if let Some(name) = word("pub mod ") {
                inside = Some(("mod", name));
            } else if let Some(name) = word("impl ").filter(|_| !line.contains(" for ")) {
                inside = Some(("impl", name));
            } else if let Some(name) = word("pub const ") {
                ours.constants.push(name);
            } else if line == "}" {
                inside = None;
            } else if let Some((kind, of)) = &inside {
                let list = match *kind {
                    "struct" => ours.structs.entry(of.clone()).or_default(),
                    "mod" => ours.modules.entry(of.clone()).or_default(),
                    _ => ours.flags.entry(of.clone()).or_default(),
                };
                match *kind {
                    "struct" => list.extend(word("    pub ")),
                    _ => list.extend(word("    pub const ")),
                }
            }
        }
        ours.flags.retain(|_, names| !names.is_empty());
        ours
    }

    fn lists(&self, lacks: &Lacks) -> String {
        let krate = lacks.krate;
        // A name that ends in "_" stands for all that begin so.
        let lacking = |names: &[&str], name: &str| {
            names.iter().any(|lacked| *lacked == name || lacked.ends_with('_') && name.starts_with(lacked))
        };
        let mut text = format!("macro_rules! structs_of_{krate} {{ ($check:ident) => {{ $check! {{\n");
        for (name, fields) in self.structs.iter().filter(|(name, _)| !lacking(lacks.types, name)) {
            let fields = fields.iter().filter(|field| !lacking(lacks.fields, field) && !lacking(lacks.fields_of, name));
            let fields: Vec<&str> = fields.map(String::as_str).collect();
            writeln!(text, "{name} {{ {} }}", fields.join(" ")).expect("a string");
        }
        text += "} }; }\n";
        writeln!(text, "macro_rules! constants_of_{krate} {{ ($check:ident) => {{ $check! {{").expect("a string");
        for (module, names) in self.modules.iter().filter(|(name, _)| !lacking(lacks.types, name)) {
            let there = lacks.all_modules || lacking(lacks.modules, module);
            for name in names.iter().filter(|name| !lacking(lacks.constants, name)) {
                let theirs = if there { format!("{module}::{name}") } else { name.clone() };
                writeln!(text, "{module}::{name} => {theirs},").expect("a string");
            }
        }
        for (flags, names) in self.flags.iter().filter(|(name, _)| !lacking(lacks.types, name)) {
            let there = lacks.all_flags || lacking(lacks.flags, flags);
            for name in names.iter().filter(|name| !lacking(lacks.constants, name)) {
                let theirs = if there { format!("{flags}::{name}.0") } else { name.clone() };
                writeln!(text, "{flags}::{name}.0 => {theirs},").expect("a string");
            }
        }
        for name in self.constants.iter().filter(|name| !lacking(lacks.constants, name)) {
            writeln!(text, "{name} => {name},").expect("a string");
        }
        text + "} }; }\n"
    }
}
