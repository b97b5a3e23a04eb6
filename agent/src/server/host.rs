//! What the agent's host is.

use keelson_api::proto::host_server::Host;
use keelson_api::proto::{
    ExternalAddress, InfoRequest, InfoResponse, Object, PacketCounter, ScheduleRequest,
    ServiceTraffic, ServicesRequest, ServicesResponse, UplinksRequest, UplinksResponse,
};
use keelson_api::{HostSpec, Kind, Resource};
use keelson_ebpf::Tally;
use tonic::{Request, Response, Status};

use super::{status, to_proto};
use crate::services::{self, Traffic};
use crate::{Agent, AgentError};

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

    async fn uplinks(
        &self,
        _: Request<UplinksRequest>,
    ) -> Result<Response<UplinksResponse>, Status> {
        let used = self.agent.network.external_use().await.map_err(status)?;
        let addresses = used.into_iter().map(|used| ExternalAddress {
            device: used.uplink,
            address: used.address.to_string(),
            to_uplink: Some(counter(used.to_uplink)),
            from_uplink: Some(counter(used.from_uplink)),
        });
        Ok(Response::new(UplinksResponse {
            addresses: addresses.collect(),
        }))
    }

    async fn services(
        &self,
        request: Request<ServicesRequest>,
    ) -> Result<Response<ServicesResponse>, Status> {
        let name = request.into_inner().name;
        if !name.is_empty() && !self.agent.view.read().services().contains_key(&name) {
            let kind = Kind::Service;
            return Err(status(AgentError::NotFound { kind, name }));
        }
        let traffic = services::traffic(&self.agent).await.map_err(status)?;
        let traffic = traffic.into_iter();
        let traffic = traffic.filter(|traffic| name.is_empty() || traffic.service == name);
        Ok(Response::new(ServicesResponse {
            traffic: traffic.map(service_traffic).collect(),
        }))
    }

    async fn schedule(
        &self,
        request: Request<ScheduleRequest>,
    ) -> Result<Response<Object>, Status> {
        let request = request.into_inner();
        let spec = HostSpec {
            unschedulable: request.unschedulable,
            drain: request.drain,
            no_live_migration: request.drain && request.no_live_migration,
        };
        if spec.drain && !spec.unschedulable {
            let message = "a host that is drained is unschedulable as well";
            return Err(Status::invalid_argument(message));
        }
        let change = |host: &mut keelson_api::Host| {
            if host.spec != spec {
                host.spec = spec;
                host.metadata.generation += 1;
            }
        };
        let changed = self.agent.objects.update(&request.name, change).await;
        let (reason, message) = match (spec.unschedulable, spec.drain) {
            (_, true) => ("Drained", "guests that can run elsewhere leave it"),
            (true, false) => ("Cordoned", "no further guests are placed on it"),
            (false, false) => ("Uncordoned", "guests are placed on it"),
        };
        let object = changed.map_err(status)?.object.into_object();
        let events = &self.agent.events;
        events
            .normal(Kind::Host, &request.name, reason, message)
            .await;
        Ok(Response::new(to_proto(&object)?))
    }
}

fn service_traffic(traffic: Traffic) -> ServiceTraffic {
    ServiceTraffic {
        service: traffic.service,
        address: traffic.address.to_string(),
        protocol: traffic.port.protocol.to_string(),
        port: traffic.port.port.into(),
        backend: traffic.backend.unwrap_or_default(),
        to_backend: Some(counter(traffic.to_backend)),
        from_backend: Some(counter(traffic.from_backend)),
    }
}

fn counter(tally: Tally) -> PacketCounter {
    PacketCounter {
        packets: tally.packets,
        bytes: tally.bytes,
    }
}
