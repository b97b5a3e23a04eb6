//! Queues of keys below a prefix, in the order of their creation: what locks and elections are made
//! of. The keys are those that etcd's client library makes, so both can stand in one queue.

use std::sync::Arc;

use bytes::Bytes;
use keelson_etcd_api::etcdserverpb as pb;
use keelson_etcd_api::mvccpb::KeyValue;
use keelson_member::command::{Authority, Operation, Response as Outcome};
use keelson_member::keyspace::KeyRange;
use keelson_member::watch::WatchOptions;
use pb::compare::{CompareResult, CompareTarget, TargetUnion};
use pb::range_request::{SortOrder, SortTarget};
use pb::request_op::Request as Op;
use pb::response_op::Response as OpResponse;
use tokio::sync::Notify;
use tonic::Status;

use super::credentials::Credentials;
use super::{Services, failed, refused, unexpected};

/// Seconds of the lease that is made for who brings none.
const DEFAULT_TTL: i64 = 60;

/// A place in a queue. It is given up when this is dropped, unless it is kept.
pub struct Place {
    services: Services,
    credentials: Credentials,
    prefix: Bytes,
    /// The key that stands for it.
    pub key: Bytes,
    /// The key's create revision: who is before, is smaller.
    pub revision: i64,
    /// The lease it ends with.
    pub lease: i64,
    kept: bool,
}

/// The prefix of a queue's keys.
pub fn prefix(name: &[u8]) -> Bytes {
    [name, b"/"].concat().into()
}

impl Services {
    /// Takes a place, or finds the one that the lease has: that one with its value before.
    pub async fn enqueue(
        &self,
        credentials: &Credentials,
        name: &[u8],
        lease: i64,
        value: Bytes,
    ) -> Result<(Place, Option<KeyValue>), Status> {
        let lease = if lease == 0 {
            self.own_lease(credentials).await?
        } else {
            lease
        };
        let prefix = prefix(name);
        let key: Bytes = [&prefix[..], format!("{lease:x}").as_bytes()]
            .concat()
            .into();
        let put = pb::PutRequest {
            key: key.clone(),
            value,
            lease,
            ..pb::PutRequest::default()
        };
        let response = self
            .run_txn(
                credentials,
                create_revision_is(&key, 0),
                Op::RequestPut(put),
                get(&key),
            )
            .await?;
        let existing = if response.succeeded {
            None
        } else {
            first_pair(&response)
        };
        let revision = match &existing {
            Some(pair) => pair.create_revision,
            None => response.header.map_or(0, |header| header.revision),
        };
        let place = Place {
            services: self.clone(),
            credentials: credentials.clone(),
            prefix,
            key,
            revision,
            lease,
            kept: false,
        };
        Ok((place, existing))
    }

    /// Runs `then` if `compare` holds, else `otherwise`.
    pub async fn run_txn(
        &self,
        credentials: &Credentials,
        compare: pb::Compare,
        then: Op,
        otherwise: Op,
    ) -> Result<pb::TxnResponse, Status> {
        let operation = |request| pb::RequestOp {
            request: Some(request),
        };
        let txn = pb::TxnRequest {
            compare: vec![compare],
            success: vec![operation(then)],
            failure: vec![operation(otherwise)],
        };
        match self.write(credentials, Operation::Txn(txn)).await? {
            Outcome::Txn(response) => Ok(response),
            _ => Err(unexpected()),
        }
    }

    /// The first of a queue, and the revision it is as of.
    pub async fn first_of(
        &self,
        credentials: &Credentials,
        prefix: &Bytes,
    ) -> Result<(Option<KeyValue>, i64), Status> {
        let request = pb::RangeRequest {
            key: prefix.clone(),
            range_end: end_of_prefix(prefix),
            limit: 1,
            sort_order: SortOrder::Ascend as i32,
            sort_target: SortTarget::Create as i32,
            ..pb::RangeRequest::default()
        };
        self.read_one(credentials, &request).await
    }

    /// Waits until a key is deleted that was there at `revision`.
    pub async fn until_deleted(&self, key: &Bytes, revision: i64) -> Result<(), Status> {
        let options = WatchOptions {
            range: KeyRange::new(key, &Bytes::new()),
            no_puts: true,
            no_deletions: false,
        };
        self.until_changed(options, revision).await
    }

    /// Waits for a change after `revision`. It may also return without one: look again.
    pub async fn until_changed(&self, options: WatchOptions, revision: i64) -> Result<(), Status> {
        let news = Arc::new(Notify::new());
        let wake = Arc::clone(&news);
        let watches = self.node.watches();
        let stream = watches.stream(Arc::new(move || wake.notify_one()));
        stream.create(0, options, revision + 1);
        loop {
            let deliveries = stream.take().map_err(|error| failed(error.into()))?;
            let something = |delivery: &keelson_member::watch::Delivery| {
                !delivery.events.is_empty() || delivery.compacted.is_some()
            };
            if deliveries.iter().any(something) {
                return Ok(());
            }
            if deliveries.is_empty() {
                news.notified().await;
            }
        }
    }

    async fn read_one(
        &self,
        credentials: &Credentials,
        request: &pb::RangeRequest,
    ) -> Result<(Option<KeyValue>, i64), Status> {
        self.linearize().await?;
        let authority: Authority = self
            .authority(credentials)
            .map_err(|error| refused(&error))?;
        let response = self
            .node
            .keyspace()
            .range(&authority, request)
            .map_err(failed)?;
        let revision = response.header.map_or(0, |header| header.revision);
        Ok((response.kvs.into_iter().next(), revision))
    }

    async fn own_lease(&self, credentials: &Credentials) -> Result<i64, Status> {
        let grant = pb::LeaseGrantRequest {
            ttl: DEFAULT_TTL.max(self.limits.lease_ttl),
            id: super::lease::new_id(),
        };
        match self
            .write(credentials, Operation::LeaseGrant(grant))
            .await?
        {
            Outcome::LeaseGrant(response) => Ok(response.id),
            _ => Err(unexpected()),
        }
    }
}

impl Place {
    /// Waits until nobody is before this place; `false` if the place itself is gone.
    pub async fn wait(&self) -> Result<bool, Status> {
        loop {
            let before = pb::RangeRequest {
                key: self.prefix.clone(),
                range_end: end_of_prefix(&self.prefix),
                limit: 1,
                sort_order: SortOrder::Descend as i32,
                sort_target: SortTarget::Create as i32,
                max_create_revision: self.revision - 1,
                ..pb::RangeRequest::default()
            };
            let read = self.services.read_one(&self.credentials, &before).await?;
            let (Some(pair), revision) = read else {
                break;
            };
            self.services.until_deleted(&pair.key, revision).await?;
        }
        let own = pb::RangeRequest {
            key: self.key.clone(),
            ..pb::RangeRequest::default()
        };
        let (own, _) = self.services.read_one(&self.credentials, &own).await?;
        Ok(own.is_some_and(|pair| pair.create_revision == self.revision))
    }

    /// Keeps it until its lease ends or its key is deleted.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        // Who waited is gone, and must not keep others waiting until the lease ends.
        let (services, credentials) = (self.services.clone(), self.credentials.clone());
        let (key, revision) = (self.key.clone(), self.revision);
        tokio::spawn(async move {
            let delete = pb::DeleteRangeRequest {
                key: key.clone(),
                ..pb::DeleteRangeRequest::default()
            };
            let compare = create_revision_is(&key, revision);
            let _ = services
                .run_txn(
                    &credentials,
                    compare,
                    Op::RequestDeleteRange(delete),
                    get(&key),
                )
                .await;
        });
    }
}

/// Holds if a key was created at a revision; 0 if it is not there.
pub fn create_revision_is(key: &Bytes, revision: i64) -> pb::Compare {
    pb::Compare {
        result: CompareResult::Equal as i32,
        target: CompareTarget::Create as i32,
        key: key.clone(),
        range_end: Bytes::new(),
        target_union: Some(TargetUnion::CreateRevision(revision)),
    }
}

/// Reads a key.
pub fn get(key: &Bytes) -> Op {
    Op::RequestRange(pb::RangeRequest {
        key: key.clone(),
        ..pb::RangeRequest::default()
    })
}

/// The end of the range of keys that begin with a prefix.
pub fn end_of_prefix(prefix: &[u8]) -> Bytes {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end.into();
        }
    }
    vec![0].into()
}

fn first_pair(response: &pb::TxnResponse) -> Option<KeyValue> {
    match response.responses.first()?.response.as_ref()? {
        OpResponse::ResponseRange(range) => range.kvs.first().cloned(),
        _ => None,
    }
}
