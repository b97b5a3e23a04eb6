//! Reads and checks the Ethernet header and ARP. Uses no maps.

use aya_ebpf::programs::TcContext;
use keelson_ebpf_common::{DropReason, PolicyEntry};
use network_types::arp::ArpHdr;
use network_types::eth::EthHdr;

/// EtherTypes as the header has them read as a big-endian number.
mod ether_type {
    pub const IPV4: u16 = 0x0800;
    pub const ARP: u16 = 0x0806;
    pub const IPV6: u16 = 0x86dd;
    pub const VLAN: u16 = 0x8100;
    pub const SERVICE_VLAN: u16 = 0x88a8;
    pub const OLD_SERVICE_VLAN: u16 = 0x9100;
}

/// What a frame carries.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Payload {
    Ipv4,
    Ipv6,
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
        ether_type::IPV6 => Ok(Payload::Ipv6),
        ether_type::ARP => Ok(Payload::Arp),
        ether_type::VLAN | ether_type::SERVICE_VLAN | ether_type::OLD_SERVICE_VLAN => {
            Err(DropReason::Vlan)
        }
        _ => Err(DropReason::UnknownProtocol),
    }
}

/// Refuses what is larger than the MTU, unless the kernel will cut it into segments that aren't.
#[inline(always)]
pub fn check_size(packet: &TcContext, policy: &PolicyEntry) -> Result<(), DropReason> {
    if packet.len() <= u32::from(policy.mtu) + EthHdr::LEN as u32 {
        return Ok(());
    }
    // SAFETY: the kernel gives the program a valid context.
    match unsafe { (*packet.skb.skb).gso_size } {
        0 => Err(DropReason::Oversized),
        _ => Ok(()),
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

/// Compares MAC addresses in two steps instead of six.
#[inline(always)]
pub fn same_mac(one: [u8; 6], other: [u8; 6]) -> bool {
    let [a, b, c, d, e, f] = one;
    let [u, v, w, x, y, z] = other;
    u32::from_ne_bytes([a, b, c, d]) == u32::from_ne_bytes([u, v, w, x])
        && u16::from_ne_bytes([e, f]) == u16::from_ne_bytes([y, z])
}
