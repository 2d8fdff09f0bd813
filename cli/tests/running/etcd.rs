//! An etcd of a test's own, and what it says of a guest.
#![allow(dead_code, reason = "each test file uses its part")]

#[path = "../../../checkpoint/src/testing/etcd.rs"]
mod server;

use crate::running::{BOUND, kill};
use belay_checkpoint::arbiter::etcd::Etcd;
use belay_checkpoint::arbiter::{Arbiter, Held, Standing};
use belay_transport::Deadline;
pub use server::{Server, etcd};

impl Server {
    /// It hears and does not answer.
    pub fn freeze(&self) {
        kill(self.pid() as i32, libc::SIGSTOP);
    }

    pub fn thaw(&self) {
        kill(self.pid() as i32, libc::SIGCONT);
    }

    /// Its record of `guest`.
    pub fn record(&self, guest: &str) -> Option<Held> {
        let mut client = Etcd::new(self.address().parse().expect("an endpoint"));
        client.who(&guest.parse().expect("a name"), Deadline::after(BOUND)).expect("it answers")
    }

    pub fn standing(&self, guest: &str) -> Option<Standing> {
        self.record(guest).map(|held| held.claim.standing)
    }
}
