//! Base64 with padding (RFC 4648 §4), as etcd's gateway writes bytes in JSON.

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// As text.
pub fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let mut word = [0; 4];
        word[1..1 + group.len()].copy_from_slice(group);
        let bits = u32::from_be_bytes(word);
        for digit in 0..4 {
            let letter = ALPHABET[(bits >> (18 - 6 * digit)) as usize & 63];
            text.push(if digit <= group.len() { letter as char } else { '=' });
        }
    }
    text
}

/// The bytes, if `text` is exactly what [`encode`] makes of them.
pub fn decode(text: &str) -> Option<Vec<u8>> {
    let text = text.as_bytes();
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    for group in text.chunks(4) {
        let padding = group.iter().rev().take_while(|&&letter| letter == b'=').count();
        if group.len() != 4 || padding > 2 {
            return None;
        }
        let digits = &group[..4 - padding];
        let bits = digits.iter().try_fold(0, |bits, &letter| {
            let digit = ALPHABET.iter().position(|&known| known == letter)?;
            Some(bits << 6 | digit as u32)
        })?;
        bytes.extend_from_slice(&(bits << (6 * padding)).to_be_bytes()[1..4 - padding]);
    }
    // Padding in the middle, and bits that say nothing, would be other ways to write the same.
    (encode(&bytes).as_bytes() == text).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_rfcs_examples_are_written_as_the_rfc_has_them() {
        let examples = [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ];
        for (bytes, text) in examples {
            assert_eq!(encode(bytes.as_bytes()), text);
            assert_eq!(decode(text).as_deref(), Some(bytes.as_bytes()));
        }
        for wrong in ["Zg=", "Zg", "Zh==", "Z===", "====", "Zg==Zg==", "Zm9v\n", "Zm-v"] {
            assert_eq!(decode(wrong), None, "{wrong:?}");
        }
    }

    proptest! {
        #[test]
        fn every_bytes_have_one_text(bytes in prop::collection::vec(any::<u8>(), 0..100), text in "[A-Za-z0-9+/=]{0,40}") {
            prop_assert_eq!(decode(&encode(&bytes)), Some(bytes));
            if let Some(bytes) = decode(&text) {
                prop_assert_eq!(encode(&bytes), text);
            }
        }
    }
}
