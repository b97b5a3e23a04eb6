use std::sync::Arc;
use std::time::Duration;

use keelson_checker::{KeepAlive, Keys, LeaseTimes, Outcome, Put, Range, Request, Response};
use keelson_etcd_api::etcdserverpb as pb;
use pb::kv_client::KvClient;
use pb::lease_client::LeaseClient;
use tokio::time::{sleep, timeout};
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::clients::send;
use crate::record::Record;
use crate::{admin, convert};

const LIMIT: Duration = Duration::from_secs(2);
const SECOND: u64 = 1_000_000_000;
/// By how much a lease may outlive its time: elections, each of which gives it its time again, and
/// times without a quorum.
const ALLOWANCE: u64 = 60 * SECOND;

/// One that has leases, one after the other: with a key, kept alive for some time, then revoked or
/// left to end.
pub struct Keeper {
    record: Arc<Record>,
    urls: Arc<[String]>,
    random: fastrand::Rng,
}

impl Keeper {
    pub fn new(record: Arc<Record>, urls: Arc<[String]>, random: fastrand::Rng) -> Self {
        Self {
            record,
            urls,
            random,
        }
    }

    pub async fn run(mut self, first: usize) {
        let mut at = first;
        while !self.record.is_stopped() {
            let url = self.urls[at % self.urls.len()].clone();
            at += 1;
            let Ok(Ok(channel)) = timeout(LIMIT, admin::connect(&url)).await else {
                sleep(Duration::from_millis(100)).await;
                continue;
            };
            self.one_lease(channel).await;
        }
    }

    async fn one_lease(&mut self, channel: Channel) {
        let id = self.random.i64(1..i64::MAX);
        let ttl = self.random.i64(2..6);
        let mut times = LeaseTimes {
            id,
            keep_alives: Vec::new(),
            revoked: None,
            gone: None,
            alive: None,
            allowance: ALLOWANCE,
        };
        let mut leases = LeaseClient::new(channel.clone());
        if !self.grant(&mut leases, &mut times, ttl).await {
            return;
        }
        let key = Keys::One(format!("lease-{id:x}").into());
        let attached = self.attach(channel.clone(), &key, id).await;
        for _ in 0..self.random.u32(..5) {
            sleep(Duration::from_millis(
                self.random.u64(300..ttl.unsigned_abs() * 500),
            ))
            .await;
            if self.record.is_stopped() || !self.keep_alive(&mut leases, &mut times, ttl).await {
                break;
            }
        }
        if self.random.u32(..4) == 0 && !self.record.is_stopped() {
            self.revoke(&mut leases, &mut times).await;
        } else if attached {
            self.wait_for_end(&key, &mut times).await;
        }
        self.record.lease(times);
    }

    /// False if it is not known to be there.
    async fn grant(
        &mut self,
        leases: &mut LeaseClient<Channel>,
        times: &mut LeaseTimes,
        ttl: i64,
    ) -> bool {
        let (client, call) = (self.record.new_client(), self.record.now());
        let message = pb::LeaseGrantRequest { ttl, id: times.id };
        let answer = timeout(LIMIT, leases.lease_grant(message)).await;
        let (outcome, promised) = match answer {
            Ok(Ok(answer)) => (Outcome::Ok(Response::Done), Some(answer.into_inner().ttl)),
            Ok(Err(status)) => (convert::of_error(&status), None),
            Err(_) => (Outcome::Unknown, None),
        };
        times.keep_alives.push(self.kept(call, ttl, promised));
        self.record
            .operation(client, call, Request::LeaseGrant(times.id), outcome);
        promised.is_some()
    }

    async fn attach(&mut self, channel: Channel, key: &Keys, lease: i64) -> bool {
        let Keys::One(key) = key else {
            return false;
        };
        let request = Request::Put(Put {
            key: key.clone(),
            value: self.record.new_value().into(),
            lease,
            prev_kv: false,
        });
        let outcome = self.ask(channel, request).await;
        matches!(outcome, Outcome::Ok(_))
    }

    /// False if there is no use in going on.
    async fn keep_alive(
        &mut self,
        leases: &mut LeaseClient<Channel>,
        times: &mut LeaseTimes,
        ttl: i64,
    ) -> bool {
        let call = self.record.now();
        let message = pb::LeaseKeepAliveRequest { id: times.id };
        let answer = timeout(LIMIT, async {
            let stream = tokio_stream::once(message);
            let mut answers = leases.lease_keep_alive(stream).await?.into_inner();
            answers.message().await
        });
        let answer: Option<Result<_, Status>> = answer.await.ok();
        let (promised, go_on) = match answer {
            Some(Ok(Some(answer))) if answer.ttl > 0 => (Some(answer.ttl), true),
            // It has ended.
            Some(Ok(Some(_))) => {
                times.gone.get_or_insert(self.record.now());
                return false;
            }
            Some(Err(status)) => (None, status.code() != Code::NotFound),
            Some(Ok(None)) | None => (None, true),
        };
        times.keep_alives.push(self.kept(call, ttl, promised));
        go_on
    }

    async fn revoke(&mut self, leases: &mut LeaseClient<Channel>, times: &mut LeaseTimes) {
        let (client, call) = (self.record.new_client(), self.record.now());
        times.revoked = Some(call);
        let message = pb::LeaseRevokeRequest { id: times.id };
        let outcome = match timeout(LIMIT, leases.lease_revoke(message)).await {
            Ok(Ok(_)) => Outcome::Ok(Response::Done),
            Ok(Err(status)) => convert::of_error(&status),
            Err(_) => Outcome::Unknown,
        };
        self.record
            .operation(client, call, Request::LeaseRevoke(times.id), outcome);
    }

    /// Looks for the lease's key until it is gone.
    async fn wait_for_end(&mut self, key: &Keys, times: &mut LeaseTimes) {
        let limit = self.record.now() + 2 * ALLOWANCE;
        let mut at = self.random.usize(..self.urls.len());
        while self.record.now() < limit {
            sleep(Duration::from_millis(250)).await;
            let url = &self.urls[at % self.urls.len()];
            at += 1;
            let Ok(Ok(channel)) = timeout(LIMIT, admin::connect(url)).await else {
                continue;
            };
            let call = self.record.now();
            let request = Request::Range(Range::of(key.clone()));
            let Outcome::Ok(Response::Range { result, .. }) = self.ask(channel, request).await
            else {
                continue;
            };
            if result.count == 0 {
                times.gone.get_or_insert(self.record.now());
                return;
            }
            times.alive = Some(call);
        }
    }

    async fn ask(&mut self, channel: Channel, request: Request) -> Outcome {
        let (client, call) = (self.record.new_client(), self.record.now());
        let answer = timeout(LIMIT, send(&mut KvClient::new(channel), &request)).await;
        let outcome = match answer {
            Ok(Ok(response)) => Outcome::Ok(response),
            Ok(Err(status)) => convert::of_error(&status),
            Err(_) => Outcome::Unknown,
        };
        self.record
            .operation(client, call, request, outcome.clone());
        outcome
    }

    fn kept(&self, call: u64, asked: i64, promised: Option<i64>) -> KeepAlive {
        KeepAlive {
            call,
            end: self.record.now(),
            promised: promised.map(|ttl| ttl.unsigned_abs() * SECOND),
            asked: asked.unsigned_abs() * SECOND,
        }
    }
}
