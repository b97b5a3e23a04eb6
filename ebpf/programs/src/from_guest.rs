//! Decides what a guest may send: frames from its own MAC address; IPv4 and IPv6 from its own
//! addresses; ARP and neighbour discovery in its own name; nothing that only routers and DHCP
//! servers send; and of that what its flows and egress rules allow. What is for a guest of the same
//! network on this host goes straight to it; what asks for the guest's configuration, to the agent. What
//! is for a service, `from_client` goes on with; what may be for a guest of another host, `to_peer`.
//!
//! Maps: those of `flows`, `rules`, `fragments`, `stations` and `questions`.

use aya_ebpf::programs::TcContext;
use keelson_ebpf_common::{
    Direction, DropReason, NO_ADDRESS, PolicyEntry, SERVICE_MAC, from_ipv4, local, stage,
};

use crate::flows::{self, Ends};
use crate::frame::{self, Head, Payload};
use crate::ip::{self, Ip, protocol};
use crate::transport::{Transport, icmp_type};
use crate::{
    Passed, fragments, neighbour_discovery, questions, services, stations, transport, tunnel,
};

const DHCP_PORTS: [u16; 2] = [67, 68];
const DHCPV6_PORTS: [u16; 2] = [547, 546];

/// The decision; see the module.
#[inline(always)]
pub fn decide(packet: &TcContext, policy: &PolicyEntry) -> Result<Passed, DropReason> {
    let head = frame::head(packet)?;
    if !frame::same_mac(head.source, policy.mac) {
        return Err(DropReason::SpoofedMac);
    }
    let payload = frame::payload(&head)?;
    if payload == Payload::Arp {
        return decide_arp(packet, policy);
    }
    if frame::same_mac(head.destination, SERVICE_MAC) {
        return Err(services::go_on(packet, stage::SERVICE_FROM_GUEST));
    }
    frame::check_size(packet, policy)?;
    let (ip, ends) = if payload == Payload::Ipv4 {
        let ip = ip::ipv4(packet, &head)?;
        let own = from_ipv4(policy.ipv4);
        if policy.ipv4 == 0 {
            return Err(DropReason::SpoofedIpv4);
        }
        if !ip::same(ip.source, own) {
            // Who has no address yet may ask for it.
            return if questions::is_dhcp(policy, &ip) && ip::same(ip.source, from_ipv4(0)) {
                Ok(Passed::ToAgent)
            } else {
                Err(DropReason::SpoofedIpv4)
            };
        }
        if questions::is_dhcp(policy, &ip) {
            return Ok(Passed::ToAgent);
        }
        let ends = Ends {
            own,
            local: local::IPV4,
            peer: ip.destination,
        };
        (ip, ends)
    } else {
        let ip = ip::ipv6(packet, &head)?;
        if neighbour_discovery::is_housekeeping(&ip) {
            check_ipv6_source(policy, &ip, true)?;
            neighbour_discovery::sent(packet, policy, &ip)?;
            if questions::is_solicitation(policy, &ip) {
                return Ok(Passed::ToAgent);
            }
            return Ok(stations::answer_solicitation(packet, policy, &ip));
        }
        let local = check_ipv6_source(policy, &ip, false)?;
        if questions::is_dhcp(policy, &ip) {
            return Ok(Passed::ToAgent);
        }
        let ends = Ends {
            own: ip.source,
            local,
            peer: ip.destination,
        };
        (ip, ends)
    };
    decide_ip(packet, policy, &head, &ip, &ends)
}

#[inline(always)]
fn decide_ip(
    packet: &TcContext,
    policy: &PolicyEntry,
    head: &Head,
    ip: &Ip,
    ends: &Ends,
) -> Result<Passed, DropReason> {
    let station = stations::find(policy, head.destination)?;
    if ip.fragment_offset != 0 {
        fragments::follow(policy, ends, ip, Direction::FromGuest)?;
    } else {
        let transport = transport::transport(ip)?;
        refuse_servers(ip, &transport)?;
        // No guest of the network: the host, or what is beyond it.
        if station.is_none()
            && transport.protocol == protocol::UDP
            && tunnel::is_port(transport.destination_port)
        {
            return Err(DropReason::TunnelPort);
        }
        flows::judge(
            packet,
            policy,
            Direction::FromGuest,
            ends,
            ip,
            &transport,
            false,
        )?;
        fragments::note(policy, ends, ip, Direction::FromGuest, false);
    }
    stations::send(packet, policy, station)
}

/// The sender's identity must be the guest's own. A probe for an address conflict has no sender
/// address yet (RFC 5227).
#[inline(always)]
fn decide_arp(packet: &TcContext, policy: &PolicyEntry) -> Result<Passed, DropReason> {
    let arp = frame::arp(packet)?;
    let sender = u32::from_ne_bytes(arp.spa());
    let is_probe = sender == 0 && arp.oper() == 1;
    let is_own = sender == policy.ipv4 && policy.ipv4 != 0;
    if !frame::same_mac(frame::words(arp.sha()), policy.mac) || !(is_probe || is_own) {
        return Err(DropReason::SpoofedArp);
    }
    if is_own && arp.oper() == 1 {
        return Ok(stations::answer_arp(packet, policy, &arp));
    }
    Ok(Passed::On)
}

/// Which of the guest's addresses the source is.
#[inline(always)]
fn check_ipv6_source(policy: &PolicyEntry, ip: &Ip, may_be_none: bool) -> Result<u8, DropReason> {
    if ip::same(policy.link_local, NO_ADDRESS) || ip::is_mapped(ip.destination) {
        return Err(DropReason::SpoofedIpv6);
    }
    if ip::same(ip.source, policy.link_local) {
        return Ok(local::LINK_LOCAL);
    }
    let is_none = ip::same(ip.source, NO_ADDRESS);
    if ip::same(ip.source, policy.ipv6) && !is_none || is_none && may_be_none {
        return Ok(local::IPV6);
    }
    Err(DropReason::SpoofedIpv6)
}

/// Refuses what only DHCP servers and routers send.
#[inline(always)]
fn refuse_servers(ip: &Ip, transport: &Transport) -> Result<(), DropReason> {
    let server = if ip.is_ipv6 { DHCPV6_PORTS } else { DHCP_PORTS };
    if transport.protocol == protocol::UDP
        && transport.source_port == server[0]
        && transport.destination_port == server[1]
    {
        return Err(DropReason::DhcpServer);
    }
    if transport.is_icmp(icmp_type::REDIRECT) || transport.is_icmp(icmp_type::ROUTER_ADVERTISEMENT)
    {
        return Err(DropReason::RouterAdvertisement);
    }
    Ok(())
}
