//! What is done to disks.

use keelson_api::Disk;
use keelson_api::proto::disks_server::Disks;
use keelson_api::proto::{
    DiskStatistics, DiskStatisticsRequest, DiskStatisticsResponse, SnapshotDiskRequest,
    SnapshotDiskResponse,
};
use serde_json::json;
use tonic::{Request, Response, Status};

use super::status;
use crate::Agent;
use crate::guest::{served_disks, snapshot};

/// What is done to disks.
#[derive(Debug)]
pub struct DisksService {
    agent: Agent,
}

impl DisksService {
    /// The service of this agent.
    pub fn new(agent: Agent) -> Self {
        Self { agent }
    }
}

#[tonic::async_trait]
impl Disks for DisksService {
    async fn snapshot(
        &self,
        request: Request<SnapshotDiskRequest>,
    ) -> Result<Response<SnapshotDiskResponse>, Status> {
        let request = request.into_inner();
        // A client that goes away does not leave it without its event.
        let agent = self.agent.clone();
        let made =
            tokio::spawn(async move { snapshot(&agent, &request.name, &request.snapshot).await });
        let made = made
            .await
            .map_err(|error| Status::internal(error.to_string()))?;
        let path = made.map_err(status)?.display().to_string();
        Ok(Response::new(SnapshotDiskResponse { path }))
    }

    async fn statistics(
        &self,
        request: Request<DiskStatisticsRequest>,
    ) -> Result<Response<DiskStatisticsResponse>, Status> {
        let name = request.into_inner().name;
        if !name.is_empty() {
            let disk = self.agent.objects.get_typed::<Disk>(&name).await;
            disk.map_err(status)?;
        }
        let mut disks = Vec::new();
        for served in served_disks(&self.agent).await.map_err(status)? {
            if !name.is_empty() && served.disk != name {
                continue;
            }
            // Others have theirs, whatever is wrong with one.
            let statistics = served.statistics().await;
            let statistics =
                statistics.unwrap_or_else(|error| json!({ "error": error.to_string() }));
            disks.push(DiskStatistics {
                name: served.disk,
                guest: served.guest,
                json: statistics.to_string().into_bytes(),
            });
        }
        Ok(Response::new(DiskStatisticsResponse { disks }))
    }
}
