//! Packets made of choices.

use std::net::{IpAddr, Ipv6Addr};

use keelson_ebpf::{Direction, InterfacePolicy};

use super::{Choices, NEIGHBOUR_MAC, SERVICE_ADDRESSES};

pub fn own_address(choices: &mut Choices<'_>, guest: &InterfacePolicy, is_ipv6: bool) -> IpAddr {
    if choices.rarely(20) {
        let other = *choices.of(&["10.77.0.9", "fd77::9", "0.0.0.0", "::", "::ffff:1.2.3.4"]);
        let other: IpAddr = other.parse().expect("valid");
        if other.is_ipv6() == is_ipv6 {
            return other;
        }
    }
    match (is_ipv6, guest.ipv6) {
        (true, Some(ipv6)) if !choices.rarely(5) => ipv6.into(),
        (true, _) => guest.mac.link_local().into(),
        _ => guest.ipv4.expect("the guest has IPv4").into(),
    }
}

pub fn peer_address(choices: &mut Choices<'_>, is_ipv6: bool) -> IpAddr {
    let ipv4 = ["10.77.0.1", "10.77.0.102", "192.0.2.9", "224.0.0.251"];
    let ipv6 = [
        "fd77::1",
        "fd77::66",
        "2001:db8::9",
        "fe80::1",
        "ff02::fb",
        "::ffff:9.9.9.9",
    ];
    let text = if is_ipv6 {
        *choices.of(&ipv6)
    } else {
        *choices.of(&ipv4)
    };
    text.parse().expect("valid")
}

pub fn ip_packet(
    choices: &mut Choices<'_>,
    guest: &InterfacePolicy,
    direction: Direction,
    is_ipv6: bool,
    is_to_service: bool,
) -> Vec<u8> {
    let own = own_address(choices, guest, is_ipv6);
    let peer = if is_to_service && !choices.rarely(12) {
        let addresses = SERVICE_ADDRESSES.map(|address| address.parse::<IpAddr>().expect("valid"));
        let mut addresses = addresses.into_iter();
        addresses
            .find(|address| address.is_ipv6() == is_ipv6)
            .expect("one of each version")
    } else {
        peer_address(choices, is_ipv6)
    };
    let ends = match direction {
        Direction::FromGuest => (own, peer),
        Direction::ToGuest => (peer, own),
    };
    let guest_sends = direction == Direction::FromGuest;
    let (protocol, payload) = if is_to_service && !choices.rarely(5) {
        // Few ends, so that flows meet.
        let source = *choices.of(&[1000, 1000, 1001]);
        let destination = *choices.of(&[80, 53, 80, 81]);
        match choices.below(3) {
            2 => (17, udp(source, destination)),
            _ => (
                6,
                tcp(
                    source,
                    destination,
                    *choices.of(&[0x02, 0x10, 0x10, 0x11, 0x04]),
                ),
            ),
        }
    } else {
        transport(choices, ends, guest_sends)
    };
    wrap(choices, ends, protocol, 64, payload, false)
}

/// Gives a payload its IP header, and fragments and extension headers now and then.
pub fn wrap(
    choices: &mut Choices<'_>,
    ends: (IpAddr, IpAddr),
    protocol: u8,
    hop_limit: u8,
    payload: Vec<u8>,
    is_plain: bool,
) -> Vec<u8> {
    let fragment: Option<u16> = (!is_plain && choices.rarely(6))
        .then(|| *choices.of(&[0x2000, 0x2000, 1, 3, 0x2001, 100, 0x1fff, 0]));
    match ends {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let options = if choices.rarely(30) { 4 } else { 0 };
            let total = u16::try_from(20 + options + payload.len()).expect("short");
            let mut packet = vec![0x45 + u8::try_from(options / 4).expect("small"), 0];
            packet.extend(total.to_be_bytes());
            packet.extend([0, 1]);
            packet.extend(fragment.unwrap_or(0).to_be_bytes());
            packet.extend([hop_limit, protocol, 0, 0]);
            packet.extend(source.octets());
            packet.extend(destination.octets());
            packet.extend(vec![1; options]);
            packet.extend(payload);
            packet
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let mut headers: Vec<(u8, Vec<u8>)> = Vec::new();
            if let Some(fragment) = fragment {
                let field = (fragment & 0x1fff) << 3 | fragment >> 13 & 1;
                let [high, low] = field.to_be_bytes();
                headers.push((44, vec![0, 0, high, low, 0, 0, 0, 1]));
            }
            if !is_plain && choices.rarely(6) {
                for _ in 0..=choices.below(5) {
                    let kind = *choices.of(&[60, 60, 0, 43, 44, 51]);
                    let long = choices.below(2) * 8;
                    let mut header = vec![0; 8 + long];
                    header[1] = u8::try_from(long / 8).expect("small");
                    let at = choices.below(headers.len() + 1);
                    headers.insert(at, (kind, header));
                }
            }
            let mut next = protocol;
            let mut body = payload;
            for (kind, mut header) in headers.into_iter().rev() {
                header[0] = next;
                next = kind;
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
        _ => unreachable!("both ends are of one family"),
    }
}

/// Ports such that a packet and its answer are often of one flow.
fn ports(choices: &mut Choices<'_>, guest_sends: bool) -> (u16, u16) {
    let guest = *choices.of(&[1000, 80, 68, 546]);
    let peer = *choices.of(&[80, 1001, 53, 67, 547]);
    let swapped = choices.rarely(12);
    let (guest, peer) = match (guest, swapped) {
        (_, true) => (67, 68),
        (546, _) if choices.rarely(3) => (547, 546),
        (guest, _) => (guest, peer),
    };
    if guest_sends {
        (guest, peer)
    } else {
        (peer, guest)
    }
}

fn transport(
    choices: &mut Choices<'_>,
    ends: (IpAddr, IpAddr),
    guest_sends: bool,
) -> (u8, Vec<u8>) {
    let is_ipv6 = ends.0.is_ipv6();
    let icmp = if is_ipv6 { 58 } else { 1 };
    match choices.below(12) {
        0..=4 => {
            let (source, destination) = ports(choices, guest_sends);
            let flags = *choices.of(&[0x02, 0x12, 0x10, 0x18, 0x11, 0x04, 0x14, 0x03, 0x00, 0x29]);
            (6, tcp(source, destination, flags))
        }
        5 | 6 => {
            let (source, destination) = ports(choices, guest_sends);
            (17, udp(source, destination))
        }
        7 | 8 => {
            let echo = if is_ipv6 { [128, 129] } else { [8, 0] };
            let kind = *choices.of(&echo);
            (
                icmp,
                vec![kind, 0, 0, 0, 0, u8::from(choices.rarely(4)), 0, 1],
            )
        }
        9 => (icmp, icmp_error(choices, ends, guest_sends)),
        10 => {
            let others = [13, 5, 9, 3, 1, 200, 133, 128];
            (icmp, vec![*choices.of(&others), 0, 0, 0, 0, 0, 0, 0])
        }
        _ => (*choices.of(&[132, 47, 1, 58, 59]), vec![0; 16]),
    }
}

/// An error about a packet that went the other way, or pretends to be.
fn icmp_error(choices: &mut Choices<'_>, ends: (IpAddr, IpAddr), guest_sends: bool) -> Vec<u8> {
    let is_ipv6 = ends.0.is_ipv6();
    let kind = *choices.of(if is_ipv6 {
        &[1, 2, 3, 4]
    } else {
        &[3, 11, 12, 3]
    });
    let (mut from, mut to) = (ends.1, ends.0);
    if choices.rarely(4) {
        (from, to) = (to, from);
    }
    if choices.rarely(3) {
        // A router on the way says so.
        let peer = peer_address(choices, is_ipv6);
        if guest_sends {
            from = peer;
        } else {
            to = peer;
        }
    }
    let quoted = match choices.below(4) {
        3 => {
            let kind = *choices.of(if is_ipv6 { &[128, 129] } else { &[8, 0] });
            let icmp = if is_ipv6 { 58 } else { 1 };
            (icmp, vec![kind, 0, 0, 0, 0, 0, 0, 1])
        }
        choice => {
            let (source, destination) = ports(choices, !guest_sends);
            if choice == 2 {
                (17, udp(source, destination))
            } else {
                (6, tcp(source, destination, 0x10))
            }
        }
    };
    let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 0];
    message.extend(wrap(choices, (from, to), quoted.0, 64, quoted.1, true));
    message
}

fn tcp(source: u16, destination: u16, flags: u8) -> Vec<u8> {
    let mut segment = source.to_be_bytes().to_vec();
    segment.extend(destination.to_be_bytes());
    segment.extend([0; 8]);
    segment.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend([0; 4]);
    segment
}

fn udp(source: u16, destination: u16) -> Vec<u8> {
    let mut datagram = source.to_be_bytes().to_vec();
    datagram.extend(destination.to_be_bytes());
    datagram.extend([0, 16, 0, 0]);
    datagram.extend([0; 8]);
    datagram
}

pub fn arp(choices: &mut Choices<'_>, guest: &InterfacePolicy) -> Vec<u8> {
    let own = guest.ipv4.expect("the guest has IPv4").octets();
    let addresses = [own, [10, 77, 0, 1], [10, 77, 0, 102], [0; 4]];
    let macs = [guest.mac.0, guest.mac.0, NEIGHBOUR_MAC];
    let mut packet = vec![0, 1, 8, 0, 6, 4, 0, *choices.of(&[1, 1, 2, 3])];
    packet.extend(*choices.of(&macs));
    packet.extend(*choices.of(&addresses));
    packet.extend([0; 6]);
    packet.extend(*choices.of(&addresses));
    packet
}

/// Neighbour discovery and what belongs to it.
pub fn housekeeping(
    choices: &mut Choices<'_>,
    guest: &InterfacePolicy,
    direction: Direction,
) -> Vec<u8> {
    let kind = *choices.of(&[135, 136, 133, 134, 137, 130, 143, 131]);
    let own = own_address(choices, guest, true);
    let peers = ["fe80::1", "ff02::1", "fd77::66", "ff02::1:ff00:65"];
    let peer: IpAddr = choices.of(&peers).parse().expect("valid");
    let ends = match direction {
        Direction::FromGuest => (own, peer),
        Direction::ToGuest => (peer, *choices.of(&[own, peer])),
    };
    let mut message = vec![kind, u8::from(choices.rarely(12)), 0, 0, 0, 0, 0, 0];
    if matches!(kind, 135 | 136) && !choices.rarely(12) {
        let other: Ipv6Addr = "fd77::66".parse().expect("valid");
        let target = match (choices.below(3), own) {
            (0 | 1, IpAddr::V6(own)) => own,
            _ => other,
        };
        message.extend(target.octets());
    }
    for _ in 0..choices.below(5) {
        let mac = *choices.of(&[guest.mac.0, guest.mac.0, NEIGHBOUR_MAC]);
        message.extend([*choices.of(&[1, 2, 14]), u8::from(!choices.rarely(12))]);
        message.extend(mac);
    }
    let hop_limit = if choices.rarely(12) { 64 } else { 255 };
    let is_plain = !choices.rarely(8);
    wrap(choices, ends, 58, hop_limit, message, is_plain)
}
