//! What is wrong with a request on its face, before the state is asked: etcd's checks, in its order.

use std::collections::BTreeSet;

use bytes::Bytes;
use keelson_etcd_api::etcdserverpb as pb;
use keelson_member::RequestError;
use keelson_member::keyspace::KeyRange;
use pb::range_request::{SortOrder, SortTarget};
use pb::request_op::Request;

pub fn range(request: &pb::RangeRequest) -> Result<(), RequestError> {
    if request.key.is_empty() {
        return Err(RequestError::EmptyKey);
    }
    // As etcd 3.6: 3.5 crashes on some of these.
    if SortOrder::try_from(request.sort_order).is_err()
        || SortTarget::try_from(request.sort_target).is_err()
    {
        return Err(RequestError::InvalidSortOption);
    }
    Ok(())
}

pub fn put(request: &pb::PutRequest) -> Result<(), RequestError> {
    if request.key.is_empty() {
        return Err(RequestError::EmptyKey);
    }
    if request.ignore_value && !request.value.is_empty() {
        return Err(RequestError::ValueProvided);
    }
    if request.ignore_lease && request.lease != 0 {
        return Err(RequestError::LeaseProvided);
    }
    Ok(())
}

pub fn delete_range(request: &pb::DeleteRangeRequest) -> Result<(), RequestError> {
    if request.key.is_empty() {
        return Err(RequestError::EmptyKey);
    }
    Ok(())
}

pub fn txn(request: &pb::TxnRequest, max_operations: usize) -> Result<(), RequestError> {
    operations(request, max_operations)?;
    intervals(&request.success)?;
    intervals(&request.failure)?;
    Ok(())
}

/// Whether a transaction changes nothing whatever it compares.
pub fn is_read_only(request: &pb::TxnRequest) -> bool {
    request
        .success
        .iter()
        .chain(&request.failure)
        .all(|operation| match &operation.request {
            Some(Request::RequestRange(_)) => true,
            Some(Request::RequestTxn(inner)) => is_read_only(inner),
            _ => false,
        })
}

/// Whether every read of a transaction that only reads may be of a stale state.
pub fn is_serializable(request: &pb::TxnRequest) -> bool {
    request
        .success
        .iter()
        .chain(&request.failure)
        .all(|operation| match &operation.request {
            Some(Request::RequestRange(range)) => range.serializable,
            _ => false,
        })
}

fn operations(request: &pb::TxnRequest, max: usize) -> Result<(), RequestError> {
    let count = request
        .compare
        .len()
        .max(request.success.len())
        .max(request.failure.len());
    let left = max
        .checked_sub(count)
        .ok_or(RequestError::TooManyOperations)?;
    if request.compare.iter().any(|compare| compare.key.is_empty()) {
        return Err(RequestError::EmptyKey);
    }
    for operation in request.success.iter().chain(&request.failure) {
        match &operation.request {
            Some(Request::RequestRange(request)) => range(request)?,
            Some(Request::RequestPut(request)) => put(request)?,
            Some(Request::RequestDeleteRange(request)) => delete_range(request)?,
            Some(Request::RequestTxn(inner)) => operations(inner, left)?,
            None => return Err(RequestError::KeyNotFound),
        }
    }
    Ok(())
}

/// Keys that a list of operations puts, and ranges that it deletes.
#[derive(Default)]
struct Writes {
    puts: BTreeSet<Bytes>,
    deletes: Vec<KeyRange>,
}

/// Refuses a list that writes one key twice. The two branches of an inner transaction may put the
/// same key: only one of them happens.
fn intervals(operations: &[pb::RequestOp]) -> Result<Writes, RequestError> {
    let mut writes = Writes::default();
    for operation in operations {
        if let Some(Request::RequestDeleteRange(delete)) = &operation.request {
            writes
                .deletes
                .push(KeyRange::new(&delete.key, &delete.range_end));
        }
    }
    for operation in operations {
        let Some(Request::RequestTxn(inner)) = &operation.request else {
            continue;
        };
        let success = intervals(&inner.success)?;
        let failure = intervals(&inner.failure)?;
        for key in &success.puts {
            writes.add(key)?;
        }
        for key in failure.puts.difference(&success.puts) {
            writes.add(key)?;
        }
        if failure.puts.iter().any(|key| writes.deletes_key(key)) {
            return Err(RequestError::DuplicateKey);
        }
        writes.deletes.extend(success.deletes);
        writes.deletes.extend(failure.deletes);
    }
    for operation in operations {
        if let Some(Request::RequestPut(put)) = &operation.request {
            writes.add(&put.key)?;
        }
    }
    Ok(writes)
}

impl Writes {
    fn add(&mut self, key: &Bytes) -> Result<(), RequestError> {
        if self.deletes_key(key) || !self.puts.insert(key.clone()) {
            return Err(RequestError::DuplicateKey);
        }
        Ok(())
    }

    fn deletes_key(&self, key: &[u8]) -> bool {
        self.deletes.iter().any(|range| range.contains(key))
    }
}
