use std::cmp::Ordering;
use std::time::Duration;

use keelson_controlplane::{
    Compare, CompareOp, CompareTarget, DeleteRequest, KeyRange, LeaseGrantRequest, PutRequest,
    RangeRequest, StateError, StateStoreExt, Txn, TxnOp, TxnResult,
};

use crate::backend::Store;

type Target = fn(i64) -> CompareTarget;

const OPERATORS: [CompareOp; 4] = [
    CompareOp::Equal,
    CompareOp::NotEqual,
    CompareOp::Greater,
    CompareOp::Less,
];

fn holds(op: CompareOp, ordering: Ordering) -> bool {
    match op {
        CompareOp::Equal => ordering.is_eq(),
        CompareOp::NotEqual => ordering.is_ne(),
        CompareOp::Greater => ordering.is_gt(),
        CompareOp::Less => ordering.is_lt(),
    }
}

async fn succeeds(
    store: &Store,
    range: impl Into<KeyRange>,
    op: CompareOp,
    target: CompareTarget,
) -> bool {
    let compare = Compare {
        range: range.into(),
        op,
        target,
    };
    store
        .txn(Txn::new().when([compare]))
        .await
        .unwrap()
        .succeeded
}

fn put(key: &str, value: &str) -> TxnOp {
    PutRequest::new(key, value).into()
}

fn delete(range: impl Into<KeyRange>) -> TxnOp {
    DeleteRequest::new(range).into()
}

pub async fn every_target_and_operator(store: &Store) {
    let lease = store
        .lease_grant(LeaseGrantRequest::new(Duration::from_mins(10)).id(50))
        .await
        .unwrap();
    for value in ["a", "b", "m"] {
        store
            .put(PutRequest::new("k", value).lease(lease.id))
            .await
            .unwrap();
    }
    let kv = store.get(b"k").await.unwrap().unwrap();
    let numbers: [(Target, i64); 4] = [
        (CompareTarget::Version, kv.version),
        (CompareTarget::CreateRevision, kv.create_revision),
        (CompareTarget::ModRevision, kv.mod_revision),
        (CompareTarget::Lease, kv.lease),
    ];
    for op in OPERATORS {
        for (target, actual) in numbers {
            for given in [actual - 1, actual, actual + 1] {
                let expected = holds(op, actual.cmp(&given));
                assert_eq!(
                    succeeds(store, "k", op, target(given)).await,
                    expected,
                    "{op:?} {given}"
                );
            }
        }
        for given in ["", "l", "m", "m0", "n"] {
            let target = CompareTarget::Value(given.into());
            assert_eq!(
                succeeds(store, "k", op, target).await,
                holds(op, "m".cmp(given)),
                "{op:?} {given}"
            );
        }
    }
}

pub async fn compare_of_a_missing_key(store: &Store) {
    for op in OPERATORS {
        for given in [-1_i64, 0, 1] {
            let expected = holds(op, 0.cmp(&given));
            for target in [
                CompareTarget::Version,
                CompareTarget::ModRevision,
                CompareTarget::CreateRevision,
                CompareTarget::Lease,
            ] {
                assert_eq!(
                    succeeds(store, "k", op, target(given)).await,
                    expected,
                    "{op:?} {given}"
                );
            }
        }
        for given in ["", "x"] {
            assert!(!succeeds(store, "k", op, CompareTarget::Value(given.into())).await);
        }
    }
}

pub async fn compare_of_a_range(store: &Store) {
    store.set(b"k1", b"same").await.unwrap();
    store.set(b"k2", b"same").await.unwrap();
    let same = || CompareTarget::Value("same".into());
    let prefix = || KeyRange::prefix("k");
    assert!(succeeds(store, prefix(), CompareOp::Equal, same()).await);
    store.set(b"k2", b"other").await.unwrap();
    assert!(!succeeds(store, prefix(), CompareOp::Equal, same()).await);
    assert!(!succeeds(store, prefix(), CompareOp::NotEqual, same()).await);
    let none = KeyRange::prefix("none");
    assert!(succeeds(store, none, CompareOp::Equal, CompareTarget::Version(0)).await);
}

pub async fn one_revision_for_all(store: &Store) {
    store.set(b"old", b"").await.unwrap();
    let txn = Txn::new().then([put("a", "1"), put("b", "2"), delete("old")]);
    let response = store.txn(txn).await.unwrap();
    assert_eq!(response.revision, 3);
    for result in &response.results {
        let revision = match result {
            TxnResult::Put(put) => put.revision,
            TxnResult::Delete(delete) => delete.revision,
            result => panic!("{result:?}"),
        };
        assert_eq!(revision, 3);
    }
    let kvs = store.list(b"").await.unwrap().kvs;
    assert_eq!(kvs.len(), 2);
    assert!(
        kvs.iter()
            .all(|kv| kv.create_revision == 3 && kv.mod_revision == 3)
    );
}

pub async fn reads_see_what_precedes_them(store: &Store) {
    let read = || TxnOp::from(RangeRequest::new("k"));
    let txn = Txn::new().then([read(), put("k", "new"), read()]);
    let response = store.txn(txn).await.unwrap();
    let [TxnResult::Range(before), _, TxnResult::Range(after)] = &response.results[..] else {
        panic!("{response:?}");
    };
    assert_eq!(before.kvs.len(), 0);
    assert_eq!(after.kvs[0].value, "new");
    assert_eq!((before.revision, after.revision), (2, 2));
}

pub async fn one_key_twice_is_refused(store: &Store) {
    let inner = |op| TxnOp::from(Txn::new().then([op]));
    for ops in [
        vec![put("k", "1"), put("k", "2")],
        vec![put("k", "1"), delete("k")],
        vec![delete(KeyRange::prefix("k")), put("k1", "")],
        vec![delete(KeyRange::from("a")), put("k", "")],
        vec![put("k", "1"), inner(put("k", "2"))],
    ] {
        for txn in [Txn::new().then(ops.clone()), Txn::new().or_else(ops)] {
            let error = store.txn(txn).await.unwrap_err();
            assert_eq!(error, StateError::DuplicateKey);
        }
    }
    assert_eq!(store.list(b"").await.unwrap().revision, 1);
    let allowed = [
        put("k", ""),
        delete(KeyRange::range("z", "a")),
        delete("l"),
        delete("l"),
    ];
    store.txn(Txn::new().then(allowed)).await.unwrap();
}

pub async fn branches_may_share_keys(store: &Store) {
    let txn = || {
        Txn::new()
            .when([Compare::missing("k")])
            .then([put("k", "then")])
            .or_else([put("k", "else")])
    };
    assert!(store.txn(txn()).await.unwrap().succeeded);
    assert!(!store.txn(txn()).await.unwrap().succeeded);
    assert_eq!(store.get(b"k").await.unwrap().unwrap().value, "else");
}

pub async fn nested(store: &Store) {
    let seen = Txn::new()
        .when([Compare::exists("k")])
        .then([put("seen", "")])
        .or_else([put("unseen", "")]);
    let txn = Txn::new().then([put("k", ""), seen.into()]);
    let response = store.txn(txn).await.unwrap();
    let TxnResult::Txn(inner) = &response.results[1] else {
        panic!("{response:?}");
    };
    // Compares see the state before the whole transaction.
    assert!(!inner.succeeded);
    assert_eq!(inner.revision, response.revision);
    assert!(store.get(b"unseen").await.unwrap().is_some());
}

pub async fn refused_whole(store: &Store) {
    let future = RangeRequest::new("k").at(100);
    let error = store
        .txn(Txn::new().then([put("k", ""), future.into()]))
        .await
        .unwrap_err();
    assert!(
        matches!(error, StateError::FutureRevision { .. }),
        "{error:?}"
    );
    let unknown = PutRequest::new("l", "").lease(77);
    let error = store
        .txn(Txn::new().then([put("k", ""), unknown.into()]))
        .await
        .unwrap_err();
    assert!(
        matches!(error, StateError::LeaseNotFound { .. }),
        "{error:?}"
    );
    let state = store.list(b"").await.unwrap();
    assert_eq!((state.revision, state.kvs.len()), (1, 0));
}

pub async fn reading_takes_no_revision(store: &Store) {
    let txn = Txn::new().then([RangeRequest::new(KeyRange::all()).into()]);
    assert_eq!(store.txn(txn).await.unwrap().revision, 1);
    assert_eq!(store.txn(Txn::new()).await.unwrap().revision, 1);
    assert_eq!(
        store
            .txn(Txn::new().then([delete("k")]))
            .await
            .unwrap()
            .revision,
        1
    );
}
