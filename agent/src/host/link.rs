//! Network devices over rtnetlink.

use std::net::IpAddr;

use futures::{StreamExt, TryStreamExt};
use keelson_api::MacAddress;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::AddressHeaderFlags;
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle, TcMessage};
use rtnetlink::{Handle, LinkUnspec};

use crate::{AgentError, error::Result};

/// A connection to the kernel's network configuration.
#[derive(Clone, Debug)]
pub struct Links {
    handle: Handle,
}

impl Links {
    /// Opens the connection and keeps it served by a task of the current runtime.
    pub fn connect() -> Result<Self> {
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(AgentError::io("open a netlink socket"))?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// The raw handle, for device types of their own.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// The index of the device `name`, if there is one.
    pub async fn index(&self, name: &str) -> Result<Option<u32>> {
        let mut links = self
            .handle
            .link()
            .get()
            .match_name(name.to_owned())
            .execute();
        match links.try_next().await {
            Ok(link) => Ok(link.map(|link| link.header.index)),
            Err(error) if errno(&error) == Some(libc::ENODEV) => Ok(None),
            Err(source) => Err(netlink(format!("look up the device {name}"))(source)),
        }
    }

    /// The index of the device `name`, which must exist.
    pub async fn require(&self, name: &str) -> Result<u32> {
        self.index(name).await?.ok_or_else(|| AgentError::Process {
            reason: "DeviceMissing",
            message: format!("the network device {name} is gone"),
        })
    }

    /// The names of all devices that start with `prefix`.
    pub async fn names(&self, prefix: &str) -> Result<Vec<String>> {
        let links: Vec<LinkMessage> = self
            .handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(netlink("list the network devices"))?;
        Ok(links
            .into_iter()
            .filter_map(name_of)
            .filter(|name| name.starts_with(prefix))
            .collect())
    }

    /// Sets a device's MTU and, where given, the bridge that it is a port of, and brings it up.
    pub async fn bring_up(&self, name: &str, mtu: u16, bridge: Option<u32>) -> Result<()> {
        let index = self.require(name).await?;
        let mut message = LinkUnspec::new_with_index(index).mtu(mtu.into()).up();
        if let Some(bridge) = bridge {
            message = message.controller(bridge);
        }
        self.handle
            .link()
            .set(message.build())
            .execute()
            .await
            .map_err(netlink(format!("bring up the device {name}")))
    }

    /// Has a device, if there is one of this name, take and give no more packets.
    pub async fn take_down(&self, name: &str) -> Result<()> {
        let Some(index) = self.index(name).await? else {
            return Ok(());
        };
        let message = LinkUnspec::new_with_index(index).down();
        self.handle
            .link()
            .set(message.build())
            .execute()
            .await
            .map_err(netlink(format!("take down the device {name}")))
    }

    /// Has a device that isn't up yet take packets without a queueing discipline: a TAP has a ring of its
    /// own, which drops what is too much, and a discipline for each of its queues would only cost time
    /// and memory.
    pub async fn remove_queueing(&self, name: &str) -> Result<()> {
        let index = self.require(name).await?;
        let index = i32::try_from(index).unwrap_or(i32::MAX);
        let mut message = TcMessage::with_index(index);
        message.header.parent = TcHandle::ROOT;
        let kind = TcAttribute::Kind("noqueue".to_owned());
        message.attributes.push(kind);
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewQueueDiscipline(message));
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        let failed = || netlink(format!("set the queueing of the device {name}"));
        let mut answers = self.handle.clone().request(request).map_err(failed())?;
        while let Some(answer) = answers.next().await {
            if let NetlinkPayload::Error(error) = answer.payload
                && error.code.is_some()
            {
                return Err(failed()(rtnetlink::Error::NetlinkError(error)));
            }
        }
        Ok(())
    }

    /// Gives a device an Ethernet address, unless it has it: to be given one, even its own, makes the kernel forget
    /// all neighbours there, with the packets that wait for one to answer (`NETDEV_CHANGEADDR`: Linux, net/ipv4/arp.c).
    pub async fn set_mac(&self, index: u32, mac: MacAddress) -> Result<()> {
        let what = format!("set the MAC address {mac}");
        let mut links = self.handle.link().get().match_index(index).execute();
        let found = links.try_next().await.map_err(netlink(what.clone()))?;
        let wanted = LinkAttribute::Address(mac.0.to_vec());
        if found.is_some_and(|link| link.attributes.contains(&wanted)) {
            return Ok(());
        }
        let message = LinkUnspec::new_with_index(index).address(mac.0.to_vec());
        self.handle
            .link()
            .set(message.build())
            .execute()
            .await
            .map_err(netlink(what))
    }

    /// Gives a device an address, unless it has it. It is in use at once: that nobody else has it is sure.
    pub async fn add_address(&self, index: u32, address: IpAddr, prefix: u8) -> Result<()> {
        let mut request = self.handle.address().add(index, address, prefix);
        if address.is_ipv6() {
            request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        }
        let added = request.execute().await;
        match added {
            Ok(()) => Ok(()),
            Err(error) if errno(&error) == Some(libc::EEXIST) => Ok(()),
            Err(source) => Err(netlink(format!("set the address {address}/{prefix}"))(
                source,
            )),
        }
    }

    /// Deletes the device `name`; whether it existed.
    pub async fn delete(&self, name: &str) -> Result<bool> {
        let Some(index) = self.index(name).await? else {
            return Ok(false);
        };
        match self.handle.link().del(index).execute().await {
            Ok(()) => Ok(true),
            Err(error) if errno(&error) == Some(libc::ENODEV) => Ok(false),
            Err(source) => Err(netlink(format!("delete the device {name}"))(source)),
        }
    }
}

/// Makes an error of netlink's answer, saying what was tried.
pub fn netlink(what: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> AgentError {
    let what = what.into();
    move |source| AgentError::Netlink { what, source }
}

/// The kernel's positive errno in an answer.
pub fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => Some(message.raw_code().abs()),
        _ => None,
    }
}

/// The name of the device that a message is about.
pub fn name_of(link: LinkMessage) -> Option<String> {
    link.attributes
        .into_iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name),
            _ => None,
        })
}
