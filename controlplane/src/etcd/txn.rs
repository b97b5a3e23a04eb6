//! Transactions as etcd's messages.

use etcd_client::proto::{PbResponseOp, PbTxnOpResponse, PbTxnResponse};
use etcd_client::{
    Compare as EncodedCompare, CompareOp as EncodedOp, Txn as EncodedTxn, TxnOp as EncodedTxnOp,
};

use super::kv;
use super::namespace::Namespace;
use super::unexpected;
use crate::{
    Compare, CompareOp, CompareTarget, DeleteResponse, KeyRange, RangeRequest, Revision,
    StateError, Txn, TxnOp, TxnResponse, TxnResult,
};

/// Whether `txn` can change anything.
pub(super) fn writes(txn: &Txn) -> bool {
    txn.then.iter().chain(&txn.or_else).any(|op| match op {
        TxnOp::Range(_) => false,
        TxnOp::Put(_) | TxnOp::Delete(_) => true,
        TxnOp::Txn(nested) => writes(nested),
    })
}

pub(super) fn encode(namespace: &Namespace, txn: &Txn) -> EncodedTxn {
    let compares = txn.when.iter();
    let compares: Vec<_> = compares
        .map(|compare| encode_compare(namespace, compare))
        .collect();
    EncodedTxn::new()
        .when(compares)
        .and_then(encode_ops(namespace, &txn.then))
        .or_else(encode_ops(namespace, &txn.or_else))
}

fn encode_ops(namespace: &Namespace, ops: &[TxnOp]) -> Vec<EncodedTxnOp> {
    ops.iter().map(|op| encode_op(namespace, op)).collect()
}

fn encode_op(namespace: &Namespace, op: &TxnOp) -> EncodedTxnOp {
    match op {
        TxnOp::Range(request) => {
            let (key, options) = kv::encode_range(namespace, request);
            EncodedTxnOp::get(key, Some(options))
        }
        TxnOp::Put(request) => {
            let key = namespace.key(&request.key);
            let options = kv::encode_put(request);
            EncodedTxnOp::put(key, request.value.to_vec(), Some(options))
        }
        // etcd would find that the empty range overlaps puts. A read holds its place.
        TxnOp::Delete(request) if request.range.is_empty() => {
            let nothing = RangeRequest::new(KeyRange::range("", "")).count_only();
            let (key, options) = kv::encode_range(namespace, &nothing);
            EncodedTxnOp::get(key, Some(options))
        }
        TxnOp::Delete(request) => {
            let (key, options) = kv::encode_delete(namespace, request);
            EncodedTxnOp::delete(key, Some(options))
        }
        TxnOp::Txn(nested) => EncodedTxnOp::txn(encode(namespace, nested)),
    }
}

fn encode_compare(namespace: &Namespace, compare: &Compare) -> EncodedCompare {
    let range = namespace.range(&compare.range);
    let (key, op) = (range.key, encode_compare_op(compare.op));
    let encoded = match &compare.target {
        CompareTarget::Version(given) => EncodedCompare::version(key, op, *given),
        CompareTarget::CreateRevision(given) => EncodedCompare::create_revision(key, op, *given),
        CompareTarget::ModRevision(given) => EncodedCompare::mod_revision(key, op, *given),
        CompareTarget::Value(given) => EncodedCompare::value(key, op, given.to_vec()),
        CompareTarget::Lease(given) => EncodedCompare::lease(key, op, *given),
    };
    match range.end {
        Some(end) => encoded.with_range(end),
        None => encoded,
    }
}

fn encode_compare_op(op: CompareOp) -> EncodedOp {
    match op {
        CompareOp::Equal => EncodedOp::Equal,
        CompareOp::NotEqual => EncodedOp::NotEqual,
        CompareOp::Greater => EncodedOp::Greater,
        CompareOp::Less => EncodedOp::Less,
    }
}

/// `revision` is that of the transaction around, if there is one.
pub(super) fn decode(
    namespace: &Namespace,
    txn: &Txn,
    response: PbTxnResponse,
    revision: Option<Revision>,
) -> Result<TxnResponse, StateError> {
    let revision = kv::revision_of(response.header.as_ref(), revision)?;
    let ops = if response.succeeded {
        &txn.then
    } else {
        &txn.or_else
    };
    if ops.len() != response.responses.len() {
        return Err(unexpected("has another number of results than operations"));
    }
    let results = ops.iter().zip(response.responses);
    Ok(TxnResponse {
        revision,
        succeeded: response.succeeded,
        results: results
            .map(|(op, result)| decode_result(namespace, op, result, revision))
            .collect::<Result<_, _>>()?,
    })
}

fn decode_result(
    namespace: &Namespace,
    op: &TxnOp,
    response: PbResponseOp,
    revision: Revision,
) -> Result<TxnResult, StateError> {
    let inside = Some(revision);
    match (op, response.response) {
        (TxnOp::Range(request), Some(PbTxnOpResponse::ResponseRange(response))) => {
            kv::decode_range(namespace, request, response, inside).map(TxnResult::Range)
        }
        (TxnOp::Put(_), Some(PbTxnOpResponse::ResponsePut(response))) => {
            kv::decode_put(namespace, response, inside).map(TxnResult::Put)
        }
        (TxnOp::Delete(_), Some(PbTxnOpResponse::ResponseDeleteRange(response))) => {
            kv::decode_delete(namespace, response, inside).map(TxnResult::Delete)
        }
        (TxnOp::Delete(request), Some(PbTxnOpResponse::ResponseRange(_)))
            if request.range.is_empty() =>
        {
            Ok(TxnResult::Delete(DeleteResponse {
                revision,
                ..Default::default()
            }))
        }
        (TxnOp::Txn(nested), Some(PbTxnOpResponse::ResponseTxn(response))) => {
            decode(namespace, nested, response, inside).map(TxnResult::Txn)
        }
        _ => Err(unexpected(
            "has a result of another kind than its operation",
        )),
    }
}
