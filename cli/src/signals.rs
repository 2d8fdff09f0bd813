//! SIGINT and SIGTERM as messages, so that every phase can end in order.

use crossbeam_channel::{Receiver, bounded};
use signal_hook::consts::{SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::iterator::Signals;
use std::sync::Arc;

/// A channel that gets the number of each SIGINT or SIGTERM. The second of them while the first is still being dealt with ends
/// the process at once, as a person who presses Ctrl-C twice expects.
pub fn termination() -> std::io::Result<Receiver<i32>> {
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let (sender, receiver) = bounded(1);
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        for signal in signals.forever() {
            if sender.try_send(signal).is_err() {
                let _ = signal_hook::low_level::emulate_default_handler(signal);
            }
        }
    })?;
    Ok(receiver)
}

/// A write beyond this process's limit on a file's length (RLIMIT_FSIZE) fails with EFBIG, and SIGXFSZ does not end the process.
pub fn outlive_file_limit() -> std::io::Result<()> {
    signal_hook::flag::register(SIGXFSZ, Arc::default()).map(drop)
}
