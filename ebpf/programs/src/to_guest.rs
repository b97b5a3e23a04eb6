//! Decides what may reach a guest: ARP that concerns it, replies and ICMP errors to flows that it
//! opened, and what its ingress rules allow.
//!
//! Maps: `FLOWS` for replies, then the rules of the guest's table (`PEER_CLASSES`,
//! `ALLOWED_PORTS`); `FRAGMENTS`.

use aya_ebpf::programs::TcContext;
use keelson_ebpf_common::{Direction, DropReason, PolicyEntry};

use crate::frame::{self, Ipv4, Payload};
use crate::transport::{self, Transport, protocol};
use crate::{flows, fragments, rules};

/// The decision; see the module.
#[inline(always)]
pub fn decide(packet: &TcContext, policy: &PolicyEntry) -> Result<(), DropReason> {
    let ethernet = frame::ethernet(packet)?;
    // A bridge floods what it hasn't learnt: not everything that arrives is the guest's.
    let is_group = ethernet.dst_addr[0] & 1 != 0;
    if !is_group && !frame::same_mac(ethernet.dst_addr, policy.mac) {
        return Err(DropReason::WrongDestination);
    }
    match frame::payload(&ethernet)? {
        Payload::Arp => decide_arp(packet, policy),
        Payload::Ipv4 => decide_ipv4(packet, policy),
    }
}

/// ARP for the guest's address, or someone's announcement of their own (RFC 5227).
#[inline(always)]
fn decide_arp(packet: &TcContext, policy: &PolicyEntry) -> Result<(), DropReason> {
    let arp = frame::arp(packet)?;
    if arp.tpa() == policy.ipv4 || arp.tpa() == arp.spa() {
        Ok(())
    } else {
        Err(DropReason::WrongDestination)
    }
}

#[inline(always)]
fn decide_ipv4(packet: &TcContext, policy: &PolicyEntry) -> Result<(), DropReason> {
    let ip = frame::ipv4(packet)?;
    if ip.header.dst_addr != policy.ipv4 {
        return Err(DropReason::WrongDestination);
    }
    if ip.header.src_addr == policy.ipv4 {
        return Err(DropReason::SpoofedIpv4);
    }
    if ip.fragment_offset != 0 {
        return fragments::follow(policy, &ip, Direction::ToGuest);
    }
    let transport = transport::transport(packet, &ip)?;
    if !is_allowed(packet, policy, &ip, &transport)? {
        return Err(DropReason::NotAllowed);
    }
    fragments::note(policy, &ip, Direction::ToGuest);
    Ok(())
}

#[inline(always)]
fn is_allowed(
    packet: &TcContext,
    policy: &PolicyEntry,
    ip: &Ipv4,
    transport: &Transport,
) -> Result<bool, DropReason> {
    let peer = ip.header.src_addr;
    if flows::answers(policy, peer, transport) {
        return Ok(true);
    }
    if transport.is_icmp_error() && is_related(packet, policy, ip)? {
        return Ok(true);
    }
    Ok(rules::allow(
        policy.ingress_table,
        peer,
        transport.protocol,
        transport.destination_port,
    ))
}

/// An ICMP error about a packet that the guest sent in a flow of its own, or in one that a rule lets
/// in. Path MTU discovery depends on these.
#[inline(always)]
fn is_related(packet: &TcContext, policy: &PolicyEntry, ip: &Ipv4) -> Result<bool, DropReason> {
    let Some(quoted) = transport::quoted(packet, ip)? else {
        return Ok(false);
    };
    if quoted.source != policy.ipv4 {
        return Ok(false);
    }
    let has_ports = matches!(quoted.protocol, protocol::TCP | protocol::UDP);
    Ok(flows::has_quoted(policy, &quoted)
        || (has_ports
            && rules::allow(
                policy.ingress_table,
                quoted.destination,
                quoted.protocol,
                quoted.source_port,
            )))
}
