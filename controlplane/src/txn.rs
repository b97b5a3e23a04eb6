use bytes::Bytes;

use crate::{
    DeleteRequest, DeleteResponse, KeyRange, LeaseId, PutRequest, PutResponse, RangeRequest,
    RangeResponse, Revision,
};

/// A transaction, as etcd's `Txn`: if every compare holds, `then` is done, else `or_else`;
/// atomically and at one revision.
///
/// Every compare, those of nested transactions included, sees the state before the transaction.
/// Ranges see the changes of operations before them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Txn {
    /// What must hold; none always holds.
    pub when: Vec<Compare>,
    /// Done if it does.
    pub then: Vec<TxnOp>,
    /// Done if it doesn't.
    pub or_else: Vec<TxnOp>,
}

impl Txn {
    /// A transaction that does nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds compares.
    #[must_use]
    pub fn when(mut self, compares: impl IntoIterator<Item = Compare>) -> Self {
        self.when.extend(compares);
        self
    }

    /// Adds operations to do if the compares hold.
    #[must_use]
    pub fn then(mut self, ops: impl IntoIterator<Item = TxnOp>) -> Self {
        self.then.extend(ops);
        self
    }

    /// Adds operations to do if the compares don't hold.
    #[must_use]
    pub fn or_else(mut self, ops: impl IntoIterator<Item = TxnOp>) -> Self {
        self.or_else.extend(ops);
        self
    }
}

/// One operation of a [`Txn`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TxnOp {
    /// Reads keys.
    Range(RangeRequest),
    /// Sets a key.
    Put(PutRequest),
    /// Deletes keys.
    Delete(DeleteRequest),
    /// A transaction in the transaction.
    Txn(Txn),
}

impl From<RangeRequest> for TxnOp {
    fn from(request: RangeRequest) -> Self {
        Self::Range(request)
    }
}

impl From<PutRequest> for TxnOp {
    fn from(request: PutRequest) -> Self {
        Self::Put(request)
    }
}

impl From<DeleteRequest> for TxnOp {
    fn from(request: DeleteRequest) -> Self {
        Self::Delete(request)
    }
}

impl From<Txn> for TxnOp {
    fn from(txn: Txn) -> Self {
        Self::Txn(txn)
    }
}

/// A condition on one key, or on every key of a range.
///
/// A key that doesn't exist has version, create and mod revision and lease 0; a compare of its
/// value never holds. A range without keys is compared as one such key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compare {
    /// The keys to compare: the condition must hold for each.
    pub range: KeyRange,
    /// How.
    pub op: CompareOp,
    /// With what.
    pub target: CompareTarget,
}

/// How a key's attribute relates to the one given: `attribute op given`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompareOp {
    /// `==`
    Equal,
    /// `!=`
    NotEqual,
    /// `>`
    Greater,
    /// `<`
    Less,
}

impl CompareOp {
    pub(crate) fn holds(self, ordering: std::cmp::Ordering) -> bool {
        match self {
            Self::Equal => ordering.is_eq(),
            Self::NotEqual => ordering.is_ne(),
            Self::Greater => ordering.is_gt(),
            Self::Less => ordering.is_lt(),
        }
    }
}

/// The attribute of a key to compare, and what to compare it with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CompareTarget {
    /// Number of changes since the key was created; 0 if there is no such key.
    Version(i64),
    /// Revision at which the key was created; 0 if there is no such key.
    CreateRevision(Revision),
    /// Revision of the last change; 0 if there is no such key.
    ModRevision(Revision),
    /// The value, in byte order.
    Value(Bytes),
    /// The lease; [`NO_LEASE`](crate::NO_LEASE) for none.
    Lease(LeaseId),
}

impl Compare {
    /// The number of changes since the key was created.
    pub fn version(range: impl Into<KeyRange>, op: CompareOp, version: i64) -> Self {
        Self {
            range: range.into(),
            op,
            target: CompareTarget::Version(version),
        }
    }

    /// The revision at which the key was created.
    pub fn create_revision(range: impl Into<KeyRange>, op: CompareOp, revision: Revision) -> Self {
        Self {
            range: range.into(),
            op,
            target: CompareTarget::CreateRevision(revision),
        }
    }

    /// The revision of the last change.
    pub fn mod_revision(range: impl Into<KeyRange>, op: CompareOp, revision: Revision) -> Self {
        Self {
            range: range.into(),
            op,
            target: CompareTarget::ModRevision(revision),
        }
    }

    /// The value.
    pub fn value(range: impl Into<KeyRange>, op: CompareOp, value: impl Into<Vec<u8>>) -> Self {
        let target = CompareTarget::Value(Bytes::from(value.into()));
        Self {
            range: range.into(),
            op,
            target,
        }
    }

    /// The lease.
    pub fn lease(range: impl Into<KeyRange>, op: CompareOp, lease: LeaseId) -> Self {
        Self {
            range: range.into(),
            op,
            target: CompareTarget::Lease(lease),
        }
    }

    /// The key exists.
    pub fn exists(key: impl Into<Vec<u8>>) -> Self {
        Self::version(KeyRange::key(key), CompareOp::Greater, 0)
    }

    /// The key doesn't exist.
    pub fn missing(key: impl Into<Vec<u8>>) -> Self {
        Self::version(KeyRange::key(key), CompareOp::Equal, 0)
    }

    /// The key was last changed at `revision`; 0 if it must not exist.
    pub fn unchanged(key: impl Into<Vec<u8>>, revision: Revision) -> Self {
        Self::mod_revision(KeyRange::key(key), CompareOp::Equal, revision)
    }
}

/// The answer to a [`Txn`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TxnResponse {
    /// The revision of this write; the current one if nothing was changed.
    pub revision: Revision,
    /// Whether the compares held.
    pub succeeded: bool,
    /// One answer for each operation done, in order.
    pub results: Vec<TxnResult>,
}

/// The answer to one operation of a [`Txn`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TxnResult {
    /// To a [`TxnOp::Range`].
    Range(RangeResponse),
    /// To a [`TxnOp::Put`].
    Put(PutResponse),
    /// To a [`TxnOp::Delete`].
    Delete(DeleteResponse),
    /// To a [`TxnOp::Txn`].
    Txn(TxnResponse),
}
