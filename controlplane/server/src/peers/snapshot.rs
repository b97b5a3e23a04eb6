//! Snapshots on their way from the leader to a member that is too far behind.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use keelson_member::disk::Disk;
use keelson_member::keyspace::{SnapshotWriter, StagedSnapshot};
use keelson_member::replica::Input;
use keelson_member::{PeerMessage, decode_message, encode_message};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Endpoint;
use tonic::{Status, Streaming};

use super::proto::peer_client::PeerClient;
use super::{LARGEST_PIECE, proto};
use crate::node::Node;

/// Pieces on the way between the disk and the connection.
pub(super) const PIECES: usize = 8;
/// A receiver waits this long for the next piece.
pub(super) const PIECE_TIMEOUT: Duration = Duration::from_secs(30);

/// Sends what the keyspace holds, and tells the member how that ended.
pub async fn send(node: Node, endpoint: Endpoint, cluster_id: u64, message: PeerMessage) {
    let to = message.to;
    let outcome = stream(&node, endpoint, cluster_id, message).await;
    match &outcome {
        Ok(()) => tracing::info!(to = %format_args!("{to:x}"), "sent a snapshot"),
        Err(error) => {
            tracing::warn!(to = %format_args!("{to:x}"), "cannot send a snapshot: {error:#}");
        }
    }
    node.tell(Input::SnapshotSent(to, outcome.is_ok()));
}

async fn stream(
    node: &Node,
    endpoint: Endpoint,
    cluster_id: u64,
    message: PeerMessage,
) -> anyhow::Result<()> {
    let channel = endpoint.connect().await.context("connect")?;
    let mut client = PeerClient::new(channel).max_encoding_message_size(LARGEST_PIECE);
    let mut reader = node.keyspace().snapshot()?;
    let (pieces, streamed) = mpsc::channel(PIECES);
    let reading = tokio::task::spawn_blocking(move || {
        let mut message = Bytes::from(encode_message(&message));
        while let Some(chunk) = reader.next_chunk()? {
            let piece = proto::SnapshotPiece {
                cluster_id,
                message: std::mem::take(&mut message),
                chunk: chunk.into(),
            };
            if pieces.blocking_send(piece).is_err() {
                break; // the call has ended, and says why
            }
        }
        anyhow::Ok(())
    });
    let sent = client.install_snapshot(ReceiverStream::new(streamed)).await;
    reading.await.context("the reader panicked")??;
    sent?;
    Ok(())
}

/// Takes a snapshot, loads it beside the keyspace, and hands it to the member.
pub async fn receive(
    node: &Node,
    disk: Arc<dyn Disk>,
    cluster_id: u64,
    mut pieces: Streaming<proto::SnapshotPiece>,
) -> Result<(), Status> {
    let (chunks, received) = mpsc::channel::<Bytes>(PIECES);
    let loading = tokio::task::spawn_blocking(move || load(disk, received));
    let mut offer = None;
    loop {
        let piece = tokio::time::timeout(PIECE_TIMEOUT, pieces.message())
            .await
            .map_err(|_| Status::deadline_exceeded("the snapshot's next piece did not come"))??;
        let Some(piece) = piece else {
            break;
        };
        super::check_cluster(cluster_id, piece.cluster_id)?;
        if offer.is_none() {
            let message = decode_message(&piece.message);
            offer = Some(message.ok_or_else(super::garbage)?);
        }
        if chunks.send(piece.chunk).await.is_err() {
            break; // the loader has ended, and says why
        }
    }
    drop(chunks);
    let staged = loading
        .await
        .map_err(|error| Status::internal(error.to_string()))?
        .map_err(|error| Status::data_loss(format!("{error:#}")))?;
    let offer = offer.ok_or_else(super::garbage)?;
    node.tell(Input::Snapshot(Box::new((offer, staged))));
    Ok(())
}

/// Loads what comes, until there is no more.
pub(super) fn load(
    disk: Arc<dyn Disk>,
    mut chunks: mpsc::Receiver<Bytes>,
) -> anyhow::Result<StagedSnapshot> {
    let (number, _) = uuid::Uuid::new_v4().as_u64_pair();
    let mut writer = SnapshotWriter::new(disk, number)?;
    while let Some(chunk) = chunks.blocking_recv() {
        if let Err(error) = writer.push(&chunk) {
            writer.discard()?;
            return Err(error.into());
        }
    }
    Ok(writer.finish()?)
}
