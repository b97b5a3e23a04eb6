//! Messages between members.
//!
//! Each member has one connection to each other one, over which it streams its messages; whatever
//! is lost with a connection, consensus sends again.

mod connector;
pub mod digests;
pub mod join;
mod lobby;
pub mod rebuild;
mod replace;
mod service;
mod snapshot;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use keelson_member::replica::{Input, Progress};
use keelson_member::{MemberError, PeerMessage, RequestError, encode_message, is_snapshot};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status};

pub use self::connector::Connector;
pub use self::lobby::{Lobby, pristine_quorum};
pub use self::service::service;

use crate::grpc::refused;
use crate::node::Node;
use crate::tls::Stamp;

/// What tonic generates from `proto/peer.proto`.
#[allow(missing_docs, unused_qualifications, clippy::pedantic)]
pub mod proto {
    tonic::include_proto!("keelson.state.v1");
}

use proto::peer_client::PeerClient;

/// Messages that wait for one member; more are dropped.
const QUEUE: usize = 4096;
/// Messages in one piece.
const MESSAGES_AT_ONCE: usize = 64;
/// Members of which it is kept where they say that they are.
const HEARD: usize = 64;
const RETRY: Duration = Duration::from_millis(100);
/// Largest piece that is taken: entries of one message, and what else may come with them.
const LARGEST_PIECE: usize = 64 * 1024 * 1024;

/// Connections to the other members.
pub struct Peers {
    cluster_id: u64,
    member_id: u64,
    connector: Connector,
    links: Mutex<HashMap<u64, Link>>,
    /// Where members say that they are: one that was away when its leader was added hears of it only
    /// by answering.
    heard: Mutex<HashMap<u64, String>>,
    /// For single calls, by URL.
    clients: Mutex<HashMap<(String, Stamp), PeerClient<Channel>>>,
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
    pub fn new(cluster_id: u64, member_id: u64, connector: Connector) -> Arc<Self> {
        Arc::new(Self {
            cluster_id,
            member_id,
            connector,
            links: Mutex::new(HashMap::new()),
            heard: Mutex::new(HashMap::new()),
            clients: Mutex::new(HashMap::new()),
        })
    }

    /// Another member says where it is.
    pub fn hear(&self, member: u64, url: &str) {
        let mut heard = self.heard.lock();
        if heard.len() >= HEARD {
            heard.clear();
        }
        heard.insert(member, url.to_owned());
    }

    /// Sends what the member puts into `outbox`, to wherever the membership says that members are.
    pub async fn run(
        self: Arc<Self>,
        node: Node,
        mut outbox: mpsc::UnboundedReceiver<PeerMessage>,
    ) {
        while let Some(message) = outbox.recv().await {
            if is_snapshot(&message) {
                self.send_snapshot(&node, message);
                continue;
            }
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
        let mut leader = self.leader(node)?;
        let response = leader
            .renew_lease(proto::RenewLeaseRequest { id })
            .await
            .map_err(|_| RequestError::TimedOut)?;
        Ok(response.into_inner().ttl)
    }

    /// Asks the leader how many milliseconds a lease has left.
    pub async fn lease_remaining(&self, node: &Node, id: i64) -> Result<Option<u64>, RequestError> {
        let mut leader = self.leader(node)?;
        let response = leader
            .lease_remaining(proto::LeaseRemainingRequest { id })
            .await
            .map_err(|_| RequestError::TimedOut)?;
        Ok(u64::try_from(response.into_inner().remaining_ms).ok())
    }

    /// Asks the leader for a vote for this member, a learner.
    pub async fn promote_self(&self, node: &Node) -> Result<(), Status> {
        let mut leader = self.leader(node).map_err(|error| refused(&error))?;
        let id = self.member_id;
        leader.promote(proto::PromoteRequest { id }).await?;
        Ok(())
    }

    /// Asks the leader how far members follow.
    pub async fn progress(&self, node: &Node, id: u64) -> Result<Progress, RequestError> {
        let mut leader = self.leader(node)?;
        let response = leader
            .progress(proto::ProgressRequest { id })
            .await
            .map_err(|_| RequestError::TimedOut)?
            .into_inner();
        Ok(Progress {
            caught_up: response.caught_up,
            active: response.active,
            voters: response.voters,
        })
    }

    /// Forgets connections to members that are gone or that have moved.
    pub fn prune(&self, node: &Node) {
        let mut links = self.links.lock();
        links.retain(|to, link| self.find(node, *to).as_deref() == Some(&link.url));
        let members = node.keyspace().metadata().members;
        let known = |url: &String| members.iter().any(|member| member.peer_urls.contains(url));
        let now = self.connector.stamp();
        self.clients
            .lock()
            .retain(|(url, stamp), _| known(url) && *stamp == now);
    }

    fn send_snapshot(&self, node: &Node, message: PeerMessage) {
        let to = message.to;
        let endpoint = url_of(node, to).and_then(|url| self.connector.endpoint(&url).ok());
        match endpoint {
            Some(endpoint) => drop(tokio::spawn(snapshot::send(
                node.clone(),
                endpoint,
                self.cluster_id,
                message,
            ))),
            None => node.tell(Input::SnapshotSent(to, false)),
        }
    }

    fn link(&self, node: &Node, to: u64) -> Option<mpsc::Sender<PeerMessage>> {
        let mut links = self.links.lock();
        if let Some(link) = links.get(&to)
            && !link.task.is_finished()
        {
            return Some(link.messages.clone());
        }
        let url = self.find(node, to)?;
        let (messages, queued) = mpsc::channel(QUEUE);
        let outgoing = Outgoing {
            cluster_id: self.cluster_id,
            from: self.member_id,
            to,
            node: node.clone(),
        };
        let task = tokio::spawn(outgoing.run(self.connector.clone(), url.clone(), queued));
        let link = Link {
            url,
            messages: messages.clone(),
            task,
        };
        links.insert(to, link);
        Some(messages)
    }

    /// Where a member is: by the membership, else as it said itself.
    fn find(&self, node: &Node, id: u64) -> Option<String> {
        url_of(node, id).or_else(|| self.heard.lock().get(&id).cloned())
    }

    fn leader(&self, node: &Node) -> Result<PeerClient<Channel>, RequestError> {
        self.member(node, node.status().leader)
    }

    fn member(&self, node: &Node, id: u64) -> Result<PeerClient<Channel>, RequestError> {
        let url = self.find(node, id).ok_or(RequestError::NoLeader)?;
        let mut clients = self.clients.lock();
        let place = (url, self.connector.stamp());
        if let Some(client) = clients.get(&place) {
            return Ok(client.clone());
        }
        let client = self
            .connector
            .client(&place.0)
            .map_err(|_| RequestError::NoLeader)?;
        clients.insert(place, client.clone());
        Ok(client)
    }
}

/// Where a member is by the membership as of what is applied here.
fn url_of(node: &Node, id: u64) -> Option<String> {
    let members = node.keyspace().metadata().members;
    let member = members.into_iter().find(|member| member.id == id)?;
    member.peer_urls.into_iter().next()
}

/// Messages on their way to one member.
struct Outgoing {
    cluster_id: u64,
    from: u64,
    to: u64,
    node: Node,
}

impl Outgoing {
    /// Streams messages, reconnecting for as long as there are any.
    async fn run(self, connector: Connector, url: String, mut queued: mpsc::Receiver<PeerMessage>) {
        loop {
            // Made anew each time: certificates may have changed.
            match connector.endpoint(&url) {
                Ok(endpoint) => {
                    if let Ok(channel) = endpoint.connect().await {
                        self.stream(channel, &mut queued).await;
                    }
                }
                Err(error) => tracing::error!(url, %error, "cannot connect to a member"),
            }
            self.node.tell(Input::Unreachable(self.to));
            while queued.try_recv().is_ok() {} // it is out of date
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn stream(&self, channel: Channel, queued: &mut mpsc::Receiver<PeerMessage>) {
        let (pieces, streamed) = mpsc::channel(64);
        let mut client = PeerClient::new(channel).max_encoding_message_size(LARGEST_PIECE);
        let call = client.exchange(ReceiverStream::new(streamed));
        let pump = async {
            let mut batch = Vec::new();
            let mut url = url_of(&self.node, self.from).unwrap_or_default();
            while queued.recv_many(&mut batch, MESSAGES_AT_ONCE).await > 0 {
                let messages = batch
                    .drain(..)
                    .map(|message| Bytes::from(encode_message(&message)));
                let piece = proto::Messages {
                    cluster_id: self.cluster_id,
                    messages: messages.collect(),
                    from: self.from,
                    url: std::mem::take(&mut url),
                };
                if pieces.send(piece).await.is_err() {
                    // The call has ended, and says why.
                    std::future::pending::<()>().await;
                }
            }
        };
        let outcome = tokio::select! {
            outcome = call => outcome,
            () = pump => return,
        };
        match outcome {
            Err(error) if error.code() == Code::PermissionDenied => {
                self.node.tell(Input::Failed(MemberError::Removed));
            }
            Err(error) => tracing::debug!(to = self.to, %error, "a connection to a member ended"),
            Ok(_) => {}
        }
    }
}

fn check_cluster(own: u64, other: u64) -> Result<(), Status> {
    if own == other {
        return Ok(());
    }
    Err(Status::failed_precondition(format!(
        "this member is of cluster {own:x}, not {other:x}"
    )))
}

fn garbage() -> Status {
    tracing::warn!("cut off a member: it speaks garbage");
    Status::invalid_argument("a message that is not one of consensus")
}
