//! What objects and devices make of source NAT and forwards, and what is to be said of each object.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use keelson_api::{ConditionStatus, Network, NetworkSpec, PortForward, PortRange, ServiceProtocol};
use keelson_ebpf::{Protocol, SourceNat};

use crate::host::{HostPorts, UplinkDevice, network_number};

/// A forward with the interface of this host's guest that it leads to.
#[derive(Clone, Debug)]
pub struct WantedForward {
    /// The object.
    pub object: PortForward,
    /// Where it leads, if the guest has such an interface.
    pub target: Option<Target>,
}

/// An interface that ports are forwarded to.
#[derive(Clone, Debug)]
pub struct Target {
    /// The host's device.
    pub device: String,
    /// Whether it has an IPv4 address.
    pub has_ipv4: bool,
    /// Whether it has an IPv6 address.
    pub has_ipv6: bool,
    /// Whether the guest runs.
    pub runs: bool,
}

/// What the host is like.
#[derive(Clone, Debug)]
pub struct Surroundings {
    /// The devices that networks name, by name.
    pub devices: BTreeMap<String, UplinkDevice>,
    /// The addresses that guests have of devices, which are perhaps gone for a while.
    pub in_use: BTreeSet<(String, IpAddr)>,
    /// What the host uses itself.
    pub ports: HostPorts,
}

/// What is to be said of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Whether it is as it should be.
    pub status: ConditionStatus,
    /// Why, for programs.
    pub reason: &'static str,
    /// Why, for people.
    pub message: String,
    /// Of a forward, where others reach its first port.
    pub addresses: Vec<SocketAddr>,
}

/// What is to be done, and said.
#[derive(Debug, Default)]
pub struct Plan {
    /// For each network whose packets are translated.
    pub source_nat: Vec<SourceNat>,
    /// Each port of each address.
    pub forwards: Vec<keelson_ebpf::PortForward>,
    /// Networks with an uplink that is there: packets are to be routed between both.
    pub routed: Vec<String>,
    /// Of networks, by name.
    pub networks: BTreeMap<String, Finding>,
    /// Of forwards, by name.
    pub port_forwards: BTreeMap<String, Finding>,
    outside: BTreeMap<String, External>,
    pools: BTreeMap<(String, IpAddr), (PortRange, String)>,
    taken: BTreeSet<(String, IpAddr, ServiceProtocol, u16)>,
    led_to: BTreeSet<(String, bool, ServiceProtocol, u16)>,
}

/// The addresses of a network's uplink.
#[derive(Clone, Debug, Default)]
struct External {
    device: String,
    ipv4: Option<Ipv4Addr>,
    ipv6: Option<Ipv6Addr>,
    problem: Option<Finding>,
}

impl Finding {
    fn new(status: ConditionStatus, reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            reason,
            message: message.into(),
            addresses: Vec::new(),
        }
    }

    fn bad(reason: &'static str, message: impl Into<String>) -> Self {
        Self::new(ConditionStatus::False, reason, message)
    }
}

impl Plan {
    /// What to do. Of objects that can't both be had, the first by name is.
    pub fn new(
        networks: &[Network],
        forwards: &[WantedForward],
        surroundings: &Surroundings,
    ) -> Self {
        let mut plan = Self::default();
        for network in networks {
            plan.add_network(network, surroundings);
        }
        for forward in forwards {
            let finding = plan.add_forward(forward, surroundings);
            let name = forward.object.metadata.name.clone();
            plan.port_forwards.insert(name, finding);
        }
        plan
    }

    fn add_network(&mut self, network: &Network, surroundings: &Surroundings) {
        let Some(uplink) = &network.spec.uplink else {
            return;
        };
        let name = &network.metadata.name;
        let external = External::of(&network.spec, surroundings);
        if surroundings.devices.contains_key(&uplink.device) && external.has_any() {
            self.routed.push(name.clone());
        }
        let translated = self.translate(network, &external, surroundings);
        let finding = match (&external.problem, translated) {
            (Some(problem), _) => problem.clone(),
            (None, Err(problem)) => problem,
            (None, Ok(message)) => Finding::new(ConditionStatus::True, "Up", message),
        };
        self.networks.insert(name.clone(), finding);
        self.outside.insert(name.clone(), external);
    }

    /// Has a network's packets translated; says to what.
    fn translate(
        &mut self,
        network: &Network,
        external: &External,
        surroundings: &Surroundings,
    ) -> Result<String, Finding> {
        let Some(uplink) = &network.spec.uplink else {
            return Ok(String::new());
        };
        let nat = &uplink.source_nat;
        let ipv4 = external.ipv4.filter(|_| nat.ipv4);
        let ipv6 = external.ipv6.filter(|_| nat.translates_ipv6(&network.spec));
        let addresses: Vec<IpAddr> = both(ipv4, ipv6).collect();
        if addresses.is_empty() {
            return Ok(format!("routed to {}, as it is", uplink.device));
        }
        if let Some(problem) = surroundings.ports.refuse_local(nat.ports) {
            return Err(Finding::bad("PortsInUse", problem));
        }
        for address in &addresses {
            let pool = (uplink.device.clone(), *address);
            if let Some((ports, other)) = self.pools.get(&pool)
                && *ports != nat.ports
            {
                let message = format!(
                    "Network/{other} has the ports {ports} of {address}; give both networks the same"
                );
                return Err(Finding::bad("PortsInUse", message));
            }
        }
        for address in &addresses {
            let owner = (nat.ports, network.metadata.name.clone());
            self.pools.insert((uplink.device.clone(), *address), owner);
        }
        self.source_nat.push(SourceNat {
            network: network_number(&network.metadata.name),
            uplink: uplink.device.clone(),
            ipv4,
            ipv6,
            ports: nat.ports.first..=nat.ports.last,
            max_mappings: nat.ports_per_interface,
        });
        let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
        Ok(format!(
            "translated to {} at {}, ports {}",
            addresses.join(" and "),
            uplink.device,
            nat.ports
        ))
    }

    fn add_forward(&mut self, forward: &WantedForward, surroundings: &Surroundings) -> Finding {
        let spec = &forward.object.spec;
        let Some(external) = self.outside.get(&spec.network).cloned() else {
            let message = format!("Network/{} has no uplink", spec.network);
            return Finding::bad("UplinkMissing", message);
        };
        let Some(target) = &forward.target else {
            let message = format!("{} has no interface in {}", spec.guest, spec.network);
            return Finding::bad("InterfaceMissing", message);
        };
        let ipv4 = external.ipv4.filter(|_| target.has_ipv4);
        let ipv6 = external.ipv6.filter(|_| target.has_ipv6);
        let addresses: Vec<IpAddr> = both(ipv4, ipv6).collect();
        if let Some(problem) = self.refuse(forward, target, &external, &addresses, surroundings) {
            return Finding::bad("PortsInUse", problem);
        }
        for address in &addresses {
            for (port, guest_port) in spec.pairs() {
                let (device, protocol) = (external.device.clone(), spec.protocol);
                self.taken.insert((device, *address, protocol, port));
                let led_to = (
                    target.device.clone(),
                    address.is_ipv4(),
                    protocol,
                    guest_port,
                );
                self.led_to.insert(led_to);
                self.forwards.push(keelson_ebpf::PortForward {
                    uplink: external.device.clone(),
                    address: *address,
                    protocol: match protocol {
                        ServiceProtocol::Tcp => Protocol::Tcp,
                        ServiceProtocol::Udp => Protocol::Udp,
                    },
                    port,
                    interface: target.device.clone(),
                    guest_port,
                });
            }
        }
        let mut finding = match external.problem {
            Some(problem) => problem,
            None if addresses.is_empty() => {
                let message =
                    "the uplink and the guest's interface have no version of IP in common";
                Finding::bad("AddressMissing", message)
            }
            None if !target.runs => {
                Finding::bad("GuestNotRunning", format!("{} does not run", spec.guest))
            }
            None => {
                let message = format!("leads to {}, ports {}", spec.guest, spec.targets());
                Finding::new(ConditionStatus::True, "Forwarding", message)
            }
        };
        let at = addresses.iter();
        finding.addresses = at
            .map(|at| SocketAddr::new(*at, spec.ports.first))
            .collect();
        finding
    }

    /// Why a forward can't be had.
    fn refuse(
        &self,
        forward: &WantedForward,
        target: &Target,
        external: &External,
        addresses: &[IpAddr],
        surroundings: &Surroundings,
    ) -> Option<String> {
        let spec = &forward.object.spec;
        // What listens since the ports were forwarded does not take them from the guest.
        let conditions = &forward.object.status.conditions;
        let in_force = conditions.iter().any(|condition| {
            condition.kind == "Ready" && condition.status == ConditionStatus::True
        });
        let ports = &surroundings.ports;
        let used = if in_force {
            ports.refuse_local(spec.ports)
        } else {
            ports.refuse(Some(spec.protocol), spec.ports)
        };
        used.or_else(|| {
            addresses.iter().find_map(|address| {
                let mut pairs = spec.pairs();
                let taken = pairs.find(|(port, guest_port)| {
                    let (device, protocol) = (external.device.clone(), spec.protocol);
                    let led_to = (
                        target.device.clone(),
                        address.is_ipv4(),
                        protocol,
                        *guest_port,
                    );
                    self.taken.contains(&(device, *address, protocol, *port))
                        || self.led_to.contains(&led_to)
                });
                let (port, guest_port) = taken?;
                Some(format!(
                    "{port}/{} of {address}, or port {guest_port} of {}, is another forward's",
                    spec.protocol, spec.guest
                ))
            })
        })
    }
}

impl External {
    /// The addresses of a network's uplink, and what is wrong with it. What guests have had stays theirs
    /// while the device or its address is gone.
    fn of(network: &NetworkSpec, surroundings: &Surroundings) -> Self {
        let Some(uplink) = &network.uplink else {
            return Self::default();
        };
        let device = surroundings.devices.get(&uplink.device);
        let mut external = Self {
            device: uplink.device.clone(),
            ..Self::default()
        };
        if device.is_some_and(|device| !device.is_ethernet) {
            let message = format!(
                "{} is no Ethernet device; give one, or a VLAN or bond of such",
                uplink.device
            );
            external.problem = Some(Finding::bad("UplinkUnsuitable", message));
            return external;
        }
        let now: Vec<IpAddr> = device.map_or_else(Vec::new, |device| device.addresses.clone());
        let in_use = surroundings.in_use.iter();
        let in_use = in_use.filter(|(device, _)| *device == uplink.device);
        let known: Vec<IpAddr> = now
            .iter()
            .copied()
            .chain(in_use.map(|(_, at)| *at))
            .collect();
        let find = |is_meant: &dyn Fn(&IpAddr) -> bool| known.iter().copied().find(is_meant);
        if network.subnet.is_some() {
            let found = find(&|at| match uplink.address {
                Some(given) => *at == IpAddr::from(given),
                None => at.is_ipv4(),
            });
            external.ipv4 = match found {
                Some(IpAddr::V4(found)) => Some(found),
                _ => None,
            };
        }
        if network.subnet_v6.is_some() {
            let found = find(&|at| match uplink.address_v6 {
                Some(given) => *at == IpAddr::from(given),
                None => at.is_ipv6(),
            });
            external.ipv6 = match found {
                Some(IpAddr::V6(found)) => Some(found),
                _ => None,
            };
        }
        external.problem = external.missing(network, device, &now);
        external
    }

    fn missing(
        &self,
        network: &NetworkSpec,
        device: Option<&UplinkDevice>,
        now: &[IpAddr],
    ) -> Option<Finding> {
        let uplink = network.uplink.as_ref()?;
        let name = &self.device;
        if device.is_none() {
            let message = format!("there is no device {name}; connections go on when it is back");
            return Some(Finding::bad("UplinkMissing", message));
        }
        let given = both(uplink.address, uplink.address_v6);
        let mut given = given.filter(|given| !now.contains(given));
        if let Some(given) = given.next() {
            let message = format!("{name} has no address {given}; add it, or give another");
            return Some(Finding::bad("AddressMissing", message));
        }
        let has = |is_ipv4: bool| now.iter().any(|at| at.is_ipv4() == is_ipv4);
        let nat = &uplink.source_nat;
        let needs_ipv4 = network.subnet.is_some() && nat.ipv4;
        let needs_ipv6 = network.subnet_v6.is_some() && nat.translates_ipv6(network);
        let version = match (needs_ipv4 && !has(true), needs_ipv6 && !has(false)) {
            (false, false) => return None,
            (true, false) => "IPv4",
            (false, true) => "IPv6",
            (true, true) => "IPv4 and no IPv6",
        };
        let message = format!("{name} has no {version} address that others can reach");
        Some(Finding::bad("AddressMissing", message))
    }

    fn has_any(&self) -> bool {
        self.ipv4.is_some() || self.ipv6.is_some()
    }
}

fn both(ipv4: Option<Ipv4Addr>, ipv6: Option<Ipv6Addr>) -> impl Iterator<Item = IpAddr> + use<> {
    let ipv6 = ipv6.map(IpAddr::from);
    ipv4.map(IpAddr::from).into_iter().chain(ipv6)
}
