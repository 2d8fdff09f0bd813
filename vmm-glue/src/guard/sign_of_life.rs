//! The watched process' side: a thread that holds the slot's mutex for as long as the process lives.

use super::page::{Got, LifePage};
use super::{GuardError, io_error};
use crossbeam_channel::{Sender, bounded};
use std::sync::Arc;
use std::thread::JoinHandle;

/// The thread does nothing; this is the least that holds a Rust thread's start and a guard page.
const STACK_BYTES: usize = 64 << 10;

/// This process' sign of life. It is given until the process ends or [`SignOfLife::stand_down`] is called; dropping it changes
/// nothing, so a panic that unwinds past it is still a death.
#[derive(Debug)]
pub struct SignOfLife {
    page: Arc<LifePage>,
    slot: usize,
    stand_down: Sender<()>,
    holder: JoinHandle<()>,
}

impl SignOfLife {
    /// Takes `slot` of the page for this process.
    pub fn hold(page: Arc<LifePage>, slot: usize) -> Result<Self, GuardError> {
        page.check_slot(slot)?;
        let (stand_down, told) = bounded::<()>(1);
        let (tell, took) = bounded(1);
        let held = Arc::clone(&page);
        let hold = move || {
            let page = held;
            let taken = take(&page, slot);
            let took_it = taken.is_ok();
            // The caller waits for exactly this one answer, so it cannot fail to be taken.
            let _ = tell.send(taken);
            if !took_it {
                return;
            }
            while told.recv().is_err() {
                // The SignOfLife was dropped without standing down: hold on until the process ends.
                std::thread::park();
            }
            page.set_orderly(slot, true);
            let released = page.unlock(slot);
            debug_assert!(released.is_ok(), "unlocked by its owner: {released:?}");
        };
        let holder = std::thread::Builder::new()
            .name("belay-life".into())
            .stack_size(STACK_BYTES)
            .spawn(hold)
            .map_err(io_error("start the thread that holds the sign of life"))?;
        took.recv().map_err(|_| GuardError::NotHeld { slot })??;
        Ok(Self { page, slot, stand_down, holder })
    }

    /// The slot it holds.
    pub fn slot(&self) -> usize {
        self.slot
    }

    /// Says whether this process, a VMM, has shut its guest's gate and ordered the guest to stop because its page server has gone.
    pub fn quiet(&self, quiet: bool) {
        self.page.set_quiet(self.slot, quiet);
    }

    /// Says that the end of this process is no death from here on. For the end of a migration, or of a VMM that has stopped by itself.
    pub fn stand_down(self) {
        // Neither can fail while the holder waits, which it does until it is told.
        let _ = self.stand_down.send(());
        let _ = self.holder.join();
    }
}

fn take(page: &LifePage, slot: usize) -> Result<(), GuardError> {
    block_signals();
    match page.try_lock(slot).map_err(io_error("take the slot's mutex"))? {
        Got::Busy => Err(GuardError::AlreadyHeld { slot, pid: page.pid(slot) }),
        // A slot can be used again after its process has died or stood down.
        Got::Free | Got::OwnerDied => {
            page.set_orderly(slot, false);
            page.set_quiet(slot, false);
            page.set_pid(slot, u64::from(std::process::id()));
            Ok(())
        }
    }
}

/// Handlers run on other threads: this one must never be in the middle of anything.
fn block_signals() {
    let mut all = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: points at room for a set.
    unsafe { libc::sigfillset(all.as_mut_ptr()) };
    // SAFETY: the set was filled above; a null old set is allowed; only this thread's mask changes.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), std::ptr::null_mut()) };
}
