//! Leases.

use std::pin::Pin;

use futures::{Stream, StreamExt as _};
use keelson_etcd_api::etcdserverpb as pb;
use keelson_member::RequestError;
use keelson_member::command::{Operation, Response as Outcome};
use pb::lease_server::Lease;
use tonic::{Request, Response, Status, Streaming};

use super::{Services, refused, unexpected};

/// Keep-alives of one stream that may wait at once.
const KEEP_ALIVES_AT_ONCE: usize = 1024;

type KeepAlives = Pin<Box<dyn Stream<Item = Result<pb::LeaseKeepAliveResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Lease for Services {
    async fn lease_grant(
        &self,
        request: Request<pb::LeaseGrantRequest>,
    ) -> Result<Response<pb::LeaseGrantResponse>, Status> {
        let credentials = self.credentials(&request);
        let mut request = request.into_inner();
        if request.id == 0 {
            request.id = new_id();
        }
        request.ttl = request.ttl.max(self.limits.lease_ttl);
        match self
            .write(&credentials, Operation::LeaseGrant(request))
            .await?
        {
            Outcome::LeaseGrant(mut response) => {
                self.complete(&mut response.header);
                Ok(Response::new(response))
            }
            _ => Err(unexpected()),
        }
    }

    async fn lease_revoke(
        &self,
        request: Request<pb::LeaseRevokeRequest>,
    ) -> Result<Response<pb::LeaseRevokeResponse>, Status> {
        let credentials = self.credentials(&request);
        match self
            .write(&credentials, Operation::LeaseRevoke(request.into_inner()))
            .await?
        {
            Outcome::LeaseRevoke(mut response) => {
                self.complete(&mut response.header);
                Ok(Response::new(response))
            }
            _ => Err(unexpected()),
        }
    }

    type LeaseKeepAliveStream = KeepAlives;

    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<pb::LeaseKeepAliveRequest>>,
    ) -> Result<Response<KeepAlives>, Status> {
        self.require_user(&request)?;
        let services = self.clone();
        let answers = request.into_inner().map(move |request| {
            let services = services.clone();
            async move {
                let id = request?.id;
                let ttl = services.renew(id).await.map_err(|error| refused(&error))?;
                Ok(pb::LeaseKeepAliveResponse {
                    header: services.current_header(),
                    id,
                    ttl,
                })
            }
        });
        // One client may keep many leases alive over one stream: they share rounds of consensus.
        let answers = answers.buffered(KEEP_ALIVES_AT_ONCE);
        let stopped = futures::stream::once(self.ending.clone().begins());
        let stopped = stopped.map(|()| Err(refused(&RequestError::Stopped)));
        Ok(Response::new(Box::pin(until(answers, stopped))))
    }

    async fn lease_time_to_live(
        &self,
        request: Request<pb::LeaseTimeToLiveRequest>,
    ) -> Result<Response<pb::LeaseTimeToLiveResponse>, Status> {
        let authority = self.require_user(&request)?;
        let request = request.into_inner();
        self.linearize().await?;
        if request.keys {
            self.node
                .keyspace()
                .check_lease_keys(&authority, request.id)
                .map_err(|error| refused(&error))?;
        }
        let remaining = match self.node.lease_remaining(request.id).await {
            Err(RequestError::NotLeader) => {
                self.peers.lease_remaining(&self.node, request.id).await
            }
            other => other,
        }
        .map_err(|error| refused(&error))?;
        let known = self.node.keyspace().lease(request.id);
        let mut response = pb::LeaseTimeToLiveResponse {
            header: self.current_header(),
            id: request.id,
            ttl: -1,
            ..pb::LeaseTimeToLiveResponse::default()
        };
        if let (Some((record, keys)), Some(remaining)) = (known, remaining) {
            response.ttl = i64::try_from(remaining / 1000).unwrap_or(i64::MAX);
            response.granted_ttl = record.granted;
            response.keys = if request.keys { keys } else { Vec::new() };
        }
        Ok(Response::new(response))
    }

    async fn lease_leases(
        &self,
        request: Request<pb::LeaseLeasesRequest>,
    ) -> Result<Response<pb::LeaseLeasesResponse>, Status> {
        self.require_user(&request)?;
        self.linearize().await?;
        let mut ids: Vec<i64> = self
            .node
            .keyspace()
            .leases()
            .into_iter()
            .map(|(id, _)| id)
            .collect();
        ids.sort_unstable();
        Ok(Response::new(pb::LeaseLeasesResponse {
            header: self.current_header(),
            leases: ids.into_iter().map(|id| pb::LeaseStatus { id }).collect(),
        }))
    }
}

/// The items of a stream until it ends, or until there is an item of the other one.
fn until<T>(stream: impl Stream<Item = T>, end: impl Stream<Item = T>) -> impl Stream<Item = T> {
    let ended = futures::stream::once(std::future::ready(None));
    let items = stream.map(Some).chain(ended).map(|item| (item, false));
    let both = futures::stream::select(items, end.map(|item| (Some(item), true)));
    both.scan(false, |ended, (item, last)| {
        let item = item.filter(|_| !*ended);
        *ended |= last;
        std::future::ready(item)
    })
}

/// An id for a lease whose client did not choose one.
pub fn new_id() -> i64 {
    let (high, _) = uuid::Uuid::new_v4().as_u64_pair();
    i64::try_from(high >> 1).unwrap_or(1).max(1)
}

impl Services {
    /// Gives a lease its full time again: its seconds, 0 if there is no such lease.
    async fn renew(&self, id: i64) -> Result<i64, RequestError> {
        match self.node.renew_lease(id).await {
            Err(RequestError::NotLeader) => self.peers.renew_lease(&self.node, id).await,
            renewed => Ok(renewed?.unwrap_or(0)),
        }
    }
}
