//! A bridge per network, which holds the gateway's address.

use keelson_api::NetworkSpec;
use rtnetlink::LinkBridge;

use super::link::{Links, errno, netlink};
use crate::error::Result;

/// Creates the bridge `name` with the network's gateway address, or completes one that exists.
/// Returns its interface index.
pub async fn ensure(links: &Links, name: &str, network: &NetworkSpec) -> Result<u32> {
    if links.index(name).await?.is_none() {
        let message = LinkBridge::new(name).build();
        match links.handle().link().add(message).execute().await {
            Ok(()) => {}
            Err(error) if errno(&error) == Some(libc::EEXIST) => {}
            Err(source) => return Err(netlink(format!("create the bridge {name}"))(source)),
        }
    }
    let index = links.require(name).await?;
    links
        .add_address(index, network.gateway().into(), network.subnet.prefix_len())
        .await?;
    if let (Some(gateway), Some(subnet)) = (network.gateway_v6(), network.subnet_v6) {
        links
            .add_address(index, gateway.into(), subnet.prefix_len())
            .await?;
    }
    links.bring_up(name, network.mtu, None).await?;
    Ok(index)
}
