//! Reads and checks IPv4 and IPv6 headers, and gives both the same form (map `HEADERS`).

use core::hint::black_box;

use aya_ebpf::programs::TcContext;
use keelson_ebpf_common::{Address, DropReason, from_ipv4};
use network_types::eth::EthHdr;
use network_types::ip::Ipv4Hdr;

use crate::frame::{Head, read};
use crate::maps::HEADERS;

/// IP protocol numbers, and IPv6's extension headers among them.
pub mod protocol {
    pub const HOP_BY_HOP: u8 = 0;
    pub const ICMP: u8 = 1;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const ROUTING: u8 = 43;
    pub const FRAGMENT: u8 = 44;
    pub const AUTHENTICATION: u8 = 51;
    pub const ICMPV6: u8 = 58;
    pub const DESTINATION_OPTIONS: u8 = 60;
    pub const MOBILITY: u8 = 135;
    pub const HOST_IDENTITY: u8 = 139;
    pub const SHIM6: u8 = 140;
}

/// Bytes of an IPv6 header.
pub const IPV6_LEN: usize = 40;

/// The most extension headers that a packet may have; RFC 8504 5.3 lets a host set such a limit.
const EXTENSION_HEADERS: usize = 4;

/// An IP packet whose lengths agree with each other and with the frame.
pub struct Ip {
    pub is_ipv6: bool,
    pub source: Address,
    pub destination: Address,
    /// What the payload is, behind any extension headers; unknown in a later fragment.
    pub protocol: u8,
    /// IPv6's hop limit; not read of IPv4.
    pub hop_limit: u8,
    /// Where the payload begins in the frame.
    pub offset: usize,
    /// Its first bytes, zeros behind its end.
    pub first: [u32; 4],
    /// Bytes of the payload in this packet.
    pub length: u32,
    /// Whether this is a part of a larger packet, or says so (RFC 6946).
    pub is_fragment: bool,
    /// More fragments follow.
    pub more_fragments: bool,
    /// Where this fragment belongs in the payload, in bytes.
    pub fragment_offset: u32,
    /// Bytes of this fragment, with any extension headers in it.
    pub fragment_length: u32,
    /// What the fragments of one packet have in common.
    pub identification: [u8; 4],
}

/// Reads the IPv4 header. Options are refused: those that hosts still heed are attacks.
#[inline(always)]
pub fn ipv4(packet: &TcContext, head: &Head) -> Result<&'static Ip, DropReason> {
    keep(parse_ipv4(packet, head)?)
}

/// Reads the IPv6 header and the extension headers behind it.
#[inline(always)]
pub fn ipv6(packet: &TcContext, head: &Head) -> Result<&'static Ip, DropReason> {
    keep(parse_ipv6(packet, head)?)
}

/// Puts what was read where the verifier does not follow it: it would check whatever comes after for each way in which
/// headers may follow one another.
#[inline(always)]
fn keep(ip: Ip) -> Result<&'static Ip, DropReason> {
    let kept = HEADERS.get_ptr_mut(0).ok_or(DropReason::Malformed)?;
    // SAFETY: the map is per CPU and the tc hooks run with preemption off: no one else has it until the packet's last
    // program ends, and a program reads one packet's headers once.
    unsafe {
        *kept = ip;
        Ok(&*black_box(kept))
    }
}

#[inline(always)]
fn parse_ipv4(packet: &TcContext, head: &Head) -> Result<Ip, DropReason> {
    if packet.len() < (EthHdr::LEN + Ipv4Hdr::LEN) as u32 {
        return Err(DropReason::Malformed);
    }
    let [first, second, third, source, destination] = head.network;
    let [version_and_length, _, total_high, total_low] = first.to_ne_bytes();
    let [id_high, id_low, fragment_high, fragment_low] = second.to_ne_bytes();
    let [_, protocol, ..] = third.to_ne_bytes();
    let total_length = u32::from(u16::from_be_bytes([total_high, total_low]));
    if version_and_length >> 4 != 4 || version_and_length & 0x0f < 5 {
        return Err(DropReason::Malformed);
    }
    if version_and_length & 0x0f != 5 {
        return Err(DropReason::IpOptions);
    }
    if total_length < Ipv4Hdr::LEN as u32 || packet.len() < total_length + EthHdr::LEN as u32 {
        return Err(DropReason::Malformed);
    }
    let fragmentation = u16::from_be_bytes([fragment_high, fragment_low]);
    let fragment_offset = u32::from(fragmentation & 0x1fff) * 8;
    // A reassembled datagram must fit the length field: the "ping of death" doesn't.
    if fragment_offset + total_length > 0xffff {
        return Err(DropReason::Malformed);
    }
    let more_fragments = fragmentation & 0x2000 != 0;
    Ok(Ip {
        is_ipv6: false,
        source: from_ipv4(source),
        destination: from_ipv4(destination),
        protocol,
        hop_limit: 0,
        offset: EthHdr::LEN + Ipv4Hdr::LEN,
        first: [head.rest[0], head.rest[1], head.rest[2], head.rest[3]],
        length: total_length - Ipv4Hdr::LEN as u32,
        is_fragment: more_fragments || fragment_offset != 0,
        more_fragments,
        fragment_offset,
        fragment_length: total_length - Ipv4Hdr::LEN as u32,
        identification: [id_high, id_low, 0, 0],
    })
}

#[inline(always)]
fn parse_ipv6(packet: &TcContext, head: &Head) -> Result<Ip, DropReason> {
    let [first, second, a, b, c] = head.network;
    let [d, e, f, g, h] = head.rest;
    let (source, destination) = ([a, b, c, d], [e, f, g, h]);
    let [version, ..] = first.to_ne_bytes();
    let [length_high, length_low, next_header, hop_limit] = second.to_ne_bytes();
    let length = u32::from(u16::from_be_bytes([length_high, length_low]));
    // A jumbogram's length is zero (RFC 2675); no guest's network has such an MTU.
    if version >> 4 != 6 || length == 0 || packet.len() < length + (EthHdr::LEN + IPV6_LEN) as u32 {
        return Err(DropReason::Malformed);
    }
    let mut ip = Ip {
        is_ipv6: true,
        source,
        destination,
        protocol: next_header,
        hop_limit,
        offset: EthHdr::LEN + IPV6_LEN,
        first: [0; 4],
        length,
        is_fragment: false,
        more_fragments: false,
        fragment_offset: 0,
        fragment_length: 0,
        identification: [0; 4],
    };
    let mut hop_by_hop_allowed = true;
    for _ in 0..EXTENSION_HEADERS {
        if !is_extension_header(ip.protocol) {
            break;
        }
        skip_extension_header(packet, &mut ip, hop_by_hop_allowed)?;
        hop_by_hop_allowed = false;
        if ip.fragment_offset != 0 {
            return Ok(ip);
        }
    }
    if is_extension_header(ip.protocol) {
        return Err(DropReason::ExtensionHeaders);
    }
    ip.first = first_bytes(packet, ip.offset);
    Ok(ip)
}

#[inline(always)]
fn is_extension_header(protocol: u8) -> bool {
    matches!(
        protocol,
        protocol::HOP_BY_HOP
            | protocol::ROUTING
            | protocol::FRAGMENT
            | protocol::AUTHENTICATION
            | protocol::DESTINATION_OPTIONS
            | protocol::MOBILITY
            | protocol::HOST_IDENTITY
            | protocol::SHIM6
    )
}

/// Reads one extension header and moves on behind it. Hop-by-hop options come first or not at all
/// (RFC 8200, 4.1), a packet has one fragment header, and source routes are refused, as are headers
/// that only protocols which guests have no use for know.
#[inline(always)]
fn skip_extension_header(
    packet: &TcContext,
    ip: &mut Ip,
    hop_by_hop_allowed: bool,
) -> Result<(), DropReason> {
    let forbidden = match ip.protocol {
        protocol::HOP_BY_HOP => !hop_by_hop_allowed,
        protocol::FRAGMENT => ip.is_fragment,
        protocol::DESTINATION_OPTIONS => false,
        _ => true,
    };
    if forbidden {
        return Err(DropReason::ExtensionHeaders);
    }
    let header: [u8; 8] = read(packet, ip.offset)?;
    let [next_header, length, high, low, identification @ ..] = header;
    let header_length = if ip.protocol == protocol::FRAGMENT {
        let fragmentation = u16::from_be_bytes([high, low]);
        ip.is_fragment = true;
        ip.more_fragments = fragmentation & 1 != 0;
        ip.fragment_offset = u32::from(fragmentation & 0xfff8);
        ip.identification = identification;
        8
    } else {
        (u32::from(length) + 1) * 8
    };
    if ip.length < header_length {
        return Err(DropReason::Malformed);
    }
    if ip.protocol == protocol::FRAGMENT {
        ip.fragment_length = ip.length - header_length;
    }
    ip.protocol = next_header;
    ip.length -= header_length;
    ip.offset += header_length as usize;
    // All but the last fragment are multiples of 8 bytes, and the whole fits (RFC 8200, 4.5).
    if ip.is_fragment
        && (ip.fragment_offset + ip.length > 0xffff
            || (ip.more_fragments && ip.length.trailing_zeros() < 3))
    {
        return Err(DropReason::Malformed);
    }
    Ok(())
}

/// Up to 16 bytes, as many as a header that is whole has.
#[inline(always)]
fn first_bytes(packet: &TcContext, offset: usize) -> [u32; 4] {
    if let Ok(bytes) = packet.load(offset) {
        return bytes;
    }
    match packet.load::<[u32; 2]>(offset) {
        Ok([a, b]) => [a, b, 0, 0],
        Err(_) => [0; 4],
    }
}

/// Whether an IPv6 address is a group's (`ff00::/8`).
#[inline(always)]
pub fn is_multicast(address: Address) -> bool {
    address[0].to_ne_bytes()[0] == 0xff
}

/// Whether an address on the wire as IPv6 is one that only stands for an IPv4 address.
#[inline(always)]
pub fn is_mapped(address: Address) -> bool {
    address[0] == 0 && address[1] == 0 && address[2] == 0xffff_u32.to_be()
}

/// Compares addresses word by word.
#[inline(always)]
pub fn same(one: Address, other: Address) -> bool {
    one[0] == other[0] && one[1] == other[1] && one[2] == other[2] && one[3] == other[3]
}
