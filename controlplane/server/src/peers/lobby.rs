//! What founders of a cluster ask each other before they begin: a founder whose folder is empty may
//! be new, or may have lost its data while the others went on.

use std::sync::Arc;

use parking_lot::Mutex;
use tonic::{Request, Response, Status};

use super::proto::lobby_server::{Lobby as LobbyService, LobbyServer};
use super::{Connector, proto};

/// Whether the cluster has not begun yet, as far as the member knows.
type IsPristine = Box<dyn Fn() -> bool + Send + Sync>;

/// What this member answers.
#[derive(Clone, Default)]
pub struct Lobby {
    answer: Arc<Mutex<Option<(u64, IsPristine)>>>,
}

impl Lobby {
    /// From now on, answers for a cluster.
    pub fn answer(&self, cluster_id: u64, pristine: impl Fn() -> bool + Send + Sync + 'static) {
        *self.answer.lock() = Some((cluster_id, Box::new(pristine)));
    }

    /// The service.
    pub fn service(&self) -> LobbyServer<Self> {
        LobbyServer::new(self.clone())
    }
}

#[tonic::async_trait]
impl LobbyService for Lobby {
    async fn standing(
        &self,
        _request: Request<proto::StandingRequest>,
    ) -> Result<Response<proto::StandingResponse>, Status> {
        let answer = self.answer.lock();
        let (cluster_id, pristine) = answer
            .as_ref()
            .ok_or_else(|| Status::unavailable("this member is starting"))?;
        Ok(Response::new(proto::StandingResponse {
            cluster_id: *cluster_id,
            pristine: pristine(),
        }))
    }
}

/// Asks the other founders, each with its URLs. Whether enough of them for a quorum with this one say
/// that the cluster has not begun; `None` if too few answer; `Some(false)` if one says that it has.
pub async fn pristine_quorum(
    connector: &Connector,
    cluster_id: u64,
    others: &[Vec<String>],
) -> Option<bool> {
    let asked = others.iter().map(|urls| ask(connector, cluster_id, urls));
    let answers = futures::future::join_all(asked).await;
    if answers.contains(&Some(false)) {
        return Some(false);
    }
    let pristine = answers.iter().flatten().count();
    // With this one, more than half.
    (2 * (pristine + 1) > others.len() + 1).then_some(true)
}

async fn ask(connector: &Connector, cluster_id: u64, urls: &[String]) -> Option<bool> {
    for url in urls {
        let Ok(mut client) = connector.lobby(url) else {
            continue;
        };
        match client.standing(proto::StandingRequest {}).await {
            Ok(answer) => {
                let answer = answer.into_inner();
                if answer.cluster_id == cluster_id {
                    return Some(answer.pristine);
                }
                tracing::warn!(
                    url,
                    "the member there is of cluster {:x}, this one of {cluster_id:x}: their \
                     --initial-cluster or --initial-cluster-token differ",
                    answer.cluster_id
                );
            }
            Err(error) => tracing::debug!(url, %error, "a founder does not answer"),
        }
    }
    None
}
