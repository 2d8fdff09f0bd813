//! The source's next word, and what is said of one that was not due. A message is named by its kind alone, because it carries device state
//! and keys; a text of the peer's is shortened and cannot steer a terminal.

use super::DestinationError;
use super::order::before_the_switch;
use crate::migrate::operator::Words;
use crate::migrate::peer::{Inbox, Listened};
use crate::migrate::protocol::{ProtocolError, ToDestination};
use belay_transport::{Deadline, harmless};
use crossbeam_channel::{Receiver, RecvTimeoutError, Select, at, never, select};
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

/// As [`next_within`], where the wait may be long: an operator who says something ends it, and is listened to by the role's own loop.
pub(super) fn next_unless_told(
    inbox: &Inbox<ToDestination>,
    wanted: &'static str,
    bound: Duration,
    words: &Words,
) -> Result<ToDestination, DestinationError> {
    match await_any(inbox.messages(), words, Deadline::after(bound)) {
        Ready::Source => word(inbox.messages().try_recv().ok()),
        Ready::Operator => Err(DestinationError::Refused(format!(
            "the operator spoke before the source had said {wanted}: that goes first, and the source dials again"
        ))),
        Ready::Nobody => Err(DestinationError::TimedOut { waiting_for: wanted, bound }),
    }
}

/// Who can be listened to.
#[derive(Debug, PartialEq, Eq)]
enum Ready {
    Source,
    Operator,
    Nobody,
}

/// Takes nothing out of any channel. A source that has gone counts as one that can be listened to; a voice of the operator's that has
/// gone is not waited for any more.
fn await_any<T>(source: &Receiver<T>, words: &Words, deadline: Deadline) -> Ready {
    let mut select = Select::new();
    let from_source = select.recv(source);
    select.recv(&words.signals);
    select.recv(&words.orders);
    while let Ok(ready) = select.ready_deadline(deadline.instant()) {
        if ready == from_source {
            return Ready::Source;
        }
        if !words.signals.is_empty() || !words.orders.is_empty() {
            return Ready::Operator;
        }
        select.remove(ready);
    }
    Ready::Nobody
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

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::unbounded;

    #[test]
    fn a_long_wait_for_the_source_ends_when_the_operator_speaks_and_leaves_what_was_said_where_it_is() {
        let (say, signals) = unbounded();
        let (source_says, source) = unbounded();
        let words = Words { signals, ..Words::none() };
        let long = || Deadline::after(Duration::from_secs(60));
        say.send(libc::SIGTERM).unwrap();
        assert_eq!(await_any(&source, &words, long()), Ready::Operator);
        assert_eq!(words.signals.try_recv(), Ok(libc::SIGTERM));
        source_says.send(()).unwrap();
        assert_eq!(await_any(&source, &words, long()), Ready::Source);
        source.recv().unwrap();
        // A voice that has gone is none, and does not make the wait spin.
        drop(say);
        assert_eq!(await_any(&source, &words, Deadline::after(Duration::from_millis(20))), Ready::Nobody);
        drop(source_says);
        assert_eq!(await_any(&source, &words, long()), Ready::Source);
    }
}
