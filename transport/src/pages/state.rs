//! The life of one page, as transitions of one atomic byte.
//!
//! ```text
//!            claim            land
//!   Absent ────────> InFlight ────> Landed
//!     │                │  │            │
//!     │        discard │  │ fail       │ discard
//!     │                v  └──> Failed ─┤
//!     │        DiscardWanted           │
//!     │          │ settle              │
//!     │ discard  v                     v
//!     └──────> Discarded <─────────────┘
//! ```
//! A discard that finds a READ in flight cannot settle at once: the READ's bytes, older than the discard, may still land in
//! the frame. It leaves [`State::DiscardWanted`], and whoever owns the READ zeroes the frame once it is over and settles.
//! (DiscardWanted is *in flight* to everybody who asks; the file keeps it so that a new page server finishes it.)
//!
//! Orderings: a claim acquires, landing releases, so that whoever sees Landed sees the bytes. loom checks it below.

/// The atomic byte the transitions work on; loom has one of its own.
pub trait AtomicByte {
    /// Load with Acquire.
    fn load(&self) -> u8;
    /// Compare and exchange with AcqRel / Acquire; the value found on failure.
    fn exchange(&self, from: u8, to: u8) -> Result<(), u8>;
}

impl AtomicByte for std::sync::atomic::AtomicU8 {
    #[inline]
    fn load(&self) -> u8 {
        self.load(std::sync::atomic::Ordering::Acquire)
    }

    #[inline]
    fn exchange(&self, from: u8, to: u8) -> Result<(), u8> {
        use std::sync::atomic::Ordering::{AcqRel, Acquire};
        self.compare_exchange(from, to, AcqRel, Acquire).map(|_| ())
    }
}

/// What a frame is. The numbers are those of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// Its content is at the source only.
    Absent = 0,
    /// A READ of it is posted.
    InFlight = 1,
    /// Its content is here; the guest's from now on.
    Landed = 2,
    /// The guest gave it up: it is zero, and the source's content is never read again.
    Discarded = 3,
    /// Its READ failed; nothing of it may be shown.
    Failed = 4,
    /// In flight, and given up by the guest meanwhile.
    DiscardWanted = 5,
}

impl State {
    /// The state a byte of the file stands for.
    pub fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            0 => Self::Absent,
            1 => Self::InFlight,
            2 => Self::Landed,
            3 => Self::Discarded,
            4 => Self::Failed,
            5 => Self::DiscardWanted,
            _ => return None,
        })
    }

    /// Whether a READ may still write the frame.
    pub fn in_flight(self) -> bool {
        matches!(self, Self::InFlight | Self::DiscardWanted)
    }
}

/// What [`land`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Landing {
    /// Published: the bytes are the guest's.
    Landed,
    /// The guest gave the page up while it was read: zero the frame, then [`settle_discard`].
    DiscardWanted,
}

/// What [`discard`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Discard {
    /// Discarded now; what it was before.
    Settled { was: State },
    /// A READ is in flight; its owner will settle.
    Wanted,
}

/// The state now.
#[inline]
pub fn load(byte: &impl AtomicByte) -> State {
    checked(byte.load())
}

/// Absent → InFlight. Whether this caller won the frame.
#[inline]
pub fn claim(byte: &impl AtomicByte) -> bool {
    byte.exchange(State::Absent as u8, State::InFlight as u8).is_ok()
}

/// InFlight → Landed, by the owner of the READ, once its bytes are in place.
#[inline]
pub fn land(byte: &impl AtomicByte) -> Landing {
    match byte.exchange(State::InFlight as u8, State::Landed as u8) {
        Ok(()) => Landing::Landed,
        Err(found) => {
            assert_eq!(checked(found), State::DiscardWanted, "only the owner of a READ lands it");
            Landing::DiscardWanted
        }
    }
}

/// InFlight → Absent, by the owner of a claim that was never posted. Whether the guest gave the page up meanwhile; the
/// claim then goes on, for [`settle_discard`].
#[inline]
pub fn release(byte: &impl AtomicByte) -> bool {
    match byte.exchange(State::InFlight as u8, State::Absent as u8) {
        Ok(()) => false,
        Err(found) => {
            assert_eq!(checked(found), State::DiscardWanted, "only the owner of a claim releases it");
            true
        }
    }
}

/// InFlight → Failed, by the owner of the READ, once it can no longer write the frame. Whether the guest gave the page up
/// meanwhile; the frame then is not failed but to be zeroed, for [`settle_discard`]: whoever reads failed frames again must
/// not bring back what the guest has discarded.
pub fn fail(byte: &impl AtomicByte) -> bool {
    match byte.exchange(State::InFlight as u8, State::Failed as u8) {
        Ok(()) => false,
        Err(found) => {
            assert_eq!(checked(found), State::DiscardWanted, "only the owner of a READ fails it");
            true
        }
    }
}

/// DiscardWanted → Discarded, by the owner of the READ, once the frame is zero.
pub fn settle_discard(byte: &impl AtomicByte) {
    let settled = byte.exchange(State::DiscardWanted as u8, State::Discarded as u8);
    assert!(settled.is_ok(), "only the owner of a READ settles a discard; the frame is {:?}", load(byte));
}

/// The guest gave the page up. By anybody.
pub fn discard(byte: &impl AtomicByte) -> Discard {
    let mut was = load(byte);
    loop {
        let to = match was {
            State::DiscardWanted => return Discard::Wanted,
            State::InFlight => State::DiscardWanted,
            State::Discarded => return Discard::Settled { was },
            State::Absent | State::Landed | State::Failed => State::Discarded,
        };
        match byte.exchange(was as u8, to as u8) {
            Ok(()) if to == State::DiscardWanted => return Discard::Wanted,
            Ok(()) => return Discard::Settled { was },
            Err(found) => was = checked(found),
        }
    }
}

fn checked(byte: u8) -> State {
    State::from_byte(byte).expect("every byte of an opened state file was checked, and only these functions write them")
}

#[cfg(test)]
mod interleavings {
    //! The transitions under every interleaving loom can find.

    use super::*;
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicU8, Ordering};
    use loom::thread;

    impl AtomicByte for AtomicU8 {
        fn load(&self) -> u8 {
            self.load(Ordering::Acquire)
        }

        fn exchange(&self, from: u8, to: u8) -> Result<(), u8> {
            self.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).map(|_| ())
        }
    }

    /// A frame: its state, and the bytes it guards. loom reports any access to `bytes` that the state does not order.
    struct Frame {
        state: AtomicU8,
        bytes: UnsafeCell<u8>,
    }

    const SOURCE: u8 = 7;

    fn frame() -> Arc<Frame> {
        Arc::new(Frame { state: AtomicU8::new(State::Absent as u8), bytes: UnsafeCell::new(0) })
    }

    fn write(frame: &Frame, value: u8) {
        // SAFETY: loom itself proves that no other access is concurrent, or fails the test.
        frame.bytes.with_mut(|bytes| unsafe { *bytes = value });
    }

    fn read(frame: &Frame) -> u8 {
        // SAFETY: loom itself proves that no write is concurrent, or fails the test.
        frame.bytes.with(|bytes| unsafe { *bytes })
    }

    /// The engine's part: claim, READ, land or settle. Whether the claim was won.
    fn pull(frame: &Frame) -> bool {
        if !claim(&frame.state) {
            return false;
        }
        write(frame, SOURCE);
        if land(&frame.state) == Landing::DiscardWanted {
            write(frame, 0);
            settle_discard(&frame.state);
        }
        true
    }

    #[test]
    fn a_claim_is_won_once_under_every_interleaving() {
        loom::model(|| {
            let frame = frame();
            let others: Vec<_> = (0..2)
                .map(|_| {
                    let frame = frame.clone();
                    thread::spawn(move || pull(&frame))
                })
                .collect();
            let won = others.into_iter().map(|other| other.join().unwrap()).filter(|won| *won).count();
            assert_eq!(won, 1);
            assert_eq!((load(&frame.state), read(&frame)), (State::Landed, SOURCE));
        });
    }

    #[test]
    fn whoever_sees_landed_sees_the_bytes_under_every_interleaving() {
        loom::model(|| {
            let frame = frame();
            let puller = thread::spawn({
                let frame = frame.clone();
                move || pull(&frame)
            });
            if load(&frame.state) == State::Landed {
                assert_eq!(read(&frame), SOURCE);
            }
            puller.join().unwrap();
        });
    }

    #[test]
    fn a_discard_meeting_a_read_never_leaves_stale_bytes_under_every_interleaving() {
        loom::model(|| {
            let frame = frame();
            let puller = thread::spawn({
                let frame = frame.clone();
                move || pull(&frame)
            });
            let outcome = discard(&frame.state);
            // A settled discard zeroes the frame itself, as ZEROPAGE does: nobody else writes it from then on.
            if let Discard::Settled { .. } = outcome {
                write(&frame, 0);
            }
            puller.join().unwrap();
            assert_eq!(load(&frame.state), State::Discarded);
            assert_eq!(read(&frame), 0, "after {outcome:?}");
        });
    }

    #[test]
    fn no_frame_is_lost_when_a_claim_is_released_or_fails_under_every_interleaving() {
        loom::model(|| {
            let frame = frame();
            let first = thread::spawn({
                let frame = frame.clone();
                move || claim(&frame.state) && !release(&frame.state)
            });
            let second = thread::spawn({
                let frame = frame.clone();
                move || {
                    if claim(&frame.state) {
                        assert!(!fail(&frame.state), "nobody discards here");
                    }
                }
            });
            first.join().unwrap();
            second.join().unwrap();
            assert!(matches!(load(&frame.state), State::Absent | State::Failed), "{:?}", load(&frame.state));
        });
    }
}
