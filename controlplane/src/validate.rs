//! Checks of requests that every backend makes before it does anything.

use crate::limits::{
    MAX_KEY_BYTES, MAX_LEASE_TTL_SECONDS, MAX_REQUEST_BYTES, MAX_TXN_OPS, OP_OVERHEAD_BYTES,
};
use crate::{
    Compare, CompareTarget, DeleteRequest, KeyRange, LeaseGrantRequest, LeaseId, PutRequest,
    RangeRequest, Revision, StateError, Txn, TxnOp, WatchRequest,
};

/// Size of a request in bytes, as it counts for the limit.
pub(crate) fn txn(request: &Txn) -> Result<usize, StateError> {
    let size = txn_size(request, MAX_TXN_OPS)?;
    within("request in bytes", size, MAX_REQUEST_BYTES)?;
    Ok(size)
}

/// `operations` is what enclosing transactions leave of the limit.
fn txn_size(request: &Txn, operations: usize) -> Result<usize, StateError> {
    let longest = request
        .when
        .len()
        .max(request.then.len())
        .max(request.or_else.len());
    if longest > operations {
        return Err(StateError::TooLarge {
            what: "transaction in operations",
            size: MAX_TXN_OPS - operations + longest,
            limit: MAX_TXN_OPS,
        });
    }
    let mut size = 0;
    for compare in &request.when {
        size += OP_OVERHEAD_BYTES + compare_size(compare)?;
    }
    for op in request.then.iter().chain(&request.or_else) {
        size += OP_OVERHEAD_BYTES
            + match op {
                TxnOp::Range(request) => range(request)?,
                TxnOp::Put(request) => put(request)?,
                TxnOp::Delete(request) => delete(request)?,
                TxnOp::Txn(nested) => txn_size(nested, operations - longest)?,
            };
    }
    Ok(size)
}

pub(crate) fn range(request: &RangeRequest) -> Result<usize, StateError> {
    if request.revision.is_some_and(|revision| revision <= 0) {
        return Err(StateError::InvalidArgument(
            "revisions to read begin at 1".into(),
        ));
    }
    key_range(&request.range)
}

pub(crate) fn put(request: &PutRequest) -> Result<usize, StateError> {
    key(&request.key)?;
    if request.lease < 0 {
        return Err(StateError::LeaseNotFound {
            lease: request.lease,
        });
    }
    let size = request.key.len() + request.value.len();
    within("key and value in bytes", size, MAX_REQUEST_BYTES)?;
    Ok(size)
}

pub(crate) fn delete(request: &DeleteRequest) -> Result<usize, StateError> {
    key_range(&request.range)
}

pub(crate) fn watch(request: &WatchRequest) -> Result<(), StateError> {
    if request.start_revision.is_some_and(|revision| revision <= 0) {
        return Err(StateError::InvalidArgument(
            "revisions to watch from begin at 1".into(),
        ));
    }
    if request.range.is_empty() {
        return Err(StateError::InvalidArgument(
            "the range to watch is empty: its end is not above its start".into(),
        ));
    }
    key_range(&request.range).map(drop)
}

pub(crate) fn compact(revision: Revision) -> Result<(), StateError> {
    if revision <= 0 {
        return Err(StateError::InvalidArgument(
            "revisions to compact to begin at 1".into(),
        ));
    }
    Ok(())
}

/// The time to live in whole seconds.
pub(crate) fn lease_grant(request: &LeaseGrantRequest) -> Result<i64, StateError> {
    let seconds = request.ttl.as_secs() + u64::from(request.ttl.subsec_nanos() > 0);
    let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
    if seconds == 0 {
        return Err(StateError::InvalidArgument(
            "a lease lives at least 1 s".into(),
        ));
    }
    if seconds > MAX_LEASE_TTL_SECONDS {
        return Err(StateError::InvalidArgument(format!(
            "a lease of {seconds} s: the longest is {MAX_LEASE_TTL_SECONDS} s"
        )));
    }
    if let Some(id) = request.id {
        lease_id(id)?;
    }
    Ok(seconds)
}

fn lease_id(id: LeaseId) -> Result<(), StateError> {
    if id > 0 {
        return Ok(());
    }
    Err(StateError::InvalidArgument(format!(
        "lease id {id}: ids begin at 1"
    )))
}

fn compare_size(compare: &Compare) -> Result<usize, StateError> {
    let value = match &compare.target {
        CompareTarget::Value(value) => value.len(),
        CompareTarget::Version(_)
        | CompareTarget::CreateRevision(_)
        | CompareTarget::ModRevision(_)
        | CompareTarget::Lease(_) => 0,
    };
    Ok(key_range(&compare.range)? + value)
}

fn key_range(range: &KeyRange) -> Result<usize, StateError> {
    if range.is_single() {
        key(range.start())?;
    }
    within("key in bytes", range.size(), 2 * MAX_KEY_BYTES)?;
    Ok(range.size())
}

fn key(key: &[u8]) -> Result<(), StateError> {
    if key.is_empty() {
        return Err(StateError::InvalidArgument("the key is empty".into()));
    }
    within("key in bytes", key.len(), MAX_KEY_BYTES)
}

fn within(what: &'static str, size: usize, limit: usize) -> Result<(), StateError> {
    if size > limit {
        Err(StateError::TooLarge { what, size, limit })
    } else {
        Ok(())
    }
}
