//! What a hostile guest sends is dropped and counted, and its neighbour doesn't notice.

mod network;

use std::net::{Ipv4Addr, Ipv6Addr};

use keelson_ebpf::{DropReason, HookChoice, InterfacePolicy, MacAddress, Protocol};
use network::frames::{self, Ends, Ip};
use network::{Guest, HOST_IP, Network, allow, host_socket};

with_both_hooks!(
    hostile_frames_are_dropped_and_counted,
    a_flood_of_new_flows_leaves_established_ones_alone
);

const NETWORK: u32 = 3;
const IPV6: u16 = 0x86dd;
const ICMPV6: u8 = 58;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

fn ipv6_of(guest: &Guest) -> Ipv6Addr {
    Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, u16::from(guest.mac.0[5]))
}

fn policy(guest: &Guest) -> InterfacePolicy {
    InterfacePolicy {
        ipv6: Some(ipv6_of(guest)),
        network: NETWORK,
        ..guest.policy_with(&[allow(Protocol::Any, keelson_ebpf::Rule::ALL_PORTS)])
    }
}

/// An IPv6 packet with a chain of extension headers, given as header numbers with their bytes.
fn ipv6(
    source: Ipv6Addr,
    destination: Ipv6Addr,
    hop_limit: u8,
    chain: &[(u8, Vec<u8>)],
    protocol: u8,
    payload: &[u8],
) -> Vec<u8> {
    let mut next = protocol;
    let mut body = payload.to_vec();
    for (number, header) in chain.iter().rev() {
        let mut header = header.clone();
        header[0] = next;
        next = *number;
        body = [header, body].concat();
    }
    let length = u16::try_from(body.len()).expect("short");
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([next, hop_limit]);
    packet.extend(source.octets());
    packet.extend(destination.octets());
    packet.extend(body);
    packet
}

fn ipv6_corpus(own: Ipv6Addr, link_local: Ipv6Addr, peer: Ipv6Addr) -> Vec<(DropReason, Vec<u8>)> {
    let udp = frames::udp_datagram(1000, 7000, b"data");
    let options = vec![0, 0, 1, 4, 0, 0, 0, 0];
    let ipv6_udp = |chain: &[(u8, Vec<u8>)]| ipv6(own, peer, 64, chain, 17, &udp);
    let advertisement = |target: Ipv6Addr, mac: [u8; 6]| {
        let rest = [&[0x20, 0, 0, 0][..], &target.octets(), &[2, 1], &mac].concat();
        frames::icmp_message(136, 0, &rest)
    };
    let other_mac = [0x52, 0x54, 0, 0, 0, 0xee];
    let mut wrong_version = ipv6_udp(&[]);
    wrong_version[0] = 0x40;
    let mut too_long = ipv6_udp(&[]);
    too_long[4] = 0x7f;
    vec![
        (DropReason::Malformed, ipv6_udp(&[])[..39].to_vec()),
        (DropReason::Malformed, wrong_version),
        (DropReason::Malformed, too_long),
        (DropReason::Malformed, ipv6(own, peer, 64, &[], 17, b"")),
        (DropReason::SpoofedIpv6, ipv6(peer, own, 64, &[], 17, &udp)),
        (
            DropReason::SpoofedIpv6,
            ipv6(Ipv6Addr::UNSPECIFIED, peer, 64, &[], 17, &udp),
        ),
        (
            DropReason::SpoofedIpv6,
            ipv6(
                own,
                Ipv4Addr::new(10, 0, 0, 1).to_ipv6_mapped(),
                64,
                &[],
                17,
                &udp,
            ),
        ),
        // Chains: too long, out of order, a source route, two fragment headers.
        (
            DropReason::ExtensionHeaders,
            ipv6_udp(&vec![(60, options.clone()); 5]),
        ),
        (
            DropReason::ExtensionHeaders,
            ipv6_udp(&[(60, options.clone()), (0, options.clone())]),
        ),
        (DropReason::ExtensionHeaders, ipv6_udp(&[(43, vec![0; 8])])),
        (
            DropReason::ExtensionHeaders,
            ipv6_udp(&[(44, vec![0; 8]), (44, vec![0; 8])]),
        ),
        // A later fragment of nothing; one whose header says that it is larger than the packet.
        (
            DropReason::Fragment,
            ipv6_udp(&[(44, vec![0, 0, 0, 8, 0, 0, 0, 9])]),
        ),
        (
            DropReason::Malformed,
            ipv6_udp(&[(60, vec![0, 200, 1, 4, 0, 0, 0, 0])]),
        ),
        // Router, DHCPv6 server, multicast querier.
        (
            DropReason::RouterAdvertisement,
            ipv6(
                link_local,
                ALL_NODES,
                255,
                &[],
                ICMPV6,
                &frames::icmp_message(134, 0, &[64; 12]),
            ),
        ),
        (
            DropReason::RouterAdvertisement,
            ipv6(
                link_local,
                peer,
                255,
                &[],
                ICMPV6,
                &frames::icmp_message(137, 0, &[0; 36]),
            ),
        ),
        (
            DropReason::RouterAdvertisement,
            ipv6(
                link_local,
                ALL_NODES,
                1,
                &[],
                ICMPV6,
                &frames::icmp_message(130, 0, &[0; 20]),
            ),
        ),
        (
            DropReason::DhcpServer,
            ipv6(
                link_local,
                peer,
                64,
                &[],
                17,
                &frames::udp_datagram(547, 546, b"offer"),
            ),
        ),
        // Neighbour discovery in another's name, from afar, in fragments.
        (
            DropReason::SpoofedNeighbour,
            ipv6(
                own,
                ALL_NODES,
                255,
                &[],
                ICMPV6,
                &advertisement(peer, other_mac),
            ),
        ),
        (
            DropReason::SpoofedNeighbour,
            ipv6(
                own,
                ALL_NODES,
                255,
                &[],
                ICMPV6,
                &advertisement(own, other_mac),
            ),
        ),
        (
            DropReason::Malformed,
            ipv6(
                own,
                ALL_NODES,
                64,
                &[],
                ICMPV6,
                &advertisement(own, other_mac),
            ),
        ),
        (
            DropReason::Malformed,
            ipv6(
                own,
                ALL_NODES,
                255,
                &[(44, vec![0; 8])],
                ICMPV6,
                &advertisement(own, other_mac),
            ),
        ),
    ]
}

fn ipv4_corpus(ends: Ends) -> Vec<(DropReason, Vec<u8>)> {
    let tcp = |flags: u8| {
        let mut segment = vec![0x12, 0x34, 0x1b, 0x58, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, flags];
        segment.extend([0xff, 0xff, 0, 0, 0, 0]);
        frames::ipv4(ends, &Ip::default(), frames::TCP, &segment)
    };
    let fragment = |fragment, protocol| {
        let fields = Ip {
            fragment,
            ..Ip::default()
        };
        frames::ipv4(ends, &fields, protocol, &[0; 64])
    };
    let source_route = Ip {
        options: vec![131, 7, 4, 10, 0, 0, 1, 0],
        ..Ip::default()
    };
    vec![
        (
            DropReason::IpOptions,
            frames::ipv4(ends, &source_route, 17, &[0; 16]),
        ),
        // Null, SYN with FIN, SYN with RST, FIN without ACK.
        (DropReason::Malformed, tcp(0)),
        (DropReason::Malformed, tcp(0x03)),
        (DropReason::Malformed, tcp(0x06)),
        (DropReason::Malformed, tcp(0x29)),
        // A tiny first fragment, and later fragments of nothing.
        (DropReason::Malformed, {
            let fields = Ip {
                fragment: 0x2000,
                ..Ip::default()
            };
            frames::ipv4(ends, &fields, frames::TCP, &[0; 8])
        }),
        (DropReason::Fragment, fragment(1, frames::TCP)),
        (DropReason::Fragment, fragment(100, frames::UDP)),
        (
            DropReason::Oversized,
            frames::ipv4(ends, &Ip::default(), 17, &[0; 1481]),
        ),
        (
            DropReason::RouterAdvertisement,
            frames::icmp(ends, 5, 1, &[0; 32]),
        ),
        (
            DropReason::RouterAdvertisement,
            frames::icmp(ends, 9, 0, &[0; 12]),
        ),
        (
            DropReason::Malformed,
            frames::ipv4(ends, &Ip::default(), ICMPV6, &[128; 8]),
        ),
    ]
}

fn hostile_frames_are_dropped_and_counted(hook: HookChoice) {
    let network = Network::new(hook);
    let mut datapath = network.open();
    let (guest, neighbour) = (network.guest(1), network.guest(2));
    for guest in [&guest, &neighbour] {
        datapath.attach(&policy(guest)).expect("attached");
    }
    for name in [&guest.name, &neighbour.name] {
        network::ip(&format!("link set {name} up"));
    }
    let ends = Ends {
        source_mac: guest.mac,
        destination_mac: neighbour.mac,
        source: guest.ip,
        destination: neighbour.ip,
    };
    let to_neighbour =
        |ether_type, packet: &[u8]| frames::ethernet(neighbour.mac, guest.mac, ether_type, packet);
    let ipv6_frames = ipv6_corpus(ipv6_of(&guest), guest.mac.link_local(), ipv6_of(&neighbour));
    let corpus = ipv4_corpus(ends)
        .into_iter()
        .chain(
            ipv6_frames
                .into_iter()
                .map(|(reason, packet)| (reason, to_neighbour(IPV6, &packet))),
        )
        .chain([
            (
                DropReason::Vlan,
                to_neighbour(0x8100, &[0, 5, 0x81, 0, 0, 6, 8, 0, 0x45]),
            ),
            (
                DropReason::UnknownProtocol,
                to_neighbour(0x8863, &[0x11; 46]),
            ),
            (DropReason::SpoofedArp, {
                let poison = frames::arp(2, (guest.mac, HOST_IP), (neighbour.mac, neighbour.ip));
                to_neighbour(frames::ARP, &poison)
            }),
            (DropReason::SpoofedMac, {
                let other = MacAddress([0x52, 0x54, 0, 0, 0, 0xee]);
                frames::ethernet(neighbour.mac, other, frames::IPV4, &[0x45; 46])
            }),
        ]);
    for (index, (reason, frame)) in corpus.enumerate() {
        let dropped = |datapath: &keelson_ebpf::Datapath| {
            let counters = datapath.counters(&guest.name).expect("attached");
            counters.from_guest.dropped_for(reason).packets
        };
        let before = dropped(&datapath);
        guest.send(&frame);
        assert_eq!(
            dropped(&datapath),
            before + 1,
            "{index}, {reason}: {frame:02x?}"
        );
    }
    guest.send(&frames::udp(ends, 1000, 7000, b"honest"));
    let first = frames::seen(&neighbour.receive());
    assert_eq!(first.data, b"honest", "nothing else reached the neighbour");
    let counters = datapath.counters(&neighbour.name).expect("attached");
    assert_eq!(counters.to_guest.passed.packets, 1);
    assert!(counters.to_guest.dropped.is_empty());
}

/// One guest opens thousands of flows to another, as its rules allow. A flow of the other's own with
/// the host, which no rule allows, goes on.
fn a_flood_of_new_flows_leaves_established_ones_alone(hook: HookChoice) {
    let mut network = Network::new(hook);
    network.config.max_flows = 256;
    let mut datapath = network.open();
    let (flooder, victim) = (network.guest(1), network.guest(2));
    datapath.attach(&policy(&flooder)).expect("attached");
    let open_port = InterfacePolicy {
        network: NETWORK,
        ..victim.policy_with(&[network::allow_from(Protocol::Tcp, 80..=80, "10.77.0.101")])
    };
    datapath.attach(&open_port).expect("attached");
    network::ip(&format!("link set {} up", flooder.name));
    victim.up();

    let socket = host_socket(9000);
    let to_host = Ends {
        source_mac: victim.mac,
        destination_mac: network::HOST_MAC,
        source: victim.ip,
        destination: HOST_IP,
    };
    victim.send(&frames::udp(to_host, 4000, 9000, b"hello"));
    let mut buffer = [0; 16];
    let (_, from) = socket.recv_from(&mut buffer).expect("the datagram arrives");
    socket.send_to(b"established", from).expect("sent");
    assert_eq!(frames::seen(&victim.receive()).data, b"established");

    let to_victim = Ends {
        source_mac: flooder.mac,
        destination_mac: victim.mac,
        source: flooder.ip,
        destination: victim.ip,
    };
    for port in 1..=5000 {
        let syn = frames::Tcp {
            source_port: port,
            destination_port: 80,
            sequence: 1,
            acknowledgement: 0,
            flags: frames::SYN,
        };
        flooder.send(&frames::tcp(to_victim, syn));
        victim.receive();
    }
    socket.send_to(b"still there", from).expect("sent");
    assert_eq!(frames::seen(&victim.receive()).data, b"still there");
}
