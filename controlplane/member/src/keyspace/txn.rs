//! Transactions: comparisons choose a path first, then its operations are checked, then applied.

use keelson_etcd_api::etcdserverpb as pb;
use keelson_etcd_api::mvccpb::KeyValue;
use pb::compare::{CompareResult, CompareTarget, TargetUnion};
use pb::request_op::Request;
use pb::response_op;

use super::apply::Applier;
use super::range::KeyRange;
use super::read::key_value;
use crate::{Failure, RequestError};

/// The branch that a transaction takes, and those of the transactions inside it, in order.
struct Path {
    succeeded: bool,
    nested: Vec<Path>,
}

/// Applies a transaction whole, or refuses it without a change.
pub(super) fn apply(
    applier: &mut Applier<'_>,
    txn: pb::TxnRequest,
) -> Result<pb::TxnResponse, Failure> {
    let path = choose(applier, &txn)?;
    check(applier, &txn, &path)?;
    let mut response = execute(applier, txn, &path)?;
    response.header = applier.header();
    Ok(response)
}

/// Every comparison sees the state before the transaction, also those of inner ones.
fn choose(applier: &Applier<'_>, txn: &pb::TxnRequest) -> Result<Path, Failure> {
    let mut succeeded = true;
    for compare in &txn.compare {
        if !holds(applier, compare)? {
            succeeded = false;
            break;
        }
    }
    let mut nested = Vec::new();
    for operation in branch(txn, succeeded) {
        if let Some(Request::RequestTxn(inner)) = &operation.request {
            nested.push(choose(applier, inner)?);
        }
    }
    Ok(Path { succeeded, nested })
}

fn branch(txn: &pb::TxnRequest, succeeded: bool) -> &[pb::RequestOp] {
    if succeeded {
        &txn.success
    } else {
        &txn.failure
    }
}

/// Checks every put of a path, then every range: which of two mistakes is told is etcd's choice.
fn check(applier: &Applier<'_>, txn: &pb::TxnRequest, path: &Path) -> Result<(), Failure> {
    each(txn, path, &mut |operation| match operation {
        Request::RequestPut(put) => applier.check_put(put),
        _ => Ok(()),
    })?;
    each(txn, path, &mut |operation| match operation {
        Request::RequestRange(range) => check_range(applier, range),
        _ => Ok(()),
    })
}

fn check_range(applier: &Applier<'_>, range: &pb::RangeRequest) -> Result<(), Failure> {
    if range.revision > applier.current() {
        return Err(RequestError::FutureRevision.into());
    }
    if range.revision != 0 && range.revision < applier.state.metadata.compact_revision {
        return Err(RequestError::Compacted.into());
    }
    Ok(())
}

/// Calls `visit` with every operation of a path, those of inner transactions included.
fn each(
    txn: &pb::TxnRequest,
    path: &Path,
    visit: &mut dyn FnMut(&Request) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut nested = path.nested.iter();
    for operation in branch(txn, path.succeeded) {
        match &operation.request {
            Some(Request::RequestTxn(inner)) => {
                if let Some(path) = nested.next() {
                    each(inner, path, visit)?;
                }
            }
            Some(request) => visit(request)?,
            None => {}
        }
    }
    Ok(())
}

fn execute(
    applier: &mut Applier<'_>,
    txn: pb::TxnRequest,
    path: &Path,
) -> Result<pb::TxnResponse, Failure> {
    let operations = if path.succeeded {
        txn.success
    } else {
        txn.failure
    };
    let mut nested = path.nested.iter();
    let mut responses = Vec::with_capacity(operations.len());
    for operation in operations {
        let response = match operation.request {
            Some(Request::RequestRange(range)) => {
                Some(response_op::Response::ResponseRange(applier.range(&range)?))
            }
            Some(Request::RequestPut(put)) => {
                Some(response_op::Response::ResponsePut(applier.put(put)?))
            }
            Some(Request::RequestDeleteRange(delete)) => Some(
                response_op::Response::ResponseDeleteRange(applier.delete_range(&delete)?),
            ),
            Some(Request::RequestTxn(inner)) => match nested.next() {
                Some(path) => Some(response_op::Response::ResponseTxn(execute(
                    applier, inner, path,
                )?)),
                None => None,
            },
            None => None,
        };
        responses.push(pb::ResponseOp { response });
    }
    // An inner transaction's header is empty, as etcd's.
    Ok(pb::TxnResponse {
        header: Some(pb::ResponseHeader::default()),
        succeeded: path.succeeded,
        responses,
    })
}

/// Whether a comparison holds for every key of its range; a single key that is missing compares as
/// one with version, revisions and lease 0, and has no value to compare.
fn holds(applier: &Applier<'_>, compare: &pb::Compare) -> Result<bool, Failure> {
    let mut pairs = Vec::new();
    if compare.range_end.is_empty() {
        match applier.existing(&compare.key)? {
            Some((at, version)) => pairs.push(key_value(compare.key.clone(), at, version)),
            None if compare.target == CompareTarget::Value as i32 => return Ok(false),
            None => pairs.push(KeyValue::default()),
        }
    } else {
        let range = KeyRange::new(&compare.key, &compare.range_end);
        applier.state.walk(&range, i64::MAX, |found| {
            pairs.push(found.pair()?);
            Ok(std::ops::ControlFlow::Continue(()))
        })?;
        if pairs.is_empty() {
            // Nothing is there: as a single key that is missing.
            if compare.target == CompareTarget::Value as i32 {
                return Ok(false);
            }
            pairs.push(KeyValue::default());
        }
    }
    Ok(pairs.iter().all(|pair| pair_holds(compare, pair)))
}

fn pair_holds(compare: &pb::Compare, pair: &KeyValue) -> bool {
    let target = CompareTarget::try_from(compare.target).unwrap_or(CompareTarget::Version);
    // A union that does not fit the target reads as zero, as protobuf's getters do.
    let number = |wanted: Option<i64>, actual: i64| actual.cmp(&wanted.unwrap_or(0));
    let union = compare.target_union.as_ref();
    let ordering = match target {
        CompareTarget::Version => number(
            union.and_then(|union| {
                if let TargetUnion::Version(n) = union {
                    Some(*n)
                } else {
                    None
                }
            }),
            pair.version,
        ),
        CompareTarget::Create => number(
            union.and_then(|union| {
                if let TargetUnion::CreateRevision(n) = union {
                    Some(*n)
                } else {
                    None
                }
            }),
            pair.create_revision,
        ),
        CompareTarget::Mod => number(
            union.and_then(|union| {
                if let TargetUnion::ModRevision(n) = union {
                    Some(*n)
                } else {
                    None
                }
            }),
            pair.mod_revision,
        ),
        CompareTarget::Lease => number(
            union.and_then(|union| {
                if let TargetUnion::Lease(n) = union {
                    Some(*n)
                } else {
                    None
                }
            }),
            pair.lease,
        ),
        CompareTarget::Value => match union {
            Some(TargetUnion::Value(value)) => pair.value.cmp(value),
            _ => pair.value[..].cmp(&[]),
        },
    };
    match CompareResult::try_from(compare.result) {
        Ok(CompareResult::Equal) => ordering.is_eq(),
        Ok(CompareResult::Greater) => ordering.is_gt(),
        Ok(CompareResult::Less) => ordering.is_lt(),
        Ok(CompareResult::NotEqual) => ordering.is_ne(),
        Err(_) => true,
    }
}
