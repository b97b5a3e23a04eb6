//! Connection tracking and the verdict that depends on it (maps `FLOWS`, `OPENING_FLOWS`).
//!
//! A packet of a flow passes because the rules let the flow's first packet pass. The flow remembers
//! which policy that was: under another one its opener is judged again, and the flow ends if it may
//! not be any more. Every other packet is a first one, judged by the rules of its own direction, and
//! opens a flow so that answers may come back, whatever the rules of the other direction say.
//!
//! A flow moves to `FLOWS` with its first answer. TCP may be picked up in the middle, as after a flow
//! was evicted; what only closes opens nothing.

use aya_ebpf::programs::TcContext;
use keelson_ebpf_common::{
    Address, Direction, DropReason, FlowKey, FlowState, PolicyEntry, TranslationKey, happening,
    phase, timeout,
};

use crate::ip::{self, Ip, protocol};
use crate::maps::{FLOWS, Flows, OPENING_FLOWS};
use crate::services::Scope;
use crate::transport::{self, Transport, icmp_type, icmpv6_type};
use crate::{clock, counters, events, rules};

/// How long `last_seen_ns` may lag: writing it for every packet would move its cache line between
/// CPUs.
pub const REFRESH_NS: u64 = 1_000_000_000;

/// `FlowKey::peer_port` of an ICMP echo: who asks. The identifier alone doesn't say.
const GUEST_ASKS: u16 = 1;
const PEER_ASKS: u16 = 2;

/// Who a packet is between, seen from the guest.
#[derive(Clone, Copy)]
pub struct Ends {
    /// The guest's own address.
    pub own: Address,
    /// Which of its addresses that is, one of `keelson_ebpf_common::local`.
    pub local: u8,
    pub peer: Address,
}

/// Whether a packet between `ends` may go on. Opens, moves on and ends flows. What a guest sends was
/// `translated`, or not; says whether what goes to it is to be.
#[inline(always)]
pub fn judge(
    packet: &TcContext,
    policy: &PolicyEntry,
    direction: Direction,
    ends: &Ends,
    ip: &Ip,
    transport: &Transport,
    translated: bool,
) -> Result<bool, DropReason> {
    let slot = policy.slot;
    let established = FLOWS.get(slot).ok_or(DropReason::NoPolicy)?;
    let is_error = transport.is_icmp_error();
    let mut key = FlowKey {
        peer: ends.peer,
        guest_port: 0,
        peer_port: 0,
        protocol: transport.protocol,
        local: ends.local,
        reserved: [0; 2],
    };
    let has_key = if is_error {
        set_quoted_key(&mut key, packet, direction, ends, ip)?
    } else {
        set_own_key(&mut key, direction, transport)
    };
    let now = clock::now();
    if has_key {
        let found = find(established, slot, &key, now);
        if let Some((flow, is_opening)) = found {
            // SAFETY: map values stay readable and writable while the program runs. Two CPUs may
            // race on one flow: each field is one aligned word, and either order is a state that the
            // flow was in. An entry that was evicted and used again meanwhile gets one flow's time
            // for another's: a timeout that is off once, no more.
            let flow = unsafe { &mut *flow };
            if is_still_allowed(policy, &key, flow) {
                let is_translated = flow.translated != 0;
                if is_error {
                    return Ok(is_translated);
                }
                if continues(flow, direction, transport) {
                    if direction == Direction::FromGuest && is_translated != translated {
                        return Err(DropReason::PortInUse);
                    }
                    let was_closed = flow.phase == phase::CLOSED;
                    let answered = advance(flow, direction, transport, now);
                    if flow.phase == phase::CLOSED && !was_closed {
                        events::report_if_observed(packet, direction, happening::CLOSED, 0);
                    }
                    if answered && is_opening {
                        promote(established, slot, &key, flow);
                    }
                    return Ok(is_translated);
                }
            } else {
                let _ = established.remove(&key);
                if let Some(opening) = OPENING_FLOWS.get(slot) {
                    let _ = opening.remove(&key);
                }
            }
        }
    }
    let table = match direction {
        Direction::FromGuest => policy.egress_table,
        Direction::ToGuest => policy.ingress_table,
    };
    let counter = rules::allow(table, ends.peer, transport.protocol, transport.rule_port)
        .ok_or(DropReason::NotAllowed)?;
    counters::count_allowed(policy.slot, direction, counter, packet.len());
    if has_key && !is_error && can_open(transport) {
        let flow = FlowState {
            last_seen_ns: now,
            generation: policy.generation,
            opener: direction as u8,
            phase: phase::OPENING,
            finished: 0,
            translated: translated.into(),
        };
        let opening = OPENING_FLOWS.get(slot).ok_or(DropReason::NoPolicy)?;
        // Without memory for it the answer is dropped, which is the safe outcome.
        let _ = opening.insert(&key, flow, 0);
        let _ = established.remove(&key);
        events::report_if_observed(packet, direction, happening::OPENED, 0);
    }
    Ok(translated)
}

/// Whether the guest has a flow of its own in which such answers to a service's client come: one to
/// the backend itself.
#[inline(always)]
pub fn is_used_directly(scope: Scope, answers: &TranslationKey, now: u64) -> bool {
    let Some(established) = FLOWS.get(scope.slot) else {
        return false;
    };
    let key = FlowKey {
        peer: answers.source,
        guest_port: answers.destination_port,
        peer_port: answers.source_port,
        protocol: answers.protocol,
        local: scope.local,
        reserved: [0; 2],
    };
    let Some((flow, _)) = find(established, scope.slot, &key, now) else {
        return false;
    };
    // SAFETY: see `judge`.
    let flow = unsafe { &*flow };
    flow.translated == 0 && flow.phase != phase::CLOSED
}

/// Completes the key of the flow that a packet belongs to; false for ICMP that belongs to none.
#[inline(always)]
fn set_own_key(key: &mut FlowKey, direction: Direction, transport: &Transport) -> bool {
    if transport.is_any_icmp() {
        let asks = transport.is_echo_request();
        key.guest_port = transport.source_port;
        key.peer_port = echo_asker(direction, asks);
        return asks || transport.is_echo_reply();
    }
    (key.guest_port, key.peer_port) = match direction {
        Direction::FromGuest => (transport.source_port, transport.destination_port),
        Direction::ToGuest => (transport.destination_port, transport.source_port),
    };
    true
}

/// Makes the key that of the flow which the packet that an ICMP error quotes belongs to. False if it
/// can't belong to one, or the error doesn't go to whoever sent that packet.
#[inline(always)]
fn set_quoted_key(
    key: &mut FlowKey,
    packet: &TcContext,
    direction: Direction,
    ends: &Ends,
    ip: &Ip,
) -> Result<bool, DropReason> {
    let quoted = transport::quoted(packet, ip)?;
    let own = match direction {
        // The guest reports what became of a packet that it got, to its sender.
        Direction::FromGuest => {
            key.peer = quoted.source;
            key.guest_port = quoted.destination_port;
            key.peer_port = quoted.source_port;
            quoted.destination
        }
        // Anyone on the way may report what became of a packet that the guest sent.
        Direction::ToGuest => {
            key.peer = quoted.destination;
            key.guest_port = quoted.source_port;
            key.peer_port = quoted.destination_port;
            quoted.source
        }
    };
    key.protocol = quoted.protocol;
    if matches!(quoted.protocol, protocol::ICMP | protocol::ICMPV6) {
        // The quoted packet went the other way, and it asked.
        key.guest_port = quoted.source_port;
        key.peer_port = echo_asker(direction.reverse(), true);
    }
    let is_to_sender = match direction {
        Direction::FromGuest => ip::same(key.peer, ends.peer),
        Direction::ToGuest => true,
    };
    Ok(quoted.has_flow && is_to_sender && ip::same(own, ends.own))
}

#[inline(always)]
fn echo_asker(direction: Direction, asks: bool) -> u16 {
    match (direction, asks) {
        (Direction::FromGuest, true) | (Direction::ToGuest, false) => GUEST_ASKS,
        _ => PEER_ASKS,
    }
}

/// A living flow, and whether it waits for its first answer.
#[inline(always)]
fn find(established: &Flows, slot: u32, key: &FlowKey, now: u64) -> Option<(*mut FlowState, bool)> {
    let (flow, is_opening) = match established.get_ptr_mut(key) {
        Some(flow) => (flow, false),
        None => (OPENING_FLOWS.get(slot)?.get_ptr_mut(key)?, true),
    };
    // SAFETY: see `judge`.
    let state = unsafe { &*flow };
    is_alive(state, key.protocol, now).then_some((flow, is_opening))
}

#[inline(always)]
fn is_alive(flow: &FlowState, ip_protocol: u8, now: u64) -> bool {
    let limit = match (ip_protocol, flow.phase) {
        (protocol::TCP, phase::OPENING) => timeout::TCP_OPENING,
        (protocol::TCP, phase::ESTABLISHED) => timeout::TCP_ESTABLISHED,
        (protocol::TCP, phase::HALF_CLOSED) => timeout::TCP_HALF_CLOSED,
        (protocol::TCP, _) => timeout::TCP_CLOSED,
        (protocol::ICMP | protocol::ICMPV6, _) => timeout::ICMP_ECHO,
        _ => timeout::DATAGRAM,
    };
    // Another CPU may have seen it at a later time than this one's.
    now < flow.last_seen_ns.wrapping_add(limit)
}

/// Whether the flow may still be; one that an earlier policy let be is judged by the present one. One
/// that a later policy let be was judged by a program that began after this one.
#[inline(always)]
fn is_still_allowed(policy: &PolicyEntry, key: &FlowKey, flow: &mut FlowState) -> bool {
    if flow.generation >= policy.generation {
        return true;
    }
    let from_guest = flow.opener == Direction::FromGuest as u8;
    let (table, port) = if from_guest {
        (policy.egress_table, key.peer_port)
    } else {
        (policy.ingress_table, key.guest_port)
    };
    let port = match key.protocol {
        protocol::ICMP => u16::from(icmp_type::ECHO_REQUEST) << 8,
        protocol::ICMPV6 => u16::from(icmpv6_type::ECHO_REQUEST) << 8,
        _ => port,
    };
    if rules::allow(table, key.peer, key.protocol, port).is_none() {
        return false;
    }
    flow.generation = policy.generation;
    true
}

/// Whether a packet goes on with the flow, instead of asking for a new connection in its place.
#[inline(always)]
fn continues(flow: &FlowState, direction: Direction, transport: &Transport) -> bool {
    if !transport.opens() {
        return true;
    }
    if flow.opener == direction as u8 {
        // The same SYN again.
        flow.phase <= phase::ESTABLISHED
    } else {
        // One half of a simultaneous open (RFC 9293, 3.5).
        flow.phase == phase::OPENING
    }
}

/// Moves a flow on; says whether this was its first answer.
#[inline(always)]
fn advance(flow: &mut FlowState, direction: Direction, transport: &Transport, now: u64) -> bool {
    let side = direction as u8;
    let mut answered = false;
    if transport.resets() {
        flow.phase = phase::CLOSED;
    } else {
        if flow.opener != side && flow.phase == phase::OPENING {
            flow.phase = phase::ESTABLISHED;
            answered = true;
        }
        if transport.finishes() && flow.phase < phase::CLOSED {
            flow.finished |= 1 << (side & 1);
            flow.phase = if flow.finished == 3 {
                phase::CLOSED
            } else {
                phase::HALF_CLOSED
            };
        }
    }
    if now > flow.last_seen_ns.wrapping_add(REFRESH_NS) {
        flow.last_seen_ns = now;
    }
    answered
}

#[inline(always)]
fn promote(established: &Flows, slot: u32, key: &FlowKey, flow: &FlowState) {
    let state = *flow;
    // Without memory for it the flow stays where it is.
    if established.insert(key, state, 0).is_ok()
        && let Some(opening) = OPENING_FLOWS.get(slot)
    {
        let _ = opening.remove(key);
    }
}

/// Whether a packet that no flow exists for opens one.
#[inline(always)]
fn can_open(transport: &Transport) -> bool {
    match transport.protocol {
        protocol::TCP => !transport.resets() && !transport.finishes(),
        protocol::ICMP | protocol::ICMPV6 => transport.is_echo_request(),
        _ => true,
    }
}
