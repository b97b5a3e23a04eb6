use std::fmt;

use async_trait::async_trait;

use crate::{
    DeleteRequest, DeleteResponse, Lease, LeaseGrantRequest, LeaseId, LeaseStatus, PutRequest,
    PutResponse, RangeRequest, RangeResponse, Revision, StateError, Txn, TxnResponse, WatchRequest,
    WatchStream,
};

/// A store of desired and observed state, with the semantics of etcd v3's API.
///
/// Every call is linearizable, and a write that is answered is on stable storage. Shorter forms of
/// the most common calls are in [`StateStoreExt`](crate::StateStoreExt).
#[async_trait]
pub trait StateStore: Send + Sync + fmt::Debug {
    /// Reads keys. A revision that is gone is [`StateError::Compacted`], one to come
    /// [`StateError::FutureRevision`].
    async fn range(&self, request: RangeRequest) -> Result<RangeResponse, StateError>;

    /// Sets one key.
    async fn put(&self, request: PutRequest) -> Result<PutResponse, StateError>;

    /// Deletes keys.
    async fn delete(&self, request: DeleteRequest) -> Result<DeleteResponse, StateError>;

    /// Compares, then reads and writes, atomically.
    async fn txn(&self, txn: Txn) -> Result<TxnResponse, StateError>;

    /// Watches keys. When this returns, the watch is established: no later change is missed.
    ///
    /// A start revision that is gone is reported by this call or by the stream's first item, as
    /// [`StateError::Compacted`]. One to come is fine: the stream starts there.
    async fn watch(&self, request: WatchRequest) -> Result<WatchStream, StateError>;

    /// Forgets history before `revision`: what can be read at it or later stays. Returns the
    /// current revision.
    async fn compact(&self, revision: Revision) -> Result<Revision, StateError>;

    /// Grants a lease.
    async fn lease_grant(&self, request: LeaseGrantRequest) -> Result<Lease, StateError>;

    /// Gives a lease its full time again.
    async fn lease_keep_alive(&self, lease: LeaseId) -> Result<Lease, StateError>;

    /// Ends a lease and deletes its keys at one revision, which is returned; the current one if it
    /// had none.
    async fn lease_revoke(&self, lease: LeaseId) -> Result<Revision, StateError>;

    /// A lease's state, with the keys attached to it if `keys` is set.
    async fn lease_status(&self, lease: LeaseId, keys: bool) -> Result<LeaseStatus, StateError>;

    /// The store's state.
    async fn status(&self) -> Result<StoreStatus, StateError>;

    /// Closes the store: calls that follow are [`StateError::Closed`]. A store that is dropped is
    /// closed as well; this one waits and reports errors.
    async fn close(&self) -> Result<(), StateError>;
}

/// A store's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreStatus {
    /// The backend: `embedded`, `etcd` or `cluster`.
    pub backend: &'static str,
    /// Where it is: a path, or endpoints. No passwords.
    pub location: String,
    /// Version of the server or of the stored format.
    pub version: String,
    /// Current revision.
    pub revision: Revision,
    /// Oldest revision that can be read, where the backend tells.
    pub compact_revision: Option<Revision>,
    /// Bytes on disk.
    pub size_bytes: u64,
}
