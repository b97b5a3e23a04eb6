//! Between the checker's requests and answers, and the member's.

use bytes::Bytes;
use keelson_checker as checker;
use keelson_checker::{Outcome, Refusal, Relation, Target};
use keelson_etcd_api::{etcdserverpb as pb, mvccpb};
use keelson_member::RequestError;
use keelson_member::command::{Operation, Response};
use keelson_member::keyspace::{Event, KeyRange, RangeEnd};
use pb::compare::{CompareResult, CompareTarget, TargetUnion};
use pb::request_op::Request as Inner;
use pb::response_op::Response as InnerResponse;

/// The command for a request that may write.
pub fn operation(request: &checker::Request, ttl: i64) -> Option<Operation> {
    Some(match request {
        checker::Request::Range(_) => return None,
        checker::Request::Put(request) => Operation::Put(put(request)),
        checker::Request::Delete(request) => Operation::DeleteRange(delete(request)),
        checker::Request::Txn(request) => Operation::Txn(txn(request)),
        checker::Request::Compact(revision) => Operation::Compact(pb::CompactionRequest {
            revision: *revision,
            physical: false,
        }),
        checker::Request::LeaseGrant(id) => {
            Operation::LeaseGrant(pb::LeaseGrantRequest { id: *id, ttl })
        }
        checker::Request::LeaseRevoke(id) => {
            Operation::LeaseRevoke(pb::LeaseRevokeRequest { id: *id })
        }
    })
}

/// A read as the member takes it.
pub fn range(request: &checker::Range) -> pb::RangeRequest {
    let (key, range_end) = keys(&request.keys);
    pb::RangeRequest {
        key,
        range_end,
        limit: i64::try_from(request.limit).unwrap_or(i64::MAX),
        revision: request.revision,
        serializable: request.serializable,
        keys_only: request.keys_only,
        count_only: request.count_only,
        ..pb::RangeRequest::default()
    }
}

/// The keys of a watch.
pub fn watched(watched: &checker::Keys) -> KeyRange {
    let (key, range_end) = keys(watched);
    if key.is_empty() || *key == [0] {
        return KeyRange {
            start: Bytes::new(),
            end: RangeEnd::Open,
        };
    }
    KeyRange::new(&key, &range_end)
}

/// What a read answered.
pub fn range_response(response: pb::RangeResponse) -> checker::Response {
    checker::Response::Range {
        revision: revision(response.header.as_ref()),
        result: range_result(response),
    }
}

/// What a command answered.
pub fn response(response: Response) -> checker::Response {
    match response {
        Response::Put(response) => checker::Response::Put {
            revision: revision(response.header.as_ref()),
            prev_kv: response.prev_kv.map(pair),
        },
        Response::DeleteRange(response) => checker::Response::Delete {
            revision: revision(response.header.as_ref()),
            deleted: count(response.deleted),
            prev_kvs: response.prev_kvs.into_iter().map(pair).collect(),
        },
        Response::Txn(response) => checker::Response::Txn {
            revision: revision(response.header.as_ref()),
            succeeded: response.succeeded,
            results: response
                .responses
                .into_iter()
                .filter_map(|inner| txn_result(inner.response?))
                .collect(),
        },
        Response::Compact(_)
        | Response::LeaseGrant(_)
        | Response::LeaseRevoke(_)
        | Response::Done => checker::Response::Done,
    }
}

/// What is known after an error.
pub fn failure(error: &RequestError) -> Outcome {
    match error {
        RequestError::Compacted => Outcome::Refused(Refusal::Compacted),
        RequestError::FutureRevision => Outcome::Refused(Refusal::FutureRevision),
        RequestError::LeaseNotFound => Outcome::Refused(Refusal::LeaseNotFound),
        RequestError::LeaseExists => Outcome::Refused(Refusal::LeaseExists),
        RequestError::DuplicateKey => Outcome::Refused(Refusal::DuplicateKey),
        RequestError::TooManyRequests
        | RequestError::NotForLearners
        | RequestError::NotLeader
        | RequestError::NoSpace => Outcome::Failed,
        _ => Outcome::Unknown,
    }
}

/// An event of a watch; `previous` says whether it is to hold what was there before.
pub fn event(event: &Event, previous: bool) -> checker::Event {
    checker::Event {
        kind: if event.deletion {
            checker::EventKind::Delete
        } else {
            checker::EventKind::Put
        },
        kv: pair(event.kv.clone()),
        prev_kv: event.previous.clone().filter(|_| previous).map(pair),
    }
}

fn keys(keys: &checker::Keys) -> (Bytes, Bytes) {
    match keys {
        checker::Keys::One(key) => (key.clone(), Bytes::new()),
        checker::Keys::Range(first, end) => (first.clone(), end.clone()),
        checker::Keys::From(first) if first.is_empty() => {
            (Bytes::from_static(&[0]), Bytes::from_static(&[0]))
        }
        checker::Keys::From(first) => (first.clone(), Bytes::from_static(&[0])),
    }
}

fn put(request: &checker::Put) -> pb::PutRequest {
    pb::PutRequest {
        key: request.key.clone(),
        value: request.value.clone(),
        lease: request.lease,
        prev_kv: request.prev_kv,
        ..pb::PutRequest::default()
    }
}

fn delete(request: &checker::Delete) -> pb::DeleteRangeRequest {
    let (key, range_end) = keys(&request.keys);
    pb::DeleteRangeRequest {
        key,
        range_end,
        prev_kv: request.prev_kv,
    }
}

fn txn(request: &checker::Txn) -> pb::TxnRequest {
    let operations = |list: &[checker::TxnOperation]| {
        list.iter()
            .map(|operation| pb::RequestOp {
                request: Some(match operation {
                    checker::TxnOperation::Range(request) => Inner::RequestRange(range(request)),
                    checker::TxnOperation::Put(request) => Inner::RequestPut(put(request)),
                    checker::TxnOperation::Delete(request) => {
                        Inner::RequestDeleteRange(delete(request))
                    }
                }),
            })
            .collect()
    };
    pb::TxnRequest {
        compare: request.compares.iter().map(compare).collect(),
        success: operations(&request.success),
        failure: operations(&request.failure),
    }
}

fn compare(compare: &checker::Compare) -> pb::Compare {
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
        Target::Lease(id) => (CompareTarget::Lease, TargetUnion::Lease(*id)),
    };
    pb::Compare {
        result: result.into(),
        target: target.into(),
        key,
        range_end,
        target_union: Some(union),
    }
}

fn txn_result(response: InnerResponse) -> Option<checker::TxnResult> {
    Some(match response {
        InnerResponse::ResponseRange(response) => checker::TxnResult::Range(range_result(response)),
        InnerResponse::ResponsePut(response) => checker::TxnResult::Put {
            prev_kv: response.prev_kv.map(pair),
        },
        InnerResponse::ResponseDeleteRange(response) => checker::TxnResult::Delete {
            deleted: count(response.deleted),
            prev_kvs: response.prev_kvs.into_iter().map(pair).collect(),
        },
        InnerResponse::ResponseTxn(_) => return None, // transactions in transactions are not asked for
    })
}

fn range_result(response: pb::RangeResponse) -> checker::RangeResult {
    checker::RangeResult {
        kvs: response.kvs.into_iter().map(pair).collect(),
        count: count(response.count),
        more: response.more,
    }
}

fn pair(kv: mvccpb::KeyValue) -> checker::KeyValue {
    checker::KeyValue {
        key: kv.key,
        value: kv.value,
        create_revision: kv.create_revision,
        mod_revision: kv.mod_revision,
        version: kv.version,
        lease: kv.lease,
    }
}

fn revision(header: Option<&pb::ResponseHeader>) -> i64 {
    header.map_or(0, |header| header.revision)
}

fn count(count: i64) -> usize {
    usize::try_from(count).unwrap_or(0)
}
