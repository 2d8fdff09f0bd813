//! QEMU's own ways to move a guest, over TCP on the loopback interface.

use super::machine::{ANSWER, Vm, qmp};
use super::moved::Moved;
use crate::error::BenchError;
use belay_transport::Deadline;
use belay_vmm_glue::qemu::qmp::{Event, Qmp, QmpError};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Longest that a migration may take.
pub const MIGRATED: Duration = Duration::from_secs(120);
/// Bytes a second; QEMU's own default is a link of 1 Gb/s.
const UNBOUNDED: u64 = 1 << 40;

/// Which.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Own {
    Precopy,
    Multifd,
    Postcopy,
    PostcopyPreempt,
}

impl Own {
    fn capabilities(self) -> &'static [&'static str] {
        match self {
            Self::Precopy => &[],
            Self::Multifd => &["multifd"],
            Self::Postcopy => &["postcopy-ram"],
            Self::PostcopyPreempt => &["postcopy-ram", "postcopy-preempt"],
        }
    }

    pub fn is_postcopy(self) -> bool {
        matches!(self, Self::Postcopy | Self::PostcopyPreempt)
    }
}

fn order(at: &mut Qmp, command: &str, arguments: Value) -> Result<Value, BenchError> {
    at.execute(command, arguments, Deadline::after(ANSWER)).map_err(qmp)
}

fn set_capabilities(at: &mut Qmp, own: Own, on: bool) -> Result<(), BenchError> {
    let one = |name: &&str| json!({ "capability": name, "state": on });
    let capabilities: Vec<Value> = own.capabilities().iter().chain(&["events"]).map(one).collect();
    order(at, "migrate-set-capabilities", json!({ "capabilities": capabilities })).map(drop)
}

fn prepare(at: &mut Qmp, own: Own) -> Result<(), BenchError> {
    set_capabilities(at, own, true)?;
    order(at, "migrate-set-parameters", json!({ "max-bandwidth": UNBOUNDED })).map(drop)
}

/// Where the destination listens, once it does.
fn listening(at: &mut Qmp) -> Result<u64, BenchError> {
    order(at, "migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" }))?;
    let told = order(at, "query-migrate", json!({}))?;
    let port = told.get("socket-address").and_then(|all| all.get(0)?.get("port")?.as_str()?.parse().ok());
    port.ok_or_else(|| BenchError::Refused { why: format!("QEMU does not say where it listens: {told}") })
}

/// Moves the guest of `source` into `destination`, which waits.
pub fn migrate(own: Own, source: &mut Vm, destination: &mut Vm) -> Result<Moved, BenchError> {
    let (mut here, mut there) = (source.qmp()?, destination.qmp()?);
    prepare(&mut here, own)?;
    prepare(&mut there, own)?;
    let port = listening(&mut there)?;
    here.forget_events();
    let ordered = Instant::now();
    order(&mut here, "migrate", json!({ "uri": format!("tcp:127.0.0.1:{port}") }))?;
    if own.is_postcopy() {
        // At once, as belay does; refused until the migration has begun.
        let end = Deadline::after(ANSWER);
        while let Err(error) = here.execute("migrate-start-postcopy", json!({}), Deadline::after(ANSWER)) {
            match error {
                QmpError::Refused { .. } if !end.expired() => std::thread::sleep(Duration::from_micros(200)),
                error => return Err(qmp(error)),
            }
        }
    }
    let over = |event: &Event| {
        let status = event.data.get("status").and_then(Value::as_str).unwrap_or_default();
        event.name == "MIGRATION" && matches!(status, "completed" | "failed" | "cancelled" | "postcopy-paused")
    };
    let ended = here.wait_for("migrate", over, Deadline::after(MIGRATED)).map_err(qmp)?;
    let total = ordered.elapsed();
    let told = order(&mut here, "query-migrate", json!({}))?;
    if ended.data.get("status").and_then(Value::as_str) != Some("completed") {
        return Err(BenchError::Refused { why: format!("QEMU's migration did not complete: {told}") });
    }
    // It is the next one's source, which has a way of its own.
    set_capabilities(&mut there, own, false)?;
    let number = |value: Option<&Value>| value.and_then(Value::as_u64);
    Ok(Moved {
        ordered,
        total,
        // QEMU 7.2 sometimes says the host's uptime of a post-copy.
        blackout: number(told.get("downtime")).map(Duration::from_millis).filter(|downtime| *downtime <= total),
        bytes: number(told.get("ram").and_then(|ram| ram.get("transferred"))),
        helpers: [Duration::ZERO; 2],
    })
}
