//! The protocol between relay and page server as it is on their socket.

use super::messages::{FromHand, FromRelay, VERSION};
use crate::golden::compare;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");

/// What a page server says, encoded.
pub(crate) fn from_hand() -> Vec<(&'static str, Vec<u8>)> {
    let messages = [
        ("attach", FromHand::Attach { version: 0x0102 }),
        ("look", FromHand::Look { version: 0x0102 }),
        ("emit", FromHand::Emit(&[0xd5; 9])),
        ("settle", FromHand::Settle { number: 0x0102_0304_0506_0708 }),
        ("go", FromHand::Go),
        ("let-go", FromHand::LetGo),
    ];
    messages.map(|(name, message)| (name, message.encode().parts().concat())).to_vec()
}

/// What a relay says, encoded.
pub(crate) fn from_relay() -> Vec<(&'static str, Vec<u8>)> {
    let messages = [
        ("attached", FromRelay::Attached { version: 0x0102, guest: 0x0304_0506 }),
        ("refused", FromRelay::Refused("process 7 has the hand")),
        ("frame", FromRelay::Frame(&[0xd5; 9])),
        ("settled", FromRelay::Settled { number: 0x0102_0304_0506_0708, torn: true, dropped: 300 }),
        ("free", FromRelay::Free),
    ];
    messages.map(|(name, message)| (name, message.encode().parts().concat())).to_vec()
}

#[test]
fn messages_are_what_they_were_when_their_version_came_out() {
    for (name, bytes) in compare(FOLDER, VERSION, "relay-from-hand", &from_hand()) {
        assert_eq!(FromHand::decode(&bytes).expect(&name).encode().parts().concat(), bytes, "{name}");
    }
    for (name, bytes) in compare(FOLDER, VERSION, "relay-from-relay", &from_relay()) {
        assert_eq!(FromRelay::decode(&bytes).expect(&name).encode().parts().concat(), bytes, "{name}");
    }
}
