//! The tunnel to other hosts: one VXLAN device of the kernel's in metadata mode (ip-link(8), `external`),
//! to which the eBPF programs say with each packet where it goes.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};

use futures::TryStreamExt;
use keelson_api::NetworkSpec;
use keelson_controlplane::StoreUrl;
use keelson_ebpf::{RemoteInterface, TunnelCounters};
use rtnetlink::LinkVxlan;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::LinkAttribute;

use super::link::{Links, errno, netlink};
use super::network::{HostNetwork, network_number};
use crate::config::Config;
use crate::{AgentError, error::Result};

const PREFIX: &str = "kvx-";
/// The largest MTU of a network: the device itself is never what limits packets.
const DEVICE_MTU: u16 = 9000;
/// Bytes in front of a guest's IP packet: its Ethernet header, VXLAN, UDP and IP (RFC 7348, 5).
const OVERHEAD_IPV4: u32 = 14 + 8 + 8 + 20;
const OVERHEAD_IPV6: u32 = 14 + 8 + 8 + 40;
/// Addresses that every default route leads to (RFC 5737, RFC 3849): nothing is sent there.
const ANYWHERE: [&str; 2] = ["192.0.2.1:9", "[2001:db8::1]:9"];

impl HostNetwork {
    /// Brings up the tunnel to other hosts.
    pub async fn ensure_tunnel(&self) -> Result<()> {
        let address = address(&self.config)?;
        let port = self.config.tunnel_port;
        let device = ensure(&self.links, port).await?;
        let tunnel = keelson_ebpf::Tunnel {
            device,
            address,
            port,
        };
        self.datapath
            .with(move |datapath| datapath.set_tunnel(Some(&tunnel)))
            .await
    }

    /// Removes the tunnel to other hosts, if there is one.
    pub async fn remove_tunnel(&self) -> Result<()> {
        self.datapath
            .with(|datapath| datapath.set_tunnel(None))
            .await?;
        remove(&self.links, self.config.tunnel_port).await
    }

    /// Makes these the networks that span hosts, by their names with their identifiers, and `guests` all that
    /// other hosts have.
    pub async fn set_overlays(
        &self,
        networks: &BTreeMap<String, u32>,
        guests: BTreeMap<String, Vec<RemoteInterface>>,
    ) -> Result<()> {
        let overlays = networks.iter();
        let overlays = overlays
            .map(|(name, vni)| (*vni, network_number(name)))
            .collect();
        self.datapath
            .with(move |datapath| {
                datapath.set_overlays(&overlays)?;
                datapath.set_all_remote(guests)
            })
            .await
    }

    /// Makes these the interfaces that a guest has on another host; none where it is on this one, or gone.
    pub async fn set_remote(&self, guest: String, interfaces: Vec<RemoteInterface>) -> Result<()> {
        self.datapath
            .with(move |datapath| datapath.set_remote(&guest, interfaces))
            .await
    }

    /// What passed the tunnel to other hosts, and what did not; `None` without one.
    pub async fn tunnel_counters(&self) -> Result<Option<TunnelCounters>> {
        self.datapath
            .with(|datapath| datapath.tunnel_counters())
            .await
    }

    /// Brings up the tunnel for a network, if that spans hosts; an error, too, where the network's packets
    /// don't fit into it whole.
    pub async fn ensure_overlay(&self, network: &NetworkSpec) -> Result<()> {
        if network.overlay.is_none() {
            return Ok(());
        }
        self.ensure_tunnel().await?;
        check_mtu(&self.links, address(&self.config)?, network.mtu).await
    }
}

/// The address by which other hosts reach this one: the one that is configured, or the one by which this
/// host reaches the state store, or everything.
///
/// # Errors
/// Says what to configure where there is none.
pub fn address(config: &Config) -> Result<IpAddr> {
    if let Some(address) = config.tunnel_address {
        return match UdpSocket::bind((address, 0)) {
            Ok(_) => Ok(address),
            Err(error) => Err(AgentError::Process {
                reason: "TunnelAddressMissing",
                message: format!(
                    "tunnel_address is {address}, which is no address of this host ({error})"
                ),
            }),
        };
    }
    let servers = servers(&config.state);
    let targets = servers.iter().map(String::as_str).chain(ANYWHERE);
    let mut found = targets.filter_map(source_of);
    found.next().ok_or_else(|| AgentError::Process {
        reason: "NoTunnelAddress",
        message:
            "no route leads to other hosts; set tunnel_address in keelsond.toml to the address by \
                  which they reach this one"
                .into(),
    })
}

/// What is wrong with an address as the end of a tunnel, if anything is.
pub fn refuse_address(address: IpAddr) -> Option<String> {
    let is_link_local = match address {
        IpAddr::V4(address) => address.is_link_local() || address.is_broadcast(),
        IpAddr::V6(address) => {
            address.is_unicast_link_local() || address.to_ipv4_mapped().is_some()
        }
    };
    let wrong = address.is_unspecified()
        || address.is_loopback()
        || address.is_multicast()
        || is_link_local;
    wrong.then(|| format!("{address}; give one by which other hosts reach this one"))
}

/// `HOST:PORT` of the state store's servers.
fn servers(url: &str) -> Vec<String> {
    let Ok(StoreUrl::Etcd(options)) = url.parse() else {
        return Vec::new();
    };
    let endpoints = options.endpoints.iter();
    endpoints
        .filter_map(|endpoint| endpoint.split_once("://"))
        .map(|(_, server)| server.trim_end_matches('/').to_owned())
        .collect()
}

/// The address from which this host would send to `target`.
fn source_of(target: &str) -> Option<IpAddr> {
    let any: SocketAddr = if target.starts_with('[') {
        SocketAddr::from(([0_u16; 8], 0))
    } else {
        SocketAddr::from(([0; 4], 0))
    };
    let socket = UdpSocket::bind(any).ok()?;
    // Sends nothing: the kernel looks for the route.
    socket.connect(target).ok()?;
    let address = socket.local_addr().ok()?.ip();
    refuse_address(address).is_none().then_some(address)
}

/// Creates the device, or completes one that exists; returns its name.
async fn ensure(links: &Links, port: u16) -> Result<String> {
    let name = name(port);
    if links.index(&name).await?.is_none() {
        let message = LinkVxlan::new(&name, 0)
            .port(port)
            .learning(false)
            .collect_metadata(true)
            .build();
        match links.handle().link().add(message).execute().await {
            Ok(()) => {}
            Err(error) if errno(&error) == Some(libc::EEXIST) => {}
            Err(error) if errno(&error) == Some(libc::EOPNOTSUPP) => {
                return Err(AgentError::Process {
                    reason: "NoVxlan",
                    message: format!(
                        "cannot create the device {name}: the kernel has no VXLAN; load its module vxlan"
                    ),
                });
            }
            Err(source) => return Err(netlink(format!("create the VXLAN device {name}"))(source)),
        }
    }
    links.bring_up(&name, DEVICE_MTU, None).await?;
    Ok(name)
}

/// Removes the device, if it is there.
async fn remove(links: &Links, port: u16) -> Result<()> {
    links.delete(&name(port)).await.map(drop)
}

/// Refuses packets of `mtu` bytes where the device that has `address` doesn't take them with what the tunnel
/// puts in front.
async fn check_mtu(links: &Links, address: IpAddr, mtu: u16) -> Result<()> {
    let Some((device, underlay)) = underlay(links, address).await? else {
        return Ok(());
    };
    let overhead = if address.is_ipv4() {
        OVERHEAD_IPV4
    } else {
        OVERHEAD_IPV6
    };
    if u32::from(mtu) + overhead <= underlay {
        return Ok(());
    }
    Err(AgentError::Process {
        reason: "MtuTooLarge",
        message: format!(
            "packets of {mtu} bytes and the tunnel's {overhead} are more than the {underlay} that \
             {device} takes, and are sent in pieces; set the network's mtu to {}",
            underlay.saturating_sub(overhead)
        ),
    })
}

/// The device that has an address, and its MTU.
async fn underlay(links: &Links, address: IpAddr) -> Result<Option<(String, u32)>> {
    let handle = links.handle();
    let found = handle.address().get().set_address_filter(address).execute();
    let found: Vec<_> = found
        .try_collect()
        .await
        .map_err(netlink(format!("look up the address {address}")))?;
    let has_it = |attribute: &AddressAttribute| matches!(attribute, AddressAttribute::Address(found) if *found == address);
    let found = found
        .iter()
        .find(|found| found.attributes.iter().any(has_it));
    let Some(found) = found else {
        return Ok(None);
    };
    let mut devices = handle
        .link()
        .get()
        .match_index(found.header.index)
        .execute();
    let device = devices
        .try_next()
        .await
        .map_err(netlink(format!("look up the device of {address}")))?;
    let attributes = device.map(|device| device.attributes).unwrap_or_default();
    let (mut name, mut mtu) = (None, None);
    for attribute in attributes {
        match attribute {
            LinkAttribute::IfName(found) => name = Some(found),
            LinkAttribute::Mtu(found) => mtu = Some(found),
            _ => {}
        }
    }
    Ok(name.zip(mtu))
}

fn name(port: u16) -> String {
    format!("{PREFIX}{port}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_servers_of_a_store_are_found() {
        let url = "cluster:https://10.0.0.1:2379,https://[fd00::2]:2379/?prefix=a";
        assert_eq!(servers(url), ["10.0.0.1:2379", "[fd00::2]:2379"]);
        assert!(servers("embedded:/var/lib/keelson/state").is_empty());
    }

    #[test]
    fn nobody_elsewhere_reaches_such_addresses() {
        for wrong in [
            "127.0.0.1",
            "0.0.0.0",
            "::1",
            "fe80::1",
            "224.0.0.1",
            "::ffff:10.0.0.1",
        ] {
            let address = wrong.parse().expect("valid");
            assert!(refuse_address(address).is_some(), "{wrong}");
        }
        for right in ["10.0.0.1", "fd00::1"] {
            let address = right.parse().expect("valid");
            assert_eq!(refuse_address(address), None);
        }
    }
}
