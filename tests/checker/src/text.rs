//! Bytes as text that people can read and that loses nothing: ASCII, the rest escaped.

use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serializer, de::Error as _};

/// Keys and values as they are printed.
pub fn text(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}

pub fn serialize<S: Serializer>(bytes: &Bytes, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&text(bytes))
}

pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
    let text = String::deserialize(deserializer)?;
    unescape(text.as_bytes())
        .map(Bytes::from)
        .ok_or_else(|| D::Error::custom(format!("{text:?} is not escaped ASCII")))
}

fn unescape(mut text: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    while let [first, rest @ ..] = text {
        let (byte, rest) = match (first, rest) {
            (b'\\', [b'x', high, low, rest @ ..]) => (hex(*high)? << 4 | hex(*low)?, rest),
            (b'\\', [b'n', rest @ ..]) => (b'\n', rest),
            (b'\\', [b'r', rest @ ..]) => (b'\r', rest),
            (b'\\', [b't', rest @ ..]) => (b'\t', rest),
            (b'\\', [b'x', ..] | []) => return None,
            (b'\\', [escaped, rest @ ..]) => (*escaped, rest),
            (plain, rest) => (*plain, rest),
        };
        bytes.push(byte);
        text = rest;
    }
    Some(bytes)
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit)
        .to_digit(16)
        .and_then(|digit| u8::try_from(digit).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_lost() {
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(unescape(text(&all).as_bytes()), Some(all));
        assert_eq!(unescape(b"\\x4"), None);
    }
}
