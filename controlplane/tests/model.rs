//! Random operations, against a model in memory: every answer is equal.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

#[allow(dead_code)] // Other tests use the rest.
mod etcd_server;

use std::collections::{BTreeMap, BTreeSet};
use std::mem::discriminant;
use std::time::Duration;

use etcd_server::EtcdServer;
use keelson_controlplane::embedded::{EmbeddedOptions, EmbeddedStore, Retention};
use keelson_controlplane::etcd::EtcdStore;
use keelson_controlplane::{
    Compare, CompareOp, DeleteRequest, DeleteResponse, KeyRange, KeyValue, LeaseGrantRequest,
    LeaseId, PutRequest, PutResponse, RangeRequest, RangeResponse, Revision, StateError,
    StateStore, Txn, TxnOp, TxnResponse, TxnResult,
};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

#[derive(Debug, Clone)]
enum Operation {
    Txn(Txn),
    /// Reads at a revision this far back.
    ReadBack(KeyRange, i64),
    /// Compacts to a revision this far back.
    Compact(i64),
    Grant(LeaseId),
    Revoke(LeaseId),
}

#[derive(Debug, PartialEq)]
enum Answer {
    Txn(TxnResponse),
    Range(RangeResponse),
    Revision(Revision),
}

type State = BTreeMap<Vec<u8>, KeyValue>;

/// Every state there was: the first at revision 1.
struct Model {
    states: Vec<State>,
    compacted: Revision,
    leases: BTreeSet<LeaseId>,
}

impl Model {
    fn new() -> Self {
        Self {
            states: vec![State::new()],
            compacted: 0,
            leases: BTreeSet::new(),
        }
    }

    fn revision(&self) -> Revision {
        i64::try_from(self.states.len()).unwrap()
    }

    fn now(&self) -> &State {
        self.states.last().unwrap()
    }

    fn apply(&mut self, operation: &Operation) -> Result<Answer, StateError> {
        let revision = self.revision();
        match operation {
            Operation::Txn(txn) => self.txn(txn).map(Answer::Txn),
            Operation::ReadBack(range, back) => {
                let requested = revision - back;
                if requested < 1 {
                    return Err(StateError::InvalidArgument(String::new()));
                }
                if requested > revision {
                    return Err(future());
                }
                if requested < self.compacted {
                    return Err(compacted());
                }
                let state = &self.states[usize::try_from(requested).unwrap() - 1];
                Ok(Answer::Range(range_of(state, range, revision)))
            }
            Operation::Compact(back) => {
                let target = revision - back;
                if target < 1 {
                    return Err(StateError::InvalidArgument(String::new()));
                }
                if target > revision {
                    return Err(future());
                }
                if target <= self.compacted {
                    return Err(compacted());
                }
                self.compacted = target;
                Ok(Answer::Revision(revision))
            }
            Operation::Grant(lease) => {
                if !self.leases.insert(*lease) {
                    return Err(StateError::LeaseExists { lease: 0 });
                }
                Ok(Answer::Revision(revision))
            }
            Operation::Revoke(lease) => {
                if !self.leases.remove(lease) {
                    return Err(StateError::LeaseNotFound { lease: 0 });
                }
                let mut state = self.now().clone();
                state.retain(|_, kv| kv.lease != *lease);
                if state.len() < self.now().len() {
                    self.states.push(state);
                }
                Ok(Answer::Revision(self.revision()))
            }
        }
    }

    fn txn(&mut self, txn: &Txn) -> Result<TxnResponse, StateError> {
        check_keys(&txn.then)?;
        check_keys(&txn.or_else)?;
        let succeeded = txn.when.iter().all(|compare| self.holds(compare));
        let ops = if succeeded { &txn.then } else { &txn.or_else };
        for op in ops {
            if let TxnOp::Put(put) = op
                && put.lease != 0
                && !self.leases.contains(&put.lease)
            {
                return Err(StateError::LeaseNotFound { lease: 0 });
            }
        }
        let before = self.now().clone();
        let mut state = before.clone();
        let next = self.revision() + 1;
        let mut changed = false;
        for op in ops {
            match op {
                TxnOp::Put(_) => changed = true,
                TxnOp::Delete(delete) => {
                    changed |= before.keys().any(|key| delete.range.contains(key));
                }
                _ => {}
            }
        }
        let revision = self.revision() + i64::from(changed);
        let results = ops
            .iter()
            .map(|op| run(op, &mut state, next, revision))
            .collect();
        if changed {
            self.states.push(state);
        }
        Ok(TxnResponse {
            revision,
            succeeded,
            results,
        })
    }

    fn holds(&self, compare: &Compare) -> bool {
        use keelson_controlplane::CompareTarget::Version;
        let Version(given) = compare.target else {
            panic!("only versions are generated");
        };
        let kv = self.now().get(compare.range.start());
        let version = kv.map_or(0, |kv| kv.version);
        match compare.op {
            CompareOp::Equal => version == given,
            CompareOp::NotEqual => version != given,
            CompareOp::Greater => version > given,
            CompareOp::Less => version < given,
        }
    }
}

fn compacted() -> StateError {
    StateError::Compacted {
        requested: 0,
        compact_revision: 0,
    }
}

fn future() -> StateError {
    StateError::FutureRevision {
        requested: 0,
        current: 0,
    }
}

fn check_keys(ops: &[TxnOp]) -> Result<(), StateError> {
    let mut puts = BTreeSet::new();
    for op in ops {
        if let TxnOp::Put(put) = op {
            let deleted = ops.iter().any(
                |other| matches!(other, TxnOp::Delete(delete) if delete.range.contains(&put.key)),
            );
            if deleted || !puts.insert(&put.key) {
                return Err(StateError::DuplicateKey);
            }
        }
    }
    Ok(())
}

/// Does one operation at revision `next`.
fn run(op: &TxnOp, state: &mut State, next: Revision, revision: Revision) -> TxnResult {
    match op {
        TxnOp::Range(request) => TxnResult::Range(range_of(state, &request.range, revision)),
        TxnOp::Put(put) => {
            let prev_kv = state.get(&put.key[..]).cloned();
            let kv = KeyValue {
                key: put.key.clone(),
                value: put.value.clone(),
                create_revision: prev_kv.as_ref().map_or(next, |kv| kv.create_revision),
                mod_revision: next,
                version: prev_kv.as_ref().map_or(1, |kv| kv.version + 1),
                lease: put.lease,
            };
            state.insert(put.key.to_vec(), kv);
            TxnResult::Put(PutResponse { revision, prev_kv })
        }
        TxnOp::Delete(delete) => {
            let prev_kvs = range_of(state, &delete.range, 0).kvs;
            state.retain(|key, _| !delete.range.contains(key));
            TxnResult::Delete(DeleteResponse {
                revision,
                deleted: i64::try_from(prev_kvs.len()).unwrap(),
                prev_kvs,
            })
        }
        TxnOp::Txn(_) => panic!("no nested transactions are generated"),
    }
}

fn range_of(state: &State, range: &KeyRange, revision: Revision) -> RangeResponse {
    let inside = state.iter().filter(|(key, _)| range.contains(key));
    let kvs: Vec<_> = inside.map(|(_, kv)| kv.clone()).collect();
    RangeResponse {
        revision,
        count: i64::try_from(kvs.len()).unwrap(),
        kvs,
        more: false,
    }
}

async fn ask(
    store: &dyn StateStore,
    operation: &Operation,
    revision: Revision,
) -> Result<Answer, StateError> {
    match operation {
        Operation::Txn(txn) => store.txn(txn.clone()).await.map(Answer::Txn),
        Operation::ReadBack(range, back) => {
            let request = RangeRequest::new(range.clone()).at(revision - back);
            store.range(request).await.map(Answer::Range)
        }
        Operation::Compact(back) => store.compact(revision - back).await.map(Answer::Revision),
        Operation::Grant(lease) => {
            let grant = LeaseGrantRequest::new(Duration::from_hours(1)).id(*lease);
            let lease = store.lease_grant(grant).await?;
            Ok(Answer::Revision(lease.revision))
        }
        Operation::Revoke(lease) => store.lease_revoke(*lease).await.map(Answer::Revision),
    }
}

async fn compare(store: &dyn StateStore, operations: &[Operation]) {
    let mut model = Model::new();
    for operation in operations {
        let revision = model.revision();
        let expected = model.apply(operation);
        match (ask(store, operation, revision).await, expected) {
            (Ok(answer), Ok(expected)) => assert_eq!(answer, expected, "{operation:?}"),
            (Err(error), Err(expected)) => {
                assert_eq!(
                    discriminant(&error),
                    discriminant(&expected),
                    "{operation:?}: {error:?}"
                );
            }
            (answer, expected) => panic!("{operation:?}: {answer:?}, not {expected:?}"),
        }
    }
}

fn key() -> impl Strategy<Value = String> {
    prop::sample::select(vec!["a", "b", "b/1", "b/2", "c"]).prop_map(str::to_owned)
}

fn range() -> impl Strategy<Value = KeyRange> {
    prop_oneof![
        3 => key().prop_map(KeyRange::key),
        1 => key().prop_map(KeyRange::prefix),
        1 => (key(), key()).prop_map(|(start, end)| KeyRange::range(start, end)),
        1 => key().prop_map(KeyRange::from),
        1 => Just(KeyRange::all()),
    ]
}

fn op() -> impl Strategy<Value = TxnOp> {
    let lease = prop_oneof![3 => Just(0), 1 => 1..4_i64];
    let put = (key(), "[a-z]{0,3}", lease)
        .prop_map(|(key, value, lease)| PutRequest::new(key, value).lease(lease).prev_kv().into());
    prop_oneof![
        4 => put,
        1 => range().prop_map(|range| DeleteRequest::new(range).prev_kv().into()),
        1 => range().prop_map(|range| RangeRequest::new(range).into()),
    ]
}

fn operation() -> impl Strategy<Value = Operation> {
    let compare_op = prop::sample::select(vec![
        CompareOp::Equal,
        CompareOp::NotEqual,
        CompareOp::Greater,
        CompareOp::Less,
    ]);
    let compare = (key(), compare_op, 0..3_i64)
        .prop_map(|(key, op, version)| Compare::version(key, op, version));
    let txn =
        (vec(compare, 0..2), vec(op(), 1..4), vec(op(), 0..3)).prop_map(|(when, then, or_else)| {
            Txn {
                when,
                then,
                or_else,
            }
        });
    prop_oneof![
        8 => txn.prop_map(Operation::Txn),
        3 => (range(), -1..10_i64).prop_map(|(range, back)| Operation::ReadBack(range, back)),
        1 => (-1..10_i64).prop_map(Operation::Compact),
        1 => (1..4_i64).prop_map(Operation::Grant),
        1 => (1..4_i64).prop_map(Operation::Revoke),
    ]
}

fn check(cases: u32, run: impl Fn(&[Operation])) {
    let config = ProptestConfig {
        failure_persistence: None,
        max_shrink_iters: 200,
        ..ProptestConfig::with_cases(cases)
    };
    let result = TestRunner::new(config).run(&vec(operation(), 1..60), |operations| {
        run(&operations);
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

#[test]
fn embedded() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    check(100, |operations| {
        runtime.block_on(async {
            let directory = tempfile::tempdir().unwrap();
            let mut options = EmbeddedOptions::new(directory.path());
            options.retention = Retention::Everything;
            let store = EmbeddedStore::open(options).await.unwrap();
            compare(&store, operations).await;
        });
    });
}

#[test]
fn etcd() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    check(20, |operations| {
        runtime.block_on(async {
            let server = EtcdServer::start().await;
            let mut options = server.options();
            options.timeout = Duration::from_secs(20);
            let store = EtcdStore::open(options).await.unwrap();
            compare(&store, operations).await;
        });
    });
}
