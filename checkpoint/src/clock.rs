//! This host's clock, as leases and heartbeats read it: CLOCK_BOOTTIME, which goes on while the host sleeps.

#[cfg(not(test))]
use read as boottime;
use rustix::time::{ClockId, clock_gettime};

#[cfg(test)]
thread_local! {
    static SIMULATED: std::cell::Cell<Option<u64>> = const { std::cell::Cell::new(None) };
}

/// CLOCK_BOOTTIME in ns.
pub(crate) fn boottime_ns() -> u64 {
    boottime()
}

fn read() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(test)]
fn boottime() -> u64 {
    SIMULATED.get().unwrap_or_else(read)
}

/// Has this thread read `now_ns` from here on, or the host's clock again.
#[cfg(test)]
pub(crate) fn simulate(now_ns: Option<u64>) {
    SIMULATED.set(now_ns);
}
