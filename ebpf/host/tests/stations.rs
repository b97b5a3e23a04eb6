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

fn arp_request(one: &Guest, other: &Guest) -> Vec<u8> {
    let nobody = MacAddress([0; 6]);
    let request = frames::arp(1, (one.mac, one.ip), (nobody, other.ip));
    frames::ethernet(BROADCAST, one.mac, ARP, &request)
}

fn guests_find_each_other_and_talk(hook: HookChoice) {
    let network = Network::new(hook);
    let (_datapath, one, other) = two_guests(&network, false);

    one.send(&arp_request(&one, &other));
    let answer = frames::arp(2, (other.mac, other.ip), (one.mac, one.ip));
    let expected = frames::ethernet(one.mac, other.mac, ARP, &answer);
    assert_eq!(one.receive(), expected);

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
    one.send(&frames::udp(ends(&one, &other), 1000, 7000, b"hello"));
    let counters = datapath.counters(&one.name).expect("attached");
    let dropped = counters.from_guest.dropped_for(DropReason::Isolated);
    assert_eq!(dropped.packets, 1);
    // The question goes to the bridge, which isn't there.
    assert_eq!(counters.from_guest.passed.packets, 1);
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
