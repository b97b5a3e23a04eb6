//! Messages between members.
//!
//! Each member has one connection to each other one, over which it streams its messages; whatever
//! is lost with a connection, consensus sends again.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use keelson_member::{PeerMessage, RequestError, decode_message, encode_message};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status, Streaming};

use crate::grpc::refused;
use crate::node::{Input, Node};

/// What tonic generates from `proto/peer.proto`.
#[allow(missing_docs, unused_qualifications, clippy::pedantic)]
pub mod proto {
    tonic::include_proto!("keelson.state.v1");
}

use proto::peer_client::PeerClient;
use proto::peer_server::Peer;

/// Messages that wait for one member; more are dropped.
const QUEUE: usize = 4096;
/// Messages in one piece.
const MESSAGES_AT_ONCE: usize = 64;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
const RETRY: Duration = Duration::from_millis(100);
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest piece that is taken: entries of one message, and what else may come with them.
const LARGEST_PIECE: usize = 64 * 1024 * 1024;

/// Connections to the other members.
pub struct Peers {
    cluster_id: u64,
    links: Mutex<HashMap<u64, Link>>,
}

struct Link {
    url: String,
    messages: mpsc::Sender<PeerMessage>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Peers {
    /// No connections yet.
    pub fn new(cluster_id: u64) -> Arc<Self> {
        Arc::new(Self {
            cluster_id,
            links: Mutex::new(HashMap::new()),
        })
    }

    /// Sends what the member puts into `outbox`, to wherever the membership says that members are.
    pub async fn run(
        self: Arc<Self>,
        node: Node,
        mut outbox: mpsc::UnboundedReceiver<PeerMessage>,
    ) {
        while let Some(message) = outbox.recv().await {
            let to = message.to;
            let Some(sender) = self.link(&node, to) else {
                node.tell(Input::Unreachable(to));
                continue;
            };
            if sender.try_send(message).is_err() {
                node.tell(Input::Unreachable(to));
            }
        }
    }

    /// Has the leader renew a lease: its seconds, 0 if there is no such lease.
    pub async fn renew_lease(&self, node: &Node, id: i64) -> Result<i64, RequestError> {
        let mut leader = leader(node)?;
        let request = proto::RenewLeaseRequest { id };
        let response = leader
            .renew_lease(request)
            .await
            .map_err(|_| RequestError::TimedOut)?;
        Ok(response.into_inner().ttl)
    }

    /// Asks the leader how many milliseconds a lease has left.
    pub async fn lease_remaining(&self, node: &Node, id: i64) -> Result<Option<u64>, RequestError> {
        let mut leader = leader(node)?;
        let request = proto::LeaseRemainingRequest { id };
        let response = leader
            .lease_remaining(request)
            .await
            .map_err(|_| RequestError::TimedOut)?;
        Ok(u64::try_from(response.into_inner().remaining_ms).ok())
    }

    fn link(&self, node: &Node, to: u64) -> Option<mpsc::Sender<PeerMessage>> {
        let mut links = self.links.lock();
        if let Some(link) = links.get(&to)
            && !link.task.is_finished()
        {
            return Some(link.messages.clone());
        }
        let url = url_of(node, to)?;
        let (messages, queued) = mpsc::channel(QUEUE);
        let task = tokio::spawn(stream_messages(
            self.cluster_id,
            node.clone(),
            to,
            url.clone(),
            queued,
        ));
        let link = Link {
            url,
            messages: messages.clone(),
            task,
        };
        links.insert(to, link);
        Some(messages)
    }

    /// Forgets connections to members that are gone or that have moved.
    pub fn prune(&self, node: &Node) {
        let mut links = self.links.lock();
        links.retain(|to, link| url_of(node, *to).as_deref() == Some(&link.url));
    }
}

fn url_of(node: &Node, id: u64) -> Option<String> {
    let members = node.keyspace().metadata().members;
    let member = members.into_iter().find(|member| member.id == id)?;
    member.peer_urls.into_iter().next()
}

fn leader(node: &Node) -> Result<PeerClient<Channel>, RequestError> {
    let url = url_of(node, node.status().leader).ok_or(RequestError::NoLeader)?;
    let endpoint = Endpoint::from_shared(url).map_err(|_| RequestError::NoLeader)?;
    let channel = endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(CALL_TIMEOUT)
        .connect_lazy();
    Ok(PeerClient::new(channel))
}

/// Streams messages to one member, reconnecting for as long as there are any.
async fn stream_messages(
    cluster_id: u64,
    node: Node,
    to: u64,
    url: String,
    mut queued: mpsc::Receiver<PeerMessage>,
) {
    let Ok(endpoint) = Endpoint::from_shared(url.clone()) else {
        tracing::error!(url, "the member's peer URL is unusable");
        return;
    };
    let endpoint = endpoint.connect_timeout(CONNECT_TIMEOUT).tcp_nodelay(true);
    loop {
        if let Ok(channel) = endpoint.connect().await {
            let (pieces, streamed) = mpsc::channel(64);
            let mut client = PeerClient::new(channel).max_encoding_message_size(LARGEST_PIECE);
            let call = client.exchange(ReceiverStream::new(streamed));
            let pump = async {
                let mut batch = Vec::new();
                while queued.recv_many(&mut batch, MESSAGES_AT_ONCE).await > 0 {
                    let messages = batch
                        .drain(..)
                        .map(|message| Bytes::from(encode_message(&message)));
                    let piece = proto::Messages {
                        cluster_id,
                        messages: messages.collect(),
                    };
                    if pieces.send(piece).await.is_err() {
                        return;
                    }
                }
            };
            tokio::select! {
                outcome = call => if let Err(error) = outcome {
                    tracing::debug!(url, %error, "a connection to a member ended");
                },
                () = pump => {}
            }
        }
        node.tell(Input::Unreachable(to));
        while queued.try_recv().is_ok() {} // it is out of date
        tokio::time::sleep(RETRY).await;
    }
}

/// The service for other members.
pub struct PeerService {
    /// This member.
    pub node: Node,
    /// Its cluster.
    pub cluster_id: u64,
}

#[tonic::async_trait]
impl Peer for PeerService {
    async fn exchange(
        &self,
        request: Request<Streaming<proto::Messages>>,
    ) -> Result<Response<proto::ExchangeEnd>, Status> {
        let mut pieces = request.into_inner();
        while let Some(piece) = pieces.next().await {
            let piece = piece?;
            if piece.cluster_id != self.cluster_id {
                return Err(Status::failed_precondition(format!(
                    "this member is of cluster {:x}, not {:x}",
                    self.cluster_id, piece.cluster_id
                )));
            }
            for message in piece.messages {
                let message = decode_message(&message).ok_or_else(|| {
                    Status::invalid_argument("a message that is not one of consensus")
                })?;
                self.node.tell(Input::Message(message));
            }
        }
        Ok(Response::new(proto::ExchangeEnd {}))
    }

    async fn renew_lease(
        &self,
        request: Request<proto::RenewLeaseRequest>,
    ) -> Result<Response<proto::RenewLeaseResponse>, Status> {
        let renewed = self
            .node
            .renew_lease(request.into_inner().id)
            .map_err(|error| refused(&error))?;
        self.node
            .read_barrier()
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
            .map_err(|error| refused(&error))?;
        Ok(Response::new(proto::LeaseRemainingResponse {
            remaining_ms: remaining
                .and_then(|left| i64::try_from(left).ok())
                .unwrap_or(-1),
        }))
    }
}

/// The service with its limits.
pub fn service(node: Node, cluster_id: u64) -> proto::peer_server::PeerServer<PeerService> {
    proto::peer_server::PeerServer::new(PeerService { node, cluster_id })
        .max_decoding_message_size(LARGEST_PIECE)
}
