//! Reads and checks the headers up to IPv4 and ARP. Uses no maps.

use aya_ebpf::programs::TcContext;
use keelson_ebpf_common::DropReason;
use network_types::arp::ArpHdr;
use network_types::eth::EthHdr;
use network_types::ip::Ipv4Hdr;

/// EtherTypes as the header has them read as a big-endian number.
pub mod ether_type {
    pub const IPV4: u16 = 0x0800;
    pub const ARP: u16 = 0x0806;
    pub const IPV6: u16 = 0x86dd;
    pub const VLAN: u16 = 0x8100;
    pub const SERVICE_VLAN: u16 = 0x88a8;
    pub const OLD_SERVICE_VLAN: u16 = 0x9100;
}

/// What a frame carries.
pub enum Payload {
    Ipv4,
    Arp,
}

/// Interface whose hook this is.
#[inline(always)]
pub fn ifindex(packet: &TcContext) -> u32 {
    // SAFETY: the kernel gives the program a valid context.
    unsafe { (*packet.skb.skb).ifindex }
}

/// Reads `T` at `offset`; whoever cut it short is told so.
#[inline(always)]
pub fn read<T>(packet: &TcContext, offset: usize) -> Result<T, DropReason> {
    packet.load(offset).map_err(|_| DropReason::Malformed)
}

/// Reads the Ethernet header. A VLAN tag is refused wherever the kernel keeps it: it takes the outer
/// one out of the frame before the ingress hook.
#[inline(always)]
pub fn ethernet(packet: &TcContext) -> Result<EthHdr, DropReason> {
    // SAFETY: the kernel gives the program a valid context.
    if unsafe { (*packet.skb.skb).vlan_present } != 0 {
        return Err(DropReason::Vlan);
    }
    read(packet, 0)
}

/// What the frame carries, if that is anything that has a policy.
#[inline(always)]
pub fn payload(ethernet: &EthHdr) -> Result<Payload, DropReason> {
    match u16::from_be(ethernet.ether_type) {
        ether_type::IPV4 => Ok(Payload::Ipv4),
        ether_type::ARP => Ok(Payload::Arp),
        ether_type::IPV6 => Err(DropReason::Ipv6),
        ether_type::VLAN | ether_type::SERVICE_VLAN | ether_type::OLD_SERVICE_VLAN => {
            Err(DropReason::Vlan)
        }
        _ => Err(DropReason::UnknownProtocol),
    }
}

/// Reads an ARP packet for IPv4 over Ethernet (RFC 826): a request or a reply.
#[inline(always)]
pub fn arp(packet: &TcContext) -> Result<ArpHdr, DropReason> {
    let arp: ArpHdr = read(packet, EthHdr::LEN)?;
    if arp.htype() != 1
        || arp.ptype() != ether_type::IPV4
        || arp.hlen() != 6
        || arp.plen() != 4
        || !matches!(arp.oper(), 1 | 2)
    {
        return Err(DropReason::Malformed);
    }
    Ok(arp)
}

/// An IPv4 header whose lengths agree with each other and with the frame.
pub struct Ipv4 {
    pub header: Ipv4Hdr,
    /// Where the transport header begins in the frame, behind any IP options.
    pub transport_offset: usize,
    /// Bytes of the datagram behind the IP header, in this fragment.
    pub transport_length: u16,
    /// Where this fragment belongs in the datagram, in units of 8 bytes.
    pub fragment_offset: u16,
    /// More fragments follow.
    pub more_fragments: bool,
}

/// Reads the IPv4 header.
#[inline(always)]
pub fn ipv4(packet: &TcContext) -> Result<Ipv4, DropReason> {
    let header: Ipv4Hdr = read(packet, EthHdr::LEN)?;
    let header_length = u16::from(header.vihl & 0x0f) * 4;
    let total_length = header.tot_len();
    if header.vihl >> 4 != 4
        || usize::from(header_length) < Ipv4Hdr::LEN
        || total_length < header_length
        || packet.len() < u32::from(total_length) + 14
    {
        return Err(DropReason::Malformed);
    }
    let transport_length = total_length - header_length;
    let fragmentation = u16::from_be_bytes(header.frags);
    let fragment_offset = fragmentation & 0x1fff;
    // A reassembled datagram must fit the length field: the "ping of death" doesn't.
    if u32::from(fragment_offset) * 8 + u32::from(total_length) > 0xffff {
        return Err(DropReason::Malformed);
    }
    Ok(Ipv4 {
        header,
        transport_offset: EthHdr::LEN + usize::from(header_length),
        transport_length,
        fragment_offset,
        more_fragments: fragmentation & 0x2000 != 0,
    })
}

/// Compares MAC addresses in two steps instead of six.
#[inline(always)]
pub fn same_mac(one: [u8; 6], other: [u8; 6]) -> bool {
    let [a, b, c, d, e, f] = one;
    let [u, v, w, x, y, z] = other;
    u32::from_ne_bytes([a, b, c, d]) == u32::from_ne_bytes([u, v, w, x])
        && u16::from_ne_bytes([e, f]) == u16::from_ne_bytes([y, z])
}
