//! Between the checker's operations and etcd's messages.

use bytes::Bytes;
use keelson_checker::{
    Compare, Delete, Event, EventKind, KeyValue, Keys, Outcome, Put, Range, RangeResult, Refusal,
    Relation, Response, Target, Txn, TxnOperation, TxnResult,
};
use keelson_etcd_api::{etcdserverpb as pb, mvccpb};
use pb::compare::{CompareResult, CompareTarget, TargetUnion};
use tonic::{Code, Status};

/// `key` and `range_end`.
pub fn keys(keys: &Keys) -> (Bytes, Bytes) {
    match keys {
        Keys::One(key) => (key.clone(), Bytes::new()),
        Keys::Range(first, end) => (first.clone(), end.clone()),
        // No key is empty; a range without an end is one to a zero byte.
        Keys::From(first) if first.is_empty() => (ZERO, ZERO),
        Keys::From(first) => (first.clone(), ZERO),
    }
}

const ZERO: Bytes = Bytes::from_static(&[0]);

/// A range's message.
pub fn range(range: &Range) -> pb::RangeRequest {
    let (key, range_end) = keys(&range.keys);
    pb::RangeRequest {
        key,
        range_end,
        revision: range.revision,
        limit: i64::try_from(range.limit).unwrap_or(i64::MAX),
        count_only: range.count_only,
        keys_only: range.keys_only,
        serializable: range.serializable,
        ..pb::RangeRequest::default()
    }
}

/// A put's message.
pub fn put(put: &Put) -> pb::PutRequest {
    pb::PutRequest {
        key: put.key.clone(),
        value: put.value.clone(),
        lease: put.lease,
        prev_kv: put.prev_kv,
        ..pb::PutRequest::default()
    }
}

/// A delete's message.
pub fn delete(delete: &Delete) -> pb::DeleteRangeRequest {
    let (key, range_end) = keys(&delete.keys);
    pb::DeleteRangeRequest {
        key,
        range_end,
        prev_kv: delete.prev_kv,
    }
}

/// A transaction's message.
pub fn txn(txn: &Txn) -> pb::TxnRequest {
    pb::TxnRequest {
        compare: txn.compares.iter().map(compare).collect(),
        success: txn.success.iter().map(operation).collect(),
        failure: txn.failure.iter().map(operation).collect(),
    }
}

fn compare(compare: &Compare) -> pb::Compare {
    let (key, range_end) = keys(&compare.keys);
    let result = match compare.relation {
        Relation::Equal => CompareResult::Equal,
        Relation::NotEqual => CompareResult::NotEqual,
        Relation::Greater => CompareResult::Greater,
        Relation::Less => CompareResult::Less,
    };
    let (target, union) = match &compare.target {
        Target::CreateRevision(number) => {
            (CompareTarget::Create, TargetUnion::CreateRevision(*number))
        }
        Target::ModRevision(number) => (CompareTarget::Mod, TargetUnion::ModRevision(*number)),
        Target::Version(number) => (CompareTarget::Version, TargetUnion::Version(*number)),
        Target::Value(value) => (CompareTarget::Value, TargetUnion::Value(value.clone())),
        Target::Lease(number) => (CompareTarget::Lease, TargetUnion::Lease(*number)),
    };
    pb::Compare {
        result: result.into(),
        target: target.into(),
        key,
        range_end,
        target_union: Some(union),
    }
}

fn operation(operation: &TxnOperation) -> pb::RequestOp {
    use pb::request_op::Request;
    let request = match operation {
        TxnOperation::Range(of) => Request::RequestRange(range(of)),
        TxnOperation::Put(of) => Request::RequestPut(put(of)),
        TxnOperation::Delete(of) => Request::RequestDeleteRange(delete(of)),
    };
    pb::RequestOp {
        request: Some(request),
    }
}

/// What a range was answered.
pub fn of_range(answer: pb::RangeResponse) -> Response {
    Response::Range {
        revision: revision(answer.header.as_ref()),
        result: range_result(answer),
    }
}

/// What a put was answered.
pub fn of_put(answer: pb::PutResponse) -> Response {
    Response::Put {
        revision: revision(answer.header.as_ref()),
        prev_kv: answer.prev_kv.map(key_value),
    }
}

/// What a delete was answered.
pub fn of_delete(answer: pb::DeleteRangeResponse) -> Response {
    Response::Delete {
        revision: revision(answer.header.as_ref()),
        deleted: usize::try_from(answer.deleted).unwrap_or(usize::MAX),
        prev_kvs: answer.prev_kvs.into_iter().map(key_value).collect(),
    }
}

/// What a transaction was answered.
pub fn of_txn(answer: pb::TxnResponse) -> Response {
    use pb::response_op::Response as Op;
    let results = answer.responses.into_iter().filter_map(|op| {
        Some(match op.response? {
            Op::ResponseRange(range) => TxnResult::Range(range_result(range)),
            Op::ResponsePut(put) => TxnResult::Put {
                prev_kv: put.prev_kv.map(key_value),
            },
            Op::ResponseDeleteRange(delete) => TxnResult::Delete {
                deleted: usize::try_from(delete.deleted).unwrap_or(usize::MAX),
                prev_kvs: delete.prev_kvs.into_iter().map(key_value).collect(),
            },
            // None is asked for.
            Op::ResponseTxn(_) => return None,
        })
    });
    Response::Txn {
        revision: revision(answer.header.as_ref()),
        succeeded: answer.succeeded,
        results: results.collect(),
    }
}

/// What an error says of what came of the request.
pub fn of_error(status: &Status) -> Outcome {
    let refusals = [
        ("required revision has been compacted", Refusal::Compacted),
        (
            "required revision is a future revision",
            Refusal::FutureRevision,
        ),
        ("requested lease not found", Refusal::LeaseNotFound),
        ("lease already exists", Refusal::LeaseExists),
        ("duplicate key given in txn", Refusal::DuplicateKey),
    ];
    let refused = refusals
        .iter()
        .find(|(words, _)| status.message().contains(words));
    match (refused, status.code()) {
        (Some((_, refusal)), _) => Outcome::Refused(*refusal),
        // Too many requests, or no space: the store says that it did not do it.
        (None, Code::ResourceExhausted) => Outcome::Failed,
        _ => Outcome::Unknown,
    }
}

/// What a watch was told of.
pub fn event(event: mvccpb::Event) -> Option<Event> {
    let kind = match event.r#type() {
        mvccpb::event::EventType::Put => EventKind::Put,
        mvccpb::event::EventType::Delete => EventKind::Delete,
    };
    Some(Event {
        kind,
        kv: key_value(event.kv?),
        prev_kv: event.prev_kv.map(key_value),
    })
}

/// The revision of an answer's header.
pub fn revision(header: Option<&pb::ResponseHeader>) -> i64 {
    header.map_or(0, |header| header.revision)
}

fn range_result(answer: pb::RangeResponse) -> RangeResult {
    RangeResult {
        kvs: answer.kvs.into_iter().map(key_value).collect(),
        count: usize::try_from(answer.count).unwrap_or(usize::MAX),
        more: answer.more,
    }
}

fn key_value(kv: mvccpb::KeyValue) -> KeyValue {
    KeyValue {
        key: kv.key,
        value: kv.value,
        create_revision: kv.create_revision,
        mod_revision: kv.mod_revision,
        version: kv.version,
        lease: kv.lease,
    }
}
