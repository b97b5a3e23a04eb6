//! The last output, which a new client gets first.

use std::collections::VecDeque;

/// Keeps the last `limit` bytes.
#[derive(Debug)]
pub(super) struct Replay {
    bytes: VecDeque<u8>,
    limit: usize,
}

impl Replay {
    pub(super) const fn new(limit: usize) -> Self {
        Self {
            bytes: VecDeque::new(),
            limit,
        }
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        let bytes = &bytes[bytes.len().saturating_sub(self.limit)..];
        let excess = (self.bytes.len() + bytes.len()).saturating_sub(self.limit);
        self.bytes.drain(..excess);
        self.bytes.extend(bytes);
    }

    pub(super) fn to_vec(&self) -> Vec<u8> {
        self.bytes.iter().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_bytes_are_kept() {
        let mut replay = Replay::new(5);
        replay.push(b"abc");
        replay.push(b"def");
        assert_eq!(replay.to_vec(), b"bcdef");
        replay.push(b"0123456789");
        assert_eq!(replay.to_vec(), b"56789");
    }
}
