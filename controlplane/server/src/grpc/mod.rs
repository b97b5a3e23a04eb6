//! etcd v3's services on a member.

mod auth;
mod cluster;
mod credentials;
mod election;
mod kv;
mod lease;
mod lock;
mod maintenance;
mod queue;
mod ranges;
mod watch;

use std::sync::Arc;

use keelson_etcd_api::etcdserverpb as pb;
use keelson_etcd_api::v3electionpb::election_server::ElectionServer;
use keelson_etcd_api::v3lockpb::lock_server::LockServer;
use keelson_member::{Failure, RequestError};
use pb::auth_server::AuthServer;
use pb::cluster_server::ClusterServer;
use pb::kv_server::KvServer;
use pb::lease_server::LeaseServer;
use pb::maintenance_server::MaintenanceServer;
use pb::watch_server::WatchServer;
use tonic::service::Routes;
use tonic::{Code, Status};

pub use self::auth::Passwords;
pub use self::ranges::{ResponseMemory, hold};

use crate::ending::Ending;
use crate::node::Node;
use crate::peers::Peers;

/// The version of etcd's API and behaviour that is spoken: clients ask for it, to know what they may
/// use.
pub const ETCD_VERSION: &str = "3.5.30";

/// What every service needs.
#[derive(Clone)]
pub struct Services {
    /// The member.
    pub node: Node,
    /// The other members.
    pub peers: Arc<Peers>,
    /// The cluster's id.
    pub cluster_id: u64,
    /// The member's id.
    pub member_id: u64,
    /// Limits that flags set.
    pub limits: Limits,
    /// Streams end when the process is about to.
    pub ending: Ending,
    /// Memory for large answers.
    pub responses: ResponseMemory,
    /// How passwords are handled.
    pub passwords: Passwords,
}

/// Limits of requests.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Operations in one transaction.
    pub txn_operations: usize,
    /// Bytes of one request.
    pub request_bytes: usize,
    /// Shortest time to live of a lease, in seconds.
    pub lease_ttl: i64,
    /// Time between progress notifications of a watch without events.
    pub watch_progress: std::time::Duration,
    /// Learners in the cluster.
    pub learners: usize,
    /// Whether the common name of a client's certificate is its user.
    pub certificate_is_user: bool,
}

/// What gRPC adds to a request at most.
const MESSAGE_OVERHEAD: usize = 512 * 1024;

impl Services {
    /// All services, as routes.
    pub fn routes(self) -> Routes {
        let largest = self.limits.request_bytes + MESSAGE_OVERHEAD;
        let mut routes =
            Routes::new(KvServer::new(self.clone()).max_decoding_message_size(largest));
        routes = routes
            .add_service(WatchServer::new(self.clone()).max_decoding_message_size(largest))
            .add_service(LeaseServer::new(self.clone()).max_decoding_message_size(largest))
            .add_service(ClusterServer::new(self.clone()).max_decoding_message_size(largest))
            .add_service(AuthServer::new(self.clone()).max_decoding_message_size(largest))
            .add_service(LockServer::new(self.clone()).max_decoding_message_size(largest))
            .add_service(ElectionServer::new(self.clone()).max_decoding_message_size(largest))
            .add_service(MaintenanceServer::new(self).max_decoding_message_size(largest));
        routes
    }

    /// Waits until a read sees everything that was acknowledged before.
    async fn linearize(&self) -> Result<(), Status> {
        self.refuse_learner()?;
        self.node
            .read_barrier()
            .await
            .map_err(|error| refused(&error))
    }

    /// A learner answers only what needs no vote.
    fn refuse_learner(&self) -> Result<(), Status> {
        // As of what can be read, which is ahead of what the member's thread last told.
        if self.node.keyspace().is_learner(self.member_id) {
            return Err(refused(&RequestError::NotForLearners));
        }
        Ok(())
    }

    /// A header with a revision of the state machine's.
    #[allow(clippy::unnecessary_wraps)] // headers are optional in messages
    fn header(&self, revision: i64) -> Option<pb::ResponseHeader> {
        Some(pb::ResponseHeader {
            cluster_id: self.cluster_id,
            member_id: self.member_id,
            revision,
            raft_term: self.node.term(),
        })
    }

    /// Fills a header that has only the revision.
    fn complete(&self, header: &mut Option<pb::ResponseHeader>) {
        let revision = header.as_ref().map_or(0, |header| header.revision);
        *header = self.header(revision);
    }

    /// A header with the current revision.
    fn current_header(&self) -> Option<pb::ResponseHeader> {
        self.header(self.node.keyspace().revision())
    }
}

/// A refused request as a status.
pub fn refused(error: &RequestError) -> Status {
    Status::new(Code::from_i32(error.code()), error.to_string())
}

/// A request that failed, as a status. A broken member ends by itself, elsewhere.
fn failed(failure: Failure) -> Status {
    match failure {
        Failure::Request(error) => refused(&error),
        Failure::Member(error) if error.is_damage() => {
            tracing::error!(%error, "a read failed");
            Status::unavailable("etcdserver: this member is damaged: ask another one")
        }
        Failure::Member(error) => {
            tracing::error!(%error, "a read failed");
            Status::new(Code::DataLoss, RequestError::Corrupt.to_string())
        }
    }
}

/// An answer of the wrong kind: a defect.
fn unexpected() -> Status {
    Status::internal("the member answered something else than was asked")
}
