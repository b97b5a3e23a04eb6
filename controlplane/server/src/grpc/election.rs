//! Elections that the server waits for (`v3election`).

use std::pin::Pin;

use bytes::Bytes;
use electionpb::election_server::Election;
use futures::Stream;
use keelson_etcd_api::etcdserverpb as pb;
use keelson_etcd_api::v3electionpb as electionpb;
use keelson_member::keyspace::{KeyRange, RangeEnd};
use keelson_member::watch::WatchOptions;
use pb::request_op::Request as Op;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::Services;
use super::credentials::Credentials;
use super::queue::{create_revision_is, end_of_prefix, get, prefix};

/// Leaders that an observer has not read yet.
const UNREAD: usize = 16;

#[tonic::async_trait]
impl Election for Services {
    async fn campaign(
        &self,
        request: Request<electionpb::CampaignRequest>,
    ) -> Result<Response<electionpb::CampaignResponse>, Status> {
        let credentials = self.credentials(&request);
        let request = request.into_inner();
        let (place, existing) = self
            .enqueue(
                &credentials,
                &request.name,
                request.lease,
                request.value.clone(),
            )
            .await?;
        let leader = electionpb::LeaderKey {
            name: request.name,
            key: place.key.clone(),
            rev: place.revision,
            lease: place.lease,
        };
        if existing.is_some_and(|pair| pair.value != request.value) {
            self.proclaim_as(&credentials, &leader, request.value)
                .await?;
        }
        if !place.wait().await? {
            return Err(Status::unknown("election: session is expired"));
        }
        place.keep();
        Ok(Response::new(electionpb::CampaignResponse {
            header: self.current_header(),
            leader: Some(leader),
        }))
    }

    async fn proclaim(
        &self,
        request: Request<electionpb::ProclaimRequest>,
    ) -> Result<Response<electionpb::ProclaimResponse>, Status> {
        let credentials = self.credentials(&request);
        let request = request.into_inner();
        let leader = request.leader.ok_or_else(missing_leader)?;
        self.proclaim_as(&credentials, &leader, request.value)
            .await?;
        Ok(Response::new(electionpb::ProclaimResponse {
            header: self.current_header(),
        }))
    }

    async fn leader(
        &self,
        request: Request<electionpb::LeaderRequest>,
    ) -> Result<Response<electionpb::LeaderResponse>, Status> {
        let credentials = self.credentials(&request);
        let prefix = prefix(&request.into_inner().name);
        let (first, revision) = self.first_of(&credentials, &prefix).await?;
        Ok(Response::new(electionpb::LeaderResponse {
            header: self.header(revision),
            kv: Some(first.ok_or_else(|| Status::unknown("election: no leader"))?),
        }))
    }

    type ObserveStream =
        Pin<Box<dyn Stream<Item = Result<electionpb::LeaderResponse, Status>> + Send>>;

    async fn observe(
        &self,
        request: Request<electionpb::LeaderRequest>,
    ) -> Result<Response<Self::ObserveStream>, Status> {
        let credentials = self.all_credentials(&request);
        let prefix = prefix(&request.into_inner().name);
        let (leaders, told) = mpsc::channel(UNREAD);
        let services = self.clone();
        tokio::spawn(async move {
            let observing = services.tell_leaders(&credentials, &prefix, &leaders);
            let outcome = tokio::select! {
                outcome = observing => outcome,
                () = leaders.closed() => return,
            };
            if let Err(error) = outcome {
                let _ = leaders.send(Err(error)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(told))))
    }

    async fn resign(
        &self,
        request: Request<electionpb::ResignRequest>,
    ) -> Result<Response<electionpb::ResignResponse>, Status> {
        let credentials = self.credentials(&request);
        let leader = request.into_inner().leader.ok_or_else(missing_leader)?;
        let delete = pb::DeleteRangeRequest {
            key: leader.key.clone(),
            ..pb::DeleteRangeRequest::default()
        };
        // Who leads no longer has nothing to give up.
        self.run_txn(
            &credentials,
            create_revision_is(&leader.key, leader.rev),
            Op::RequestDeleteRange(delete),
            get(&leader.key),
        )
        .await?;
        Ok(Response::new(electionpb::ResignResponse {
            header: self.current_header(),
        }))
    }
}

impl Services {
    async fn proclaim_as(
        &self,
        credentials: &Credentials,
        leader: &electionpb::LeaderKey,
        value: Bytes,
    ) -> Result<(), Status> {
        let put = pb::PutRequest {
            key: leader.key.clone(),
            value,
            lease: leader.lease,
            ..pb::PutRequest::default()
        };
        let response = self
            .run_txn(
                credentials,
                create_revision_is(&leader.key, leader.rev),
                Op::RequestPut(put),
                get(&leader.key),
            )
            .await?;
        if !response.succeeded {
            return Err(Status::unknown("election: not leader"));
        }
        Ok(())
    }

    /// Tells the leader, each time that it or what it proclaims changes, until nobody listens.
    async fn tell_leaders(
        &self,
        credentials: &Credentials,
        prefix: &Bytes,
        leaders: &mpsc::Sender<Result<electionpb::LeaderResponse, Status>>,
    ) -> Result<(), Status> {
        let options = WatchOptions {
            range: KeyRange {
                start: prefix.clone(),
                end: RangeEnd::Before(end_of_prefix(prefix)),
            },
            no_puts: false,
            no_deletions: false,
        };
        let mut told = None;
        loop {
            let (first, revision) = self.first_of(credentials, prefix).await?;
            if let Some(pair) = first
                && told != Some(pair.mod_revision)
            {
                told = Some(pair.mod_revision);
                let response = electionpb::LeaderResponse {
                    header: self.header(revision),
                    kv: Some(pair),
                };
                if leaders.send(Ok(response)).await.is_err() {
                    return Ok(());
                }
            }
            self.until_changed(options.clone(), revision).await?;
        }
    }
}

fn missing_leader() -> Status {
    Status::unknown("\"leader\" field must be provided")
}
