//! The rules of an interface, and how the eBPF programs take them.

use std::fmt;

use ipnet::IpNet;
use keelson_api::{IcmpType, PortRange, Protocol};
use keelson_ebpf::{IpPrefix, Rule};

use crate::{AgentError, error::Result};

/// The rules of an interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// What may reach it.
    pub ingress: Vec<ResolvedRule>,
    /// What it may reach; everything if `None`.
    pub egress: Option<Vec<ResolvedRule>>,
}

/// A rule whose other side is networks and addresses only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedRule {
    /// What counts the packets that it lets pass; zero for nothing.
    pub counter: u64,
    /// The protocol.
    pub protocol: Protocol,
    /// Destination ports; all where empty.
    pub ports: Vec<PortRange>,
    /// ICMP types; all where empty.
    pub icmp_types: Vec<IcmpType>,
    /// Networks of the other side; everywhere if `None`, nowhere if empty.
    pub peers: Option<Vec<IpNet>>,
}

/// Every combination of each rule's ports and peers, as the eBPF programs take them.
pub fn expand(rules: &[ResolvedRule]) -> Result<Vec<Rule>> {
    let mut expanded = Vec::new();
    for rule in rules {
        let protocol = match rule.protocol {
            Protocol::Any => keelson_ebpf::Protocol::Any,
            Protocol::Icmp => keelson_ebpf::Protocol::Icmp,
            Protocol::Icmpv6 => keelson_ebpf::Protocol::Icmpv6,
            Protocol::Tcp => keelson_ebpf::Protocol::Tcp,
            Protocol::Udp => keelson_ebpf::Protocol::Udp,
        };
        let ports = rule.ports.iter().map(|range| range.first..=range.last);
        let icmp_types = rule.icmp_types.iter();
        let mut ports: Vec<_> = ports
            .chain(icmp_types.map(|icmp| Rule::icmp_type(icmp.number, icmp.code)))
            .collect();
        if ports.is_empty() {
            ports.push(Rule::ALL_PORTS);
        }
        let mut peers = Vec::new();
        for network in rule.peers.iter().flatten() {
            let peer = IpPrefix::new(network.addr(), network.prefix_len());
            peers.push(peer.map_err(invalid_rule)?);
        }
        if rule.peers.is_none() {
            peers.extend([IpPrefix::ANY_IPV4, IpPrefix::ANY_IPV6]);
        }
        for ports in ports {
            expanded.extend(peers.iter().map(|&peer| Rule {
                protocol,
                ports: ports.clone(),
                peer,
                counter: rule.counter,
            }));
        }
    }
    Ok(expanded)
}

/// A manifest's rules were checked, so that this says the two disagree.
fn invalid_rule(problem: impl fmt::Display) -> AgentError {
    AgentError::Invalid(vec![format!("a security group's rule: {problem}")])
}
