//! A bridge per network, which holds the gateway's addresses.

use keelson_api::{MacAddress, NetworkSpec};
use rtnetlink::LinkBridge;

use super::link::{Links, errno, netlink};
use crate::error::Result;

/// Creates the bridge `name` with the gateway's Ethernet address and the network's gateway addresses, or
/// completes one that exists. Returns its interface index.
pub async fn ensure(
    links: &Links,
    name: &str,
    mac: MacAddress,
    network: &NetworkSpec,
) -> Result<u32> {
    if links.index(name).await?.is_none() {
        let message = LinkBridge::new(name).build();
        match links.handle().link().add(message).execute().await {
            Ok(()) => {}
            Err(error) if errno(&error) == Some(libc::EEXIST) => {}
            Err(source) => return Err(netlink(format!("create the bridge {name}"))(source)),
        }
    }
    let index = links.require(name).await?;
    // Left to itself a bridge takes the lowest address of its ports, and another one when they change.
    links.set_mac(index, mac).await?;
    if let (Some(gateway), Some(subnet)) = (network.gateway(), network.subnet) {
        links
            .add_address(index, gateway.into(), subnet.prefix_len())
            .await?;
    }
    if let (Some(gateway), Some(subnet)) = (network.gateway_v6(), network.subnet_v6) {
        links
            .add_address(index, gateway.into(), subnet.prefix_len())
            .await?;
        // Router advertisements come from this one; the kernel makes another where it was told to.
        links
            .add_address(index, mac.link_local().into(), 64)
            .await?;
    }
    links.bring_up(name, network.mtu, None).await?;
    Ok(index)
}
