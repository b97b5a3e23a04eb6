//! Tells whoever waits for it what happened to a packet (maps `EVENTS`, `OBSERVED`). Where nobody
//! waits, that costs one lookup of an array; where the ring buffer is full, the event is lost.

use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::programs::TcContext;
use keelson_ebpf_common::{Direction, DropReason, Event, from_ipv4, happening};

use crate::frame;
use crate::ip::protocol;
use crate::maps::{EVENTS, OBSERVED};

/// `BPF_RB_NO_WAKEUP`: the reader looks by itself, so that a flood doesn't wake it for each packet.
const NO_WAKEUP: u64 = 1;

/// Whether someone waits for events of this kind.
#[inline(always)]
pub fn is_observed(kind: u8) -> bool {
    OBSERVED
        .get(0)
        .is_some_and(|observed| observed >> (kind & 7) & 1 == 1)
}

/// Reports a packet of the interface `ifindex`. Reads its headers by itself, as far as they are there,
/// since what it reports on may be that they are wrong.
#[inline(always)]
fn report(packet: &TcContext, ifindex: u32, direction: Direction, kind: u8, reason: u8) {
    let Some(mut entry) = EVENTS.reserve::<Event>(0) else {
        return;
    };
    let head = frame::head_or_zeros(packet);
    let is_ipv4 = frame::is_ipv4(&head);
    let is_ipv6 = frame::is_ipv6(&head);
    let (source, destination, protocol, ports) = if is_ipv4 {
        let [_, _, third, source, destination] = head.network;
        let protocol = third.to_ne_bytes()[1];
        (
            from_ipv4(source),
            from_ipv4(destination),
            protocol,
            head.rest[0],
        )
    } else if is_ipv6 {
        let [_, second, a, b, c] = head.network;
        let [d, e, f, g, h] = head.rest;
        // Behind extension headers ports are not looked for.
        let ports: u32 = packet.load(54).unwrap_or(0);
        ([a, b, c, d], [e, f, g, h], second.to_ne_bytes()[2], ports)
    } else {
        ([0; 4], [0; 4], 0, 0)
    };
    let (source_port, destination_port) = ports_of(protocol, ports);
    entry.write(Event {
        // SAFETY: the helper has no preconditions.
        time_ns: unsafe { bpf_ktime_get_ns() },
        ifindex,
        length: packet.len(),
        source,
        destination,
        source_port,
        destination_port,
        ether_type: frame::ether_type(&head),
        protocol,
        direction: direction as u8,
        kind,
        reason,
        reserved: [0; 6],
    });
    entry.submit(NO_WAKEUP);
}

#[inline(always)]
fn ports_of(ip_protocol: u8, first: u32) -> (u16, u16) {
    let [a, b, c, d] = first.to_ne_bytes();
    match ip_protocol {
        protocol::TCP | protocol::UDP => (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])),
        protocol::ICMP | protocol::ICMPV6 => (u16::from(a), 0),
        _ => (0, 0),
    }
}

/// Reports a packet if someone waits for that.
#[inline(always)]
pub fn report_if_observed(packet: &TcContext, direction: Direction, kind: u8, reason: u8) {
    if is_observed(kind) {
        report(packet, frame::ifindex(packet), direction, kind, reason);
    }
}

/// Reports that a packet of the interface `ifindex` is dropped, which it has left or comes to, if someone
/// waits for that.
#[inline(always)]
pub fn report_dropped(packet: &TcContext, ifindex: u32, direction: Direction, reason: DropReason) {
    if is_observed(happening::DROPPED) {
        report(packet, ifindex, direction, happening::DROPPED, reason as u8);
    }
}
