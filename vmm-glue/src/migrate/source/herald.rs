//! Looking for a destination that was cut off: dials it until it has come back and each has proved to the other who it is.
//!
//! The destination listens for as long as it runs, fenced or not; the source is the side that dials, as at the beginning. Nobody is hurried: a
//! destination that is not there is asked for again, more and more seldom, until the grace is over.

use super::{Happened, Happening};
use crate::migrate::protocol::{self, ToDestination};
use crate::migrate::reattach::Answered;
use crate::migrate::settings::Proposal;
use belay_transport::Deadline;
use belay_transport::explain;
use belay_transport::session::{self, Address, Offer, RegionGeometry, SessionConfig, SourceSession};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// One try.
const ONE_TRY: Duration = Duration::from_secs(2);
/// Between two tries.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);
/// How soon a herald that is not wanted any more ends, but for a try that is under way.
const LOOK: Duration = Duration::from_millis(20);

/// What a herald says, and as which session's: none has begun.
pub(super) const NO_SESSION: u64 = 0;

/// Everything a herald needs to know.
pub(super) struct Errand {
    pub address: Address,
    pub config: SessionConfig,
    pub proposal: Proposal,
    pub geometry: Vec<RegionGeometry>,
    /// `None`: until it is told to stop.
    pub grace: Option<Duration>,
}

/// A thread that dials. Ends by itself soon after it was dropped.
pub(super) struct Herald(Arc<AtomicBool>);

impl Herald {
    /// Sends it off. It says [`Happening::CameBack`] or [`Happening::GraceOver`], once, and why a try failed when that changes.
    pub(super) fn send(errand: Errand, happened: Happened) -> std::io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        std::thread::Builder::new().name("herald".into()).spawn(move || {
            let say = |what| {
                if !stopped.load(Ordering::Acquire) {
                    // Waits while the main loop is busy; a main loop that is gone hears nothing.
                    let _ = happened.send((NO_SESSION, what));
                }
            };
            seek(&errand, &stopped, say);
        })?;
        Ok(Self(stop))
    }
}

impl Drop for Herald {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

fn seek(errand: &Errand, stopped: &AtomicBool, say: impl Fn(Happening)) {
    let over = errand.grace.map(|grace| Instant::now() + grace);
    let (mut pause, mut told) = (FIRST_PAUSE, String::new());
    loop {
        if stopped.load(Ordering::Acquire) {
            return;
        }
        match dial(errand) {
            Ok(session) => return say(Happening::CameBack(Box::new(session))),
            Err(why) if why != told => {
                told.clone_from(&why);
                say(Happening::NotBack(why));
            }
            Err(_) => {}
        }
        let next = Instant::now() + pause;
        pause = (pause * 2).min(LONGEST_PAUSE);
        while Instant::now() < next {
            if stopped.load(Ordering::Acquire) {
                return;
            }
            if over.is_some_and(|over| Instant::now() >= over) {
                return say(Happening::GraceOver(told));
            }
            std::thread::sleep(LOOK.min(next.saturating_duration_since(Instant::now())));
        }
    }
}

/// One try: a session whose other end has proved that it is this migration's destination, and been given the same proof.
fn dial(errand: &Errand) -> Result<SourceSession, String> {
    let identity = errand.proposal.identity;
    let call = identity.call().map_err(|error| error.to_string())?;
    let proposal = Proposal { reattach: Some(call), ..errand.proposal.clone() };
    let offer = Offer { geometry: errand.geometry.clone(), blob: protocol::encode(&proposal) };
    let deadline = Deadline::after(ONE_TRY);
    let connected = session::connect(&errand.address, errand.config.clone(), &offer, deadline);
    let session = connected.map_err(|error| explain(&error))?;
    let answered = protocol::decode::<Answered>(&session.blob).map_err(|error| explain(&error))?;
    let proof = identity.conclude(session.agreed.session, &call, &answered);
    let proof = proof.ok_or("whoever answers there is not this migration's destination")?;
    let reattach = protocol::encode(&ToDestination::Reattach { proof });
    session.control.send(&reattach, deadline).map_err(|error| explain(&error))?;
    Ok(session)
}
