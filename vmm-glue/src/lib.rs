//! `belay-vmm-glue` plugs transport and checkpoint into VMMs. Thin: mechanism lives below, decisions of a command live above.

pub mod guard;
