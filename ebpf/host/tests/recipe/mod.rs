//! Frames made of choices: mostly sane ones between a few ends, so that flows come about and rules
//! match, with every part wrong now and then.
#![allow(dead_code, reason = "each test file uses a part")]

mod packets;

use std::net::IpAddr;

use keelson_ebpf::{Direction, InterfacePolicy};
use packets::{arp, housekeeping, ip_packet, peer_address, wrap};

pub const NEIGHBOUR_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 2];
pub const SERVICE_MAC: [u8; 6] = [0x02, 0x4b, 0x45, 0x45, 0x4c, 0x53];
/// Virtual addresses of services.
pub const SERVICE_ADDRESSES: [&str; 2] = ["10.77.0.80", "fd77::80"];
pub const GATEWAY_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// Choices by the bytes of a test case; zeros choose the simplest.
pub struct Choices<'a> {
    bytes: std::slice::Iter<'a, u8>,
}

impl<'a> Choices<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self {
            bytes: bytes.iter(),
        }
    }

    pub fn below(&mut self, count: usize) -> usize {
        usize::from(self.bytes.next().copied().unwrap_or(0)) % count
    }

    pub fn of<'b, T>(&mut self, list: &'b [T]) -> &'b T {
        &list[self.below(list.len())]
    }

    /// True one time in `count`.
    pub fn rarely(&mut self, count: usize) -> bool {
        self.below(count) == count - 1
    }

    fn byte(&mut self) -> u8 {
        self.bytes.next().copied().unwrap_or(0)
    }
}

#[derive(Clone)]
pub struct Recipe {
    pub direction: Direction,
    frame: Vec<u8>,
}

impl Recipe {
    pub fn frame(&self) -> Vec<u8> {
        self.frame.clone()
    }

    /// The same, as what became of it.
    pub fn become_frame(&self, frame: Vec<u8>) -> Self {
        Self {
            frame,
            direction: self.direction,
        }
    }

    /// A frame on its way.
    pub fn new(direction: Direction, frame: Vec<u8>) -> Self {
        Self { direction, frame }
    }

    /// What a guest sent, on its way to a guest.
    pub fn arrived(&self) -> Self {
        Self {
            frame: self.frame.clone(),
            direction: Direction::ToGuest,
        }
    }

    /// A frame that the guest sends to a service, or any.
    pub fn choose(choices: &mut Choices<'_>, guest: &InterfacePolicy, is_to_service: bool) -> Self {
        let direction = if is_to_service {
            Direction::FromGuest
        } else {
            *choices.of(&[Direction::FromGuest, Direction::ToGuest])
        };
        Self::make(choices, guest, direction, is_to_service)
    }

    /// A frame of a direction.
    pub fn make(
        choices: &mut Choices<'_>,
        guest: &InterfacePolicy,
        direction: Direction,
        is_to_service: bool,
    ) -> Self {
        let is_ipv6 = choices.below(2) == 1;
        let (ether_type, packet) = match choices.below(12) {
            11 => (0x0806, arp(choices, guest)),
            10 if is_ipv6 => (0x86dd, housekeeping(choices, guest, direction)),
            9 if choices.rarely(4) => (0x8100, vec![0; 46]),
            _ if is_ipv6 && (guest.ipv6.is_some() || choices.rarely(8)) => (
                0x86dd,
                ip_packet(choices, guest, direction, true, is_to_service),
            ),
            _ => (
                0x0800,
                ip_packet(choices, guest, direction, false, is_to_service),
            ),
        };
        let peer_mac = *choices.of(&[GATEWAY_MAC, GATEWAY_MAC, GATEWAY_MAC, NEIGHBOUR_MAC]);
        let (mut destination, mut source) = match direction {
            Direction::FromGuest => (peer_mac, guest.mac.0),
            Direction::ToGuest => (guest.mac.0, peer_mac),
        };
        if is_to_service {
            destination = SERVICE_MAC;
        }
        if choices.rarely(24) {
            source = NEIGHBOUR_MAC;
        }
        if choices.rarely(24) {
            destination = [0xff; 6];
        }
        let ether_type: u16 = ether_type;
        let mut frame = [
            &destination[..],
            &source,
            &ether_type.to_be_bytes(),
            &packet,
        ]
        .concat();
        spoil(choices, &mut frame);
        Self { direction, frame }
    }
}

impl Recipe {
    /// What the other side might say to an earlier frame: swaps its ends, and chooses what kind of
    /// answer it is.
    pub fn answer(&self, choices: &mut Choices<'_>) -> Self {
        let mut frame = self.frame.clone();
        let (destination, source) = frame.split_at_mut(6);
        destination.swap_with_slice(&mut source[..6]);
        let (addresses, length, protocol_at) = match frame[12..14] {
            [0x08, 0x00] => (26, 4, 23),
            [0x86, 0xdd] => (22, 16, 20),
            _ => (14, 0, 14),
        };
        let payload = addresses + 2 * length;
        if let Some(both) = frame.get_mut(addresses..payload) {
            let (source, destination) = both.split_at_mut(length);
            source.swap_with_slice(destination);
        }
        let protocol = frame[protocol_at];
        match (protocol, frame.get_mut(payload..)) {
            (6, Some(segment)) if segment.len() >= 20 => {
                swap_ports(segment);
                segment[13] = *choices.of(&[0x12, 0x10, 0x18, 0x11, 0x04, 0x02]);
            }
            (17, Some(datagram)) if datagram.len() >= 8 => swap_ports(datagram),
            (1, Some(message)) if !message.is_empty() && message[0] == 8 => message[0] = 0,
            (58, Some(message)) if !message.is_empty() && message[0] == 128 => message[0] = 129,
            _ => {}
        }
        spoil(choices, &mut frame);
        Self {
            direction: match self.direction {
                Direction::FromGuest => Direction::ToGuest,
                Direction::ToGuest => Direction::FromGuest,
            },
            frame,
        }
    }

    /// An ICMP error about an earlier frame.
    pub fn error(&self, choices: &mut Choices<'_>, guest: &InterfacePolicy) -> Option<Self> {
        let answer = self.answer(&mut Choices::new(&[]));
        let frame = &answer.frame;
        let quoted = self.frame.get(14..)?;
        let (ends, kind, protocol) = match frame[12..14] {
            [0x08, 0x00] => {
                let address = |at: usize| -> Option<IpAddr> {
                    Some(<[u8; 4]>::try_from(frame.get(at..at + 4)?).ok()?.into())
                };
                ((address(26)?, address(30)?), 3, 1)
            }
            [0x86, 0xdd] => {
                let address = |at: usize| -> Option<IpAddr> {
                    Some(<[u8; 16]>::try_from(frame.get(at..at + 16)?).ok()?.into())
                };
                ((address(22)?, address(38)?), 2, 58)
            }
            _ => return None,
        };
        let ends = match answer.direction {
            Direction::ToGuest if choices.rarely(2) => (
                peer_address(choices, guest.ipv6.is_some() && protocol == 58),
                ends.1,
            ),
            _ => ends,
        };
        if ends.0.is_ipv4() != ends.1.is_ipv4() {
            return None;
        }
        let mut message = vec![kind, 4, 0, 0, 0, 0, 5, 0];
        message.extend(&quoted[..quoted.len().min(64)]);
        let packet = wrap(choices, ends, protocol, 64, message, true);
        let mut frame = frame[..14].to_vec();
        frame.extend(packet);
        Some(Self {
            direction: answer.direction,
            frame,
        })
    }
}

fn swap_ports(header: &mut [u8]) {
    let (source, destination) = header.split_at_mut(2);
    source.swap_with_slice(&mut destination[..2]);
}

/// Cuts, lengthens or changes a frame now and then.
fn spoil(choices: &mut Choices<'_>, frame: &mut Vec<u8>) {
    match choices.below(16) {
        15 => {
            // The kernel's test run takes no IP frame without the whole first header.
            let least = match frame[12..14] {
                [0x08, 0x00] => 34,
                [0x86, 0xdd] => 54,
                _ => 15,
            };
            frame.truncate(least + usize::from(choices.byte()) % (frame.len() - least + 1));
        }
        14 => {
            let at = 14 + usize::from(choices.byte()) % (frame.len() - 14).max(1);
            if let Some(byte) = frame.get_mut(at) {
                *byte = choices.byte();
            }
        }
        13 => frame.extend([0; 8]),
        12 if choices.rarely(3) => frame.resize(1515 + choices.below(2), 0),
        _ => {}
    }
}
