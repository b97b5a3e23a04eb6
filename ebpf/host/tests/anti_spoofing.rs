//! A guest can send only from its own MAC address, IPv4 address and ARP identity; what it may not
//! send is dropped and counted, to the packet and the byte.

mod network;

use std::net::Ipv4Addr;

use keelson_ebpf::{DropReason, HookChoice, InterfaceCounters, MacAddress, Tally};
use network::frames::{self, ARP, BROADCAST, Ends, Ip};
use network::{Guest, HOST_IP, HOST_MAC, Network, host_socket};

with_both_hooks!(
    own_identity_passes_and_every_other_is_dropped,
    arp_is_only_sent_in_the_own_name,
    frames_that_are_no_plain_ip_or_arp_are_dropped
);

const OTHER_MAC: MacAddress = MacAddress([0x52, 0x54, 0, 0, 0, 0xee]);
const OTHER_IP: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 250);

fn own(guest: &Guest) -> Ends {
    Ends {
        source_mac: guest.mac,
        destination_mac: HOST_MAC,
        source: guest.ip,
        destination: HOST_IP,
    }
}

/// Sends a datagram that the host must get after all frames sent before.
fn sync(guest: &Guest, socket: &std::net::UdpSocket) -> Tally {
    let frame = frames::udp(own(guest), 4000, 9000, b"sync");
    guest.send(&frame);
    let mut buffer = [0; 64];
    let (length, from) = socket.recv_from(&mut buffer).expect("the datagram arrives");
    assert_eq!(&buffer[..length], b"sync");
    assert_eq!(from.ip(), guest.ip);
    tally(&[&frame])
}

fn tally(frames: &[&Vec<u8>]) -> Tally {
    Tally {
        packets: frames.len() as u64,
        bytes: frames.iter().map(|frame| frame.len() as u64).sum(),
    }
}

/// Sends each frame, and checks that each was dropped for its reason and nothing else happened.
fn expect_drops(hook: HookChoice, make: impl FnOnce(&Guest) -> Vec<(DropReason, Vec<u8>)>) {
    let network = Network::new(hook);
    let mut datapath = network.open();
    let guest = network.guest(1);
    datapath.attach(&guest.policy()).expect("attached");
    guest.up();
    let socket = host_socket(9000);

    let mut expected = InterfaceCounters::default();
    for (reason, frame) in make(&guest) {
        guest.send(&frame);
        let sum = expected.from_guest.dropped.entry(reason).or_default();
        sum.packets += 1;
        // The kernel takes the outer VLAN tag out of the frame before the program sees it.
        let outer_tag = if reason == DropReason::Vlan { 4 } else { 0 };
        sum.bytes += frame.len() as u64 - outer_tag;
    }
    expected.from_guest.passed = sync(&guest, &socket);
    assert_eq!(datapath.counters(&guest.name).expect("attached"), expected);
}

fn own_identity_passes_and_every_other_is_dropped(hook: HookChoice) {
    expect_drops(hook, |guest| {
        let foreign_mac = Ends {
            source_mac: OTHER_MAC,
            ..own(guest)
        };
        let foreign_ip = Ends {
            source: OTHER_IP,
            ..own(guest)
        };
        let host_ip = Ends {
            source: HOST_IP,
            ..own(guest)
        };
        let no_ip = Ends {
            source: Ipv4Addr::UNSPECIFIED,
            ..own(guest)
        };
        vec![
            (
                DropReason::SpoofedMac,
                frames::udp(foreign_mac, 4000, 9000, b"a"),
            ),
            (
                DropReason::SpoofedIpv4,
                frames::udp(foreign_ip, 4000, 9000, b"bb"),
            ),
            (
                DropReason::SpoofedIpv4,
                frames::udp(host_ip, 4000, 9000, b"ccc"),
            ),
            (DropReason::SpoofedIpv4, frames::udp(no_ip, 68, 67, b"dddd")),
            (
                DropReason::DhcpServer,
                frames::udp(own(guest), 67, 68, b"offer"),
            ),
        ]
    });
}

fn arp_is_only_sent_in_the_own_name(hook: HookChoice) {
    let network = Network::new(hook);
    let mut datapath = network.open();
    let guest = network.guest(1);
    datapath.attach(&guest.policy()).expect("attached");
    guest.up();
    let nobody = MacAddress([0; 6]);
    let request = |mac, sender: (MacAddress, Ipv4Addr), target: Ipv4Addr| {
        frames::ethernet(
            BROADCAST,
            mac,
            ARP,
            &frames::arp(1, sender, (nobody, target)),
        )
    };

    let own_request = request(guest.mac, (guest.mac, guest.ip), HOST_IP);
    guest.send(&own_request);
    let answer = guest.receive();
    assert_eq!(answer[12..14], ARP.to_be_bytes());
    assert_eq!(answer[28..32], HOST_IP.octets());

    let probe = request(guest.mac, (guest.mac, Ipv4Addr::UNSPECIFIED), OTHER_IP);
    guest.send(&probe);
    for spoofed in [
        request(guest.mac, (guest.mac, OTHER_IP), HOST_IP),
        request(guest.mac, (OTHER_MAC, guest.ip), HOST_IP),
        request(guest.mac, (guest.mac, HOST_IP), HOST_IP),
    ] {
        guest.send(&spoofed);
    }
    guest.send(&own_request);
    guest.receive();

    let counters = datapath.counters(&guest.name).expect("attached");
    let passed = tally(&[&own_request, &probe, &own_request]);
    assert_eq!(counters.from_guest.passed, passed);
    assert_eq!(
        counters.from_guest.dropped_for(DropReason::SpoofedArp),
        Tally {
            packets: 3,
            bytes: 3 * 42
        }
    );
    assert_eq!(counters.to_guest.passed.packets, 2);
}

fn frames_that_are_no_plain_ip_or_arp_are_dropped(hook: HookChoice) {
    expect_drops(hook, |guest| {
        let plain = frames::udp(own(guest), 4000, 9000, b"data");
        let ip_packet = &plain[14..];
        let ethernet =
            |ether_type, payload: &[u8]| frames::ethernet(HOST_MAC, guest.mac, ether_type, payload);
        let mut wrong_version = plain.clone();
        wrong_version[14] = 0x55;
        let mut short_header = plain.clone();
        short_header[14] = 0x44;
        let mut too_long = plain.clone();
        too_long[16] = 0xff;
        let mut short_datagram = plain.clone();
        short_datagram[39] = 7;
        let oversized = Ip {
            fragment: 0x1fff,
            ..Ip::default()
        };
        vec![
            (DropReason::Malformed, ethernet(0x86dd, &[0x60; 39])),
            (
                DropReason::Vlan,
                ethernet(0x8100, &[&[0, 5, 8, 0], ip_packet].concat()),
            ),
            (
                DropReason::Vlan,
                ethernet(0x88a8, &[&[0, 5, 0x81, 0], ip_packet].concat()),
            ),
            (DropReason::UnknownProtocol, ethernet(0x88cc, &[0; 46])),
            (DropReason::UnknownProtocol, ethernet(46, &[0; 46])),
            (DropReason::Malformed, ethernet(0x0806, &[0; 27])),
            (DropReason::Malformed, plain[..33].to_vec()),
            (DropReason::Malformed, plain[..45].to_vec()),
            (DropReason::Malformed, wrong_version),
            (DropReason::Malformed, short_header),
            (DropReason::Malformed, too_long),
            (DropReason::Malformed, short_datagram),
            (
                DropReason::Malformed,
                frames::ipv4(own(guest), &oversized, 17, &[0; 64]),
            ),
            (
                DropReason::Malformed,
                frames::ipv4(own(guest), &Ip::default(), 6, &[0; 19]),
            ),
            (
                DropReason::Malformed,
                frames::ipv4(own(guest), &Ip::default(), 1, &[8; 7]),
            ),
        ]
    });
}
