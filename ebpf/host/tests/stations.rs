//! Guests of one network on one host find and reach each other without a bridge, unless they are kept
//! apart.

mod network;

use std::net::Ipv6Addr;

use keelson_ebpf::{DropReason, HookChoice, InterfacePolicy, MacAddress, Protocol, Rule};
use network::frames::{self, ARP, BROADCAST, Ends};
use network::{Guest, Network, allow};

with_both_hooks!(
    guests_find_each_other_and_talk,
    isolated_guests_do_not,
    an_address_that_another_has_is_refused
);

const IPV6: u16 = 0x86dd;

fn ipv6_of(guest: &Guest) -> Ipv6Addr {
    Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, u16::from(guest.mac.0[5]))
}

fn policy(guest: &Guest, isolated: bool) -> InterfacePolicy {
    InterfacePolicy {
        ipv6: Some(ipv6_of(guest)),
        network: 9,
        isolated,
        ..guest.policy_with(&[
            allow(Protocol::Udp, 7000..=7000),
            network::allow_from(Protocol::Udp, Rule::ALL_PORTS, "fd77::/64"),
        ])
    }
}

fn two_guests(network: &Network, isolated: bool) -> (keelson_ebpf::Datapath, Guest, Guest) {
    let mut datapath = network.open();
    let (one, other) = (network.guest(1), network.guest(2));
    for guest in [&one, &other] {
        datapath.attach(&policy(guest, isolated)).expect("attached");
        network::ip(&format!("link set {} up", guest.name));
    }
    (datapath, one, other)
}

fn ends(one: &Guest, other: &Guest) -> Ends {
    Ends {
        source_mac: one.mac,
        destination_mac: other.mac,
        source: one.ip,
        destination: other.ip,
    }
}

fn ipv6(source: Ipv6Addr, destination: Ipv6Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let length = u8::try_from(payload.len()).expect("short");
    let mut packet = vec![0x60, 0, 0, 0, 0, length, protocol, 255];
    packet.extend(source.octets());
    packet.extend(destination.octets());
    packet.extend(payload);
    packet
}

fn solicitation(one: &Guest, other: &Guest) -> Vec<u8> {
    let target = ipv6_of(other);
    let rest = [&[0; 4][..], &target.octets(), &[1, 1], &one.mac.0].concat();
    let group: Ipv6Addr = "ff02::1:ff00:2".parse().expect("valid");
    let message = frames::icmp_message(135, 0, &rest);
    let packet = ipv6(ipv6_of(one), group, 58, &message);
    frames::ethernet(
        MacAddress([0x33, 0x33, 0xff, 0, 0, 2]),
        one.mac,
        IPV6,
        &packet,
    )
}

fn arp_request(one: &Guest, other: &Guest) -> Vec<u8> {
    let nobody = MacAddress([0; 6]);
    let request = frames::arp(1, (one.mac, one.ip), (nobody, other.ip));
    frames::ethernet(BROADCAST, one.mac, ARP, &request)
}

/// The ones' complement sum of a whole packet with its pseudo header is all ones (RFC 1071).
fn is_summed(packet: &[u8]) -> bool {
    let pseudo = [0, packet[5], 0, packet[6]];
    let all = [&packet[8..], &pseudo].concat();
    let mut sum: u32 = all
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum == 0xffff
}

fn guests_find_each_other_and_talk(hook: HookChoice) {
    let network = Network::new(hook);
    let (_datapath, one, other) = two_guests(&network, false);

    one.send(&arp_request(&one, &other));
    let answer = frames::arp(2, (other.mac, other.ip), (one.mac, one.ip));
    let expected = frames::ethernet(one.mac, other.mac, ARP, &answer);
    assert_eq!(one.receive(), expected);

    one.send(&solicitation(&one, &other));
    let answer = one.receive();
    assert_eq!(answer[..6], one.mac.0);
    assert_eq!(answer[6..12], other.mac.0);
    let packet = &answer[14..];
    assert_eq!(packet[..8], [0x60, 0, 0, 0, 0, 32, 58, 255]);
    assert_eq!(packet[8..24], ipv6_of(&other).octets());
    assert_eq!(packet[24..40], ipv6_of(&one).octets());
    assert_eq!(packet[40..42], [136, 0]);
    assert_eq!(packet[44..48], [0x60, 0, 0, 0]);
    assert_eq!(packet[48..64], ipv6_of(&other).octets());
    assert_eq!(packet[64..66], [2, 1]);
    assert_eq!(packet[66..72], other.mac.0);
    assert!(is_summed(packet), "{packet:02x?}");

    one.send(&frames::udp(ends(&one, &other), 1000, 7000, b"hello"));
    assert_eq!(frames::seen(&other.receive()).data, b"hello");
    other.send(&frames::udp(ends(&other, &one), 7000, 1000, b"answer"));
    assert_eq!(frames::seen(&one.receive()).data, b"answer");
    let datagram = frames::udp_datagram(1000, 53, b"six");
    let packet = ipv6(ipv6_of(&one), ipv6_of(&other), 17, &datagram);
    let frame = frames::ethernet(other.mac, one.mac, IPV6, &packet);
    one.send(&frame);
    assert_eq!(other.receive(), frame);
}

fn isolated_guests_do_not(hook: HookChoice) {
    let network = Network::new(hook);
    let (datapath, one, other) = two_guests(&network, true);
    one.send(&arp_request(&one, &other));
    one.send(&solicitation(&one, &other));
    one.send(&frames::udp(ends(&one, &other), 1000, 7000, b"hello"));
    let counters = datapath.counters(&one.name).expect("attached");
    let dropped = counters.from_guest.dropped_for(DropReason::Isolated);
    assert_eq!(dropped.packets, 1);
    // Questions go to the bridge, which isn't there.
    assert_eq!(counters.from_guest.passed.packets, 2);
    assert!(one.receive_now().is_none(), "nobody answers");
    assert!(other.receive_now().is_none(), "nothing arrives");
}

fn an_address_that_another_has_is_refused(hook: HookChoice) {
    let network = Network::new(hook);
    let (mut datapath, one, other) = two_guests(&network, false);
    for (field, wrong) in [
        (
            "mac",
            InterfacePolicy {
                mac: other.mac,
                ..policy(&one, false)
            },
        ),
        (
            "ipv4",
            InterfacePolicy {
                ipv4: Some(other.ip),
                ..policy(&one, false)
            },
        ),
        (
            "ipv6",
            InterfacePolicy {
                ipv6: Some(ipv6_of(&other)),
                ..policy(&one, false)
            },
        ),
    ] {
        let error = datapath.update(&wrong).expect_err("it is taken");
        let message = error.to_string();
        assert!(message.contains(field), "{message}");
        assert!(message.contains(&other.name), "{message}");
    }
    one.send(&frames::udp(ends(&one, &other), 1000, 7000, b"as before"));
    assert_eq!(frames::seen(&other.receive()).data, b"as before");
}
