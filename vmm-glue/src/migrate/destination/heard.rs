//! The source's next word, and what is said of one that was not due. A message is named by its kind alone, because it carries device state
//! and keys; a text of the peer's is shortened and cannot steer a terminal.

use super::DestinationError;
use super::order::before_the_switch;
use crate::migrate::operator::Words;
use crate::migrate::peer::{Inbox, Listened, harmless};
use crate::migrate::protocol::{ProtocolError, ToDestination};
use belay_transport::Deadline;
use crossbeam_channel::{at, never, select};
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
            recv(inbox.messages()) -> heard => return match heard {
                Ok(Listened::Message(ToDestination::Failed { reason, .. })) => {
                    Err(DestinationError::PeerFailed(harmless(&reason)))
                }
                Ok(Listened::Message(message)) => Ok(message),
                Ok(Listened::Closed(why)) => Err(DestinationError::PeerClosed(harmless(&why))),
                Err(_) => Err(DestinationError::PeerClosed("the control thread ended".to_owned())),
            },
            recv(words.signals) -> _ => return Err(DestinationError::Interrupted),
            recv(words.orders) -> order => before_the_switch(order)?,
            recv(over) -> _ => {
                return Err(DestinationError::TimedOut { waiting_for: wanted, bound: bound.unwrap_or_default() });
            }
        }
    }
}

/// For a word that was not the one that was due.
pub(super) fn unexpected(message: &ToDestination, wanted: &'static str) -> DestinationError {
    ProtocolError::Unexpected { got: message.kind().to_owned(), wanted }.into()
}
