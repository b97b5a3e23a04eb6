//! Rebuilds this member from the others, and serves those that are rebuilt from this one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use keelson_member::command::{Operation, Rebuild};
use keelson_member::disk::Disk;
use keelson_member::{Identity, Limits, MemberError, rebuild};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use super::snapshot::{PIECE_TIMEOUT, PIECES, load};
use super::{Connector, LARGEST_PIECE, proto};
use crate::grpc::refused;
use crate::maintenance;
use crate::node::Node;

const RETRY: Duration = Duration::from_millis(500);
/// How often it is said that the others can't help.
const COMPLAINT: Duration = Duration::from_secs(10);

/// What is to be rebuilt, and from where.
pub struct Damaged<'a> {
    pub disk: &'a Arc<dyn Disk>,
    pub identity: &'a Identity,
    /// Where the other members may be.
    pub urls: &'a [String],
    pub connector: &'a Connector,
}

impl Damaged<'_> {
    /// Asks the others until one has sent what is needed, however long that takes.
    pub async fn rebuild(&self, reason: &str) -> anyhow::Result<()> {
        tracing::warn!(reason, "this member is rebuilt from the others");
        rebuild::prepare(&**self.disk)?;
        let mut complained: Option<Instant> = None;
        loop {
            let mut failures = Vec::new();
            for url in self.urls {
                match self.rebuild_from(url).await {
                    Ok(()) => {
                        tracing::info!(url, "this member is whole again");
                        return Ok(());
                    }
                    Err(error) if is_removed(&error) => {
                        return Err(MemberError::Removed.into());
                    }
                    Err(error) => failures.push(format!("{url}: {error:#}")),
                }
            }
            if complained.is_none_or(|since| since.elapsed() > COMPLAINT) {
                complained = Some(Instant::now());
                tracing::warn!(
                    "cannot rebuild this member yet ({}). A quorum of the members has to run \
                     without it; if that is lost, restore a backup: keelson-state snapshot restore",
                    failures.join("; ")
                );
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn rebuild_from(&self, url: &str) -> anyhow::Result<()> {
        let channel = self.connector.endpoint(url)?.connect().await?;
        let mut client =
            proto::peer_client::PeerClient::new(channel).max_decoding_message_size(LARGEST_PIECE);
        let (number, _) = uuid::Uuid::new_v4().as_u64_pair();
        let request = proto::RebuildRequest {
            cluster_id: self.identity.cluster_id,
            member_id: self.identity.member_id,
            number,
        };
        let mut pieces = client.rebuild(request).await?.into_inner();
        let (chunks, received) = mpsc::channel(PIECES);
        let disk = Arc::clone(self.disk);
        let loading = tokio::task::spawn_blocking(move || load(disk, received));
        let outcome = loop {
            match tokio::time::timeout(PIECE_TIMEOUT, pieces.message()).await {
                Err(_) => break Err(anyhow::anyhow!("the snapshot's next piece did not come")),
                Ok(Err(status)) => break Err(status.into()),
                Ok(Ok(None)) => break Ok(()),
                // A loader that has ended says why.
                Ok(Ok(Some(piece))) => drop(chunks.send(piece.chunk).await),
            }
        };
        drop(chunks);
        let staged = loading.await.context("the loader panicked")?;
        outcome?;
        let (disk, identity, staged) = (Arc::clone(self.disk), self.identity.clone(), staged?);
        tokio::task::spawn_blocking(move || {
            rebuild::finish(&disk, &identity, staged, number, Limits::default())
        })
        .await
        .context("the loader panicked")??;
        Ok(())
    }
}

fn is_removed(error: &anyhow::Error) -> bool {
    let denied = error
        .downcast_ref::<Status>()
        .is_some_and(|status| status.code() == Code::PermissionDenied);
    denied || matches!(error.downcast_ref(), Some(MemberError::Removed))
}

/// Has the cluster note that a member is being rebuilt, and then sends it everything.
pub(super) async fn serve(
    node: Node,
    permit: OwnedSemaphorePermit,
    request: proto::RebuildRequest,
) -> Result<ReceiverStream<Result<proto::RebuildPiece, Status>>, Status> {
    let metadata = node.keyspace().metadata();
    if metadata.removed_members.contains(&request.member_id) {
        return Err(Status::permission_denied("the member was removed"));
    }
    let rebuild = Rebuild {
        member_id: request.member_id,
        number: request.number,
    };
    node.propose(Operation::Rebuild(rebuild), None)
        .await
        .map_err(|error| refused(&error))?;
    tracing::info!(member = %format_args!("{:x}", request.member_id), "a member is rebuilt from this one");
    let (pieces, streamed) = mpsc::channel(PIECES);
    tokio::task::spawn_blocking(move || {
        let _permit = permit;
        if let Err(error) = send(&node, &pieces) {
            tracing::warn!(%error, "cannot send what a member is rebuilt from");
            let _ = pieces.blocking_send(Err(Status::internal(error.to_string())));
        }
    });
    Ok(ReceiverStream::new(streamed))
}

fn send(
    node: &Node,
    pieces: &mpsc::Sender<Result<proto::RebuildPiece, Status>>,
) -> Result<(), MemberError> {
    maintenance::flush_now(node)?;
    let mut reader = node.keyspace().snapshot()?;
    while let Some(chunk) = reader.next_chunk()? {
        let piece = proto::RebuildPiece {
            chunk: chunk.into(),
        };
        if pieces.blocking_send(Ok(piece)).is_err() {
            break; // the member has gone
        }
    }
    Ok(())
}
