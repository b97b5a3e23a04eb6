//! Reads and checks the Ethernet header and ARP. Uses no maps.

use core::mem::MaybeUninit;

use aya_ebpf::helpers::generated::bpf_skb_load_bytes;
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

/// The beginning of a frame, read at once: a call of a helper costs more than the bytes that it
/// copies. As far as the frame is shorter, zeros.
#[repr(C)]
pub struct Head {
    /// So that the IP header is aligned.
    padding: MaybeUninit<u16>,
    pub destination: [u16; 3],
    pub source: [u16; 3],
    ether_type: u16,
    /// An IPv4 header without options, or half of an IPv6 header.
    pub network: [u32; 5],
    /// What follows it.
    pub rest: [u32; 5],
}

/// Bytes that a head has: all, or up to the header of UDP and ICMP over IPv4, of IPv4, of Ethernet.
const HEAD_LENGTHS: [usize; 4] = [54, 42, 34, EthHdr::LEN];

/// Reads the beginning of a frame. A VLAN tag is refused wherever the kernel keeps it: it takes the
/// outer one out of the frame before the ingress hook.
#[inline(always)]
pub fn head(packet: &TcContext) -> Result<Head, DropReason> {
    // SAFETY: the kernel gives the program a valid context.
    if unsafe { (*packet.skb.skb).vlan_present } != 0 {
        return Err(DropReason::Vlan);
    }
    let head = head_or_zeros(packet);
    if packet.len() < EthHdr::LEN as u32 {
        return Err(DropReason::Malformed);
    }
    Ok(head)
}

/// Reads the beginning of a frame, whatever it is.
#[inline(always)]
pub fn head_or_zeros(packet: &TcContext) -> Head {
    // Not zeroed here: the compiler makes a loop over bytes of that, which costs more than all the rest.
    let mut head = MaybeUninit::uninit();
    let [whole, udp, ipv4, ethernet] = HEAD_LENGTHS;
    let _ = load_head(packet, &mut head, whole)
        || load_head(packet, &mut head, udp)
        || load_head(packet, &mut head, ipv4)
        || load_head(packet, &mut head, ethernet);
    // SAFETY: the first call wrote everything but the padding: the frame, or zeros where it failed.
    unsafe { head.assume_init() }
}

/// The EtherType as a number.
#[inline(always)]
pub fn ether_type(head: &Head) -> u16 {
    u16::from_be(head.ether_type)
}

/// Whether the frame says that it carries IPv4.
#[inline(always)]
pub fn is_ipv4(head: &Head) -> bool {
    ether_type(head) == ether_type::IPV4
}

/// Whether the frame says that it carries IPv6.
#[inline(always)]
pub fn is_ipv6(head: &Head) -> bool {
    ether_type(head) == ether_type::IPV6
}

#[inline(always)]
fn load_head(packet: &TcContext, head: &mut MaybeUninit<Head>, length: usize) -> bool {
    // SAFETY: a place in the head, which is not read.
    let to = unsafe { &raw mut (*head.as_mut_ptr()).destination }.cast();
    // SAFETY: behind the padding the head has 54 bytes of integers, and `length` is no more.
    unsafe { bpf_skb_load_bytes(packet.skb.skb.cast(), 0, to, length as u32) == 0 }
}

/// What the frame carries, if that is anything that has a policy.
#[inline(always)]
pub fn payload(head: &Head) -> Result<Payload, DropReason> {
    match u16::from_be(head.ether_type) {
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

/// A MAC address in words, as a head has it.
#[inline(always)]
pub fn words([a, b, c, d, e, f]: [u8; 6]) -> [u16; 3] {
    [
        u16::from_ne_bytes([a, b]),
        u16::from_ne_bytes([c, d]),
        u16::from_ne_bytes([e, f]),
    ]
}

/// A MAC address as maps have it.
#[inline(always)]
pub fn bytes([a, b, c]: [u16; 3]) -> [u8; 6] {
    let ([a, b], [c, d], [e, f]) = (a.to_ne_bytes(), b.to_ne_bytes(), c.to_ne_bytes());
    [a, b, c, d, e, f]
}

/// Compares MAC addresses word by word.
#[inline(always)]
pub fn same_mac(one: [u16; 3], other: [u8; 6]) -> bool {
    let other = words(other);
    one[0] == other[0] && one[1] == other[1] && one[2] == other[2]
}
