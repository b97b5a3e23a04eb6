//! The bridge of a network, by which the host and whoever is behind it reach services: packets to a
//! service are translated on their way out of it (`service_from_host`), answers on their way in
//! (`service_to_host`). No rules are asked here: those of the backend's interface see the client.
//!
//! Maps: `GATEWAYS`; those of `services` and `stations`.

use aya_ebpf::programs::TcContext;
use keelson_ebpf_common::{DropReason, GatewayEntry, SERVICE_MAC, stage};

use crate::frame::{self, Payload};
use crate::ip::{self, protocol};
use crate::services::{self, Scope};
use crate::{Passed, from_client, hairpin, neighbour_discovery, stations};

/// Translates what goes to a service, and answers for where that is.
#[inline(always)]
pub fn from_host(packet: &TcContext, gateway: &GatewayEntry) -> Result<Passed, DropReason> {
    // What the host sends elsewhere is its own business.
    let Ok(head) = frame::head(packet) else {
        return Ok(Passed::On);
    };
    let is_for_service = frame::same_mac(head.destination, SERVICE_MAC);
    let ip = match frame::payload(&head) {
        Ok(Payload::Arp) => {
            return Ok(stations::answer_host_arp(packet, gateway.network));
        }
        Ok(Payload::Ipv6) if !is_for_service => {
            let [_, _, next_header, _] = head.network[1].to_ne_bytes();
            if next_header != protocol::ICMPV6 {
                return Ok(Passed::On);
            }
            let Ok(ip) = ip::ipv6(packet, &head) else {
                return Ok(Passed::On);
            };
            if !neighbour_discovery::is_housekeeping(&ip) {
                return Ok(Passed::On);
            }
            return Ok(stations::answer_host_solicitation(
                packet,
                gateway.network,
                &head,
                &ip,
            ));
        }
        _ if !is_for_service => return Ok(Passed::On),
        Ok(Payload::Ipv6) => ip::ipv6(packet, &head)?,
        Ok(Payload::Ipv4) => ip::ipv4(packet, &head)?,
        Err(reason) => return Err(reason),
    };
    let scope = Scope {
        network: gateway.network,
        slot: 0,
        local: 0,
    };
    let work = services::workspace()?;
    let found = services::forward(packet, &ip, scope, work)?;
    found.translate(packet, &ip, found.translation.source)?;
    let (address, backend) = (work.key.destination, found.translation.destination);
    services::count(
        work,
        gateway.network,
        address,
        found.service,
        backend,
        packet.len(),
        false,
    );
    if packet.store(0, &found.translation.mac, 0).is_err() {
        return Err(DropReason::Malformed);
    }
    let mac = frame::words(found.translation.mac);
    Ok(match stations::find_in(gateway.network, mac) {
        Some(ifindex) => Passed::To(ifindex),
        None => Passed::On,
    })
}

/// Translates what a backend answers, and goes on with what a guest may have at the uplink's address.
#[inline(always)]
pub fn to_host(packet: &TcContext, gateway: &GatewayEntry) -> Result<Passed, DropReason> {
    let head = frame::head(packet)?;
    let ip = match frame::payload(&head) {
        Ok(Payload::Ipv4) => ip::ipv4(packet, &head)?,
        Ok(Payload::Ipv6) => ip::ipv6(packet, &head)?,
        _ => return Ok(Passed::On),
    };
    let work = services::workspace()?;
    if let Some(found) = services::reverse(packet, &ip, 0, work) {
        from_client::rewrite_answer(packet, &ip, &found)?;
        from_client::count_answer(packet, work, gateway.network, &found);
    } else if hairpin::concerns(&ip) {
        return Err(services::go_on(packet, stage::TURN_BACK));
    }
    Ok(Passed::On)
}
