//! Who wants the vCPUs to run or stand still, and where each of them is. All waiting between the controller and the vCPU
//! threads happens here, on one mutex.

use belay_checkpoint::guest::GuestError;
use belay_transport::Deadline;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// What the controller wants of all vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    Stop,
    Run,
    Exit,
}

/// What becomes of the wish to stop when not every vCPU has by the deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    Withdrawn,
    Stands,
}

/// Where a vCPU is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Outside KVM_RUN with nothing pending.
    Stopped,
    /// Inside KVM_RUN or about to be.
    Running,
    /// At a PACE read, waiting to be let on; memory does not change, but the read is not complete.
    Parked,
    /// Its thread has ended.
    Ended,
}

#[derive(Debug)]
struct State {
    wanted: Wanted,
    phases: Vec<Phase>,
    park_at_step: Option<u64>,
    crashed: Option<String>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Control {
    state: Mutex<State>,
    to_vcpus: Condvar,
    to_controller: Condvar,
}

/// Why a wait at a PACE read ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Waited {
    /// The time has come.
    Due,
    /// The vCPU is to stop: complete the read and leave.
    Stop,
}

impl Control {
    pub fn new(vcpus: usize) -> Self {
        let phases = vec![Phase::Stopped; vcpus];
        let state = State { wanted: Wanted::Stop, phases, park_at_step: None, crashed: None };
        Self { state: Mutex::new(state), to_vcpus: Condvar::new(), to_controller: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change below is a single assignment, so a panic elsewhere cannot leave the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // --- the controller's side

    /// Asks all vCPUs to stop and waits until they have. `kick` gets each vCPU that may be inside KVM_RUN out of it. On a timeout
    /// a wish that is to be [`Wish::Withdrawn`] is, and `unkick` undoes the kick; one that stands, or a stop that was wanted before,
    /// is kept: a vCPU that waits for a page then stops the moment it is served.
    pub fn stop(
        &self,
        deadline: Deadline,
        on_timeout: Wish,
        kick: impl Fn(usize),
        unkick: impl Fn(usize),
    ) -> Result<(), GuestError> {
        let asked = Instant::now();
        let mut state = self.lock();
        let before = state.wanted;
        state.wanted = Wanted::Stop;
        self.to_vcpus.notify_all();
        for (vcpu, phase) in state.phases.iter().enumerate() {
            if matches!(phase, Phase::Running | Phase::Parked) {
                kick(vcpu);
            }
        }
        loop {
            state.crashed()?;
            let running = state.phases.iter().filter(|&&phase| phase != Phase::Stopped).count();
            if running == 0 {
                return Ok(());
            }
            let left = deadline.left();
            if left.is_zero() {
                if on_timeout == Wish::Withdrawn && before != Wanted::Stop {
                    state.wanted = before;
                    (0..state.phases.len()).for_each(unkick);
                    self.to_vcpus.notify_all();
                }
                let bound_ms = asked.elapsed().as_millis() as u64;
                return Err(GuestError::StopTimedOut { bound_ms, running, vcpus: state.phases.len() });
            }
            state = self.to_controller.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Lets all vCPUs run.
    pub fn run(&self) -> Result<(), GuestError> {
        let mut state = self.lock();
        state.crashed()?;
        state.wanted = Wanted::Run;
        self.to_vcpus.notify_all();
        Ok(())
    }

    /// Tells all threads to end, and waits until they have or the deadline passes; whether they have.
    pub fn exit(&self, deadline: Deadline, kick: impl Fn(usize)) -> bool {
        let mut state = self.lock();
        state.wanted = Wanted::Exit;
        self.to_vcpus.notify_all();
        (0..state.phases.len()).for_each(kick);
        while state.phases.iter().any(|&phase| phase != Phase::Ended) {
            let left = deadline.left();
            if left.is_zero() {
                return false;
            }
            state = self.to_controller.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Fails unless every vCPU stands still, wanted so.
    pub fn check_paused(&self, call: &'static str) -> Result<(), GuestError> {
        let state = self.lock();
        state.crashed()?;
        if state.wanted == Wanted::Stop && state.phases.iter().all(|&phase| phase == Phase::Stopped) {
            return Ok(());
        }
        Err(GuestError::WrongState { call, state: "running", wanted: "paused" })
    }

    /// Why the guest failed, if it did.
    pub fn failure(&self) -> Option<String> {
        self.lock().crashed.clone()
    }

    /// Where each vCPU is to wait: at its first PACE read at or behind this step. `None` lets them on.
    pub fn set_park(&self, at_step: Option<u64>) {
        let mut state = self.lock();
        state.park_at_step = at_step;
        // Whoever is parked looks again, and parks anew if that is where it is to be.
        state.phases.iter_mut().filter(|phase| **phase == Phase::Parked).for_each(|phase| *phase = Phase::Running);
        self.to_vcpus.notify_all();
    }

    /// Waits until every vCPU is parked.
    pub fn wait_parked(&self, deadline: Deadline) -> Result<(), GuestError> {
        let asked = Instant::now();
        let mut state = self.lock();
        loop {
            state.crashed()?;
            if state.park_at_step.is_none() || state.wanted != Wanted::Run {
                let (call, wanted) = ("wait_parked", "running and told where to park");
                return Err(GuestError::WrongState { call, state: "paused or not told where to park", wanted });
            }
            let running = state.phases.iter().filter(|&&phase| phase != Phase::Parked).count();
            if running == 0 {
                return Ok(());
            }
            let left = deadline.left();
            if left.is_zero() {
                let bound_ms = asked.elapsed().as_millis() as u64;
                return Err(GuestError::StopTimedOut { bound_ms, running, vcpus: state.phases.len() });
            }
            state = self.to_controller.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    // --- a vCPU thread's side

    /// Stands still until the vCPU may run; `false` when its thread is to end. `may_run` is called under the lock just before
    /// the vCPU counts as running, so that a kick that comes later is not lost.
    pub fn stand_still(&self, vcpu: usize, may_run: impl FnOnce()) -> bool {
        let mut state = self.lock();
        state.phases[vcpu] = Phase::Stopped;
        self.to_controller.notify_all();
        loop {
            match state.wanted {
                Wanted::Exit => return false,
                Wanted::Run if state.crashed.is_none() => {
                    state.phases[vcpu] = Phase::Running;
                    may_run();
                    return true;
                }
                _ => state = self.to_vcpus.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// After a vCPU came out of KVM_RUN on a kick: whether it may go straight back in (the wish was withdrawn).
    pub fn may_go_on(&self, may_run: impl FnOnce()) -> bool {
        let state = self.lock();
        let go_on = state.wanted == Wanted::Run && state.crashed.is_none();
        if go_on {
            may_run();
        }
        go_on
    }

    /// Holds a vCPU at a PACE read until `due`, until there is room for its output and while it is to park.
    pub fn wait_at_pace(&self, vcpu: usize, step: u64, due: Instant, has_room: impl Fn() -> bool) -> Waited {
        /// How long output may have had room again before the guest notices.
        const ROOM_POLL: std::time::Duration = std::time::Duration::from_micros(500);
        let mut state = self.lock();
        loop {
            if state.wanted != Wanted::Run || state.crashed.is_some() {
                state.phases[vcpu] = Phase::Running;
                return Waited::Stop;
            }
            if state.park_at_step.is_some_and(|at| step >= at) {
                state.phases[vcpu] = Phase::Parked;
                self.to_controller.notify_all();
                state = self.to_vcpus.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.phases[vcpu] = Phase::Running;
            let now = Instant::now();
            let wait = if !has_room() {
                ROOM_POLL
            } else if now < due {
                due - now
            } else {
                return Waited::Due;
            };
            state = self.to_vcpus.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The guest cannot go on: everyone is told, nobody runs again.
    pub fn crash(&self, message: String) {
        let mut state = self.lock();
        state.crashed.get_or_insert(message);
        self.to_controller.notify_all();
        self.to_vcpus.notify_all();
    }

    /// A vCPU's thread ends.
    pub fn ended(&self, vcpu: usize) {
        self.lock().phases[vcpu] = Phase::Ended;
        self.to_controller.notify_all();
    }
}

impl State {
    fn crashed(&self) -> Result<(), GuestError> {
        match &self.crashed {
            Some(message) => Err(GuestError::Crashed(message.clone())),
            None => Ok(()),
        }
    }
}
