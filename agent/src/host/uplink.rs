//! The devices that lead outside of the host: what they are now, when they change, and that packets are
//! routed between them and guests.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};
use keelson_ebpf::{ExternalUse, PortForward, SourceNat};
use parking_lot::Mutex;
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressMessage, AddressScope,
};
use rtnetlink::packet_route::link::LinkLayerType;
use tokio::sync::Notify;

use super::link::{errno, name_of, netlink};
use super::network::HostNetwork;
use crate::{AgentError, error::Result};

/// The kernel's settings of devices (Documentation/networking/ip-sysctl.rst).
const SETTINGS: &str = "/proc/sys/net";

/// A device that may lead outside, as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UplinkDevice {
    /// Its index.
    pub index: u32,
    /// Whether its frames have Ethernet headers.
    pub is_ethernet: bool,
    /// The addresses by which others reach it, those of IPv4 and of IPv6 in the kernel's order.
    pub addresses: Vec<IpAddr>,
}

/// The devices whose changes somebody wants to know.
pub type Watched = Arc<Mutex<BTreeSet<String>>>;

impl HostNetwork {
    /// A device as it is now, if there is one of this name.
    ///
    /// # Errors
    /// [`AgentError::Netlink`].
    pub async fn uplink_device(&self, name: &str) -> Result<Option<UplinkDevice>> {
        let handle = self.links.handle();
        let mut links = handle.link().get().match_name(name.to_owned()).execute();
        let link = match links.try_next().await {
            Ok(Some(link)) => link,
            Ok(None) => return Ok(None),
            Err(error) if errno(&error) == Some(libc::ENODEV) => return Ok(None),
            Err(source) => return Err(netlink(format!("look up the device {name}"))(source)),
        };
        let index = link.header.index;
        let addresses: Vec<AddressMessage> = handle
            .address()
            .get()
            .set_link_index_filter(index)
            .execute()
            .try_collect()
            .await
            .map_err(netlink(format!("list the addresses of the device {name}")))?;
        Ok(Some(UplinkDevice {
            index,
            is_ethernet: link.header.link_layer_type == LinkLayerType::Ether,
            addresses: addresses.iter().filter_map(reachable_address).collect(),
        }))
    }

    /// Makes these the host's source NAT and forwards.
    ///
    /// # Errors
    /// [`AgentError::Datapath`].
    pub async fn set_nat(
        &self,
        networks: Vec<SourceNat>,
        forwards: Vec<PortForward>,
    ) -> Result<Vec<String>> {
        self.datapath
            .with(move |datapath| datapath.set_nat(&networks, &forwards))
            .await
    }

    /// The addresses of uplinks that guests have, and what was translated at each.
    ///
    /// # Errors
    /// [`AgentError::Datapath`].
    pub async fn external_use(&self) -> Result<Vec<ExternalUse>> {
        self.datapath.with(|datapath| datapath.external_use()).await
    }
}

/// Tells `wake` whenever a watched device comes, goes or changes, or any address does. Ends when the
/// kernel's messages can't be followed any more.
pub async fn follow_devices(watched: Watched, wake: Arc<Notify>) -> Result<()> {
    let groups = [
        MulticastGroup::Link,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv6Ifaddr,
    ];
    let (connection, _handle, mut messages) = rtnetlink::new_multicast_connection(&groups)
        .map_err(AgentError::io("follow the network devices"))?;
    let connection = tokio::spawn(connection);
    // What changed before it was followed.
    wake.notify_one();
    while let Some((message, _)) = messages.next().await {
        if concerns(message, &watched) {
            wake.notify_one();
        }
    }
    connection.abort();
    Ok(())
}

fn concerns(message: NetlinkMessage<RouteNetlinkMessage>, watched: &Watched) -> bool {
    let is_watched = |name: Option<String>| name.is_some_and(|name| watched.lock().contains(&name));
    match message.payload {
        NetlinkPayload::InnerMessage(
            RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link),
        ) => is_watched(name_of(link)),
        NetlinkPayload::InnerMessage(
            RouteNetlinkMessage::NewAddress(_) | RouteNetlinkMessage::DelAddress(_),
        ) => !watched.lock().is_empty(),
        // Messages were lost.
        NetlinkPayload::Overrun(_) => true,
        _ => false,
    }
}

/// The address of a message, if others can reach the host by it for as long as it has it.
fn reachable_address(message: &AddressMessage) -> Option<IpAddr> {
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    let (mut address, mut local) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Flags(all) => flags = *all,
            AddressAttribute::Address(found) => address = Some(*found),
            // At a link to one other host it is the own one, and the other attribute the other's.
            AddressAttribute::Local(found) => local = Some(*found),
            _ => {}
        }
    }
    let unusable = AddressFlags::Tentative | AddressFlags::Dadfailed | AddressFlags::Deprecated;
    let is_usable = message.header.scope == AddressScope::Universe && !flags.intersects(unusable);
    local.or(address).filter(|_| is_usable)
}

/// Has the host route IPv4 packets that come by a device.
///
/// # Errors
/// [`AgentError::Io`] with the file that can't be written.
pub fn route_ipv4(device: &str) -> Result<()> {
    set(&setting("ipv4", device, "forwarding"), "1")
}

/// Has the host route IPv6 packets. Linux has one switch for all devices, and a router takes no default
/// routes from advertisements: devices that took them go on.
///
/// # Errors
/// As [`route_ipv4`].
pub fn route_ipv6() -> Result<()> {
    let all = setting("ipv6", "all", "forwarding");
    if read(&all)? == "1" {
        return Ok(());
    }
    let folder = Path::new(SETTINGS).join("ipv6/conf");
    let devices =
        std::fs::read_dir(&folder).map_err(AgentError::io(format!("list {}", folder.display())))?;
    for device in devices.flatten() {
        let accept = device.path().join("accept_ra");
        let is_router = read(&device.path().join("forwarding")).is_ok_and(|value| value == "1");
        // One that went away meanwhile takes none.
        if !is_router && read(&accept).is_ok_and(|value| value == "1") {
            set(&accept, "2")?;
        }
    }
    set(&all, "1")
}

fn setting(version: &str, device: &str, name: &str) -> PathBuf {
    let folder = Path::new(SETTINGS).join(version).join("conf");
    folder.join(device).join(name)
}

fn read(path: &Path) -> Result<String> {
    let text = std::fs::read_to_string(path)
        .map_err(AgentError::io(format!("read {}", path.display())))?;
    Ok(text.trim().to_owned())
}

/// Writes a setting, unless it is so; one that is so need not be writable.
fn set(path: &Path, value: &str) -> Result<()> {
    match read(path) {
        Ok(now) if now == value => return Ok(()),
        _ => {}
    }
    match std::fs::write(path, value) {
        // The device went away.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other.map_err(AgentError::io(format!("set {} to {value}", path.display()))),
    }
}
