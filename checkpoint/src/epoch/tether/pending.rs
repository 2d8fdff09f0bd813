//! Epochs that are closed and have not committed, as a policy sees them.

use super::shared::State;
use crate::guest::Epoch;
use crate::policy::OnItsWay;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

#[derive(Debug, Default)]
pub(super) struct Pending(VecDeque<Shipped>);

#[derive(Debug)]
struct Shipped {
    epoch: Epoch,
    pages: u64,
    at: Instant,
}

impl Pending {
    pub fn ship(&mut self, epoch: Epoch, pages: u64) {
        self.0.push_back(Shipped { epoch, pages, at: Instant::now() });
    }

    /// What is on its way by now.
    pub fn on_its_way(&mut self, state: &State) -> OnItsWay {
        while self.0.front().is_some_and(|shipped| shipped.epoch <= state.committed) {
            self.0.pop_front();
        }
        let begun = self.0.front().map(|first| state.committed_at.map_or(first.at, |before| before.max(first.at)));
        OnItsWay {
            pages: self.0.iter().map(|shipped| shipped.pages).sum(),
            since: begun.map_or(Duration::ZERO, |begun| begun.elapsed()),
        }
    }
}
