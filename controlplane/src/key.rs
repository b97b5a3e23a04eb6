use bytes::Bytes;

/// The keys a request is about: one key, a prefix, or a half-open range in byte order.
///
/// Keys are arbitrary non-empty bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRange {
    start: Bytes,
    end: RangeEnd,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum RangeEnd {
    /// Only `start` itself.
    Single,
    /// Keys from `start` up to, but not including this.
    Before(Bytes),
    /// Keys from `start` on.
    Unbounded,
}

impl KeyRange {
    /// Exactly one key.
    pub fn key(key: impl Into<Vec<u8>>) -> Self {
        Self {
            start: Bytes::from(key.into()),
            end: RangeEnd::Single,
        }
    }

    /// Every key that begins with `prefix`; every key if it is empty.
    pub fn prefix(prefix: impl Into<Vec<u8>>) -> Self {
        let start = prefix.into();
        let end = prefix_end(&start).map_or(RangeEnd::Unbounded, RangeEnd::Before);
        Self {
            start: Bytes::from(start),
            end,
        }
    }

    /// Keys from `start` up to, but not including `end`. Empty if `end` is not above `start`.
    pub fn range(start: impl Into<Vec<u8>>, end: impl Into<Vec<u8>>) -> Self {
        Self {
            start: Bytes::from(start.into()),
            end: RangeEnd::Before(Bytes::from(end.into())),
        }
    }

    /// Keys from `start` on.
    pub fn from(start: impl Into<Vec<u8>>) -> Self {
        Self {
            start: Bytes::from(start.into()),
            end: RangeEnd::Unbounded,
        }
    }

    /// Every key.
    pub fn all() -> Self {
        Self {
            start: Bytes::new(),
            end: RangeEnd::Unbounded,
        }
    }

    /// The first key that the range can contain; empty for all keys.
    pub fn start(&self) -> &[u8] {
        &self.start
    }

    /// Whether the range is one key.
    pub fn is_single(&self) -> bool {
        self.end == RangeEnd::Single
    }

    /// Whether `key` is in the range.
    pub fn contains(&self, key: &[u8]) -> bool {
        match &self.end {
            RangeEnd::Single => key == self.start,
            RangeEnd::Before(end) => key >= &self.start[..] && key < &end[..],
            RangeEnd::Unbounded => key >= &self.start[..],
        }
    }

    /// The part of this range behind `key`: where the next page starts after `key` was read.
    #[must_use]
    pub fn after(&self, key: &[u8]) -> Self {
        if self.is_single() {
            return Self::range(key.to_vec(), key.to_vec());
        }
        let mut start = Vec::with_capacity(key.len() + 1);
        start.extend_from_slice(key);
        start.push(0);
        Self {
            start: Bytes::from(start),
            end: self.end.clone(),
        }
    }

    /// Whether no key can be in the range.
    pub fn is_empty(&self) -> bool {
        match &self.end {
            RangeEnd::Single => self.start.is_empty(),
            // The empty key is none.
            RangeEnd::Before(end) => end <= &self.start || end[..] <= [0][..],
            RangeEnd::Unbounded => false,
        }
    }

    pub(crate) fn end(&self) -> &RangeEnd {
        &self.end
    }

    pub(crate) fn size(&self) -> usize {
        let end = match &self.end {
            RangeEnd::Before(end) => end.len(),
            RangeEnd::Single | RangeEnd::Unbounded => 0,
        };
        self.start.len() + end
    }
}

impl<K: Into<Vec<u8>>> From<K> for KeyRange {
    /// One key.
    fn from(key: K) -> Self {
        Self::key(key)
    }
}

/// The first key behind every key that begins with `prefix`, or `None` if there is none.
pub(crate) fn prefix_end(prefix: &[u8]) -> Option<Bytes> {
    let last = prefix.iter().rposition(|byte| *byte != u8::MAX)?;
    let mut end = prefix[..=last].to_vec();
    end[last] += 1;
    Some(Bytes::from(end))
}
