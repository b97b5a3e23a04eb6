//! What this member answers to others.

use std::sync::Arc;

use futures::StreamExt as _;
use keelson_member::disk::Disk;
use keelson_member::keyspace::DIGEST_VERSION;
use keelson_member::replica::Input;
use keelson_member::{check_form, check_term, decode_message};
use prometheus::IntCounter;
use tokio::sync::Semaphore;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::proto::peer_server::{Peer, PeerServer};
use super::{
    LARGEST_PIECE, Peers, check_cluster, digests, garbage, proto, rebuild, replace, snapshot,
};
use crate::grpc::refused;
use crate::node::Node;

/// The service for other members.
pub struct PeerService {
    node: Node,
    peers: Arc<Peers>,
    disk: Arc<dyn Disk>,
    cluster_id: u64,
    member_id: u64,
    /// One snapshot at a time.
    receiving: Semaphore,
    /// One member at a time.
    rebuilding: Arc<Semaphore>,
    rebuilt: IntCounter,
}

/// The service with its limits.
pub fn service(
    node: Node,
    peers: Arc<Peers>,
    disk: Arc<dyn Disk>,
    cluster_id: u64,
    member_id: u64,
    rebuilt: IntCounter,
) -> PeerServer<PeerService> {
    PeerServer::new(PeerService {
        node,
        peers,
        disk,
        cluster_id,
        member_id,
        receiving: Semaphore::new(1),
        rebuilding: Arc::new(Semaphore::new(1)),
        rebuilt,
    })
    .max_decoding_message_size(LARGEST_PIECE)
}

#[tonic::async_trait]
impl Peer for PeerService {
    type RebuildStream = ReceiverStream<Result<proto::RebuildPiece, Status>>;

    async fn rebuild(
        &self,
        request: Request<proto::RebuildRequest>,
    ) -> Result<Response<Self::RebuildStream>, Status> {
        let request = request.into_inner();
        check_cluster(self.cluster_id, request.cluster_id)?;
        let Ok(permit) = Arc::clone(&self.rebuilding).try_acquire_owned() else {
            return Err(Status::resource_exhausted(
                "another member is being rebuilt from this one",
            ));
        };
        rebuild::serve(self.node.clone(), permit, request, self.rebuilt.clone())
            .await
            .map(Response::new)
    }

    async fn exchange(
        &self,
        request: Request<Streaming<proto::Messages>>,
    ) -> Result<Response<proto::ExchangeEnd>, Status> {
        let mut pieces = request.into_inner();
        let mut known = false;
        while let Some(piece) = pieces.next().await {
            let piece = piece?;
            check_cluster(self.cluster_id, piece.cluster_id)?;
            if !known {
                let removed = self.node.keyspace().metadata().removed_members;
                if removed.contains(&piece.from) {
                    return Err(Status::permission_denied("the member was removed"));
                }
                known = true;
                if !piece.url.is_empty() {
                    self.peers.hear(piece.from, &piece.url);
                }
            }
            for message in piece.messages {
                let message = decode_message(&message).ok_or_else(garbage)?;
                check_form(&message, piece.from, self.member_id)
                    .and_then(|()| check_term(&message, self.node.term()))
                    .map_err(|refusal| {
                        let from = format_args!("{:x}", piece.from);
                        tracing::warn!(%from, refusal, "cut off a member");
                        Status::invalid_argument(format!("a message makes no sense: {refusal}"))
                    })?;
                self.node.tell(Input::Message(message));
            }
        }
        Ok(Response::new(proto::ExchangeEnd {}))
    }

    async fn install_snapshot(
        &self,
        request: Request<Streaming<proto::SnapshotPiece>>,
    ) -> Result<Response<proto::InstallSnapshotEnd>, Status> {
        let Ok(_permit) = self.receiving.try_acquire() else {
            return Err(Status::resource_exhausted(
                "another snapshot is being received",
            ));
        };
        let disk = Arc::clone(&self.disk);
        snapshot::receive(&self.node, disk, self.cluster_id, request.into_inner()).await?;
        Ok(Response::new(proto::InstallSnapshotEnd {}))
    }

    async fn digest(
        &self,
        request: Request<proto::DigestRequest>,
    ) -> Result<Response<proto::DigestResponse>, Status> {
        let request = request.into_inner();
        check_cluster(self.cluster_id, request.cluster_id)?;
        let digest = self.node.keyspace().digest(request.index);
        Ok(Response::new(proto::DigestResponse {
            digest: digest.filter(|_| request.version == DIGEST_VERSION),
        }))
    }

    async fn diverged(
        &self,
        request: Request<proto::DivergedRequest>,
    ) -> Result<Response<proto::DivergedResponse>, Status> {
        let request = request.into_inner();
        check_cluster(self.cluster_id, request.cluster_id)?;
        let own = self.node.keyspace().digest(request.index);
        if request.version == DIGEST_VERSION && own.is_some_and(|own| own != request.digest) {
            self.node
                .tell(Input::Failed(digests::divergent(request.index)));
        }
        Ok(Response::new(proto::DivergedResponse {}))
    }

    async fn membership(
        &self,
        _request: Request<proto::MembershipRequest>,
    ) -> Result<Response<proto::MembershipResponse>, Status> {
        // One that joins has just been added: it must be in the answer.
        self.node
            .read_barrier()
            .await
            .map_err(|error| refused(&error))?;
        let metadata = self.node.keyspace().metadata();
        Ok(Response::new(proto::MembershipResponse {
            cluster_id: self.cluster_id,
            members: metadata.members.into_iter().map(Into::into).collect(),
        }))
    }

    async fn progress(
        &self,
        request: Request<proto::ProgressRequest>,
    ) -> Result<Response<proto::ProgressResponse>, Status> {
        let progress = self
            .node
            .progress(request.into_inner().id)
            .await
            .map_err(|error| refused(&error))?;
        Ok(Response::new(proto::ProgressResponse {
            caught_up: progress.caught_up,
            active: progress.active,
            voters: progress.voters,
        }))
    }

    async fn replace(
        &self,
        request: Request<proto::ReplaceRequest>,
    ) -> Result<Response<proto::MembershipResponse>, Status> {
        let request = request.into_inner();
        let members = replace::replace(&self.node, &request.member, request.peer_urls).await?;
        Ok(Response::new(proto::MembershipResponse {
            cluster_id: self.cluster_id,
            members: members.into_iter().map(Into::into).collect(),
        }))
    }

    async fn promote(
        &self,
        request: Request<proto::PromoteRequest>,
    ) -> Result<Response<proto::PromoteResponse>, Status> {
        replace::promote(&self.node, request.into_inner().id).await?;
        Ok(Response::new(proto::PromoteResponse {}))
    }

    async fn renew_lease(
        &self,
        request: Request<proto::RenewLeaseRequest>,
    ) -> Result<Response<proto::RenewLeaseResponse>, Status> {
        let renewed = self
            .node
            .renew_lease(request.into_inner().id)
            .await
            .map_err(|error| refused(&error))?;
        Ok(Response::new(proto::RenewLeaseResponse {
            ttl: renewed.unwrap_or(0),
        }))
    }

    async fn lease_remaining(
        &self,
        request: Request<proto::LeaseRemainingRequest>,
    ) -> Result<Response<proto::LeaseRemainingResponse>, Status> {
        let remaining = self
            .node
            .lease_remaining(request.into_inner().id)
            .await
            .map_err(|error| refused(&error))?;
        Ok(Response::new(proto::LeaseRemainingResponse {
            remaining_ms: remaining
                .and_then(|left| i64::try_from(left).ok())
                .unwrap_or(-1),
        }))
    }
}
