//! Frames and messages under any bytes.

use super::frames::{Frames, MAX_FRAME_BYTES};
use super::messages::{FromHand, FromRelay};

/// Frames come out as they went in, in one piece or byte by byte, up to the first that is none; a message that is understood is written as it came.
pub(crate) fn frames(bytes: &[u8]) {
    let mut whole = Frames::default();
    whole.push(bytes);
    let mut cut = Frames::default();
    let (mut later, mut rest) = (bytes.iter(), bytes);
    loop {
        let model = rest.split_first_chunk::<4>().map(|(length, after)| (u32::from_be_bytes(*length) as usize, after));
        match (whole.next(), model) {
            (Ok(Some(frame)), Some((length, after))) => {
                assert_eq!(frame, &after[..length]);
                let again = loop {
                    match cut.next().expect("a frame, as in one piece") {
                        Some(again) => break again.to_vec(),
                        None => cut.push(&[*later.next().expect("as many bytes")]),
                    }
                };
                assert_eq!(again, frame);
                if let Ok(message) = FromHand::decode(frame) {
                    assert_eq!(message.encode().parts().concat(), frame);
                }
                if let Ok(message) = FromRelay::decode(frame) {
                    assert_eq!(message.encode().parts().concat(), frame);
                }
                rest = &after[length..];
            }
            (Ok(None), model) => {
                assert!(model.is_none_or(|(length, after)| after.len() < length));
                return assert_eq!(whole.is_torn(), !rest.is_empty());
            }
            (Err(error), Some((length, _))) => {
                return assert!(error.bytes == length && (length == 0 || length > MAX_FRAME_BYTES));
            }
            (_, None) => panic!("a frame out of {} bytes", rest.len()),
        }
    }
}
