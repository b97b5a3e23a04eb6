//! Guests that serve, and one that is their client.

use std::net::{IpAddr, SocketAddr};

use keelson_ebpf::{Datapath, HookChoice, InterfacePolicy, Protocol, Service};

use super::machine::{BRIDGE, Machine, bridge};
use super::{Network, allow_from};

/// A service's virtual addresses, by version of IP.
pub const ADDRESSES: [&str; 2] = ["10.77.0.80", "fd77::80"];
/// The port that backends serve.
pub const SERVED: u16 = 8080;
/// Where the service is, by version of IP.
pub fn service_at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().expect("valid"), port)
}

/// Three guests, two of which serve; the third is a client.
pub struct Fleet {
    // First, so that it is closed before the namespace goes.
    pub datapath: Datapath,
    pub guests: Vec<Machine>,
    pub network: Network,
}

impl Fleet {
    pub fn new(hook: HookChoice) -> Self {
        let network = Network::new(hook);
        let mut datapath = network.open();
        bridge();
        let guests: Vec<_> = (1..=3).map(Machine::guest).collect();
        for guest in &guests {
            datapath.attach(&policy(guest)).expect("attached");
            guest.up();
        }
        for guest in &guests[..2] {
            guest.serve(SERVED);
        }
        datapath
            .set_gateways(&[(BRIDGE.into(), 9)])
            .expect("attached");
        let mut fleet = Self {
            datapath,
            guests,
            network,
        };
        fleet.serve_from(&[0, 1]);
        fleet
    }

    pub fn services(&self, guests: &[usize], target: u16) -> Vec<Service> {
        let mut services = Vec::new();
        for address in ADDRESSES {
            let address: IpAddr = address.parse().expect("valid");
            for (protocol, port) in [(Protocol::Tcp, 80), (Protocol::Udp, 80)] {
                let guests = guests.iter().map(|index| &self.guests[*index]);
                let backends = guests.map(|guest| guest.backend(address, target));
                services.push(Service {
                    network: 9,
                    address,
                    protocol,
                    port,
                    backends: backends.collect(),
                    draining: Vec::new(),
                });
            }
        }
        services
    }

    /// Makes these guests the backends.
    pub fn serve_from(&mut self, guests: &[usize]) {
        let services = self.services(guests, SERVED);
        self.datapath.set_services(&services).expect("valid");
    }

    /// Has some of the guests serve, and others drain.
    pub fn drain(&mut self, serving: &[usize], draining: &[usize]) {
        let mut services = self.services(serving, SERVED);
        let drained = self.services(draining, SERVED);
        for (service, drained) in services.iter_mut().zip(drained) {
            service.draining = drained.backends;
        }
        self.datapath.set_services(&services).expect("valid");
    }

    /// Has the next agent take over.
    #[must_use]
    pub fn open_again(self) -> Self {
        let Self {
            datapath,
            guests,
            network,
        } = self;
        // One at a time can have the maps.
        drop(datapath);
        Self {
            datapath: network.open(),
            guests,
            network,
        }
    }

    pub fn client(&self) -> &Machine {
        &self.guests[2]
    }
}

/// Lets in what is served.
pub fn policy(guest: &Machine) -> InterfacePolicy {
    let mut ingress = Vec::new();
    for peer in ["0.0.0.0/0", "::/0"] {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            ingress.push(allow_from(protocol, SERVED..=SERVED + 1, peer));
        }
    }
    InterfacePolicy {
        ingress,
        ..guest.policy()
    }
}
