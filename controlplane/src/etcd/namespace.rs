//! Confines keys to a prefix.

use bytes::Bytes;

use crate::KeyRange;
use crate::key::{RangeEnd, prefix_end};

/// Translates keys and ranges of a store to those of the cluster, and back.
#[derive(Debug, Clone)]
pub(super) struct Namespace {
    prefix: Vec<u8>,
}

/// A range as etcd wants it: one key, or keys up to an end that is not included, where the end
/// `\0` stands for all keys from the start on.
pub(super) struct EncodedRange {
    pub(super) key: Vec<u8>,
    pub(super) end: Option<Vec<u8>>,
}

impl Namespace {
    pub(super) fn new(prefix: Vec<u8>) -> Self {
        Self { prefix }
    }

    pub(super) fn prefix(&self) -> &[u8] {
        &self.prefix
    }

    pub(super) fn key(&self, key: &[u8]) -> Vec<u8> {
        [&self.prefix, key].concat()
    }

    pub(super) fn range(&self, range: &KeyRange) -> EncodedRange {
        if range.is_empty() {
            // Most empty ranges would mean something else to etcd: an empty end a single key, the
            // end "\0" every key.
            let key = self.key(b"empty");
            let end = Some(key.clone());
            return EncodedRange { key, end };
        }
        let mut key = self.key(range.start());
        if key.is_empty() {
            // The first key there can be.
            key.push(0);
        }
        let end = match range.end() {
            RangeEnd::Single => None,
            RangeEnd::Before(end) => Some(self.key(end)),
            RangeEnd::Unbounded => Some(prefix_end(&self.prefix).map_or(vec![0], Vec::from)),
        };
        EncodedRange { key, end }
    }

    /// The key as callers know it, if it is one of theirs.
    pub(super) fn strip(&self, key: &[u8]) -> Option<Bytes> {
        key.strip_prefix(&self.prefix[..])
            .map(Bytes::copy_from_slice)
    }

    /// As [`strip`](Self::strip), without a copy.
    pub(super) fn strip_owned(&self, key: Vec<u8>) -> Option<Bytes> {
        let inside = key.starts_with(&self.prefix);
        inside.then(|| Bytes::from(key).slice(self.prefix.len()..))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(prefix: &[u8], range: &KeyRange) -> (Vec<u8>, Option<Vec<u8>>) {
        let range = Namespace::new(prefix.to_vec()).range(range);
        (range.key, range.end)
    }

    #[test]
    fn ranges_stay_inside_the_prefix() {
        for range in [
            KeyRange::all(),
            KeyRange::prefix(""),
            KeyRange::prefix([0xff]),
            KeyRange::from("x"),
            KeyRange::from([0xff, 0xff]),
        ] {
            let (key, end) = encoded(b"p/", &range);
            assert!(key.starts_with(b"p/"), "{range:?}");
            assert_eq!(end.as_deref(), Some(&b"p0"[..]), "{range:?}");
        }
        assert_eq!(
            encoded(b"p/", &KeyRange::range("", "b")),
            (b"p/".to_vec(), Some(b"p/b".to_vec()))
        );
        assert_eq!(encoded(b"p/", &KeyRange::key("b")), (b"p/b".to_vec(), None));
    }

    #[test]
    fn all_keys_without_a_prefix() {
        assert_eq!(encoded(b"", &KeyRange::all()), (vec![0], Some(vec![0])));
        assert_eq!(
            encoded(b"", &KeyRange::from("x")),
            (b"x".to_vec(), Some(vec![0]))
        );
    }

    #[test]
    fn empty_ranges_never_become_wide_ones() {
        for range in [
            KeyRange::range("", ""),
            KeyRange::range("", [0]),
            KeyRange::range("a", ""),
            KeyRange::range("a", [0]),
            KeyRange::range("b", "a"),
            KeyRange::range("a", "a"),
        ] {
            let (key, end) = encoded(b"", &range);
            assert!(range.is_empty(), "{range:?}");
            assert_eq!(Some(key), end, "{range:?}");
        }
    }
}
