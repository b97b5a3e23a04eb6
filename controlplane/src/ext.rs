use std::future::Future;

use async_trait::async_trait;
use bytes::Bytes;

use crate::{
    Compare, DeleteRequest, KeyRange, KeyValue, PutRequest, RangeRequest, Revision, StateError,
    StateStore, Txn, TxnOp, TxnResult,
};

/// Keys read at one revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The revision at which everything was read: watch from `revision + 1`.
    pub revision: Revision,
    /// The keys, in byte order.
    pub kvs: Vec<KeyValue>,
}

/// How a conditional write ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Swap {
    /// It was done, at this revision.
    Done(Revision),
    /// Somebody else was first; nothing was done. The pair as it is now, if it exists.
    Conflict(Option<KeyValue>),
}

impl Swap {
    /// The revision of the write, or `None` if there was a conflict.
    pub fn revision(&self) -> Option<Revision> {
        match self {
            Self::Done(revision) => Some(*revision),
            Self::Conflict(_) => None,
        }
    }
}

/// Keys read at once by [`StateStoreExt::list`].
const PAGE: u32 = 500;

/// Attempts of [`StateStoreExt::modify`] before it gives up.
const MODIFY_ATTEMPTS: usize = 100;

/// Short forms of a [`StateStore`]'s most common calls.
#[async_trait]
pub trait StateStoreExt: StateStore {
    /// The pair of `key`, if it exists.
    async fn get(&self, key: &[u8]) -> Result<Option<KeyValue>, StateError> {
        let mut response = self.range(RangeRequest::new(KeyRange::key(key))).await?;
        Ok(response.kvs.pop())
    }

    /// The pair of `key` as it was at `revision`, if it existed.
    async fn get_at(&self, key: &[u8], revision: Revision) -> Result<Option<KeyValue>, StateError> {
        let mut response = self
            .range(RangeRequest::new(KeyRange::key(key)).at(revision))
            .await?;
        Ok(response.kvs.pop())
    }

    /// Everything below `prefix`, read in pages at one revision.
    async fn list(&self, prefix: &[u8]) -> Result<Snapshot, StateError> {
        let mut request = RangeRequest::prefix(prefix).limit(PAGE);
        let mut page = self.range(request.clone()).await?;
        let mut snapshot = Snapshot {
            revision: page.revision,
            kvs: page.kvs,
        };
        while page.more {
            let Some(last) = snapshot.kvs.last() else {
                break;
            };
            request.range = request.range.after(&last.key);
            page = self.range(request.clone().at(snapshot.revision)).await?;
            snapshot.kvs.append(&mut page.kvs);
        }
        Ok(snapshot)
    }

    /// Sets `key`; returns the revision.
    async fn set(&self, key: &[u8], value: &[u8]) -> Result<Revision, StateError> {
        Ok(self.put(PutRequest::new(key, value)).await?.revision)
    }

    /// Deletes `key`; returns whether it existed.
    async fn remove(&self, key: &[u8]) -> Result<bool, StateError> {
        Ok(self
            .delete(DeleteRequest::new(KeyRange::key(key)))
            .await?
            .deleted
            > 0)
    }

    /// Sets `key` if it doesn't exist.
    async fn create(&self, key: &[u8], value: &[u8]) -> Result<Swap, StateError> {
        self.compare_and_swap(key, 0, PutRequest::new(key, value))
            .await
    }

    /// Does `put` if `key` was last changed at `mod_revision`; 0 if it must not exist.
    async fn compare_and_swap(
        &self,
        key: &[u8],
        mod_revision: Revision,
        put: PutRequest,
    ) -> Result<Swap, StateError> {
        swap(self, key, mod_revision, put.into()).await
    }

    /// Deletes `key` if it was last changed at `mod_revision`.
    async fn compare_and_delete(
        &self,
        key: &[u8],
        mod_revision: Revision,
    ) -> Result<Swap, StateError> {
        swap(
            self,
            key,
            mod_revision,
            DeleteRequest::new(KeyRange::key(key)).into(),
        )
        .await
    }

    /// Reads `key`, lets `change` turn the pair into the new value, and writes that unless the key
    /// changed meanwhile; then once more, up to 100 times. `None` from `change` leaves the key as
    /// it is. Returns the revision of the write, if there was one.
    ///
    /// # Errors
    /// Those of the store, and [`StateError::Exhausted`] if there was a conflict every time.
    async fn modify<F>(&self, key: &[u8], mut change: F) -> Result<Option<Revision>, StateError>
    where
        F: FnMut(Option<&KeyValue>) -> Option<Bytes> + Send,
    {
        let mut current = self.get(key).await?;
        for _ in 0..MODIFY_ATTEMPTS {
            let Some(value) = change(current.as_ref()) else {
                return Ok(None);
            };
            let (revision, lease) = current
                .as_ref()
                .map_or((0, crate::NO_LEASE), |kv| (kv.mod_revision, kv.lease));
            let put = PutRequest::new(key, value).lease(lease);
            match self.compare_and_swap(key, revision, put).await? {
                Swap::Done(revision) => return Ok(Some(revision)),
                Swap::Conflict(now) => current = now,
            }
        }
        Err(StateError::Exhausted {
            what: "attempts to modify one key",
            limit: MODIFY_ATTEMPTS,
        })
    }
}

impl<S: StateStore + ?Sized> StateStoreExt for S {}

fn swap<S: StateStore + ?Sized>(
    store: &S,
    key: &[u8],
    mod_revision: Revision,
    op: TxnOp,
) -> impl Future<Output = Result<Swap, StateError>> + Send {
    let txn = Txn::new()
        .when([Compare::unchanged(key, mod_revision)])
        .then([op])
        .or_else([RangeRequest::new(KeyRange::key(key)).into()]);
    let answer = store.txn(txn);
    async move {
        let mut response = answer.await?;
        if response.succeeded {
            return Ok(Swap::Done(response.revision));
        }
        match response.results.pop() {
            Some(TxnResult::Range(mut range)) => Ok(Swap::Conflict(range.kvs.pop())),
            _ => Ok(Swap::Conflict(None)),
        }
    }
}
