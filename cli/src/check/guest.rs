//! What stands against moving a running QEMU guest, and against tethering it.

use super::judge::{Finding, Verdict};
use crate::report::counted;
use belay_transport::Deadline;
use belay_vmm_glue::qemu::inspect::{InspectError, Inspection};
use belay_vmm_glue::qemu::judge::{Against, HeldBy, Objection, objections};
use belay_vmm_glue::qemu::process::Process;
use belay_vmm_glue::qemu::qmp::{Qmp, QmpError};
use std::path::Path;
use std::time::Duration;

/// For all questions together: a QEMU whose guest runs answers each in well under a millisecond.
const BOUND: Duration = Duration::from_secs(10);

/// Asks the QEMU at `socket`, of process `pid` if the socket does not tell. `tracker`: why this host cannot track another process's
/// writes, if it cannot.
pub fn look(socket: &Path, pid: Option<u32>, tracker: Result<(), &str>) -> Result<Vec<Finding>, InspectError> {
    let deadline = Deadline::after(BOUND);
    // Somebody who types a path wants to hear of a wrong one now. A socket that is there and refuses is a QEMU that is being started.
    if let Err(source) = std::fs::symlink_metadata(socket) {
        return Err(QmpError::Connect { path: socket.to_owned(), source }.into());
    }
    let mut qmp = Qmp::connect(socket, deadline)?;
    let process = Process::behind(&qmp, pid)?;
    let guest = Inspection::of(&mut qmp, &process, deadline)?;
    Ok(judge(&guest, tracker))
}

fn judge(guest: &Inspection, tracker: Result<(), &str>) -> Vec<Finding> {
    let Inspection { version, pid, machine, vcpus, kvm, status, .. } = guest;
    let machine = machine.strip_suffix("-machine").unwrap_or(machine);
    let how = if *kvm { "KVM" } else { "emulated" };
    let ok = |name: String, detail| Finding { name: name.into(), verdict: Verdict::Ok, detail, mend: vec![] };
    let vcpus = counted(*vcpus as u64, "vCPU", "vCPUs");
    let detail = format!("process {pid}, {machine}, {vcpus}, {how}, {status}");
    let mut findings = vec![ok(format!("QEMU {version}"), detail)];
    let found = objections(guest, tracker, HeldBy::Nobody, &[]);
    for ram in &guest.ram {
        let name = format!("RAM {}", ram.id);
        if found.iter().all(|objection| objection.what != name) {
            let detail = format!("{} MiB, {}", ram.bytes >> 20, ram.path.as_deref().unwrap_or_default());
            findings.push(ok(name, detail));
        }
    }
    findings.extend(found.into_iter().map(finding));
    findings
}

fn finding(objection: Objection) -> Finding {
    let Objection { against, what, why, change } = objection;
    let (verdict, detail) = match against {
        Against::Moving => (Verdict::Missing, why),
        Against::Tethering => (Verdict::Degraded, format!("not to be tethered: {why}")),
    };
    let mend = if change.is_empty() { vec![] } else { vec![change] };
    Finding { name: what.into(), verdict, detail, mend }
}
