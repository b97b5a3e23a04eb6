use bytes::Bytes;

/// A point in the store's history. The store is at revision 1 when it is new; every write that
/// changes something, a whole transaction being one write, takes the next revision.
pub type Revision = i64;

/// Identifies a lease. 0 is no lease: [`NO_LEASE`].
pub type LeaseId = i64;

/// The lease id of a key without a lease.
pub const NO_LEASE: LeaseId = 0;

/// A key with its value and its place in history, as etcd's `mvccpb.KeyValue`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue {
    /// The key.
    pub key: Bytes,
    /// The value; empty in a keys-only answer.
    pub value: Bytes,
    /// Revision at which the key was created: it didn't exist just before.
    pub create_revision: Revision,
    /// Revision of the last change.
    pub mod_revision: Revision,
    /// Number of changes since the key was created, that one included.
    pub version: i64,
    /// The lease that deletes this key when it ends, or [`NO_LEASE`].
    pub lease: LeaseId,
}
