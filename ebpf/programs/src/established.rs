//! The short way of most packets: TCP and UDP, of a flow in which both sides have sent, under the very
//! policy that let it be. What passes here passes in `from_guest` and `to_guest` as well; whatever this is not sure
//! of, the rarest first, it leaves to them. It reads the headers where they are, each field once.
//!
//! Maps: `FLOWS`; those of `stations` and `tunnel`.

use core::arch::asm;

use aya_ebpf::programs::TcContext;
use keelson_ebpf_common::{
    Address, Direction, FlowKey, NO_ADDRESS, PolicyEntry, SERVICE_MAC, flag, from_ipv4, local,
    phase, timeout,
};
use network_types::eth::EthHdr;
use network_types::ip::Ipv4Hdr;
use network_types::tcp::TcpHdr;
use network_types::udp::UdpHdr;

use crate::flows::REFRESH_NS;
use crate::ip::{self, IPV6_LEN, protocol};
use crate::maps::FLOWS;
use crate::{Passed, clock, frame, stations, transport, tunnel};

/// Where fields are in an Ethernet frame.
mod at {
    pub const DESTINATION_MAC: usize = 0;
    pub const SOURCE_MAC: usize = 6;
    pub const ETHER_TYPE_AND_VERSION: usize = 12;
    /// With an IPv4 header that has no options.
    pub mod ipv4 {
        pub const LENGTH_AND_IDENTIFICATION: usize = 16;
        pub const FRAGMENTATION_AND_PROTOCOL: usize = 20;
        pub const SOURCE: usize = 26;
        pub const DESTINATION: usize = 30;
        pub const TRANSPORT: [usize; 3] = [34, 38, 46];
    }
    /// With an IPv6 header that no extension follows.
    pub mod ipv6 {
        pub const LENGTH_AND_NEXT_HEADER: usize = 18;
        pub const SOURCE: [usize; 4] = [22, 26, 30, 34];
        pub const DESTINATION: [usize; 4] = [38, 42, 46, 50];
        pub const TRANSPORT: [usize; 3] = [54, 58, 66];
    }
}

/// Bytes that a packet must have in one piece; of datagrams, that leaves out those of less than 12 bytes.
const IPV4_HEADERS: usize = EthHdr::LEN + Ipv4Hdr::LEN + TcpHdr::LEN;
const IPV6_HEADERS: usize = EthHdr::LEN + IPV6_LEN + TcpHdr::LEN;
/// The EtherType, the version and, of IPv4, five words of header; what is masked is the class of the traffic.
const IPV4: u32 = u32::from_be_bytes([0x08, 0x00, 0x45, 0]);
const IPV4_MASK: u32 = 0xffff_ff00;
const IPV6: u32 = u32::from_be_bytes([0x86, 0xdd, 0x60, 0]);
const IPV6_MASK: u32 = 0xffff_f000;
/// More fragments, and where a fragment belongs.
const FRAGMENT_BITS: u32 = 0x3fff_0000;
/// Ports of DHCP and DHCPv6, from client to server and back.
const DHCP: [u32; 4] = [
    68 << 16 | 67,
    67 << 16 | 68,
    546 << 16 | 547,
    547 << 16 | 546,
];

/// Where a packet goes that passes this way; `None` if it isn't known here whether it does.
#[inline(always)]
pub fn pass(packet: &TcContext, policy: &PolicyEntry, direction: Direction) -> Option<Passed> {
    let limited = match direction {
        Direction::FromGuest => flag::LIMITED_FROM_GUEST,
        Direction::ToGuest => flag::LIMITED_TO_GUEST,
    };
    if policy.flags & (flag::CAPTURED | flag::ISOLATED | limited) != 0 {
        return None;
    }
    // SAFETY: the kernel gives the program a valid context.
    if unsafe { (*packet.skb.skb).vlan_present } != 0 {
        return None;
    }
    let headers = Headers::of(packet)?;
    let own_mac = match direction {
        Direction::FromGuest => headers.mac::<{ at::SOURCE_MAC }>(),
        Direction::ToGuest => headers.mac::<{ at::DESTINATION_MAC }>(),
    };
    if !frame::same_mac(own_mac, policy.mac) {
        return None;
    }
    if direction == Direction::FromGuest {
        frame::check_size(packet, policy).ok()?;
    }
    let version = headers.number::<{ at::ETHER_TYPE_AND_VERSION }>();
    let (peer, local, segment) = if version & IPV4_MASK == IPV4 {
        ipv4(packet, policy, headers, direction)?
    } else if version & IPV6_MASK == IPV6 {
        ipv6(packet, policy, headers, direction)?
    } else {
        return None;
    };
    let limit = segment.limit()?;
    let (source_port, destination_port) = ((segment.ports >> 16) as u16, segment.ports as u16);
    let (guest_port, peer_port) = match direction {
        Direction::FromGuest => (source_port, destination_port),
        Direction::ToGuest => (destination_port, source_port),
    };
    let key = FlowKey {
        peer,
        guest_port,
        peer_port,
        protocol: segment.protocol,
        local,
        reserved: [0; 2],
    };
    is_established(policy, &key, limit).then_some(())?;
    match direction {
        Direction::ToGuest => Some(Passed::On),
        Direction::FromGuest => send(headers, policy, segment.protocol, destination_port),
    }
}

/// The other side, which of its addresses the guest has here, and the segment, of a whole packet to or from the
/// guest's IPv4 address.
#[inline(always)]
fn ipv4(
    packet: &TcContext,
    policy: &PolicyEntry,
    headers: Headers,
    direction: Direction,
) -> Option<(Address, u8, Segment)> {
    let source = headers.word::<{ at::ipv4::SOURCE }>();
    let destination = headers.word::<{ at::ipv4::DESTINATION }>();
    let (own, peer) = match direction {
        Direction::FromGuest => (source, destination),
        Direction::ToGuest => (destination, source),
    };
    let fragmentation = headers.number::<{ at::ipv4::FRAGMENTATION_AND_PROTOCOL }>();
    let total = headers.number::<{ at::ipv4::LENGTH_AND_IDENTIFICATION }>() >> 16;
    if policy.ipv4 == 0
        || own != policy.ipv4
        || peer == own
        || fragmentation & FRAGMENT_BITS != 0
        || packet.len() < total + EthHdr::LEN as u32
    {
        return None;
    }
    let segment = Segment {
        protocol: fragmentation as u8,
        length: total.checked_sub(Ipv4Hdr::LEN as u32)?,
        ports: headers.number::<{ at::ipv4::TRANSPORT[0] }>(),
        second: headers.number::<{ at::ipv4::TRANSPORT[1] }>(),
        fourth: headers.number::<{ at::ipv4::TRANSPORT[2] }>(),
    };
    Some((from_ipv4(peer), local::IPV4, segment))
}

/// As [`ipv4`], of the guest's IPv6 address, not its link-local one.
#[inline(always)]
fn ipv6(
    packet: &TcContext,
    policy: &PolicyEntry,
    headers: Headers,
    direction: Direction,
) -> Option<(Address, u8, Segment)> {
    if headers.first + IPV6_HEADERS > packet.data_end() {
        return None;
    }
    let source = [
        headers.word::<{ at::ipv6::SOURCE[0] }>(),
        headers.word::<{ at::ipv6::SOURCE[1] }>(),
        headers.word::<{ at::ipv6::SOURCE[2] }>(),
        headers.word::<{ at::ipv6::SOURCE[3] }>(),
    ];
    let destination = [
        headers.word::<{ at::ipv6::DESTINATION[0] }>(),
        headers.word::<{ at::ipv6::DESTINATION[1] }>(),
        headers.word::<{ at::ipv6::DESTINATION[2] }>(),
        headers.word::<{ at::ipv6::DESTINATION[3] }>(),
    ];
    let (own, peer) = match direction {
        Direction::FromGuest => (source, destination),
        Direction::ToGuest => (destination, source),
    };
    let length_and_next = headers.number::<{ at::ipv6::LENGTH_AND_NEXT_HEADER }>();
    let length = length_and_next >> 16;
    // No address of the guest's, none that isn't on the wire (`::/64`, mapped ones among them).
    if ip::same(policy.ipv6, NO_ADDRESS)
        || !ip::same(own, policy.ipv6)
        || ip::same(peer, own)
        || peer[0] | peer[1] == 0
        || packet.len() < length + (EthHdr::LEN + IPV6_LEN) as u32
    {
        return None;
    }
    let segment = Segment {
        protocol: (length_and_next >> 8) as u8,
        length,
        ports: headers.number::<{ at::ipv6::TRANSPORT[0] }>(),
        second: headers.number::<{ at::ipv6::TRANSPORT[1] }>(),
        fourth: headers.number::<{ at::ipv6::TRANSPORT[2] }>(),
    };
    Some((peer, local::IPV6, segment))
}

/// What a whole IP packet carries.
struct Segment {
    protocol: u8,
    /// In bytes.
    length: u32,
    /// Its first word: source and destination port.
    ports: u32,
    /// The word with UDP's length.
    second: u32,
    /// The word with TCP's offset and flags.
    fourth: u32,
}

impl Segment {
    /// After how long without a packet its flow is forgotten, if it is a datagram or a segment that neither opens nor
    /// ends a connection, whose lengths agree.
    #[inline(always)]
    fn limit(&self) -> Option<u64> {
        if DHCP.contains(&self.ports) {
            return None;
        }
        match self.protocol {
            protocol::TCP => {
                let header = self.fourth >> 28 << 2;
                let flags = (self.fourth >> 16) as u8;
                (header >= TcpHdr::LEN as u32 && self.length >= header && transport::goes_on(flags))
                    .then_some(timeout::TCP_ESTABLISHED)
            }
            protocol::UDP => {
                let datagram = self.second >> 16;
                (datagram >= UdpHdr::LEN as u32 && datagram <= self.length)
                    .then_some(timeout::DATAGRAM)
            }
            _ => None,
        }
    }
}

/// Whether the packet is of a flow in which both sides have sent, that nothing is translated in. Notes that it
/// was seen.
#[inline(always)]
fn is_established(policy: &PolicyEntry, key: &FlowKey, limit: u64) -> bool {
    let Some(flow) = FLOWS
        .get(policy.slot)
        .and_then(|flows| flows.get_ptr_mut(key))
    else {
        return false;
    };
    // SAFETY: see `flows::judge`.
    let flow = unsafe { &mut *flow };
    let now = clock::now();
    let holds = flow.phase == phase::ESTABLISHED
        && flow.translated == 0
        && flow.generation >= policy.generation
        && now < flow.last_seen_ns.wrapping_add(limit);
    if holds && now > flow.last_seen_ns.wrapping_add(REFRESH_NS) {
        flow.last_seen_ns = now;
    }
    holds
}

/// Where a packet from the guest goes: to a guest of the network on this host, or on through the host.
#[inline(always)]
fn send(headers: Headers, policy: &PolicyEntry, ip_protocol: u8, port: u16) -> Option<Passed> {
    let mac = headers.mac::<{ at::DESTINATION_MAC }>();
    if frame::same_mac(mac, SERVICE_MAC) {
        return None;
    }
    if let Some(ifindex) = stations::find_near(policy.network, mac) {
        return Some(Passed::To(ifindex));
    }
    if policy.flags & flag::SPANS_HOSTS != 0
        || ip_protocol == protocol::UDP && tunnel::is_port(port)
    {
        return None;
    }
    Some(Passed::On)
}

/// The beginning of a frame, as far as it is in the packet's first piece.
#[derive(Clone, Copy)]
struct Headers {
    first: usize,
}

impl Headers {
    #[inline(always)]
    fn of(packet: &TcContext) -> Option<Self> {
        let first = packet.data();
        (first + IPV4_HEADERS <= packet.data_end()).then_some(Self { first })
    }

    /// Four bytes as they lie there, at any alignment. The compiler would read them one by one, since the BPF
    /// virtual machine promises no other way; the kernels of all processors that Keelson is for have one.
    #[inline(always)]
    fn word<const OFFSET: usize>(self) -> u32 {
        let value: u64;
        // SAFETY: `of` has seen that the packet has these bytes; the verifier checks it once more.
        unsafe {
            asm!(
                "{value} = *(u32 *)({first} + {offset})",
                value = out(reg) value,
                first = in(reg) self.first,
                offset = const OFFSET,
                options(pure, readonly, nostack),
            );
        }
        value as u32
    }

    /// Four bytes as a number.
    #[inline(always)]
    fn number<const OFFSET: usize>(self) -> u32 {
        u32::from_be(self.word::<OFFSET>())
    }

    /// A MAC address in words.
    #[inline(always)]
    fn mac<const OFFSET: usize>(self) -> [u16; 3] {
        let place = (self.first + OFFSET) as *const [u16; 3];
        // SAFETY: as of words; frames begin at even addresses.
        unsafe { place.read() }
    }
}
