//! Reads and checks the headers behind IPv4. Uses no maps.

use aya_ebpf::programs::TcContext;
use keelson_ebpf_common::DropReason;
use network_types::icmp::Icmpv4Hdr;
use network_types::ip::Ipv4Hdr;
use network_types::tcp::TcpHdr;
use network_types::udp::UdpHdr;

use crate::frame::{Ipv4, read};

/// IP protocol numbers.
pub mod protocol {
    pub const ICMP: u8 = 1;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
}

/// ICMP types (RFC 792).
pub mod icmp_type {
    pub const ECHO_REPLY: u8 = 0;
    pub const DESTINATION_UNREACHABLE: u8 = 3;
    pub const ECHO_REQUEST: u8 = 8;
    pub const TIME_EXCEEDED: u8 = 11;
    pub const PARAMETER_PROBLEM: u8 = 12;
}

const TCP_FIN: u8 = 0x01;
const TCP_SYN: u8 = 0x02;
const TCP_RST: u8 = 0x04;
const TCP_ACK: u8 = 0x10;

/// What the policy needs of a transport header.
pub struct Transport {
    pub protocol: u8,
    /// Zero for protocols without ports; for an ICMP echo both ports are its identifier.
    pub source_port: u16,
    pub destination_port: u16,
    /// The flags of TCP, the type of ICMP, else zero.
    detail: u8,
}

impl Transport {
    /// TCP that asks for a new connection.
    #[inline(always)]
    pub fn opens(&self) -> bool {
        self.protocol == protocol::TCP && self.detail & (TCP_SYN | TCP_ACK | TCP_RST) == TCP_SYN
    }

    /// TCP that ends a connection, or one half of it.
    #[inline(always)]
    pub fn closes(&self) -> bool {
        self.protocol == protocol::TCP && self.detail & (TCP_FIN | TCP_RST) != 0
    }

    /// ICMP of this type.
    #[inline(always)]
    pub fn is_icmp(&self, icmp_type: u8) -> bool {
        self.protocol == protocol::ICMP && self.detail == icmp_type
    }

    /// ICMP that reports what became of an earlier packet, which it quotes.
    #[inline(always)]
    pub fn is_icmp_error(&self) -> bool {
        self.is_icmp(icmp_type::DESTINATION_UNREACHABLE)
            || self.is_icmp(icmp_type::TIME_EXCEEDED)
            || self.is_icmp(icmp_type::PARAMETER_PROBLEM)
    }
}

/// Reads the transport header of a whole datagram or of a first fragment, which must hold all of
/// that header (RFC 1858).
#[inline(always)]
pub fn transport(packet: &TcContext, ip: &Ipv4) -> Result<Transport, DropReason> {
    match ip.header.proto {
        protocol::TCP => tcp(packet, ip),
        protocol::UDP => udp(packet, ip),
        protocol::ICMP => icmp(packet, ip),
        other => Ok(Transport {
            protocol: other,
            source_port: 0,
            destination_port: 0,
            detail: 0,
        }),
    }
}

#[inline(always)]
fn tcp(packet: &TcContext, ip: &Ipv4) -> Result<Transport, DropReason> {
    // Up to and with the flags, for which the header type has only single bits.
    let bytes: [u8; 14] = read(packet, ip.transport_offset)?;
    let header_length = u16::from(bytes[12] >> 4) * 4;
    if usize::from(header_length) < TcpHdr::LEN || ip.transport_length < header_length {
        return Err(DropReason::Malformed);
    }
    Ok(Transport {
        protocol: protocol::TCP,
        source_port: u16::from_be_bytes([bytes[0], bytes[1]]),
        destination_port: u16::from_be_bytes([bytes[2], bytes[3]]),
        detail: bytes[13],
    })
}

#[inline(always)]
fn udp(packet: &TcContext, ip: &Ipv4) -> Result<Transport, DropReason> {
    let header: UdpHdr = read(packet, ip.transport_offset)?;
    let whole = !ip.more_fragments;
    if usize::from(ip.transport_length) < UdpHdr::LEN
        || usize::from(header.len()) < UdpHdr::LEN
        || (whole && header.len() > ip.transport_length)
    {
        return Err(DropReason::Malformed);
    }
    Ok(Transport {
        protocol: protocol::UDP,
        source_port: header.src_port(),
        destination_port: header.dst_port(),
        detail: 0,
    })
}

#[inline(always)]
fn icmp(packet: &TcContext, ip: &Ipv4) -> Result<Transport, DropReason> {
    let header: Icmpv4Hdr = read(packet, ip.transport_offset)?;
    if usize::from(ip.transport_length) < Icmpv4Hdr::LEN {
        return Err(DropReason::Malformed);
    }
    let identifier = match header.type_ {
        icmp_type::ECHO_REQUEST | icmp_type::ECHO_REPLY => {
            u16::from_be_bytes([header.data[0], header.data[1]])
        }
        _ => 0,
    };
    Ok(Transport {
        protocol: protocol::ICMP,
        source_port: identifier,
        destination_port: identifier,
        detail: header.type_,
    })
}

/// The packet that an ICMP error quotes: its IP header and 8 bytes (RFC 792).
pub struct Quoted {
    pub source: [u8; 4],
    pub destination: [u8; 4],
    pub protocol: u8,
    pub source_port: u16,
    pub destination_port: u16,
}

/// Reads what an ICMP error quotes, as far as it can belong to a flow: `None` for a later fragment
/// or an ICMP message that is no echo request.
#[inline(always)]
pub fn quoted(packet: &TcContext, ip: &Ipv4) -> Result<Option<Quoted>, DropReason> {
    let offset = ip.transport_offset + Icmpv4Hdr::LEN;
    let header: Ipv4Hdr = read(packet, offset)?;
    let header_length = usize::from(header.vihl & 0x0f) * 4;
    let needed = Icmpv4Hdr::LEN + header_length + 8;
    if header.vihl >> 4 != 4
        || header_length < Ipv4Hdr::LEN
        || usize::from(ip.transport_length) < needed
    {
        return Err(DropReason::Malformed);
    }
    let bytes: [u8; 8] = read(packet, offset + header_length)?;
    let later_fragment = u16::from_be_bytes(header.frags) & 0x1fff != 0;
    let (source_port, destination_port) = match header.proto {
        protocol::TCP | protocol::UDP => (
            u16::from_be_bytes([bytes[0], bytes[1]]),
            u16::from_be_bytes([bytes[2], bytes[3]]),
        ),
        protocol::ICMP if bytes[0] == icmp_type::ECHO_REQUEST => {
            let identifier = u16::from_be_bytes([bytes[4], bytes[5]]);
            (identifier, identifier)
        }
        protocol::ICMP => return Ok(None),
        _ => (0, 0),
    };
    if later_fragment {
        return Ok(None);
    }
    Ok(Some(Quoted {
        source: header.src_addr,
        destination: header.dst_addr,
        protocol: header.proto,
        source_port,
        destination_port,
    }))
}
