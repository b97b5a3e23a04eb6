use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use keelson_checker::{
    Compare, Delete, Keys, Outcome, Put, Range, Relation, Request, Response, Target, Txn,
    TxnOperation,
};
use keelson_etcd_api::etcdserverpb as pb;
use pb::kv_client::KvClient;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tonic::Status;
use tonic::transport::Channel;

use crate::record::Record;
use crate::{admin, convert};

/// After which a client gives up on a request.
const LIMIT: Duration = Duration::from_secs(2);
/// Keys that all clients share, so that they meet.
const KEYS: u64 = 12;

/// One that reads and writes, one request at a time.
pub struct Client {
    record: Arc<Record>,
    urls: Arc<[String]>,
    random: fastrand::Rng,
    pause: Duration,
    /// What it last knew of each key's modification revision.
    known: HashMap<Bytes, i64>,
}

impl Client {
    pub fn new(
        record: Arc<Record>,
        urls: Arc<[String]>,
        random: fastrand::Rng,
        pause: Duration,
    ) -> Self {
        Self {
            record,
            urls,
            random,
            pause,
            known: HashMap::new(),
        }
    }

    /// Works until the record is stopped, with a new connection to the next member after each request
    /// whose outcome is unknown.
    pub async fn run(mut self, first: usize) {
        let mut at = first;
        while !self.record.is_stopped() {
            let url = &self.urls[at % self.urls.len()];
            at += 1;
            let Ok(Ok(channel)) = timeout(LIMIT, admin::connect(url)).await else {
                sleep(Duration::from_millis(100)).await;
                continue;
            };
            self.work(KvClient::new(channel)).await;
        }
    }

    async fn work(&mut self, mut kv: KvClient<Channel>) {
        let client = self.record.new_client();
        let mut ticks = interval(self.pause);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while !self.record.is_stopped() {
            ticks.tick().await;
            let request = self.request();
            let call = self.record.now();
            let answer = timeout(LIMIT, send(&mut kv, &request)).await;
            let outcome = match answer {
                Ok(Ok(response)) => Outcome::Ok(response),
                Ok(Err(status)) => convert::of_error(&status),
                Err(_) => Outcome::Unknown,
            };
            self.learn(&request, &outcome);
            let go_on = outcome != Outcome::Unknown;
            self.record.operation(client, call, request, outcome);
            if !go_on {
                return;
            }
        }
    }

    fn request(&mut self) -> Request {
        match self.random.u32(..20) {
            0..4 => Request::Put(self.put()),
            4..8 => Request::Txn(self.compare_and_swap()),
            8..12 => Request::Range(Range::of(Keys::One(self.key()))),
            12 => Request::Range(Range::of(Keys::all())),
            13 | 14 => Request::Range(Range {
                serializable: true,
                ..Range::of(self.keys())
            }),
            15 => Request::Range(Range {
                revision: (self.record.last_revision() - self.random.i64(0..300)).max(1),
                serializable: self.random.bool(),
                ..Range::of(self.keys())
            }),
            16 => Request::Range(Range {
                limit: self.random.usize(1..4),
                keys_only: self.random.bool(),
                count_only: self.random.u32(..4) == 0,
                ..Range::of(Keys::all())
            }),
            17 => Request::Delete(Delete {
                keys: Keys::One(self.key()),
                prev_kv: self.random.bool(),
            }),
            18 => Request::Txn(self.several()),
            _ => Request::Delete(Delete {
                keys: Keys::Range("k0".into(), format!("k{}", self.random.u32(1..3)).into()),
                prev_kv: true,
            }),
        }
    }

    fn put(&mut self) -> Put {
        Put {
            key: self.key(),
            value: self.record.new_value().into(),
            lease: 0,
            prev_kv: self.random.bool(),
        }
    }

    /// As Kubernetes changes its objects.
    fn compare_and_swap(&mut self) -> Txn {
        let put = self.put();
        let key = put.key.clone();
        Txn {
            compares: vec![Compare {
                keys: Keys::One(key.clone()),
                relation: Relation::Equal,
                target: Target::ModRevision(self.known.get(&key).copied().unwrap_or(0)),
            }],
            success: vec![TxnOperation::Put(put)],
            failure: vec![TxnOperation::Range(Range::of(Keys::One(key)))],
        }
    }

    /// Two keys at once, whether they are there or not.
    fn several(&mut self) -> Txn {
        let value = Bytes::from(self.record.new_value());
        let first = self.random.u64(..KEYS - 1);
        let put = |number: u64| {
            TxnOperation::Put(Put {
                key: key(number),
                value: value.clone(),
                lease: 0,
                prev_kv: false,
            })
        };
        let delete = TxnOperation::Delete(Delete {
            keys: Keys::One(key(first)),
            prev_kv: true,
        });
        Txn {
            compares: vec![Compare {
                keys: Keys::One(key(first)),
                relation: Relation::Greater,
                target: Target::Version(self.random.i64(0..6)),
            }],
            success: vec![delete, put(first + 1)],
            failure: vec![
                put(first),
                put(first + 1),
                TxnOperation::Range(Range::of(Keys::all())),
            ],
        }
    }

    fn learn(&mut self, request: &Request, outcome: &Outcome) {
        if let (Request::Put(put), Outcome::Ok(Response::Put { revision, .. })) = (request, outcome)
        {
            self.known.insert(put.key.clone(), *revision);
        }
        if let Outcome::Ok(Response::Range { result, .. }) = outcome {
            for kv in &result.kvs {
                self.known.insert(kv.key.clone(), kv.mod_revision);
            }
        }
        let Outcome::Ok(Response::Txn {
            revision,
            succeeded,
            ..
        }) = outcome
        else {
            return;
        };
        if let Request::Txn(txn) = request
            && let [TxnOperation::Put(put)] = txn.success.as_slice()
        {
            let known = if *succeeded { *revision } else { 0 };
            self.known.insert(put.key.clone(), known);
        }
    }

    fn keys(&mut self) -> Keys {
        if self.random.bool() {
            Keys::One(self.key())
        } else {
            Keys::prefix(b"k")
        }
    }

    fn key(&mut self) -> Bytes {
        key(self.random.u64(..KEYS))
    }
}

fn key(number: u64) -> Bytes {
    format!("k{number}").into()
}

/// Sends a request about keys.
pub async fn send(kv: &mut KvClient<Channel>, request: &Request) -> Result<Response, Status> {
    Ok(match request {
        Request::Range(range) => {
            convert::of_range(kv.range(convert::range(range)).await?.into_inner())
        }
        Request::Put(put) => convert::of_put(kv.put(convert::put(put)).await?.into_inner()),
        Request::Delete(delete) => {
            convert::of_delete(kv.delete_range(convert::delete(delete)).await?.into_inner())
        }
        Request::Txn(txn) => convert::of_txn(kv.txn(convert::txn(txn)).await?.into_inner()),
        Request::Compact(revision) => {
            let request = pb::CompactionRequest {
                revision: *revision,
                physical: false,
            };
            kv.compact(request).await?;
            Response::Done
        }
        Request::LeaseGrant(_) | Request::LeaseRevoke(_) => {
            return Err(Status::internal("no request about keys"));
        }
    })
}

/// Compacts every few seconds.
pub async fn compact(record: Arc<Record>, urls: Arc<[String]>, mut random: fastrand::Rng) {
    while !record.is_stopped() {
        sleep(Duration::from_millis(random.u64(1000..4000))).await;
        let url = &urls[random.usize(..urls.len())];
        let Ok(Ok(channel)) = timeout(LIMIT, admin::connect(url)).await else {
            continue;
        };
        let revision = record.last_revision() - random.i64(50..400);
        if revision < 2 || record.is_stopped() {
            continue;
        }
        let request = Request::Compact(revision);
        let (client, call) = (record.new_client(), record.now());
        let outcome = match timeout(LIMIT, send(&mut KvClient::new(channel), &request)).await {
            Ok(Ok(response)) => Outcome::Ok(response),
            Ok(Err(status)) => convert::of_error(&status),
            Err(_) => Outcome::Unknown,
        };
        record.operation(client, call, request, outcome);
    }
}
