//! Builds frames byte by byte, right or wrong as a test needs them.

use std::net::Ipv4Addr;

use keelson_ebpf::MacAddress;

pub const IPV4: u16 = 0x0800;
pub const ARP: u16 = 0x0806;
pub const ICMP: u8 = 1;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const BROADCAST: MacAddress = MacAddress([0xff; 6]);

pub const FIN: u8 = 0x01;
pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const ACK: u8 = 0x10;

/// Who sends to whom.
#[derive(Clone, Copy, Debug)]
pub struct Ends {
    pub source_mac: MacAddress,
    pub destination_mac: MacAddress,
    pub source: Ipv4Addr,
    pub destination: Ipv4Addr,
}

pub fn ethernet(
    destination: MacAddress,
    source: MacAddress,
    ether_type: u16,
    payload: &[u8],
) -> Vec<u8> {
    let ether_type = ether_type.to_be_bytes();
    [&destination.0[..], &source.0, &ether_type, payload].concat()
}

pub fn arp(
    operation: u16,
    sender: (MacAddress, Ipv4Addr),
    target: (MacAddress, Ipv4Addr),
) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4];
    packet.extend(operation.to_be_bytes());
    packet.extend(sender.0.0);
    packet.extend(sender.1.octets());
    packet.extend(target.0.0);
    packet.extend(target.1.octets());
    packet
}

/// The fields of an IPv4 header that tests vary.
#[derive(Clone, Debug)]
pub struct Ip {
    pub identification: u16,
    /// Offset in units of 8 bytes, with 0x2000 for "more fragments".
    pub fragment: u16,
    pub options: Vec<u8>,
}

impl Default for Ip {
    fn default() -> Self {
        Self {
            identification: 1,
            fragment: 0,
            options: Vec::new(),
        }
    }
}

pub fn ipv4_header(
    fields: &Ip,
    protocol: u8,
    source: Ipv4Addr,
    destination: Ipv4Addr,
    payload_length: usize,
) -> Vec<u8> {
    let header_length = 20 + fields.options.len();
    let words = u8::try_from(header_length / 4).expect("short");
    let total = u16::try_from(header_length + payload_length).expect("fits");
    let mut header = vec![0x40 | words, 0];
    header.extend(total.to_be_bytes());
    header.extend(fields.identification.to_be_bytes());
    header.extend(fields.fragment.to_be_bytes());
    header.extend([64, protocol, 0, 0]);
    header.extend(source.octets());
    header.extend(destination.octets());
    header.extend(&fields.options);
    let sum = checksum(&[&header]);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    header
}

pub fn ipv4(ends: Ends, fields: &Ip, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = ipv4_header(
        fields,
        protocol,
        ends.source,
        ends.destination,
        payload.len(),
    );
    packet.extend(payload);
    ethernet(ends.destination_mac, ends.source_mac, IPV4, &packet)
}

/// A UDP datagram with no checksum, which IPv4 allows.
pub fn udp_datagram(source_port: u16, destination_port: u16, data: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + data.len()).expect("fits");
    let mut datagram = Vec::new();
    for field in [source_port, destination_port, length, 0] {
        datagram.extend(field.to_be_bytes());
    }
    datagram.extend(data);
    datagram
}

pub fn udp(ends: Ends, source_port: u16, destination_port: u16, data: &[u8]) -> Vec<u8> {
    let datagram = udp_datagram(source_port, destination_port, data);
    ipv4(ends, &Ip::default(), UDP, &datagram)
}

/// A TCP segment without data or options.
#[derive(Clone, Copy, Debug)]
pub struct Tcp {
    pub source_port: u16,
    pub destination_port: u16,
    pub sequence: u32,
    pub acknowledgement: u32,
    pub flags: u8,
}

pub fn tcp_segment(ends: Ends, tcp: Tcp) -> Vec<u8> {
    let mut segment = Vec::new();
    segment.extend(tcp.source_port.to_be_bytes());
    segment.extend(tcp.destination_port.to_be_bytes());
    segment.extend(tcp.sequence.to_be_bytes());
    segment.extend(tcp.acknowledgement.to_be_bytes());
    segment.extend([0x50, tcp.flags, 0xff, 0xff, 0, 0, 0, 0]);
    let pseudo = [
        &ends.source.octets()[..],
        &ends.destination.octets(),
        &[0, TCP, 0, 20],
    ]
    .concat();
    let sum = checksum(&[&pseudo, &segment]);
    segment[16..18].copy_from_slice(&sum.to_be_bytes());
    segment
}

pub fn tcp(ends: Ends, tcp: Tcp) -> Vec<u8> {
    ipv4(ends, &Ip::default(), TCP, &tcp_segment(ends, tcp))
}

/// An ICMP message with `rest` behind type, code and checksum.
pub fn icmp_message(icmp_type: u8, code: u8, rest: &[u8]) -> Vec<u8> {
    let mut message = vec![icmp_type, code, 0, 0];
    message.extend(rest);
    let sum = checksum(&[&message]);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}

pub fn icmp(ends: Ends, icmp_type: u8, code: u8, rest: &[u8]) -> Vec<u8> {
    ipv4(
        ends,
        &Ip::default(),
        ICMP,
        &icmp_message(icmp_type, code, rest),
    )
}

/// The internet checksum (RFC 1071) of parts that each have an even length but for the last.
pub fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum: u32 = 0;
    for part in parts {
        for pair in part.chunks(2) {
            let low = pair.get(1).copied().unwrap_or(0);
            sum += u32::from(u16::from_be_bytes([pair[0], low]));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("folded")
}

/// What matters of a received frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub protocol: u8,
    pub source_port: u16,
    pub destination_port: u16,
    /// The flags of TCP, else zero.
    pub flags: u8,
    pub data: Vec<u8>,
}

/// Reads a received IPv4 frame without options.
pub fn seen(frame: &[u8]) -> Seen {
    assert_eq!(
        frame[12..14],
        IPV4.to_be_bytes(),
        "an IPv4 frame: {frame:02x?}"
    );
    let transport = &frame[34..];
    let number = |at: usize| u16::from_be_bytes([transport[at], transport[at + 1]]);
    let protocol = frame[23];
    Seen {
        protocol,
        source_port: number(0),
        destination_port: number(2),
        flags: if protocol == TCP { transport[13] } else { 0 },
        data: transport[8..].to_vec(),
    }
}
