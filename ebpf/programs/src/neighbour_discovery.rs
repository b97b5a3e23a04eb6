//! Anti-spoofing of IPv6's housekeeping: neighbour discovery (RFC 4861), router advertisements
//! (RFC 6105), multicast listeners (RFC 2710, RFC 3810). No rule is asked. Uses no maps.

use aya_ebpf::programs::TcContext;
use keelson_ebpf_common::{Address, DropReason, NO_ADDRESS, PolicyEntry};

use crate::frame::{read, same_mac, words};
use crate::ip::{self, Ip, protocol};
use crate::transport::icmpv6_type;

/// Bytes of a solicitation or advertisement before its options.
const NEIGHBOUR_LEN: usize = 24;
/// Options that a guest's message may have; hosts send one or two.
const OPTIONS: usize = 3;
const SOURCE_LINK_LAYER: u8 = 1;
const TARGET_LINK_LAYER: u8 = 2;

/// Whether an IPv6 packet is housekeeping.
#[inline(always)]
pub fn is_housekeeping(ip: &Ip) -> bool {
    let [icmpv6_type, ..] = ip.first[0].to_ne_bytes();
    ip.protocol == protocol::ICMPV6
        && ip.fragment_offset == 0
        && ip.length >= 8
        && matches!(
            icmpv6_type,
            icmpv6_type::LISTENER_QUERY..=icmpv6_type::REDIRECT | icmpv6_type::LISTENER_REPORT
        )
}

/// Decides about a message that the guest sent. Its source may be none where it asks whether its own
/// address is free (RFC 4862), or has no address yet.
#[inline(always)]
pub fn sent(packet: &TcContext, policy: &PolicyEntry, ip: &Ip) -> Result<(), DropReason> {
    let [icmpv6_type, code, ..] = ip.first[0].to_ne_bytes();
    match icmpv6_type {
        icmpv6_type::LISTENER_QUERY | icmpv6_type::ROUTER_ADVERTISEMENT | icmpv6_type::REDIRECT => {
            return Err(DropReason::RouterAdvertisement);
        }
        icmpv6_type::LISTENER_REPORT | icmpv6_type::LISTENER_QUERY..=icmpv6_type::LISTENER_DONE => {
            return Ok(());
        }
        _ => {}
    }
    check_form(ip, code)?;
    if icmpv6_type == icmpv6_type::ROUTER_SOLICITATION {
        return check_options(packet, policy, ip.offset + 8, ip.length, 8);
    }
    let has_source = !ip::same(ip.source, NO_ADDRESS);
    let is_own = is_own(policy, target(packet, ip)?);
    let advertises = icmpv6_type == icmpv6_type::NEIGHBOUR_ADVERTISEMENT;
    if (advertises || !has_source) && !is_own {
        return Err(DropReason::SpoofedNeighbour);
    }
    check_options(
        packet,
        policy,
        ip.offset + NEIGHBOUR_LEN,
        ip.length,
        NEIGHBOUR_LEN,
    )
}

/// Decides about a message on its way to the guest. None of those that guests of this host sent
/// lies; the others come from the host or its uplink.
#[inline(always)]
pub fn received(packet: &TcContext, policy: &PolicyEntry, ip: &Ip) -> Result<(), DropReason> {
    let [icmpv6_type, code, ..] = ip.first[0].to_ne_bytes();
    match icmpv6_type {
        icmpv6_type::LISTENER_QUERY => Ok(()),
        icmpv6_type::ROUTER_ADVERTISEMENT | icmpv6_type::REDIRECT => check_form(ip, code),
        icmpv6_type::NEIGHBOUR_SOLICITATION => {
            check_form(ip, code)?;
            if is_own(policy, target(packet, ip)?) {
                Ok(())
            } else {
                Err(DropReason::WrongDestination)
            }
        }
        icmpv6_type::NEIGHBOUR_ADVERTISEMENT => {
            check_form(ip, code)?;
            if is_own(policy, target(packet, ip)?) {
                // Someone else claims the guest's address.
                return Err(DropReason::SpoofedNeighbour);
            }
            Ok(())
        }
        _ => Err(DropReason::WrongDestination),
    }
}

/// Sent on this link, not through a router, and not in fragments (RFC 4861 6.1, RFC 6980).
#[inline(always)]
fn check_form(ip: &Ip, code: u8) -> Result<(), DropReason> {
    if ip.hop_limit != 255 || code != 0 || ip.is_fragment {
        return Err(DropReason::Malformed);
    }
    Ok(())
}

#[inline(always)]
fn target(packet: &TcContext, ip: &Ip) -> Result<Address, DropReason> {
    if ip.length < NEIGHBOUR_LEN as u32 {
        return Err(DropReason::Malformed);
    }
    read(packet, ip.offset + 8)
}

#[inline(always)]
fn is_own(policy: &PolicyEntry, address: Address) -> bool {
    (ip::same(address, policy.ipv6) && !ip::same(address, NO_ADDRESS))
        || ip::same(address, policy.link_local)
}

/// Every link-layer address among the options must be the guest's own.
#[inline(always)]
fn check_options(
    packet: &TcContext,
    policy: &PolicyEntry,
    mut offset: usize,
    length: u32,
    mut position: usize,
) -> Result<(), DropReason> {
    for _ in 0..OPTIONS {
        if length as usize == position {
            return Ok(());
        }
        let [kind, eighths, mac @ ..]: [u8; 8] = read(packet, offset)?;
        let option_length = usize::from(eighths) * 8;
        if eighths == 0 || (length as usize) < position + option_length {
            return Err(DropReason::Malformed);
        }
        if matches!(kind, SOURCE_LINK_LAYER | TARGET_LINK_LAYER)
            && !same_mac(words(mac), policy.mac)
        {
            return Err(DropReason::SpoofedNeighbour);
        }
        offset += option_length;
        position += option_length;
    }
    if length as usize == position {
        Ok(())
    } else {
        Err(DropReason::Malformed)
    }
}
