//! The RDMA rows: libraries, devices with their ports, GIDs and limits, and how much memory may be locked.
//!
//! Nothing of it is ever missing: the fabrics local and tcp need none.

use super::judge::{Finding, Verdict};
use belay_transport::fabric::verbs::inventory::{Asked, Device, Inventory, Limits, OnDemand, Port, Trouble};
use belay_transport::fabric::verbs::{LockedMemory, VerbsSettings};

const LIBRARIES: &str = "rdma libraries";
const CONNECTIONS: &str = "rdma connections";
const DEVICE: &str = "rdma device";
const LIMITS: &str = "rdma limits";
const PORT: &str = "rdma port";
const GID: &str = "rdma gid";
const MEMLOCK: &str = "memlock";
/// What must be locked at least: the demo's guest.
const GUEST_BYTES: u64 = 256 << 20;

fn ok(name: &'static str, detail: String) -> Finding {
    Finding { name: name.into(), verdict: Verdict::Ok, detail, mend: vec![] }
}

fn degraded(name: &'static str, trouble: &Trouble) -> Finding {
    Finding { name: name.into(), verdict: Verdict::Degraded, detail: trouble.to_string(), mend: trouble.mend() }
}

/// Every row, from the libraries on to memory.
pub fn judge(inventory: &Inventory) -> Vec<Finding> {
    let mut findings = vec![];
    if let Ok(libraries) = &inventory.libraries {
        findings.push(ok(LIBRARIES, libraries.versions()));
    }
    for trouble in inventory.troubles() {
        let name = match &trouble {
            Trouble::Library(_) => LIBRARIES,
            Trouble::NoConnectionManager { .. } | Trouble::ConnectionManagerDenied { .. } => CONNECTIONS,
            _ => DEVICE,
        };
        let mut finding = degraded(name, &trouble);
        if name == DEVICE {
            finding.detail += " (the fabrics local and tcp need none)";
        }
        findings.push(finding);
    }
    if !inventory.devices.is_empty() && !findings.iter().any(|finding| finding.name == CONNECTIONS) {
        findings.push(ok(CONNECTIONS, format!("{} may be used", inventory.rdma_cm.path.display())));
    }
    findings.extend(inventory.devices.iter().flat_map(|device| of_device(inventory, device)));
    findings.push(memlock(inventory.memory));
    findings
}

fn of_device(inventory: &Inventory, device: &Device) -> Vec<Finding> {
    let mut findings = vec![match device.trouble() {
        Some(trouble) => degraded(DEVICE, &trouble),
        None => {
            let node = device.numa_node.map_or_else(|| "no NUMA node".to_owned(), |node| format!("NUMA node {node}"));
            let file = device.uverbs.as_ref().map(|file| format!(", {} may be used", file.path.display()));
            ok(DEVICE, format!("{}: {}, {node}{}", device.name, device.transport(), file.unwrap_or_default()))
        }
    }];
    if let Asked::Answered(limits) = &device.asked {
        findings.push(ok(LIMITS, format!("{}: {}", device.name, told(limits))));
    }
    findings.extend(device.ports.iter().flat_map(|port| of_port(inventory, device, port)));
    findings
}

fn told(limits: &Limits) -> String {
    let on_demand = match limits.on_demand {
        OnDemand::Unknown => "unknown in this build",
        OnDemand::None | OnDemand::Some { read: false, write: false } => "none",
        OnDemand::Some { read: true, write: true } => "READ and WRITE",
        OnDemand::Some { read: true, write: false } => "READ",
        OnDemand::Some { read: false, write: true } => "WRITE",
    };
    format!(
        "READs a queue pair {} out, {} in; {} requests a queue, {} pieces each; {} completions a queue; {} regions of up to {}; \
         paging on demand: {on_demand}; firmware {}",
        limits.max_qp_init_rd_atom,
        limits.max_qp_rd_atom,
        limits.max_qp_wr,
        limits.max_sge,
        limits.max_cqe,
        limits.max_mr,
        bytes(limits.max_mr_size),
        limits.firmware,
    )
}

/// In the largest unit that leaves a whole number before the point.
fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let unit = (bytes.checked_ilog2().unwrap_or(0) / 10) as usize;
    let scaled = bytes as f64 / (1_u64 << (10 * unit)) as f64;
    if scaled.fract() < 0.05 { format!("{scaled:.0} {}", UNITS[unit]) } else { format!("{scaled:.1} {}", UNITS[unit]) }
}

fn of_port(inventory: &Inventory, device: &Device, port: &Port) -> Vec<Finding> {
    let mut findings = vec![match device.port_trouble(port) {
        Some(trouble) => degraded(PORT, &trouble),
        None => {
            let mut detail = format!("{} port {}: {}, {}", device.name, port.number, port.state, port.transport);
            if let Some(rate) = &port.rate {
                detail += &format!(", {rate}");
            }
            if let Some(mtu) = port.active_mtu_bytes {
                detail += &format!(", path MTU {mtu}");
            }
            if port.lid != 0 {
                detail += &format!(", LID {}", port.lid);
            }
            ok(PORT, detail)
        }
    }];
    let settings =
        VerbsSettings { device: Some(device.name.clone()), port: Some(port.number), ..VerbsSettings::default() };
    // Whether that much memory may be locked is a row of its own.
    let chosen = inventory.choose(&settings, 0).ok().map(|choice| choice.gid);
    findings.extend(port.gids.iter().map(|gid| {
        let default = if chosen == Some(gid) { " (taken unless --gid-index says another)" } else { "" };
        ok(GID, format!("{} port {} GID {gid}{default}", device.name, port.number))
    }));
    findings
}

fn memlock(memory: LockedMemory) -> Finding {
    if let Err(low) = memory.check(GUEST_BYTES) {
        let mut finding = degraded(MEMLOCK, &low.into());
        finding.detail += " (for a guest of 256 MiB; local and tcp pin nothing)";
        return finding;
    }
    ok(
        MEMLOCK,
        match memory.left() {
            None if memory.privileged => "no limit for this process (CAP_IPC_LOCK)".into(),
            None => "no limit".into(),
            Some(most) => format!("guests of up to {} can be registered with a device", bytes(most)),
        },
    )
}

#[cfg(test)]
pub(super) mod tests;
