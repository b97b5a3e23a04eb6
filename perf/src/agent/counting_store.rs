//! A state store that counts what is asked of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use keelson_controlplane::{
    DeleteRequest, DeleteResponse, Lease, LeaseGrantRequest, LeaseId, LeaseStatus, PutRequest,
    PutResponse, RangeRequest, RangeResponse, Revision, StateError, StateStore, StoreStatus, Txn,
    TxnResponse, WatchRequest, WatchStream,
};

/// What was asked of stores.
#[derive(Debug, Default)]
pub struct Requests {
    reads: AtomicU64,
    writes: AtomicU64,
    keep_alives: AtomicU64,
}

impl Requests {
    /// Reads and writes; renewals of leases are apart.
    pub fn total(&self) -> u64 {
        self.reads.load(Ordering::Relaxed) + self.writes.load(Ordering::Relaxed)
    }

    /// Renewals of leases.
    pub fn keep_alives(&self) -> u64 {
        self.keep_alives.load(Ordering::Relaxed)
    }
}

/// A state store that counts what is asked of it.
#[derive(Debug)]
pub struct CountingStore {
    inner: Arc<dyn StateStore>,
    requests: Arc<Requests>,
}

impl CountingStore {
    /// Counts what is asked of `inner`, together with that of others, in `requests`.
    pub fn new(inner: Arc<dyn StateStore>, requests: Arc<Requests>) -> Self {
        Self { inner, requests }
    }

    fn read(&self) -> &dyn StateStore {
        self.requests.reads.fetch_add(1, Ordering::Relaxed);
        self.inner.as_ref()
    }

    fn write(&self) -> &dyn StateStore {
        self.requests.writes.fetch_add(1, Ordering::Relaxed);
        self.inner.as_ref()
    }
}

#[async_trait]
impl StateStore for CountingStore {
    async fn range(&self, request: RangeRequest) -> Result<RangeResponse, StateError> {
        self.read().range(request).await
    }

    async fn put(&self, request: PutRequest) -> Result<PutResponse, StateError> {
        self.write().put(request).await
    }

    async fn delete(&self, request: DeleteRequest) -> Result<DeleteResponse, StateError> {
        self.write().delete(request).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnResponse, StateError> {
        self.write().txn(txn).await
    }

    async fn watch(&self, request: WatchRequest) -> Result<WatchStream, StateError> {
        self.read().watch(request).await
    }

    async fn compact(&self, revision: Revision) -> Result<Revision, StateError> {
        self.write().compact(revision).await
    }

    async fn lease_grant(&self, request: LeaseGrantRequest) -> Result<Lease, StateError> {
        self.write().lease_grant(request).await
    }

    async fn lease_keep_alive(&self, lease: LeaseId) -> Result<Lease, StateError> {
        self.requests.keep_alives.fetch_add(1, Ordering::Relaxed);
        self.inner.lease_keep_alive(lease).await
    }

    async fn lease_revoke(&self, lease: LeaseId) -> Result<Revision, StateError> {
        self.write().lease_revoke(lease).await
    }

    async fn lease_status(&self, lease: LeaseId, keys: bool) -> Result<LeaseStatus, StateError> {
        self.read().lease_status(lease, keys).await
    }

    async fn status(&self) -> Result<StoreStatus, StateError> {
        self.read().status().await
    }

    async fn close(&self) -> Result<(), StateError> {
        self.inner.close().await
    }
}
