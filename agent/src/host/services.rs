//! Services on this host.

use keelson_ebpf::ServiceUse;

use super::network::{BRIDGE_PREFIX, HostNetwork, device_name, network_number};
use crate::error::Result;

impl HostNetwork {
    /// Makes these the host's services, which are in `networks`.
    pub async fn set_services(
        &self,
        networks: Vec<String>,
        services: Vec<keelson_ebpf::Service>,
    ) -> Result<()> {
        let bridges: Vec<_> = networks
            .iter()
            .map(|name| (device_name(BRIDGE_PREFIX, name), network_number(name)))
            .collect();
        self.datapath
            .with(move |datapath| {
                datapath.set_gateways(&bridges)?;
                datapath.set_services(&services)
            })
            .await
    }

    /// The host's services as they are in force.
    pub async fn services(&self) -> Result<Vec<keelson_ebpf::Service>> {
        self.datapath.with(|datapath| datapath.services()).await
    }

    /// What went between services and their clients here.
    ///
    /// # Errors
    /// [`AgentError::Datapath`](crate::AgentError::Datapath).
    pub async fn service_use(&self) -> Result<Vec<ServiceUse>> {
        self.datapath.with(|datapath| datapath.service_use()).await
    }
}
