//! A guest's interface, and what its clients ask.
#![allow(dead_code, reason = "each test file uses a part")]

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use dhcproto::{Decodable, Decoder, Encodable, v4, v6};
use etherparse::{Icmpv6Type, PacketBuilder};
use keelson_dhcp::{InterfaceConfiguration, Ipv4Configuration, Ipv6Configuration};

pub const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
pub const ROUTER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x11];
pub const ROUTER_LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0x00ff, 0xfe00, 0x0011);

pub fn link_local() -> Ipv6Addr {
    Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0x00ff, 0xfe00, 0x0009)
}

pub fn configuration() -> InterfaceConfiguration {
    InterfaceConfiguration {
        mac: GUEST_MAC,
        router_mac: ROUTER_MAC,
        host_name: "web".into(),
        mtu: 1400,
        dns_servers: vec![
            "9.9.9.9".parse().expect("valid"),
            "fd77::53".parse().expect("valid"),
        ],
        search_domains: vec!["corp.example".into(), "example".into()],
        lease_time: Duration::from_hours(1),
        default_route: true,
        ipv4: Some(Ipv4Configuration {
            address: "10.77.0.9/24".parse().expect("valid"),
            router: Ipv4Addr::new(10, 77, 0, 1),
            routes: vec![(
                "10.0.0.0/8".parse().expect("valid"),
                Ipv4Addr::new(10, 77, 0, 254),
            )],
            dhcp: true,
        }),
        ipv6: Some(Ipv6Configuration {
            address: "fd77::9/64".parse().expect("valid"),
            router: ROUTER_LINK_LOCAL,
            routes: vec!["fd00:8::/48".parse().expect("valid")],
            dhcp: true,
            advertised: true,
            slaac: false,
        }),
    }
}

/// A message of DHCP in a frame, as a client without an address sends it.
pub fn dhcp(message: &v4::Message) -> Vec<u8> {
    dhcp_frame(&message.to_vec().expect("it can be encoded"))
}

pub fn dhcp_frame(message: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(GUEST_MAC, [0xff; 6])
        .ipv4([0; 4], [255; 4], 64)
        .udp(68, 67)
        .write(&mut frame, message)
        .expect("it fits");
    frame
}

pub fn dhcp_options(
    kind: v4::MessageType,
    options: impl IntoIterator<Item = v4::DhcpOption>,
) -> v4::Message {
    let mut message = v4::Message::default();
    message.set_chaddr(&GUEST_MAC);
    message.opts_mut().insert(v4::DhcpOption::MessageType(kind));
    for option in options {
        message.opts_mut().insert(option);
    }
    message
}

pub fn dhcpv6(message: &v6::Message) -> Vec<u8> {
    dhcpv6_frame(&message.to_vec().expect("it can be encoded"))
}

pub fn dhcpv6_frame(message: &[u8]) -> Vec<u8> {
    let servers = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(GUEST_MAC, [0x33, 0x33, 0, 1, 0, 2])
        .ipv6(link_local().octets(), servers.octets(), 1)
        .udp(546, 547)
        .write(&mut frame, message)
        .expect("it fits");
    frame
}

/// A message of a client with an identifier.
pub fn dhcpv6_with(
    kind: v6::MessageType,
    options: impl IntoIterator<Item = v6::DhcpOption>,
) -> v6::Message {
    let mut message = v6::Message::new(kind);
    let client = v6::DhcpOption::ClientId(vec![0, 3, 0, 1, 2, 0, 0, 0, 0, 9]);
    message.opts_mut().insert(client);
    for option in options {
        message.opts_mut().insert(option);
    }
    message
}

pub fn server_id() -> v6::DhcpOption {
    v6::DhcpOption::ServerId([&[0, 3, 0, 1][..], &ROUTER_MAC].concat())
}

pub fn router_solicitation() -> Vec<u8> {
    let routers = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
    let option = [&[1, 1][..], &GUEST_MAC].concat();
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(GUEST_MAC, [0x33, 0x33, 0, 0, 0, 2])
        .ipv6(link_local().octets(), routers.octets(), 255)
        .icmpv6(Icmpv6Type::RouterSolicitation)
        .write(&mut frame, &option)
        .expect("it fits");
    frame
}

pub fn decode<T: Decodable>(message: &[u8]) -> T {
    T::decode(&mut Decoder::new(message)).expect("an answer can be read")
}
