//! SIGINT and SIGTERM as messages, so that every phase can end in order.

use crossbeam_channel::{Receiver, bounded};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

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
