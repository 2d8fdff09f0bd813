//! The source's next word, and what is said of one that was not due. A message is named by its kind alone, because it carries device state
//! and keys; a text of the peer's is shortened and cannot steer a terminal.

use super::DestinationError;
use crate::migrate::peer::{Inbox, Listened, harmless};
use crate::migrate::protocol::{ProtocolError, ToDestination};
use belay_transport::Deadline;
use crossbeam_channel::{Receiver, at, never, select};
use std::time::Duration;

/// Waits for the source's next word, for as long as `bound` says, or for a word of the operator's.
pub(super) fn next<W>(
    inbox: &Inbox<ToDestination>,
    wanted: &'static str,
    bound: Option<Duration>,
    words: &Receiver<W>,
) -> Result<ToDestination, DestinationError> {
    let over = bound.map_or_else(never, |bound| at(Deadline::after(bound).instant()));
    select! {
        recv(inbox.messages()) -> heard => match heard {
            Ok(Listened::Message(ToDestination::Failed { reason, .. })) => {
                Err(DestinationError::PeerFailed(harmless(&reason)))
            }
            Ok(Listened::Message(message)) => Ok(message),
            Ok(Listened::Closed(why)) => Err(DestinationError::PeerClosed(harmless(&why))),
            Err(_) => Err(DestinationError::PeerClosed("the control thread ended".to_owned())),
        },
        recv(words) -> _ => Err(DestinationError::Interrupted),
        recv(over) -> _ => {
            Err(DestinationError::TimedOut { waiting_for: wanted, bound: bound.unwrap_or_default() })
        }
    }
}

/// As [`next`], whatever the operator says meanwhile.
pub(super) fn next_within(
    inbox: &Inbox<ToDestination>,
    wanted: &'static str,
    bound: Duration,
) -> Result<ToDestination, DestinationError> {
    next(inbox, wanted, Some(bound), &never::<()>())
}

/// For a word that was not the one that was due.
pub(super) fn unexpected(message: &ToDestination, wanted: &'static str) -> DestinationError {
    ProtocolError::Unexpected { got: message.kind().to_owned(), wanted }.into()
}
