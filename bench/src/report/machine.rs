//! What a run was made on: figures of two machines are not compared without a word.

use belay_transport::fabric::verbs::inventory::Inventory;
use serde::{Deserialize, Serialize};

/// A machine, and the program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    pub cpu: String,
    pub cores: usize,
    pub memory_bytes: u64,
    pub kernel: String,
    pub page_bytes: usize,
    /// The devices' names; empty without any.
    pub rdma: Vec<String>,
    /// Version of belay, and the commit it was built from where that is known.
    pub belay: String,
    pub commit: Option<String>,
    /// Built with debug assertions: no figure.
    pub debug: bool,
}

impl Machine {
    /// This one.
    pub fn this() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let (cpus, memory) = (read("/proc/cpuinfo"), read("/proc/meminfo"));
        let kib = field(&memory, "MemTotal").and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok());
        Self {
            cpu: field(&cpus, "model name").unwrap_or("unknown").to_owned(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: kib.unwrap_or_default() << 10,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            page_bytes: rustix::param::page_size(),
            rdma: Inventory::of_this_host().devices.into_iter().map(|device| device.name).collect(),
            belay: env!("CARGO_PKG_VERSION").to_owned(),
            commit: option_env!("BELAY_COMMIT").map(str::to_owned),
            debug: cfg!(debug_assertions),
        }
    }

    /// On one line.
    pub fn line(&self) -> String {
        let gib = self.memory_bytes as f64 / f64::from(1 << 30);
        let rdma = if self.rdma.is_empty() { "no RDMA device".to_owned() } else { self.rdma.join(", ") };
        let commit = self.commit.as_ref().map(|commit| format!(" ({commit})")).unwrap_or_default();
        let debug = if self.debug { ", not a release build" } else { "" };
        let Self { cpu, cores, kernel, belay, .. } = self;
        format!("{cpu}, {cores} cores, {gib:.0} GiB, Linux {kernel}, {rdma}; belay {belay}{commit}{debug}")
    }

    /// What of it is not so on the other, in words; the program and its commit aside, because those are what is compared.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let fields = |machine: &Self| {
            [
                ("processor", machine.cpu.clone()),
                ("cores", machine.cores.to_string()),
                // What the kernel keeps for itself differs from boot to boot.
                ("memory", format!("{:.0} GiB", machine.memory_bytes as f64 / f64::from(1 << 30))),
                ("kernel", machine.kernel.clone()),
                ("page size", machine.page_bytes.to_string()),
                ("RDMA", machine.rdma.join(", ")),
                ("debug build", machine.debug.to_string()),
            ]
        };
        let pairs = fields(self).into_iter().zip(fields(other));
        let differ = pairs.filter(|((_, here), (_, there))| here != there);
        differ.map(|((name, here), (_, there))| format!("{name}: {here} here, {there} there")).collect()
    }
}

/// The first `name : value` of a file of /proc.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let (_, value) = text.lines().filter_map(|line| line.split_once(':')).find(|(key, _)| key.trim() == name)?;
    Some(value.trim())
}
