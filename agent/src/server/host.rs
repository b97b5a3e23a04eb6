//! What the agent's host is.

use keelson_api::proto::host_server::Host;
use keelson_api::proto::{InfoRequest, InfoResponse};
use tonic::{Request, Response, Status};

use super::status;
use crate::Agent;

/// What the agent's host is.
#[derive(Debug)]
pub struct HostService {
    agent: Agent,
}

impl HostService {
    /// The service of this agent.
    pub fn new(agent: Agent) -> Self {
        Self { agent }
    }
}

#[tonic::async_trait]
impl Host for HostService {
    async fn info(&self, _: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        let inventory = &self.agent.inventory;
        Ok(Response::new(InfoResponse {
            version: env!("CARGO_PKG_VERSION").into(),
            hostname: inventory.hostname.clone(),
            kernel: inventory.kernel.clone(),
            cpus: inventory.cpus,
            memory_bytes: inventory.memory_bytes,
            state: self.agent.objects.location().await.map_err(status)?,
            network_hook: self.agent.network.hook().await.map_err(status)?,
        }))
    }
}
