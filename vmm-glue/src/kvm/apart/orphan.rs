//! What a VMM does whose page server has gone: the gate is shut, the guest stopped for good, its memory kept, and the door listened at.

use super::door::{Caller, Door};
use super::server::Vmm;
use belay_transport::Deadline;
use std::time::Duration;

/// How often a guest that would not stop is asked again.
const LOOK: Duration = Duration::from_millis(200);

/// Stops the guest and waits for the next page server, until `until` if that is a time.
pub(super) fn wait(vmm: &mut Vmm, door: Option<&Door>, until: Option<Deadline>) -> Option<Caller> {
    let mut stopped = false;
    loop {
        let next = Deadline::after(until.map_or(LOOK, |until| until.left().min(LOOK)));
        if !stopped {
            // A vCPU that waits for a page may not stop now. The order stands: it runs nothing more, and stops when it is served.
            stopped = vmm.halt(Deadline::after(next.left() / 4));
        }
        match door {
            Some(door) => {
                if let Some(caller) = door.next(next) {
                    return Some(caller);
                }
            }
            None => std::thread::sleep(next.left()),
        }
        if until.is_some_and(|until| until.expired()) {
            return None;
        }
    }
}
