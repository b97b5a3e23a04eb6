//! Frames: built into a fixed buffer, and taken apart.

use crate::virtio::net::FRAME_LIMIT;

/// All stations.
pub const BROADCAST: [u8; 6] = [0xff; 6];

const ETHERNET: usize = 14;
const ARP: usize = 28;
const IPV4: usize = 20;
const ICMP: usize = 8;
const TYPE_IPV4: [u8; 2] = [0x08, 0x00];
const TYPE_ARP: [u8; 2] = [0x08, 0x06];
const PROTOCOL_ICMP: u8 = 1;
const UDP: usize = 8;
const PROTOCOL_UDP: u8 = 17;
const TCP: usize = 20;
const PROTOCOL_TCP: u8 = 6;
const TCP_SYN: u8 = 0x02;
const TCP_ACK: u8 = 0x10;

/// The most data that an echo takes with it.
pub const ECHO_DATA_LIMIT: usize = FRAME_LIMIT - ETHERNET - IPV4 - ICMP;

/// Who a frame is from or for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Station {
    /// Its MAC address.
    pub mac: [u8; 6],
    /// Its IPv4 address.
    pub address: [u8; 4],
}

/// The operation of an ARP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Who has this address?
    Request,
    /// I have.
    Reply,
}

/// An ICMP echo.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Echo<'a> {
    /// A reply, not a request.
    pub reply: bool,
    /// Which sender's.
    pub identifier: u16,
    /// Which one.
    pub sequence: u16,
    /// What goes with it.
    pub data: &'a [u8],
}

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content<'a> {
    /// ARP: the operation, its sender, and the address asked for or told.
    Arp {
        /// What is said.
        operation: Operation,
        /// By whom.
        sender: Station,
        /// The target's address.
        target: [u8; 4],
    },
    /// An echo between two stations.
    Echo {
        /// From where.
        sender: Station,
        /// To which address.
        target: [u8; 4],
        /// What.
        echo: Echo<'a>,
    },
    /// TCP that asks for a connection.
    Syn {
        /// From where.
        sender: Station,
        /// To which address.
        target: [u8; 4],
        /// The sender's port and sequence number, and the port asked for.
        syn: Syn,
    },
    /// TCP that grants a connection.
    SynAck {
        /// From where.
        sender: Station,
        /// To which address.
        target: [u8; 4],
        /// What was asked for.
        syn: Syn,
    },
    /// A datagram of UDP that holds a number.
    Datagram {
        /// From where.
        sender: Station,
        /// To which address.
        target: [u8; 4],
        /// Its ports, and the number.
        datagram: Datagram,
    },
    /// Anything else.
    Other,
}

/// A datagram of UDP that holds a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// The port that it comes from.
    pub source_port: u16,
    /// The port that it is for.
    pub port: u16,
    /// The number.
    pub number: u32,
}

/// What a segment that asks for a connection says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Syn {
    /// The port that it comes from.
    pub source_port: u16,
    /// The port that it asks for.
    pub port: u16,
    /// Its sequence number.
    pub sequence: u32,
}

/// A frame under construction.
pub struct Frame {
    bytes: [u8; FRAME_LIMIT],
    length: usize,
}

impl Frame {
    /// An ARP packet. The frame's source is `source`, which a spoofer makes another than the sender's.
    pub fn arp(operation: Operation, source: [u8; 6], sender: Station, target: Station) -> Self {
        let (destination, code) = match operation {
            Operation::Request => (BROADCAST, 1),
            Operation::Reply => (target.mac, 2),
        };
        let mut frame = Self::ethernet(destination, source, TYPE_ARP);
        // Ethernet, IPv4, and the lengths of their addresses.
        frame.push(&[0, 1, 8, 0, 6, 4, 0, code]);
        frame.push(&sender.mac);
        frame.push(&sender.address);
        frame.push(if operation == Operation::Request {
            &[0; 6]
        } else {
            &target.mac
        });
        frame.push(&target.address);
        frame
    }

    /// An ICMP echo; data beyond [`ECHO_DATA_LIMIT`] is left out.
    pub fn echo(sender: Station, target: Station, echo: Echo<'_>) -> Self {
        let data = &echo.data[..echo.data.len().min(ECHO_DATA_LIMIT)];
        let mut frame = Self::ipv4(sender, target, PROTOCOL_ICMP, ICMP + data.len());
        let start = frame.length;
        frame.push(&[if echo.reply { 0 } else { 8 }, 0, 0, 0]);
        frame.push(&echo.identifier.to_be_bytes());
        frame.push(&echo.sequence.to_be_bytes());
        frame.push(data);
        frame.checksum(start, frame.length, start + 2);
        frame
    }

    /// A datagram of UDP, without a checksum (RFC 768).
    pub fn datagram(sender: Station, target: Station, datagram: Datagram) -> Self {
        let length = UDP + size_of::<u32>();
        let mut frame = Self::ipv4(sender, target, PROTOCOL_UDP, length);
        frame.push(&datagram.source_port.to_be_bytes());
        frame.push(&datagram.port.to_be_bytes());
        frame.push(&(length as u16).to_be_bytes());
        frame.push(&[0; 2]);
        frame.push(&datagram.number.to_be_bytes());
        frame
    }

    /// The answer to a segment that asked `sender` for a connection: it may come.
    pub fn syn_ack(sender: Station, target: Station, syn: Syn) -> Self {
        let ports = (syn.port, syn.source_port);
        // Any number will do to begin with.
        let numbers = (syn.sequence.rotate_left(16), syn.sequence.wrapping_add(1));
        Self::segment(sender, target, ports, numbers, TCP_SYN | TCP_ACK)
    }

    /// Asks `target` for a connection.
    pub fn syn(sender: Station, target: Station, syn: Syn) -> Self {
        let ports = (syn.source_port, syn.port);
        Self::segment(sender, target, ports, (syn.sequence, 0), TCP_SYN)
    }

    /// TCP without data: ports and numbers as in the header, its own first.
    fn segment(
        sender: Station,
        target: Station,
        ports: (u16, u16),
        numbers: (u32, u32),
        flags: u8,
    ) -> Self {
        let mut frame = Self::ipv4(sender, target, PROTOCOL_TCP, TCP);
        let start = frame.length;
        frame.push(&ports.0.to_be_bytes());
        frame.push(&ports.1.to_be_bytes());
        frame.push(&numbers.0.to_be_bytes());
        frame.push(&numbers.1.to_be_bytes());
        frame.push(&[(TCP / 4 << 4) as u8, flags, 0xff, 0xff]);
        // The sum is taken over a pseudo header as well (RFC 9293, 3.1), which stands here meanwhile.
        let place = frame.length;
        frame.push(&[0; 4]);
        frame.push(&sender.address);
        frame.push(&target.address);
        frame.push(&[0, PROTOCOL_TCP, 0, TCP as u8]);
        frame.checksum(start, frame.length, place);
        frame.length = start + TCP;
        frame
    }

    /// The frame's bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    fn ethernet(destination: [u8; 6], source: [u8; 6], kind: [u8; 2]) -> Self {
        let mut frame = Self {
            bytes: [0; FRAME_LIMIT],
            length: 0,
        };
        frame.push(&destination);
        frame.push(&source);
        frame.push(&kind);
        frame
    }

    /// A frame up to the payload of an IPv4 packet, which is `length` bytes long.
    fn ipv4(sender: Station, target: Station, protocol: u8, length: usize) -> Self {
        let mut frame = Self::ethernet(target.mac, sender.mac, TYPE_IPV4);
        let [high, low] = ((IPV4 + length) as u16).to_be_bytes();
        frame.push(&[0x45, 0, high, low, 0, 0, 0x40, 0, 64, protocol, 0, 0]);
        frame.push(&sender.address);
        frame.push(&target.address);
        frame.checksum(ETHERNET, ETHERNET + IPV4, ETHERNET + 10);
        frame
    }

    fn push(&mut self, bytes: &[u8]) {
        self.bytes[self.length..self.length + bytes.len()].copy_from_slice(bytes);
        self.length += bytes.len();
    }

    fn checksum(&mut self, start: usize, end: usize, place: usize) {
        let sum = checksum(&self.bytes[start..end]);
        self.bytes[place..place + 2].copy_from_slice(&sum.to_be_bytes());
    }
}

/// What a received frame holds; a malformed or foreign one is [`Content::Other`].
pub fn parse(bytes: &[u8]) -> Content<'_> {
    let Some((header, body)) = bytes.split_at_checked(ETHERNET) else {
        return Content::Other;
    };
    let content = match [header[12], header[13]] {
        TYPE_ARP => parse_arp(body),
        TYPE_IPV4 => parse_ipv4(header, body),
        _ => None,
    };
    content.unwrap_or(Content::Other)
}

fn parse_arp(body: &[u8]) -> Option<Content<'_>> {
    let body = body.get(..ARP)?;
    if body[..6] != [0, 1, 8, 0, 6, 4] {
        return None;
    }
    let operation = match body[7] {
        1 => Operation::Request,
        2 => Operation::Reply,
        _ => return None,
    };
    let sender = Station {
        mac: array(body, 8)?,
        address: array(body, 14)?,
    };
    Some(Content::Arp {
        operation,
        sender,
        target: array(body, 24)?,
    })
}

fn parse_ipv4<'a>(header: &[u8], body: &'a [u8]) -> Option<Content<'a>> {
    let first = *body.first()?;
    let options = usize::from(first & 0xf) * 4;
    let total = usize::from(u16::from_be_bytes(array(body, 2)?));
    // Short frames are padded, so the packet's own length counts.
    let packet = body.get(..total)?;
    let message = packet.get(options..)?;
    if first >> 4 != 4 || options < IPV4 {
        return None;
    }
    let sender = Station {
        mac: array(header, 6)?,
        address: array(packet, 12)?,
    };
    let target = array(packet, 16)?;
    match packet[9] {
        PROTOCOL_ICMP => parse_echo(message).map(|echo| Content::Echo {
            sender,
            target,
            echo,
        }),
        PROTOCOL_UDP => Some(Content::Datagram {
            sender,
            target,
            datagram: Datagram {
                source_port: u16::from_be_bytes(array(message, 0)?),
                port: u16::from_be_bytes(array(message, 2)?),
                number: u32::from_be_bytes(array(message, UDP)?),
            },
        }),
        PROTOCOL_TCP => parse_segment(message, sender, target),
        _ => None,
    }
}

fn parse_echo(message: &[u8]) -> Option<Echo<'_>> {
    let valid = message.len() >= ICMP && matches!(message[0], 0 | 8) && checksum(message) == 0;
    valid.then_some(Echo {
        reply: message.first() == Some(&0),
        identifier: u16::from_be_bytes(array(message, 4)?),
        sequence: u16::from_be_bytes(array(message, 6)?),
        data: message.get(ICMP..)?,
    })
}

/// What asks for a connection or grants one.
fn parse_segment(segment: &[u8], sender: Station, target: [u8; 4]) -> Option<Content<'_>> {
    let flags = *segment.get(13)?;
    let from = u16::from_be_bytes(array(segment, 0)?);
    let to = u16::from_be_bytes(array(segment, 2)?);
    let sequence = u32::from_be_bytes(array(segment, 4)?);
    let acknowledged = u32::from_be_bytes(array(segment, 8)?);
    match flags & (TCP_SYN | TCP_ACK) {
        TCP_SYN => Some(Content::Syn {
            sender,
            target,
            syn: Syn {
                source_port: from,
                port: to,
                sequence,
            },
        }),
        both if both == TCP_SYN | TCP_ACK => Some(Content::SynAck {
            sender,
            target,
            syn: Syn {
                source_port: to,
                port: from,
                sequence: acknowledged.wrapping_sub(1),
            },
        }),
        _ => None,
    }
}

fn array<const COUNT: usize>(bytes: &[u8], offset: usize) -> Option<[u8; COUNT]> {
    bytes.get(offset..offset + COUNT)?.try_into().ok()
}

/// The Internet checksum (RFC 1071); 0 over a packet that holds its right checksum.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0_u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low));
    }
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
