//! Whatever a guest sends is answered or not, never a panic; and an answer is the guest's, small, and tells
//! nothing but its configuration.

mod questions;

use std::net::Ipv4Addr;

use dhcproto::{v4, v6};
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use keelson_dhcp::{InterfaceConfiguration, answer};
use proptest::prelude::*;
use questions::{
    GUEST_MAC, ROUTER_MAC, configuration, dhcp, dhcp_frame, dhcp_options, dhcpv6, dhcpv6_frame,
    dhcpv6_with, router_solicitation, server_id,
};

fn check(configuration: &InterfaceConfiguration, question: &[u8]) {
    let Some(frame) = answer(configuration, question) else {
        return;
    };
    assert!(frame.len() <= 1514, "{}", frame.len());
    assert_eq!(frame[6..12], ROUTER_MAC, "it comes from the router");
    let is_group = frame[0] & 1 == 1;
    assert!(is_group || frame[..6] == GUEST_MAC, "it goes to the guest");
    let packet = SlicedPacket::from_ethernet(&frame).expect("it is well-formed");
    match (packet.net, packet.transport) {
        (Some(NetSlice::Ipv4(ip)), Some(TransportSlice::Udp(udp))) => {
            assert_eq!(ip.header().source_addr(), Ipv4Addr::new(10, 77, 0, 1));
            assert_eq!((udp.source_port(), udp.destination_port()), (67, 68));
            let message: v4::Message = questions::decode(udp.payload());
            let own = Ipv4Addr::new(10, 77, 0, 9);
            assert!(message.yiaddr().is_unspecified() || message.yiaddr() == own);
            assert_eq!(message.chaddr(), GUEST_MAC);
        }
        (Some(NetSlice::Ipv6(_)), Some(TransportSlice::Udp(udp))) => {
            assert_eq!((udp.source_port(), udp.destination_port()), (547, 546));
            let message: v6::Message = questions::decode(udp.payload());
            for option in message.opts().iter() {
                let v6::DhcpOption::IANA(association) = option else {
                    continue;
                };
                for option in association.opts.iter() {
                    if let v6::DhcpOption::IAAddr(address) = option {
                        let is_own = address.addr.to_string() == "fd77::9";
                        assert!(is_own || address.valid_life == 0);
                    }
                }
            }
        }
        (Some(NetSlice::Ipv6(_)), Some(TransportSlice::Icmpv6(icmp))) => {
            assert_eq!(icmp.slice()[0], 134);
        }
        other => panic!("no answer is {other:?}"),
    }
}

fn well_formed() -> impl Strategy<Value = Vec<u8>> {
    let dhcp = (0_u8..20, any::<u32>(), any::<u16>()).prop_map(|(kind, address, size)| {
        let address = Ipv4Addr::from_bits(address);
        let mut message = dhcp_options(
            v4::MessageType::from(kind),
            [
                v4::DhcpOption::RequestedIpAddress(address),
                v4::DhcpOption::MaxMessageSize(size),
            ],
        );
        message.set_ciaddr(address);
        dhcp(&message)
    });
    let dhcpv6 = (0_u8..24, any::<bool>(), any::<u32>()).prop_map(|(kind, has_server, id)| {
        let association = v6::DhcpOption::IANA(v6::IANA {
            id,
            t1: id,
            t2: id,
            opts: v6::DhcpOptions::new(),
        });
        let server = has_server.then(server_id);
        let options = [association].into_iter().chain(server);
        dhcpv6(&dhcpv6_with(kind.into(), options))
    });
    prop_oneof![dhcp, dhcpv6, Just(router_solicitation())]
}

/// Bytes where no header or checksum would have a parser give up early, and beyond.
fn damaged() -> impl Strategy<Value = Vec<u8>> {
    let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..12);
    (
        well_formed(),
        changes,
        any::<prop::sample::Index>(),
        any::<bool>(),
    )
        .prop_map(|(mut frame, changes, end, cut)| {
            for (at, byte) in changes {
                let at = at.index(frame.len());
                frame[at] = byte;
            }
            if cut {
                frame.truncate(end.index(frame.len()));
            }
            frame
        })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        check(&configuration(), &bytes);
        check(&configuration(), &dhcp_frame(&bytes));
        check(&configuration(), &dhcpv6_frame(&bytes));
    }

    #[test]
    fn any_damage(frame in damaged()) {
        check(&configuration(), &frame);
    }

    #[test]
    fn any_options(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let message = dhcp_options(v4::MessageType::Discover, []);
        let mut frame = dhcp(&message);
        // In place of the end of the options.
        let mut payload = frame.split_off(42);
        payload.pop();
        payload.extend(&bytes);
        check(&configuration(), &dhcp_frame(&payload));
        let mut payload = vec![1, 0, 0, 1, 0, 1, 0, 2, 7, 7];
        payload.extend(bytes);
        check(&configuration(), &dhcpv6_frame(&payload));
    }
}

#[test]
fn an_ethernet_address_longer_than_its_field_is_ignored() {
    let mut frame = dhcp(&dhcp_options(v4::MessageType::Discover, []));
    for length in [0, 5, 7, 16, 17, 255] {
        frame[44] = length;
        assert_eq!(answer(&configuration(), &frame), None);
    }
}
