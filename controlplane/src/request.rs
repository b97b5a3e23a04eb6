use bytes::Bytes;

use crate::{KeyRange, KeyValue, LeaseId, NO_LEASE, Revision};

/// Reads keys in byte order, as etcd's `Range`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RangeRequest {
    /// The keys to read.
    pub range: KeyRange,
    /// Read the state as it was at this revision; `None` reads the current one.
    pub revision: Option<Revision>,
    /// Return at most this many keys; `None` and 0 return all, up to
    /// [`MAX_RANGE_BYTES`](crate::limits::MAX_RANGE_BYTES).
    pub limit: Option<u32>,
    /// Leave the values out.
    pub keys_only: bool,
    /// Return only how many there are.
    pub count_only: bool,
}

impl RangeRequest {
    /// Reads everything in `range`, now.
    pub fn new(range: impl Into<KeyRange>) -> Self {
        Self {
            range: range.into(),
            revision: None,
            limit: None,
            keys_only: false,
            count_only: false,
        }
    }

    /// Reads everything below `prefix`, now.
    pub fn prefix(prefix: impl Into<Vec<u8>>) -> Self {
        Self::new(KeyRange::prefix(prefix))
    }

    /// Reads the state as it was at `revision`.
    #[must_use]
    pub fn at(mut self, revision: Revision) -> Self {
        self.revision = Some(revision);
        self
    }

    /// Returns at most `limit` keys; 0 means no limit.
    #[must_use]
    pub fn limit(mut self, limit: u32) -> Self {
        self.limit = (limit > 0).then_some(limit);
        self
    }

    /// Leaves the values out.
    #[must_use]
    pub fn keys_only(mut self) -> Self {
        self.keys_only = true;
        self
    }

    /// Returns only how many keys there are.
    #[must_use]
    pub fn count_only(mut self) -> Self {
        self.count_only = true;
        self
    }
}

/// The answer to a [`RangeRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RangeResponse {
    /// The store's revision when it answered, also if an older one was read.
    pub revision: Revision,
    /// The keys, in byte order.
    pub kvs: Vec<KeyValue>,
    /// Whether the limit left keys out: continue behind the last key, at the same revision.
    pub more: bool,
    /// Number of keys in the range, those beyond the limit included.
    pub count: i64,
}

/// Sets one key, as etcd's `Put`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PutRequest {
    /// The key; not empty.
    pub key: Bytes,
    /// The new value.
    pub value: Bytes,
    /// The lease that the key is attached to from now on; [`NO_LEASE`] detaches it.
    pub lease: LeaseId,
    /// Return the pair that was replaced.
    pub prev_kv: bool,
}

impl PutRequest {
    /// Sets `key` to `value`, without a lease.
    pub fn new(key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) -> Self {
        Self {
            key: Bytes::from(key.into()),
            value: Bytes::from(value.into()),
            lease: NO_LEASE,
            prev_kv: false,
        }
    }

    /// Attaches the key to `lease`.
    #[must_use]
    pub fn lease(mut self, lease: LeaseId) -> Self {
        self.lease = lease;
        self
    }

    /// Returns the pair that was replaced.
    #[must_use]
    pub fn prev_kv(mut self) -> Self {
        self.prev_kv = true;
        self
    }
}

/// The answer to a [`PutRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PutResponse {
    /// The revision of this write.
    pub revision: Revision,
    /// The pair that was replaced, if asked for and there was one.
    pub prev_kv: Option<KeyValue>,
}

/// Deletes keys, as etcd's `DeleteRange`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeleteRequest {
    /// The keys to delete.
    pub range: KeyRange,
    /// Return the pairs that were deleted.
    pub prev_kv: bool,
}

impl DeleteRequest {
    /// Deletes everything in `range`.
    pub fn new(range: impl Into<KeyRange>) -> Self {
        Self {
            range: range.into(),
            prev_kv: false,
        }
    }

    /// Deletes everything below `prefix`.
    pub fn prefix(prefix: impl Into<Vec<u8>>) -> Self {
        Self::new(KeyRange::prefix(prefix))
    }

    /// Returns the pairs that were deleted.
    #[must_use]
    pub fn prev_kv(mut self) -> Self {
        self.prev_kv = true;
        self
    }
}

/// The answer to a [`DeleteRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DeleteResponse {
    /// The revision of this write; the current one if nothing was deleted.
    pub revision: Revision,
    /// Number of keys deleted.
    pub deleted: i64,
    /// The pairs deleted, in byte order, if asked for.
    pub prev_kvs: Vec<KeyValue>,
}
