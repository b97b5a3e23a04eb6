//! Frames around questions and answers.

use std::net::{Ipv4Addr, Ipv6Addr};

use etherparse::icmpv6::RouterAdvertisementHeader;
use etherparse::{Icmpv6Type, NetSlice, PacketBuilder, SlicedPacket, TransportSlice};

use crate::InterfaceConfiguration;

const DHCP_CLIENT: u16 = 68;
const DHCP_SERVER: u16 = 67;
const DHCPV6_CLIENT: u16 = 546;
const DHCPV6_SERVER: u16 = 547;
/// Neighbour discovery passes no router (RFC 4861, 6.1).
const HOP_LIMIT: u8 = 255;
const TTL: u8 = 64;
const BROADCAST: [u8; 6] = [0xff; 6];
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];

/// What a frame asks.
pub enum Question<'a> {
    /// A DHCP message to a server.
    Dhcp {
        /// The message.
        message: &'a [u8],
    },
    /// A DHCPv6 message to a server.
    Dhcpv6 {
        /// Who sent it.
        client: Ipv6Addr,
        /// The message.
        message: &'a [u8],
    },
    /// A router solicitation.
    RouterSolicitation {
        /// Who sent it, if it has an address.
        sender: Option<Ipv6Addr>,
    },
}

/// Finds out what a frame asks.
pub fn read(frame: &[u8]) -> Option<Question<'_>> {
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    match (packet.net?, packet.transport?) {
        (NetSlice::Ipv4(_), TransportSlice::Udp(udp)) => {
            let is_dhcp = (udp.source_port(), udp.destination_port()) == (DHCP_CLIENT, DHCP_SERVER);
            is_dhcp.then_some(Question::Dhcp {
                message: udp.payload(),
            })
        }
        (NetSlice::Ipv6(ip), TransportSlice::Udp(udp)) => {
            let ports = (udp.source_port(), udp.destination_port());
            let client = ip.header().source_addr();
            let is_dhcp = ports == (DHCPV6_CLIENT, DHCPV6_SERVER) && !client.is_unspecified();
            is_dhcp.then_some(Question::Dhcpv6 {
                client,
                message: udp.payload(),
            })
        }
        (NetSlice::Ipv6(ip), TransportSlice::Icmpv6(icmp)) => {
            let sender = ip.header().source_addr();
            let is_solicitation = matches!(icmp.icmp_type(), Icmpv6Type::RouterSolicitation)
                && ip.header().hop_limit() == HOP_LIMIT;
            is_solicitation.then_some(Question::RouterSolicitation {
                sender: (!sender.is_unspecified()).then_some(sender),
            })
        }
        _ => None,
    }
}

/// A DHCP message from the router; to everyone where the guest has no address yet.
pub fn dhcp(
    configuration: &InterfaceConfiguration,
    router: Ipv4Addr,
    to: Option<Ipv4Addr>,
    message: &[u8],
) -> Option<Vec<u8>> {
    let mac = if to.is_some() {
        configuration.mac
    } else {
        BROADCAST
    };
    let to = to.unwrap_or(Ipv4Addr::BROADCAST);
    let builder = PacketBuilder::ethernet2(configuration.router_mac, mac)
        .ipv4(router.octets(), to.octets(), TTL)
        .udp(DHCP_SERVER, DHCP_CLIENT);
    let mut frame = Vec::with_capacity(builder.size(message.len()));
    builder.write(&mut frame, message).ok()?;
    Some(frame)
}

/// A DHCPv6 message from the router.
pub fn dhcpv6(
    configuration: &InterfaceConfiguration,
    router: Ipv6Addr,
    client: Ipv6Addr,
    message: &[u8],
) -> Option<Vec<u8>> {
    let builder = PacketBuilder::ethernet2(configuration.router_mac, configuration.mac)
        .ipv6(router.octets(), client.octets(), TTL)
        .udp(DHCPV6_SERVER, DHCPV6_CLIENT);
    let mut frame = Vec::with_capacity(builder.size(message.len()));
    builder.write(&mut frame, message).ok()?;
    Some(frame)
}

/// A router advertisement, with what follows its first eight bytes; to everyone where it is not known
/// who asked.
pub fn advertisement(
    configuration: &InterfaceConfiguration,
    router: Ipv6Addr,
    to: Option<Ipv6Addr>,
    header: RouterAdvertisementHeader,
    rest: &[u8],
) -> Option<Vec<u8>> {
    let mac = match to {
        Some(_) => configuration.mac,
        None => ALL_NODES_MAC,
    };
    let to = to.unwrap_or(ALL_NODES);
    let builder = PacketBuilder::ethernet2(configuration.router_mac, mac)
        .ipv6(router.octets(), to.octets(), HOP_LIMIT)
        .icmpv6(Icmpv6Type::RouterAdvertisement(header));
    let mut frame = Vec::with_capacity(builder.size(rest.len()));
    builder.write(&mut frame, rest).ok()?;
    Some(frame)
}
