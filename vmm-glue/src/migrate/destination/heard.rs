//! The source's next word, and what is said of one that was not due. A message is named by its kind alone, because it carries device state
//! and keys; a text of the peer's is shortened and cannot steer a terminal.

use super::DestinationError;
use super::order::before_the_switch;
use crate::migrate::operator::Words;
use crate::migrate::peer::{Inbox, Listened, harmless};
use crate::migrate::protocol::{ProtocolError, ToDestination};
use belay_transport::Deadline;
use crossbeam_channel::{RecvTimeoutError, at, never, select};
use std::time::Duration;

/// Waits for the source's next word, for as long as `bound` says, while the guest has not been handed over; the operator may call it off.
pub(super) fn next(
    inbox: &Inbox<ToDestination>,
    wanted: &'static str,
    bound: Option<Duration>,
    words: &Words,
) -> Result<ToDestination, DestinationError> {
    let over = bound.map_or_else(never, |bound| at(Deadline::after(bound).instant()));
    loop {
        select! {
            recv(inbox.messages()) -> heard => return word(heard.ok()),
            recv(words.signals) -> _ => return Err(DestinationError::Interrupted),
            recv(words.orders) -> order => before_the_switch(order)?,
            recv(over) -> _ => {
                return Err(DestinationError::TimedOut { waiting_for: wanted, bound: bound.unwrap_or_default() });
            }
        }
    }
}

/// As [`next`], of a source that comes back: whatever the operator says meanwhile is looked at after it.
pub(super) fn next_within(
    inbox: &Inbox<ToDestination>,
    wanted: &'static str,
    bound: Duration,
) -> Result<ToDestination, DestinationError> {
    match inbox.messages().recv_timeout(bound) {
        Err(RecvTimeoutError::Timeout) => Err(DestinationError::TimedOut { waiting_for: wanted, bound }),
        heard => word(heard.ok()),
    }
}

/// What was heard, if it is a word of a source that is well.
fn word(heard: Option<Listened<ToDestination>>) -> Result<ToDestination, DestinationError> {
    match heard {
        Some(Listened::Message(ToDestination::Failed { reason, .. })) => {
            Err(DestinationError::PeerFailed(harmless(&reason)))
        }
        Some(Listened::Message(message)) => Ok(message),
        Some(Listened::Closed(why)) => Err(DestinationError::PeerClosed(harmless(&why))),
        None => Err(DestinationError::PeerClosed("the control thread ended".to_owned())),
    }
}

/// For a word that was not the one that was due.
pub(super) fn unexpected(message: &ToDestination, wanted: &'static str) -> DestinationError {
    ProtocolError::Unexpected { got: message.kind().to_owned(), wanted }.into()
}
