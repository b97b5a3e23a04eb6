//! What went between services and their clients on this host, or behind it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use keelson_api::{Service, ServicePort, ServiceProtocol};
use keelson_ebpf::{Protocol, ServiceUse, Tally};

use super::backends::candidates;
use crate::host::network_number;
use crate::view::View;
use crate::{Agent, error::Result};

/// What went between a port of a service's address and a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Traffic {
    /// The service's name.
    pub service: String,
    /// The virtual address.
    pub address: IpAddr,
    /// The port, as the service's object has it.
    pub port: ServicePort,
    /// The guest; `None` for all that the service no longer has, or that are not counted one by one.
    pub backend: Option<String>,
    /// What clients sent.
    pub to_backend: Tally,
    /// What they were answered.
    pub from_backend: Tally,
}

/// What is counted, of services whose objects are there, in order of their names.
///
/// # Errors
/// [`AgentError::Datapath`](crate::AgentError::Datapath).
pub async fn traffic(agent: &Agent) -> Result<Vec<Traffic>> {
    let uses = agent.network.service_use().await?;
    let view = agent.view.read();
    Ok(attribute(&uses, &view))
}

fn attribute(uses: &[ServiceUse], view: &View) -> Vec<Traffic> {
    let mut by_address: BTreeMap<(u32, IpAddr), Vec<&ServiceUse>> = BTreeMap::new();
    for used in uses {
        let of_address = by_address.entry((used.network, used.address));
        of_address.or_default().push(used);
    }
    let mut traffic = Vec::new();
    for (name, service) in view.services() {
        let guests = guests(service, view);
        let network = network_number(&service.spec.network);
        let ipv4 = service.spec.address.map(IpAddr::from);
        let ipv6 = service.spec.address_v6.map(IpAddr::from);
        for address in ipv4.into_iter().chain(ipv6) {
            let of_address = by_address.get(&(network, address));
            for used in of_address.into_iter().flatten() {
                let ports = &mut service.spec.ports.iter();
                let Some(port) = ports.find(|port| is_port(**port, used)) else {
                    continue;
                };
                let backend = used.backend.and_then(|backend| guests.get(&backend));
                traffic.push(Traffic {
                    service: name.clone(),
                    address,
                    port: *port,
                    backend: backend.cloned(),
                    to_backend: used.to_backend,
                    from_backend: used.from_backend,
                });
            }
        }
    }
    traffic
}

/// Who has which address, of the guests that a service is for.
fn guests(service: &Service, view: &View) -> BTreeMap<IpAddr, String> {
    let candidates = candidates(service, view).into_iter();
    let addresses = candidates.flat_map(|candidate| {
        let ipv4 = candidate.address.map(IpAddr::from);
        let ipv6 = candidate.address_v6.map(IpAddr::from);
        let addresses = ipv4.into_iter().chain(ipv6);
        addresses.map(move |address| (address, candidate.guest.clone()))
    });
    addresses.collect()
}

fn is_port(port: ServicePort, used: &ServiceUse) -> bool {
    let protocol = match port.protocol {
        ServiceProtocol::Tcp => Protocol::Tcp,
        ServiceProtocol::Udp => Protocol::Udp,
    };
    port.port == used.port && protocol == used.protocol
}
