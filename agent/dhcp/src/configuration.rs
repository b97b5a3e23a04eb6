use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use ipnet::{Ipv4Net, Ipv6Net};

/// What one guest interface is told of itself and its network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterfaceConfiguration {
    /// The interface's Ethernet address. Questions in the name of another one have no answer.
    pub mac: [u8; 6],
    /// The Ethernet address of the network's router, which answers come from.
    pub router_mac: [u8; 6],
    /// The guest's name.
    pub host_name: String,
    /// The largest IP packet, in bytes.
    pub mtu: u16,
    /// Servers that resolve names. Those of IPv4 are told by DHCP, those of IPv6 by DHCPv6 and router
    /// advertisements.
    pub dns_servers: Vec<IpAddr>,
    /// Domains that names without one are looked for in.
    pub search_domains: Vec<String>,
    /// How long an address may be used without asking again; whole seconds count.
    pub lease_time: Duration,
    /// Whether the router is the way to everywhere.
    pub default_route: bool,
    /// Its IPv4, if it has any.
    pub ipv4: Option<Ipv4Configuration>,
    /// Its IPv6, if it has any.
    pub ipv6: Option<Ipv6Configuration>,
}

/// What one guest interface is told of its IPv4.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ipv4Configuration {
    /// Its address, with the prefix length of its subnet.
    pub address: Ipv4Net,
    /// The router's address, also as the DHCP server.
    pub router: Ipv4Addr,
    /// Networks and the routers to them.
    pub routes: Vec<(Ipv4Net, Ipv4Addr)>,
    /// Whether DHCP is answered.
    pub dhcp: bool,
}

/// What one guest interface is told of its IPv6.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ipv6Configuration {
    /// Its address, with the prefix length of its subnet.
    pub address: Ipv6Net,
    /// The router's link-local address, also as the DHCPv6 server.
    pub router: Ipv6Addr,
    /// Networks that the router is the way to.
    pub routes: Vec<Ipv6Net>,
    /// Whether DHCPv6 is answered.
    pub dhcp: bool,
    /// Whether there are router advertisements.
    pub advertised: bool,
    /// Whether guests make their address of the subnet and their Ethernet address (RFC 4862), instead of
    /// asking for it by DHCPv6.
    pub slaac: bool,
}

impl InterfaceConfiguration {
    pub(crate) fn lease_seconds(&self) -> u32 {
        // The largest number stands for forever.
        u32::try_from(self.lease_time.as_secs()).unwrap_or(u32::MAX)
    }

    pub(crate) fn dns_servers_v4(&self) -> Vec<Ipv4Addr> {
        let servers = self.dns_servers.iter();
        servers
            .filter_map(|server| match server {
                IpAddr::V4(server) => Some(*server),
                IpAddr::V6(_) => None,
            })
            .collect()
    }

    pub(crate) fn dns_servers_v6(&self) -> Vec<Ipv6Addr> {
        let servers = self.dns_servers.iter();
        servers
            .filter_map(|server| match server {
                IpAddr::V6(server) => Some(*server),
                IpAddr::V4(_) => None,
            })
            .collect()
    }
}
