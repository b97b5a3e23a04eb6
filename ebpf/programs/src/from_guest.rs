//! Decides what a guest may send: frames from its own MAC address, IPv4 from its own address, ARP in
//! its own name, nothing else; no answers of a DHCP server; and of that what its egress rules allow,
//! or what answers something that its ingress rules let in.
//!
//! Maps: the rules of the guest's tables (`PEER_CLASSES`, `ALLOWED_PORTS`); opens and refreshes
//! `FLOWS`, so that replies come back; `FRAGMENTS`.

use aya_ebpf::programs::TcContext;
use keelson_ebpf_common::{ALLOW_ALL, Direction, DropReason, PolicyEntry};

use crate::frame::{self, Ipv4, Payload};
use crate::transport::{self, Transport, icmp_type, protocol};
use crate::{flows, fragments, rules};

const DHCP_SERVER_PORT: u16 = 67;
const DHCP_CLIENT_PORT: u16 = 68;

/// The decision; see the module.
#[inline(always)]
pub fn decide(packet: &TcContext, policy: &PolicyEntry) -> Result<(), DropReason> {
    let ethernet = frame::ethernet(packet)?;
    if !frame::same_mac(ethernet.src_addr, policy.mac) {
        return Err(DropReason::SpoofedMac);
    }
    match frame::payload(&ethernet)? {
        Payload::Arp => decide_arp(packet, policy),
        Payload::Ipv4 => decide_ipv4(packet, policy),
    }
}

/// The sender's identity must be the guest's own. A probe for an address conflict has no sender
/// address yet (RFC 5227).
#[inline(always)]
fn decide_arp(packet: &TcContext, policy: &PolicyEntry) -> Result<(), DropReason> {
    let arp = frame::arp(packet)?;
    let is_probe = arp.spa() == [0; 4] && arp.oper() == 1;
    if !frame::same_mac(arp.sha(), policy.mac) || !(is_probe || arp.spa() == policy.ipv4) {
        return Err(DropReason::SpoofedArp);
    }
    Ok(())
}

#[inline(always)]
fn decide_ipv4(packet: &TcContext, policy: &PolicyEntry) -> Result<(), DropReason> {
    let ip = frame::ipv4(packet)?;
    if ip.header.src_addr != policy.ipv4 {
        return Err(DropReason::SpoofedIpv4);
    }
    if ip.fragment_offset != 0 {
        return fragments::follow(policy, &ip, Direction::FromGuest);
    }
    let transport = transport::transport(packet, &ip)?;
    if transport.protocol == protocol::UDP
        && transport.source_port == DHCP_SERVER_PORT
        && transport.destination_port == DHCP_CLIENT_PORT
    {
        return Err(DropReason::DhcpServer);
    }
    if policy.egress_table != ALLOW_ALL && !is_allowed(policy, &ip, &transport) {
        return Err(DropReason::NotAllowed);
    }
    flows::sent(policy, ip.header.dst_addr, &transport);
    fragments::note(policy, &ip, Direction::FromGuest);
    Ok(())
}

/// Whether the egress rules allow it, or the ingress rules what it answers.
#[inline(always)]
fn is_allowed(policy: &PolicyEntry, ip: &Ipv4, transport: &Transport) -> bool {
    let peer = ip.header.dst_addr;
    if rules::allow(
        policy.egress_table,
        peer,
        transport.protocol,
        transport.destination_port,
    ) {
        return true;
    }
    let can_answer = match transport.protocol {
        protocol::TCP => !transport.opens(),
        protocol::ICMP => transport.is_icmp(icmp_type::ECHO_REPLY) || transport.is_icmp_error(),
        _ => true,
    };
    can_answer
        && rules::allow(
            policy.ingress_table,
            peer,
            transport.protocol,
            transport.source_port,
        )
}
