//! Rebuilds this member from the others, and serves those that are rebuilt from this one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use keelson_member::command::{Operation, Rebuild};
use keelson_member::disk::Disk;
use keelson_member::{Identity, Limits, MemberError, rebuild};
use prometheus::IntCounter;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use super::snapshot::{PIECE_TIMEOUT, PIECES, load};
use super::{Connector, LARGEST_PIECE, proto};
use crate::again;
use crate::grpc::refused;
use crate::maintenance;
use crate::metrics::Rebuilds;
use crate::node::Node;

/// Between attempts, at first. It doubles.
const RETRY: Duration = Duration::from_millis(500);
/// At most, where nobody could send anything: to go on soon when they can.
const LONGEST_RETRY: Duration = Duration::from_secs(2);
/// At most, where something was sent and was of no use: that costs the others a copy of everything.
const LONGEST_RETRY_OF_COPIES: Duration = Duration::from_mins(1);
/// How often it is said that the others can't help.
const COMPLAINT: Duration = Duration::from_secs(10);

/// What is to be rebuilt, and from where.
pub struct Damaged<'a> {
    pub disk: &'a Arc<dyn Disk>,
    pub identity: &'a Identity,
    /// Where the other members may be.
    pub urls: &'a [String],
    pub connector: &'a Connector,
    pub metrics: &'a Rebuilds,
}

impl Damaged<'_> {
    /// Asks the others until one has sent what is needed, however long that takes.
    pub async fn rebuild(&self, reason: &str) -> anyhow::Result<()> {
        let begin = Instant::now();
        self.metrics.damage_found.inc();
        let pause = again::wait();
        if !pause.is_zero() {
            tracing::error!(
                reason,
                ?pause,
                "this member was found damaged again soon after it was rebuilt: it waits. Its memory or \
                 its disk may be at fault: replace it"
            );
            tokio::time::sleep(pause).await;
        }
        tracing::warn!(reason, "this member is rebuilt from the others");
        rebuild::prepare(&**self.disk)?;
        let mut complained: Option<Instant> = None;
        let mut retry = RETRY;
        loop {
            let mut failures = Vec::new();
            let mut received = false;
            for url in self.urls {
                match self.rebuild_from(url, &mut received).await {
                    Ok(()) => {
                        let took = begin.elapsed();
                        self.metrics.durations.observe(took.as_secs_f64());
                        tracing::info!(url, ?took, "this member is whole again");
                        return Ok(());
                    }
                    Err(error) if is_removed(&error) => {
                        return Err(MemberError::Removed.into());
                    }
                    Err(error) => {
                        self.metrics.failures.inc();
                        failures.push(format!("{url}: {error:#}"));
                    }
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
            tokio::time::sleep(retry).await;
            retry = (2 * retry).min(if received {
                LONGEST_RETRY_OF_COPIES
            } else {
                LONGEST_RETRY
            });
        }
    }

    /// Notes whether anything was received.
    async fn rebuild_from(&self, url: &str, received_any: &mut bool) -> anyhow::Result<()> {
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
                Ok(Ok(Some(piece))) => {
                    *received_any = true;
                    drop(chunks.send(piece.chunk).await);
                }
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
    served: IntCounter,
) -> Result<ReceiverStream<Result<proto::RebuildPiece, Status>>, Status> {
    let metadata = node.keyspace().metadata();
    if metadata.removed_members.contains(&request.member_id) {
        return Err(Status::permission_denied("the member was removed"));
    }
    if !metadata
        .members
        .iter()
        .any(|member| member.id == request.member_id)
    {
        return Err(Status::not_found("there is no such member"));
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
        match send(&node, &pieces) {
            Ok(()) => served.inc(),
            Err(error) => {
                tracing::warn!(%error, "cannot send what a member is rebuilt from");
                let _ = pieces.blocking_send(Err(Status::internal(error.to_string())));
            }
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
