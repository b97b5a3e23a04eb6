//! Remembers the flows that guests open, so that replies may come back (map `FLOWS`).
//!
//! A flow that a rule lets in needs no entry: the rule decides about each of its packets, so a flood
//! of allowed packets can't push the guests' own flows out, and a rule that is taken away takes its
//! connections with it.

use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;
use keelson_ebpf_common::{FlowKey, FlowState, PolicyEntry, phase, timeout};

use crate::maps::FLOWS;
use crate::rules;
use crate::transport::{Quoted, Transport, icmp_type, protocol};

/// How long `last_seen_ns` may lag: writing it for every packet would move its cache line between
/// CPUs.
const REFRESH_NS: u64 = 1_000_000_000;

/// A packet from the guest: refreshes its flow, or opens one.
///
/// TCP opens a flow only with a SYN; a UDP packet opens none where the rules let its reply in.
#[inline(always)]
pub fn sent(policy: &PolicyEntry, peer: [u8; 4], transport: &Transport) {
    if transport.protocol == protocol::ICMP && !transport.is_icmp(icmp_type::ECHO_REQUEST) {
        return;
    }
    let key = key(
        policy,
        peer,
        transport.protocol,
        transport.source_port,
        transport.destination_port,
    );
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    if !transport.opens() && refresh(&key, transport, now, false) {
        return;
    }
    let opens = match transport.protocol {
        protocol::TCP => transport.opens(),
        protocol::ICMP => true,
        _ => !rules::allow(
            policy.ingress_table,
            peer,
            transport.protocol,
            transport.source_port,
        ),
    };
    if opens {
        let state = FlowState {
            last_seen_ns: now,
            phase: phase::OPENING,
            reserved: 0,
        };
        // Without memory for it the reply is dropped, which is the safe outcome.
        let _ = FLOWS.insert(key, state, 0);
    }
}

/// A packet to the guest: whether it belongs to a flow that the guest opened. Refreshes it.
#[inline(always)]
pub fn answers(policy: &PolicyEntry, peer: [u8; 4], transport: &Transport) -> bool {
    if transport.protocol == protocol::ICMP && !transport.is_icmp(icmp_type::ECHO_REPLY) {
        return false;
    }
    let key = key(
        policy,
        peer,
        transport.protocol,
        transport.destination_port,
        transport.source_port,
    );
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    refresh(&key, transport, now, true)
}

/// Whether the packet that an ICMP error quotes belongs to a flow that the guest opened.
#[inline(always)]
pub fn has_quoted(policy: &PolicyEntry, quoted: &Quoted) -> bool {
    let key = key(
        policy,
        quoted.destination,
        quoted.protocol,
        quoted.source_port,
        quoted.destination_port,
    );
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    FLOWS.get_ptr(key).is_some_and(|state| {
        // SAFETY: map values stay readable while the program runs; see `refresh` on races.
        let state = unsafe { &*state };
        is_alive(state, quoted.protocol, now)
    })
}

#[inline(always)]
fn key(
    policy: &PolicyEntry,
    peer: [u8; 4],
    protocol: u8,
    guest_port: u16,
    peer_port: u16,
) -> FlowKey {
    FlowKey {
        interface_id: policy.interface_id,
        guest: policy.ipv4,
        peer,
        guest_port,
        peer_port,
        protocol,
        reserved: [0; 3],
    }
}

/// Finds a living flow and moves it on.
#[inline(always)]
fn refresh(key: &FlowKey, transport: &Transport, now: u64, is_reply: bool) -> bool {
    let Some(state) = FLOWS.get_ptr_mut(key) else {
        return false;
    };
    // SAFETY: map values stay readable and writable while the program runs. Two CPUs may race on one
    // flow: each field is one aligned word, and either order is a state that the flow was in. An
    // entry that was evicted and used again meanwhile gets one flow's time for another's: a timeout
    // that is off once, no more.
    let state = unsafe { &mut *state };
    if !is_alive(state, transport.protocol, now) {
        return false;
    }
    if is_reply {
        // A new connection toward the guest is no reply, whatever the ports; only while the guest's
        // own SYN is open it is one half of a simultaneous open (RFC 9293, 3.5).
        if transport.opens() && state.phase != phase::OPENING {
            return false;
        }
        if state.phase == phase::OPENING {
            state.phase = phase::ESTABLISHED;
        }
    }
    if transport.closes() {
        state.phase = phase::CLOSING;
    }
    if now.wrapping_sub(state.last_seen_ns) > REFRESH_NS {
        state.last_seen_ns = now;
    }
    true
}

#[inline(always)]
fn is_alive(state: &FlowState, ip_protocol: u8, now: u64) -> bool {
    let limit = match (ip_protocol, state.phase) {
        (protocol::TCP, phase::OPENING) => timeout::TCP_OPENING,
        (protocol::TCP, phase::ESTABLISHED) => timeout::TCP_ESTABLISHED,
        (protocol::TCP, _) => timeout::TCP_CLOSING,
        (protocol::ICMP, _) => timeout::ICMP_ECHO,
        _ => timeout::DATAGRAM,
    };
    now.wrapping_sub(state.last_seen_ns) < limit
}
