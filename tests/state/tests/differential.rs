//! The same random requests to etcd and to keelson-state: the answers are equal, errors included.
//!
//! A seed repeats a run: `KEELSON_SEED=7 KEELSON_STEPS=100000 cargo nextest run -p
//! keelson-state-tests differential`.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

use std::fmt::Debug;
use std::time::Duration;

use keelson_etcd_api::etcdserverpb as pb;
use keelson_state_tests::{Agreement, Cluster, Program, Random, compare, number};
use pb::compare::TargetUnion;
use pb::kv_client::KvClient;
use pb::lease_client::LeaseClient;
use pb::request_op::Request;
use pb::response_op::Response;
use pb::watch_client::WatchClient;
use pb::watch_request::RequestUnion;
use tonic::Status;
use tonic::transport::Channel;

/// Few enough that sorting them keeps equal ones in order in etcd too, which promises no order: its
/// sort is stable up to a dozen.
const KEYS: u64 = 10;

/// After how long a server is asked again whether a watch has been told everything.
const ASK_AGAIN: Duration = Duration::from_millis(20);

#[tokio::test]
async fn the_same_answers() {
    let seed = number("KEELSON_SEED", 1);
    let steps = number("KEELSON_STEPS", 3000);
    let etcd = Cluster::start(Program::Etcd, 1, &[]).await;
    let keelson = Cluster::start(Program::KeelsonState, 1, &[]).await;
    let mut run = Run {
        random: Random::new(seed),
        etcd: etcd.connect(0).await,
        keelson: keelson.connect(0).await,
        revision: 1,
        leases: vec![0],
        step: 0,
        seed,
        refusals: 0,
        compacts: true,
    };
    for step in 0..steps {
        run.step = step;
        run.one().await;
    }
    // What comes now stays in the history, to be compared.
    run.compacts = false;
    let from = run.revision + 1;
    for step in steps..steps + 100 {
        run.step = step;
        run.one().await;
    }
    run.compare_histories(from).await;
    assert!(
        run.refusals > steps / 50,
        "only {} of {steps} requests were refused",
        run.refusals
    );
}

struct Run {
    random: Random,
    etcd: Channel,
    keelson: Channel,
    revision: i64,
    leases: Vec<i64>,
    step: u64,
    seed: u64,
    refusals: u64,
    compacts: bool,
}

impl Run {
    async fn one(&mut self) {
        match self.random.below(20) {
            0..=4 => {
                let request = self.put();
                let (mut a, mut b) = (
                    KvClient::new(self.etcd.clone()),
                    KvClient::new(self.keelson.clone()),
                );
                let (a, b) = (a.put(request.clone()).await, b.put(request.clone()).await);
                self.compare(&request, a, b, |answer| vec![&mut answer.header]);
            }
            5..=8 => {
                let request = self.range();
                let (mut a, mut b) = (
                    KvClient::new(self.etcd.clone()),
                    KvClient::new(self.keelson.clone()),
                );
                let (a, b) = (
                    a.range(request.clone()).await,
                    b.range(request.clone()).await,
                );
                self.compare(&request, a, b, |answer| vec![&mut answer.header]);
            }
            9 | 10 => {
                let request = self.delete();
                let (mut a, mut b) = (
                    KvClient::new(self.etcd.clone()),
                    KvClient::new(self.keelson.clone()),
                );
                let (a, b) = (
                    a.delete_range(request.clone()).await,
                    b.delete_range(request.clone()).await,
                );
                self.compare(&request, a, b, |answer| vec![&mut answer.header]);
            }
            11..=15 => {
                let request = self.txn(0);
                let (mut a, mut b) = (
                    KvClient::new(self.etcd.clone()),
                    KvClient::new(self.keelson.clone()),
                );
                let (a, b) = (a.txn(request.clone()).await, b.txn(request.clone()).await);
                self.compare(&request, a, b, headers);
            }
            16 if self.compacts => {
                let request = pb::CompactionRequest {
                    // Most compactions leave some history.
                    revision: if self.random.one_in(3) {
                        self.some_revision()
                    } else {
                        self.revision - 50
                    },
                    physical: self.random.one_in(2),
                };
                let (mut a, mut b) = (
                    KvClient::new(self.etcd.clone()),
                    KvClient::new(self.keelson.clone()),
                );
                let (a, b) = (a.compact(request).await, b.compact(request).await);
                self.compare(&request, a, b, |answer| vec![&mut answer.header]);
            }
            17 => self.watch().await,
            _ => self.lease().await,
        }
    }

    /// A watch from some revision: everything it is told until it knows all that there is.
    async fn watch(&mut self) {
        let create = pb::WatchCreateRequest {
            key: self.key().into(),
            range_end: self.range_end().into(),
            start_revision: match self.random.below(3) {
                // One that begins later is told of no progress by etcd.
                0 => self.some_revision().min(self.revision),
                _ => (self.revision - i64::try_from(self.random.below(30)).unwrap()).max(1),
            },
            filters: match self.random.below(4) {
                0 => vec![0],
                1 => vec![1],
                _ => Vec::new(),
            },
            prev_kv: self.random.one_in(2),
            fragment: self.random.one_in(4),
            watch_id: i64::try_from(self.random.below(3)).unwrap(),
            ..pb::WatchCreateRequest::default()
        };
        let etcd = told(&self.etcd, &create).await;
        let keelson = told(&self.keelson, &create).await;
        assert_eq!(
            etcd, keelson,
            "etcd left, keelson-state right; seed {}, step {}: {create:?}",
            self.seed, self.step
        );
    }

    async fn lease(&mut self) {
        let (mut a, mut b) = (
            LeaseClient::new(self.etcd.clone()),
            LeaseClient::new(self.keelson.clone()),
        );
        let id = match self.random.below(8) {
            0 => 404,
            _ => self.random.pick(&self.leases.clone()),
        };
        match self.random.below(4) {
            0 => {
                let id = i64::try_from(1000 + self.random.below(12)).unwrap();
                let ttl = self.random.pick(&[100, 200, 5000, 9_000_000_001]);
                let request = pb::LeaseGrantRequest { ttl, id };
                let (a, b) = (a.lease_grant(request).await, b.lease_grant(request).await);
                if a.is_ok() {
                    self.leases.push(id);
                }
                self.compare(&request, a, b, |answer| vec![&mut answer.header]);
            }
            1 => {
                let request = pb::LeaseRevokeRequest { id };
                let (a, b) = (a.lease_revoke(request).await, b.lease_revoke(request).await);
                self.leases.retain(|known| *known != id || *known == 0);
                self.compare(&request, a, b, |answer| vec![&mut answer.header]);
            }
            2 => {
                let request = pb::LeaseTimeToLiveRequest {
                    id,
                    keys: self.random.one_in(2),
                };
                let (mut a, mut b) = (
                    a.lease_time_to_live(request).await,
                    b.lease_time_to_live(request).await,
                );
                for answer in [&mut a, &mut b].into_iter().flatten() {
                    let answer = answer.get_mut();
                    answer.ttl = answer.ttl.min(1); // they count from different moments
                    answer.keys.sort();
                }
                self.compare(&request, a, b, |answer| vec![&mut answer.header]);
            }
            _ => {
                let request = pb::LeaseLeasesRequest {};
                let (mut a, mut b) = (a.lease_leases(request).await, b.lease_leases(request).await);
                for answer in [&mut a, &mut b].into_iter().flatten() {
                    answer.get_mut().leases.sort_by_key(|lease| lease.id);
                }
                self.compare(&request, a, b, |answer| vec![&mut answer.header]);
            }
        }
    }

    /// All events that both still have.
    async fn compare_histories(&mut self, from: i64) {
        // A key of its own says where the history ends.
        let end = pb::PutRequest {
            key: "~end".into(),
            ..pb::PutRequest::default()
        };
        for channel in [&self.etcd, &self.keelson] {
            KvClient::new(channel.clone())
                .put(end.clone())
                .await
                .unwrap();
        }
        for previous in [false, true] {
            let mut histories = Vec::new();
            for channel in [&self.etcd, &self.keelson] {
                histories.push(history(channel, from, previous).await);
            }
            assert!(
                histories[0].len() > 1,
                "there is too little history to compare"
            );
            assert_eq!(
                histories[0],
                histories[1],
                "events from {}",
                self.revision - 40
            );
        }
    }

    /// Compares answers but for what differs between clusters: their ids and terms.
    fn compare<T: Debug + PartialEq>(
        &mut self,
        request: &impl Debug,
        etcd: Result<tonic::Response<T>, Status>,
        keelson: Result<tonic::Response<T>, Status>,
        headers: impl Fn(&mut T) -> Vec<&mut Option<pb::ResponseHeader>>,
    ) {
        let context = format!("seed {}, step {}: {request:?}", self.seed, self.step);
        match compare(&context, etcd, keelson, headers) {
            Agreement::Answered(revision) => self.revision = self.revision.max(revision),
            Agreement::Refused => self.refusals += 1,
        }
    }

    fn key(&mut self) -> String {
        if self.random.one_in(40) {
            return String::new();
        }
        format!("k{}", self.random.below(KEYS))
    }

    /// No end, a later key, an earlier one, a prefix's, or no limit.
    fn range_end(&mut self) -> Vec<u8> {
        match self.random.below(6) {
            0 | 1 => Vec::new(),
            2 | 3 => self.key().into_bytes(),
            4 => b"l".to_vec(),
            _ => vec![0],
        }
    }

    fn some_revision(&mut self) -> i64 {
        match self.random.below(10) {
            0 => -1,
            1 => self.revision + 1 + i64::try_from(self.random.below(3)).unwrap(),
            2 => i64::try_from(self.random.below(5)).unwrap(),
            _ => (self.revision - i64::try_from(self.random.below(60)).unwrap()).max(0),
        }
    }

    fn put(&mut self) -> pb::PutRequest {
        let ignore_value = self.random.one_in(8);
        let ignore_lease = self.random.one_in(8);
        let value = if ignore_value && !self.random.one_in(4) {
            String::new()
        } else {
            format!("v{}", self.random.below(5))
        };
        let lease = match self.random.below(6) {
            0 => self.random.pick(&self.leases.clone()),
            1 if self.random.one_in(4) => 404,
            _ => 0,
        };
        pb::PutRequest {
            key: self.key().into(),
            value: value.into(),
            lease: if ignore_lease && !self.random.one_in(4) {
                0
            } else {
                lease
            },
            prev_kv: self.random.one_in(2),
            ignore_value,
            ignore_lease,
        }
    }

    /// A deletion without an end is asked for outside of transactions only: inside, etcd lets it
    /// stand beside a put of a key that it covers, against what its API says.
    fn delete_of_txn(&mut self) -> pb::DeleteRangeRequest {
        let mut request = self.delete();
        if request.range_end[..] == [0] {
            request.range_end = b"l".to_vec().into();
        }
        request
    }

    fn delete(&mut self) -> pb::DeleteRangeRequest {
        pb::DeleteRangeRequest {
            key: self.key().into(),
            range_end: if self.random.one_in(3) {
                self.range_end().into()
            } else {
                Vec::new().into()
            },
            prev_kv: self.random.one_in(2),
        }
    }

    fn range(&mut self) -> pb::RangeRequest {
        // An unknown order or target crashes etcd 3.5: only known ones are asked for.
        let sorted = self.random.one_in(3);
        let filter = |run: &mut Self| {
            if run.random.one_in(8) {
                run.some_revision()
            } else {
                0
            }
        };
        pb::RangeRequest {
            key: self.key().into(),
            range_end: self.range_end().into(),
            limit: if self.random.one_in(3) {
                i64::try_from(self.random.below(6)).unwrap()
            } else {
                0
            },
            revision: if self.random.one_in(3) {
                self.some_revision()
            } else {
                0
            },
            sort_order: if sorted {
                i32::try_from(self.random.below(3)).unwrap()
            } else {
                0
            },
            sort_target: if sorted {
                i32::try_from(self.random.below(5)).unwrap()
            } else {
                0
            },
            serializable: self.random.one_in(4),
            keys_only: self.random.one_in(6),
            count_only: self.random.one_in(8),
            min_mod_revision: filter(self),
            max_mod_revision: filter(self),
            min_create_revision: filter(self),
            max_create_revision: filter(self),
        }
    }

    fn compare_of_txn(&mut self) -> pb::Compare {
        let union = match self.random.below(5) {
            0 => TargetUnion::Version(i64::try_from(self.random.below(4)).unwrap()),
            1 => TargetUnion::CreateRevision(self.some_revision()),
            2 => TargetUnion::ModRevision(self.some_revision()),
            3 => TargetUnion::Value(format!("v{}", self.random.below(5)).into()),
            _ => TargetUnion::Lease(self.random.pick(&self.leases.clone())),
        };
        let target = match union {
            TargetUnion::Version(_) => 0,
            TargetUnion::CreateRevision(_) => 1,
            TargetUnion::ModRevision(_) => 2,
            TargetUnion::Value(_) => 3,
            TargetUnion::Lease(_) => 4,
        };
        pb::Compare {
            result: i32::try_from(self.random.below(4)).unwrap(),
            target,
            key: self.key().into(),
            range_end: if self.random.one_in(4) {
                self.range_end().into()
            } else {
                Vec::new().into()
            },
            target_union: Some(union),
        }
    }

    fn txn(&mut self, depth: u32) -> pb::TxnRequest {
        let compares = self.random.below(3);
        pb::TxnRequest {
            compare: (0..compares).map(|_| self.compare_of_txn()).collect(),
            success: self.operations(depth),
            failure: self.operations(depth),
        }
    }

    fn operations(&mut self, depth: u32) -> Vec<pb::RequestOp> {
        let count = self.random.below(4);
        let mut operations = Vec::new();
        for _ in 0..count {
            let request = match self.random.below(9) {
                0..=2 => Some(Request::RequestPut(self.put())),
                3..=5 => Some(Request::RequestRange(self.range())),
                6 => Some(Request::RequestDeleteRange(self.delete_of_txn())),
                7 if self.random.one_in(6) => None,
                _ if depth < 2 => Some(Request::RequestTxn(self.txn(depth + 1))),
                _ => Some(Request::RequestRange(self.range())),
            };
            operations.push(pb::RequestOp { request });
        }
        operations
    }
}

fn headers(txn: &mut pb::TxnResponse) -> Vec<&mut Option<pb::ResponseHeader>> {
    let mut all = vec![&mut txn.header];
    for operation in &mut txn.responses {
        match &mut operation.response {
            Some(Response::ResponseRange(answer)) => all.push(&mut answer.header),
            Some(Response::ResponsePut(answer)) => all.push(&mut answer.header),
            Some(Response::ResponseDeleteRange(answer)) => all.push(&mut answer.header),
            Some(Response::ResponseTxn(answer)) => all.extend(headers(answer)),
            None => {}
        }
    }
    all
}

/// What a watch is told, until it is told that there is no more: how it was created or refused, its
/// events, and how it was canceled.
async fn told(channel: &Channel, create: &pb::WatchCreateRequest) -> Vec<String> {
    let request = |union| pb::WatchRequest {
        request_union: Some(union),
    };
    let progress = || request(RequestUnion::ProgressRequest(pb::WatchProgressRequest {}));
    let (requests, waiting) = tokio::sync::mpsc::channel(16);
    let create = request(RequestUnion::CreateRequest(create.clone()));
    requests.send(create).await.unwrap();
    let mut responses = WatchClient::new(channel.clone())
        .watch(tokio_stream::wrappers::ReceiverStream::new(waiting))
        .await
        .unwrap()
        .into_inner();
    let mut told = Vec::new();
    loop {
        let response = tokio::time::timeout(ASK_AGAIN, responses.message()).await;
        let Ok(response) = response else {
            // etcd does not answer while a watch is behind, and forgets that it was asked.
            requests.send(progress()).await.unwrap();
            continue;
        };
        let response = response.unwrap().unwrap();
        let revision = response.header.map_or(0, |header| header.revision);
        if response.created && !response.canceled {
            // Only now: etcd may answer this before that.
            requests.send(progress()).await.unwrap();
        }
        if response.created || response.canceled {
            told.push(format!(
                "watch {} created {} canceled {} {:?} compacted at {}",
                response.watch_id,
                response.created,
                response.canceled,
                response.cancel_reason,
                response.compact_revision
            ));
        } else if response.events.is_empty() {
            told.push(format!("nothing more at revision {revision}"));
            return told;
        }
        // How events are cut into responses is each server's choice.
        told.extend(response.events.iter().map(|event| format!("{event:?}")));
        if response.canceled {
            return told;
        }
    }
}

/// Events from a revision on, up to that of the key that marks the end; or how the watch ended.
async fn history(channel: &Channel, start_revision: i64, prev_kv: bool) -> Vec<String> {
    let create = pb::WatchCreateRequest {
        key: "k".into(),
        range_end: vec![0].into(),
        start_revision,
        prev_kv,
        ..pb::WatchCreateRequest::default()
    };
    let request = pb::WatchRequest {
        request_union: Some(RequestUnion::CreateRequest(create)),
    };
    let requests = futures::StreamExt::chain(tokio_stream::once(request), tokio_stream::pending());
    let mut responses = WatchClient::new(channel.clone())
        .watch(requests)
        .await
        .unwrap()
        .into_inner();
    let mut events = Vec::new();
    loop {
        let response = responses.message().await.unwrap().unwrap();
        if response.canceled {
            events.push(format!(
                "canceled: {} at {}",
                response.cancel_reason, response.compact_revision
            ));
            return events;
        }
        for event in response.events {
            let end = event.kv.as_ref().is_some_and(|kv| kv.key == "~end");
            events.push(format!("{event:?}"));
            if end {
                return events;
            }
        }
    }
}
