//! Decides what may reach a guest: ARP and neighbour discovery that concern it, what the agent answers,
//! and what its flows and ingress rules allow. What answers it as the client of a service, `from_client`
//! goes on with.
//!
//! Maps: those of `flows`, `rules`, `fragments` and `stations`.

use aya_ebpf::programs::TcContext;
use keelson_ebpf_common::{
    Direction, DropReason, NO_ADDRESS, PolicyEntry, flag, from_ipv4, local, stage,
};

use crate::flows::{self, Ends};
use crate::frame::{self, Payload};
use crate::ip::{self, Ip};
use crate::{Passed, fragments, neighbour_discovery, questions, services, stations, transport};

/// The decision; see the module.
#[inline(always)]
pub fn decide(packet: &TcContext, policy: &PolicyEntry) -> Result<Passed, DropReason> {
    let head = frame::head(packet)?;
    // A bridge floods what it hasn't learnt: not everything that arrives is the guest's.
    let is_group = head.destination[0].to_ne_bytes()[0] & 1 != 0;
    if !is_group && !frame::same_mac(head.destination, policy.mac) {
        return Err(DropReason::WrongDestination);
    }
    if questions::is_answer(packet) {
        return Ok(Passed::On);
    }
    if policy.flags & flag::ISOLATED != 0 {
        stations::find(policy, head.source)?;
    }
    let (ip, ends) = match frame::payload(&head)? {
        Payload::Arp => return decide_arp(packet, policy).map(|()| Passed::On),
        Payload::Ipv4 => {
            let ip = ip::ipv4(packet, &head)?;
            let own = from_ipv4(policy.ipv4);
            if policy.ipv4 == 0 || !ip::same(ip.destination, own) {
                return Err(DropReason::WrongDestination);
            }
            if ip::same(ip.source, own) {
                return Err(DropReason::SpoofedIpv4);
            }
            let ends = Ends {
                own,
                local: local::IPV4,
                peer: ip.source,
            };
            (ip, ends)
        }
        Payload::Ipv6 => {
            let ip = ip::ipv6(packet, &head)?;
            let local = check_ipv6(policy, &ip)?;
            if neighbour_discovery::is_housekeeping(&ip) {
                return neighbour_discovery::received(packet, policy, &ip).map(|()| Passed::On);
            }
            let Some(local) = local else {
                return Err(DropReason::WrongDestination);
            };
            let ends = Ends {
                own: ip.destination,
                local,
                peer: ip.source,
            };
            (ip, ends)
        }
    };
    let direction = Direction::ToGuest;
    let is_translated = if ip.fragment_offset != 0 {
        fragments::follow(policy, &ends, &ip, direction)?
    } else {
        let transport = transport::transport(&ip)?;
        let is_translated = flows::judge(packet, policy, direction, &ends, &ip, &transport, false)?;
        fragments::note(policy, &ends, &ip, direction, is_translated);
        is_translated
    };
    if is_translated {
        return Err(services::go_on(packet, stage::SERVICE_TO_GUEST));
    }
    Ok(Passed::On)
}

/// ARP for the guest's address, or someone's announcement of their own (RFC 5227).
#[inline(always)]
fn decide_arp(packet: &TcContext, policy: &PolicyEntry) -> Result<(), DropReason> {
    let arp = frame::arp(packet)?;
    let target = u32::from_ne_bytes(arp.tpa());
    if policy.ipv4 != 0 && (target == policy.ipv4 || arp.tpa() == arp.spa()) {
        Ok(())
    } else {
        Err(DropReason::WrongDestination)
    }
}

/// Which of the guest's addresses the destination is; `None` for a group's.
#[inline(always)]
fn check_ipv6(policy: &PolicyEntry, ip: &Ip) -> Result<Option<u8>, DropReason> {
    if ip::same(policy.link_local, NO_ADDRESS) {
        return Err(DropReason::WrongDestination);
    }
    let from_itself = ip::same(ip.source, policy.ipv6) && !ip::same(policy.ipv6, NO_ADDRESS)
        || ip::same(ip.source, policy.link_local);
    if from_itself || ip::is_mapped(ip.source) || ip::is_multicast(ip.source) {
        return Err(DropReason::SpoofedIpv6);
    }
    if ip::is_multicast(ip.destination) {
        return Ok(None);
    }
    if ip::same(ip.destination, policy.link_local) {
        return Ok(Some(local::LINK_LOCAL));
    }
    if ip::same(ip.destination, policy.ipv6) && !ip::same(policy.ipv6, NO_ADDRESS) {
        return Ok(Some(local::IPV6));
    }
    Err(DropReason::WrongDestination)
}
