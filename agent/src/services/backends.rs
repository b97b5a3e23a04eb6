//! Which interfaces of which guests a service is for.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use keelson_api::{MacAddress, Service, ServiceProtocol, ServiceSpec};
use keelson_ebpf::{Protocol, ServiceBackend};

use crate::view::{KnownGuest, View};

/// A guest's interface that a service is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The guest.
    pub guest: String,
    /// Its interface.
    pub interface: String,
    /// The interface's IPv4 address.
    pub address: Option<Ipv4Addr>,
    /// Its IPv6 address.
    pub address_v6: Option<Ipv6Addr>,
    /// Its Ethernet address.
    pub mac: MacAddress,
    /// Whether the guest runs, and is to go on.
    pub runs: bool,
    /// Whether the guest runs, and is about to stop.
    pub stops: bool,
    /// Whether the service is for it; else it was, and may have flows.
    pub selected: bool,
    /// Where it is.
    pub place: Place,
}

/// Where a guest is, as this host sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// On this host, which finds out whether it serves.
    Here,
    /// On another one, which does.
    On(String),
    /// On another one, whose lease has ended.
    OnLost(String),
    /// On none.
    Nowhere,
}

/// The interfaces that a service is for: the first one in its network of each guest that it selects.
pub fn candidates(service: &Service, view: &View) -> Vec<Candidate> {
    let spec = &service.spec;
    view.guests_in(&spec.network)
        .filter(|(name, guest)| spec.selects(name, &guest.labels))
        .filter_map(|(name, guest)| candidate(name, guest, spec, view, true))
        .take(keelson_ebpf::MAX_BACKENDS)
        .collect()
}

/// The interfaces that a service is not for any more, of those whose addresses it still has as backends.
pub fn former(service: &Service, view: &View, held: &BTreeSet<IpAddr>) -> Vec<Candidate> {
    if held.is_empty() {
        return Vec::new();
    }
    let spec = &service.spec;
    view.guests_in(&spec.network)
        .filter(|(name, guest)| !spec.selects(name, &guest.labels))
        .filter_map(|(name, guest)| candidate(name, guest, spec, view, false))
        .filter(|candidate| candidate.is_among(held))
        .collect()
}

fn candidate(
    name: &str,
    guest: &KnownGuest,
    service: &ServiceSpec,
    view: &View,
    selected: bool,
) -> Option<Candidate> {
    let mut interfaces = guest.interfaces.iter();
    let interface = interfaces.find(|interface| interface.network == service.network)?;
    let place = match &guest.host {
        _ if guest.is_here() => Place::Here,
        Some(host) if view.is_lost(host) => Place::OnLost(host.clone()),
        Some(host) => Place::On(host.clone()),
        None => Place::Nowhere,
    };
    Some(Candidate {
        guest: name.into(),
        interface: interface.name.clone(),
        address: interface.address,
        address_v6: interface.address_v6,
        mac: interface.mac?,
        runs: guest.runs,
        stops: guest.stops,
        selected,
        place,
    })
}

impl Candidate {
    /// Whether it has one of these addresses.
    pub fn is_among(&self, addresses: &BTreeSet<IpAddr>) -> bool {
        let ipv4 = self.address.map(IpAddr::from);
        let ipv6 = self.address_v6.map(IpAddr::from);
        let mut own = ipv4.into_iter().chain(ipv6);
        own.any(|address| addresses.contains(&address))
    }

    /// The address by which it is known: that of IPv4, if it has one.
    pub fn main_address(&self) -> Option<IpAddr> {
        let ipv6 = self.address_v6.map(IpAddr::from);
        self.address.map(IpAddr::from).or(ipv6)
    }

    /// Its end for a service at `address`, if it has one of that version of IP.
    fn backend(&self, address: IpAddr, port: u16) -> Option<ServiceBackend> {
        let own = match address {
            IpAddr::V4(_) => self.address?.into(),
            IpAddr::V6(_) => self.address_v6?.into(),
        };
        Some(ServiceBackend {
            address: own,
            port,
            mac: keelson_ebpf::MacAddress(self.mac.0),
        })
    }
}

/// The service's ports as the eBPF programs take them, each with the candidates that serve, and with as many of those
/// that drain as there is room for.
pub fn ports(
    service: &Service,
    network: u32,
    serving: &[&Candidate],
    draining: &[&Candidate],
) -> Vec<keelson_ebpf::Service> {
    let room = keelson_ebpf::MAX_BACKENDS.saturating_sub(serving.len());
    let draining = &draining[..draining.len().min(room)];
    let spec = &service.spec;
    let ipv4 = spec.address.map(IpAddr::from);
    let ipv6 = spec.address_v6.map(IpAddr::from);
    let addresses: Vec<IpAddr> = ipv4.into_iter().chain(ipv6).collect();
    let mut ports = Vec::new();
    for port in &spec.ports {
        for &address in &addresses {
            let backend = |candidate: &&Candidate| candidate.backend(address, port.target());
            ports.push(keelson_ebpf::Service {
                network,
                address,
                protocol: match port.protocol {
                    ServiceProtocol::Tcp => Protocol::Tcp,
                    ServiceProtocol::Udp => Protocol::Udp,
                },
                port: port.port,
                backends: serving.iter().filter_map(backend).collect(),
                draining: draining.iter().filter_map(backend).collect(),
            });
        }
    }
    ports
}
