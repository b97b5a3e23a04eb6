//! The other guests of a network: what is for them is sent straight to them or to their host, and
//! questions for their Ethernet addresses are answered in place (maps `STATIONS`, `NEAR_STATIONS`, `NEIGHBOURS` of guests
//! of this host, `REMOTE_STATIONS`, `REMOTE_NEIGHBOURS` of others).

use aya_ebpf::programs::TcContext;
use keelson_ebpf_common::{
    Address, DropReason, NO_ADDRESS, NearStation, NeighbourKey, PolicyEntry, RemoteStation,
    SERVICE_MAC, StationKey, flag, from_ipv4, stage,
};
use network_types::arp::ArpHdr;
use network_types::eth::EthHdr;

use crate::frame::Head;
use crate::ip::{self, IPV6_LEN, Ip, protocol};
use crate::maps::{NEAR_STATIONS, NEIGHBOURS, REMOTE_NEIGHBOURS, REMOTE_STATIONS, STATIONS};
use crate::transport::icmpv6_type;
use crate::{Passed, frame, services};

/// Bytes of a solicitation or advertisement with the one option that both have room for.
const NEIGHBOUR_MESSAGE_LEN: usize = 32;
/// Solicited, and to be taken over what was known before (RFC 4861, 4.4).
const SOLICITED_OVERRIDE: u8 = 0x60;
/// The option that tells a target's Ethernet address, with its length in units of 8 bytes.
const TARGET_LINK_LAYER: [u8; 2] = [2, 1];

/// The interface of the guest with this MAC address in the same network on this host; refused where guests
/// are kept apart, on whatever hosts they are.
#[inline(always)]
pub fn find(policy: &PolicyEntry, mac: [u16; 3]) -> Result<Option<u32>, DropReason> {
    let station = find_in(policy.network, mac);
    if policy.flags & flag::ISOLATED != 0
        && (station.is_some() || find_remote(policy.network, mac).is_some())
    {
        return Err(DropReason::Isolated);
    }
    Ok(station)
}

/// Sends a packet that may leave a guest where its destination is.
#[inline(always)]
pub fn send(
    packet: &TcContext,
    policy: &PolicyEntry,
    station: Option<u32>,
) -> Result<Passed, DropReason> {
    match station {
        Some(ifindex) => Ok(Passed::To(ifindex)),
        // Another program looks for it on other hosts: the verifier goes through this end often.
        None if policy.flags & flag::SPANS_HOSTS != 0 => {
            Err(services::go_on(packet, stage::TO_PEER))
        }
        None => Ok(Passed::On),
    }
}

/// The guest of another host with this MAC address in a network by its number.
#[inline(always)]
pub fn find_remote(network: u32, mac: [u16; 3]) -> Option<&'static RemoteStation> {
    let key = StationKey {
        network,
        mac: frame::bytes(mac),
        reserved: [0; 2],
    };
    // SAFETY: an entry that is replaced meanwhile may be read half, and then names another host or network:
    // that host has no such guest, or not in that network, and drops the packet.
    unsafe { REMOTE_STATIONS.get(key) }
}

/// The interface of the guest with this MAC address on this host, in a network by its number.
#[inline(always)]
pub fn find_in(network: u32, mac: [u16; 3]) -> Option<u32> {
    if network == 0 {
        return None;
    }
    let key = StationKey {
        network,
        mac: frame::bytes(mac),
        reserved: [0; 2],
    };
    // SAFETY: reads one aligned number; an entry that was replaced meanwhile gives the index of
    // another interface, whose own policy decides.
    unsafe { STATIONS.get(key) }.copied()
}

/// As [`find_in`], most often without hashing. For few callers: whatever comes after it, the verifier goes through
/// twice.
#[inline(always)]
pub fn find_near(network: u32, mac: [u16; 3]) -> Option<u32> {
    if network != 0
        && let Some(near) = NEAR_STATIONS.get(NearStation::place(network, mac))
        && near.network == network
        && near.mac[0] == mac[0]
        && near.mac[1] == mac[1]
        && near.mac[2] == mac[2]
        && near.ifindex != 0
    {
        // As in `find_in`: at worst, another interface's own policy decides.
        return Some(near.ifindex);
    }
    find_in(network, mac)
}

/// Answers a question of the guest about another guest, if it is known where that one is: turns the
/// frame into the answer and sends it back. Otherwise the question goes on.
#[inline(always)]
pub fn answer_arp(packet: &TcContext, policy: &PolicyEntry, request: &ArpHdr) -> Passed {
    let target = u32::from_ne_bytes(request.tpa());
    if target == policy.ipv4 {
        return Passed::On;
    }
    let Some(mac) = neighbour(policy, from_ipv4(target)) else {
        return Passed::On;
    };
    if !store_arp_answer(packet, request, mac) {
        return Passed::On;
    }
    Passed::To(frame::ifindex(packet))
}

/// Answers a question of the host for a service's address, to the interface that it came from.
#[inline(always)]
pub fn answer_host_arp(packet: &TcContext, network: u32) -> Passed {
    let Ok(request) = frame::arp(packet) else {
        return Passed::On;
    };
    let target = from_ipv4(u32::from_ne_bytes(request.tpa()));
    let mac = neighbour_in(network, target);
    if request.oper() != 1 || mac != Some(SERVICE_MAC) {
        return Passed::On;
    }
    if !store_arp_answer(packet, &request, SERVICE_MAC) {
        return Passed::On;
    }
    Passed::Back(frame::ifindex(packet))
}

/// Turns a request into the answer that `mac` has the address.
#[inline(always)]
fn store_arp_answer(packet: &TcContext, request: &ArpHdr, mac: [u8; 6]) -> bool {
    let mut answer = *request;
    answer.set_oper(2);
    answer.set_sha(mac);
    answer.set_spa(request.tpa());
    answer.set_tha(request.sha());
    answer.set_tpa(request.spa());
    let addresses = [request.sha(), mac];
    packet.store(0, &addresses, 0).is_ok() && packet.store(EthHdr::LEN, &answer, 0).is_ok()
}

/// As [`answer_arp`], for a neighbour solicitation that was checked.
#[inline(always)]
pub fn answer_solicitation(packet: &TcContext, policy: &PolicyEntry, ip: &Ip) -> Passed {
    let Some(target) = solicited(packet, ip) else {
        return Passed::On;
    };
    if ip::same(target, policy.ipv6) || ip::same(target, policy.link_local) {
        return Passed::On;
    }
    let Some(mac) = neighbour(policy, target) else {
        return Passed::On;
    };
    if !store_advertisement(packet, ip, target, [policy.mac, mac]) {
        return Passed::On;
    }
    Passed::To(frame::ifindex(packet))
}

/// As [`answer_host_arp`], for a neighbour solicitation.
#[inline(always)]
pub fn answer_host_solicitation(packet: &TcContext, network: u32, head: &Head, ip: &Ip) -> Passed {
    let Some(target) = solicited(packet, ip) else {
        return Passed::On;
    };
    if neighbour_in(network, target) != Some(SERVICE_MAC)
        || !store_advertisement(packet, ip, target, [frame::bytes(head.source), SERVICE_MAC])
    {
        return Passed::On;
    }
    Passed::Back(frame::ifindex(packet))
}

/// Whose Ethernet address a neighbour solicitation asks for, if it can be answered in place.
#[inline(always)]
fn solicited(packet: &TcContext, ip: &Ip) -> Option<Address> {
    let [icmpv6_type, ..] = ip.first[0].to_ne_bytes();
    // The answer must fit the question's place: with the option that hosts send.
    if icmpv6_type != icmpv6_type::NEIGHBOUR_SOLICITATION
        || ip.length != NEIGHBOUR_MESSAGE_LEN as u32
        || ip.offset != EthHdr::LEN + IPV6_LEN
        || packet.len() != (EthHdr::LEN + IPV6_LEN + NEIGHBOUR_MESSAGE_LEN) as u32
        || ip::same(ip.source, NO_ADDRESS)
    {
        return None;
    }
    packet.load::<Address>(ip.offset + 8).ok()
}

/// Turns a solicitation into the answer from the second Ethernet address to the first.
#[inline(always)]
fn store_advertisement(
    packet: &TcContext,
    ip: &Ip,
    target: Address,
    addresses: [[u8; 6]; 2],
) -> bool {
    let message = advertisement(target, ip.source, addresses[1]);
    packet.store(0, &addresses, 0).is_ok() && packet.store(EthHdr::LEN, &message, 0).is_ok()
}

/// An IPv6 packet that tells who has `target`.
#[inline(always)]
fn advertisement(target: Address, to: Address, mac: [u8; 6]) -> [u32; 18] {
    let [a, b, c, d, e, f] = mac;
    let [kind, eighths] = TARGET_LINK_LAYER;
    let length = NEIGHBOUR_MESSAGE_LEN as u8;
    let first = u32::from_ne_bytes([icmpv6_type::NEIGHBOUR_ADVERTISEMENT, 0, 0, 0]);
    let flags = u32::from_ne_bytes([SOLICITED_OVERRIDE, 0, 0, 0]);
    let option = [
        u32::from_ne_bytes([kind, eighths, a, b]),
        u32::from_ne_bytes([c, d, e, f]),
    ];
    // Of the addresses, the pseudo header (RFC 8200, 8.1), and the message.
    let words = [
        u32::from_ne_bytes([0, 0, 0, length]),
        u32::from_ne_bytes([0, 0, 0, protocol::ICMPV6]),
        first,
        flags,
        option[0],
        option[1],
    ];
    let mut sum = 0_u64;
    for word in words {
        sum += u64::from(word);
    }
    // The target stands in the message and as the source.
    for index in 0..4 {
        sum += 2 * u64::from(target[index]) + u64::from(to[index]);
    }
    let checksum = fold(sum).to_ne_bytes();
    [
        u32::from_ne_bytes([0x60, 0, 0, 0]),
        u32::from_ne_bytes([0, length, protocol::ICMPV6, 255]),
        target[0],
        target[1],
        target[2],
        target[3],
        to[0],
        to[1],
        to[2],
        to[3],
        first | u32::from_ne_bytes([0, 0, checksum[0], checksum[1]]),
        flags,
        target[0],
        target[1],
        target[2],
        target[3],
        option[0],
        option[1],
    ]
}

/// The internet checksum of a sum of words in any byte order (RFC 1071).
#[inline(always)]
fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

/// The MAC address of the guest of the same network that has this address, unless guests are kept
/// apart.
#[inline(always)]
fn neighbour(policy: &PolicyEntry, address: Address) -> Option<[u8; 6]> {
    if policy.network == 0 || policy.flags & flag::ISOLATED != 0 {
        return None;
    }
    let here = neighbour_in(policy.network, address);
    if here.is_some() || policy.flags & flag::SPANS_HOSTS == 0 {
        return here;
    }
    let key = NeighbourKey {
        network: policy.network,
        address,
    };
    // SAFETY: as in `neighbour_in`.
    unsafe { REMOTE_NEIGHBOURS.get(key) }.map(|neighbour| neighbour.mac)
}

/// As [`neighbour`], in a network by its number.
#[inline(always)]
fn neighbour_in(network: u32, address: Address) -> Option<[u8; 6]> {
    let key = NeighbourKey { network, address };
    // SAFETY: reads a MAC address; an entry that was replaced meanwhile gives another's, whose
    // own policy decides about what is then sent to it.
    unsafe { NEIGHBOURS.get(key) }.map(|neighbour| neighbour.mac)
}
