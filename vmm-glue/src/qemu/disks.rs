//! A guest's writable disks as its host's role needs them: the relays in hand, or none.
//!
//! Shared by the guest, which stops and goes on, by the tether and the folder ([`Storage`]), and by whoever lets go once the guest is nobody
//! else's.

use super::disk::{Hand, HandError, Role, log};
use super::spec::QemuDisk;
use belay_checkpoint::guest::{Epoch, GuestError};
use belay_checkpoint::storage::{DiskWrites, Storage};
use belay_transport::Deadline;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Longest that a relay may take to give an epoch's log.
const SETTLE: Duration = Duration::from_secs(5);
/// Longest that the source may take to make room for another epoch, and that storage may take for one flush of everything.
const STORAGE: Duration = Duration::from_secs(10);
/// Longest that an epoch's writes may take.
const APPLY: Duration = Duration::from_secs(60);

/// See the module.
#[derive(Debug, Clone, Default)]
pub struct Disks(Arc<Mutex<Vec<Arc<Hand>>>>);

fn failed(error: HandError) -> GuestError {
    GuestError::Io { doing: "hold the guest's disks".to_owned(), source: io::Error::other(error) }
}

impl Disks {
    /// Takes the relays at `paths` in hand, in this order, for the guest of this process.
    pub fn attach(&self, paths: &[PathBuf], role: Role, guest: u32, deadline: Deadline) -> Result<(), HandError> {
        let hands = paths.iter().map(|path| Hand::attach(path, role, guest, deadline).map(Arc::new));
        let hands = hands.collect::<Result<Vec<_>, _>>()?;
        let mut names: Vec<&str> = hands.iter().map(|hand| hand.known.name.as_str()).collect();
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            let (path, why) =
                (paths[0].clone(), format!("two of this guest's disks are called {}; say --name", twice[0]));
            return Err(HandError::Refused { path, why });
        }
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = hands;
        Ok(())
    }

    /// As their relays know them.
    pub fn known(&self) -> Vec<QemuDisk> {
        self.hands().iter().map(|hand| QemuDisk::of(&hand.known)).collect()
    }

    fn hands(&self) -> Vec<Arc<Hand>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn each(&self, mut act: impl FnMut(&Hand) -> Result<(), HandError>) -> Result<(), GuestError> {
        self.hands().iter().try_for_each(|hand| act(hand)).map_err(failed)
    }

    /// As [`Storage`], for a guest that has such disks.
    pub fn storage(&self) -> Option<Arc<dyn Storage>> {
        (!self.hands().is_empty()).then(|| Arc::new(self.clone()) as Arc<dyn Storage>)
    }

    /// Source: the guest stands and leaves.
    pub fn away(&self) -> Result<(), GuestError> {
        self.each(|hand| hand.away(Deadline::after(STORAGE)))
    }

    /// Source: the guest goes on here, in this process.
    pub fn back(&self, guest: u32) -> Result<(), GuestError> {
        self.each(|hand| hand.back(guest, Deadline::after(STORAGE)))
    }

    /// Destination: the guest is about to be stopped.
    pub fn prepare(&self) -> Result<(), GuestError> {
        self.each(Hand::prepare)
    }

    /// Destination: waits until the guest may go on (P7).
    pub fn wait_for_room(&self) -> Result<(), GuestError> {
        self.each(|hand| hand.wait_for_room(Deadline::after(STORAGE)))
    }

    /// Destination: the guest goes on.
    pub fn go(&self) -> Result<(), GuestError> {
        self.each(Hand::go)
    }

    /// Nobody needs to see to the disks any more.
    pub fn let_go(&self) -> Result<(), GuestError> {
        let hands = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        hands.iter().try_for_each(|hand| hand.let_go(Deadline::after(SETTLE))).map_err(failed)
    }
}

impl Storage for Disks {
    fn disks(&self) -> u16 {
        self.hands().len() as u16
    }

    fn close_epoch(&self, epoch: Epoch) -> Result<Vec<DiskWrites>, GuestError> {
        let mut all = Vec::new();
        for (device, hand) in self.hands().iter().enumerate() {
            let (bytes, flushed) = hand.settle(epoch.0, Deadline::after(SETTLE)).map_err(failed)?;
            if !bytes.is_empty() {
                all.push(DiskWrites { device: device as u16, bytes, flushed });
            }
        }
        Ok(all)
    }

    fn applied(&self, epoch: Epoch) {
        // A relay that has gone is noticed where it is asked for something.
        let _ = self.each(|hand| hand.applied(epoch.0));
    }

    fn own(&self, deadline: Deadline) -> Result<(), GuestError> {
        self.each(|hand| hand.own(deadline))
    }

    fn apply(&self, writes: &[u8], between: &mut dyn FnMut()) -> Result<(), GuestError> {
        let read = log::decode(writes).map_err(|error| GuestError::BadState(error.to_string()))?;
        let hands = self.hands();
        let hand = hands.iter().find(|hand| hand.known.name == read.name).ok_or_else(|| {
            let here: Vec<&str> = hands.iter().map(|hand| hand.known.name.as_str()).collect();
            GuestError::BadState(format!("no disk here is called {}; there are {}", read.name, here.join(", ")))
        })?;
        hand.apply(writes, Deadline::after(APPLY), between).map_err(failed)
    }

    fn check(&self) -> Result<(), GuestError> {
        let flush = |hand: &Hand| log::encode(&hand.known.name, hand.known.disk_bytes, &[log::Entry::Flush]);
        self.each(|hand| hand.apply(&flush(hand), Deadline::after(STORAGE), &mut || ()))
    }

    fn give_up(&self) -> Result<(), GuestError> {
        self.each(|hand| hand.give_up(Deadline::after(STORAGE)))
    }

    fn keep(&self) -> Result<(), GuestError> {
        self.away()
    }
}
