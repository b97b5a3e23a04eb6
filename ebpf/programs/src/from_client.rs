//! What a guest sends to a service: translated by one program (`service_from_guest`), decided about by
//! the next (`from_client`), which sees whom the packet really goes to. Rules are asked about that
//! backend and its port, not about the service's address; only a guest that reaches itself through a
//! service is for its own rules a flow with the service.
//!
//! Maps: those of `services`, `flows`, `rules`, `fragments` and `stations`.

use aya_ebpf::programs::TcContext;
use keelson_ebpf_common::{
    Direction, DropReason, NO_ADDRESS, PolicyEntry, SERVICE_MAC, Workspace, from_ipv4, local,
    stage, translation,
};
use network_types::eth::EthHdr;

use crate::flows::{self, Ends};
use crate::frame::{self, Head, Payload};
use crate::ip::{self, Ip};
use crate::services::{self, Scope, ServicePort};
use crate::{Passed, fragments, stations, transport};

/// Translates a packet whose sender's Ethernet address was checked, and goes on with `decide`.
#[inline(always)]
pub fn translate(packet: &TcContext, policy: &PolicyEntry) -> Result<Passed, DropReason> {
    let head = frame::head(packet)?;
    frame::check_size(packet, policy)?;
    let ip = read(packet, &head)?;
    let local = check_source(policy, &ip)?;
    let scope = Scope {
        network: policy.network,
        slot: policy.slot,
        local,
    };
    let work = services::workspace()?;
    let found = services::forward(packet, &ip, scope, work)?;
    let is_hairpin = found.translation.flags & translation::HAIRPIN != 0;
    let [a, b, c, d] = ip.first[0].to_ne_bytes();
    work.source_port = u16::from_be_bytes([a, b]);
    work.destination_port = u16::from_be_bytes([c, d]);
    work.flags = found.translation.flags;
    work.service_port = found.service.port;
    work.service_protocol = found.service.protocol;
    found.translate(packet, &ip, found.translation.source)?;
    let source = if is_hairpin { SERVICE_MAC } else { policy.mac };
    let addresses = [found.translation.mac, source];
    if packet.store(0, &addresses, 0).is_err() {
        return Err(DropReason::Malformed);
    }
    Err(services::go_on(packet, stage::FROM_CLIENT))
}

/// The decision about a translated packet; see the module.
#[inline(always)]
pub fn decide(packet: &TcContext, policy: &PolicyEntry) -> Result<Passed, DropReason> {
    let work = services::workspace()?;
    let head = frame::head(packet)?;
    let ip = read(packet, &head)?;
    // A guest that is its own backend gets its packet back, from the service's address.
    let is_hairpin = work.flags & translation::HAIRPIN != 0;
    let (own, peer) = if is_hairpin {
        (ip.destination, ip.source)
    } else {
        (ip.source, ip.destination)
    };
    let local = if ip.is_ipv6 { local::IPV6 } else { local::IPV4 };
    let ends = Ends { own, local, peer };
    let station = if is_hairpin {
        None
    } else {
        stations::find(policy, head.destination)?
    };
    let direction = Direction::FromGuest;
    if ip.fragment_offset != 0 {
        fragments::follow(policy, &ends, &ip, direction)?;
    } else {
        let mut transport = transport::transport(&ip)?;
        let is_error = transport.is_icmp_error();
        if is_hairpin && !is_error {
            transport.source_port = work.source_port;
            transport.destination_port = work.destination_port;
            transport.rule_port = work.destination_port;
        }
        // What it reports about itself to itself concerns nobody else.
        if !(is_hairpin && is_error) {
            flows::judge(
                packet,
                policy,
                direction,
                &ends,
                &ip,
                &transport,
                !is_hairpin,
            )?;
        }
        fragments::note(policy, &ends, &ip, direction, !is_hairpin);
    }
    let is_answer = work.flags & translation::ANSWER != 0;
    let service = ServicePort {
        port: work.service_port,
        protocol: work.service_protocol,
    };
    let address = work.key.destination;
    services::count(
        work,
        policy.network,
        address,
        service,
        ip.destination,
        packet.len(),
        is_answer,
    );
    if is_hairpin {
        return Ok(Passed::To(frame::ifindex(packet)));
    }
    stations::send(packet, policy, station)
}

#[inline(always)]
fn read(packet: &TcContext, head: &Head) -> Result<&'static Ip, DropReason> {
    match frame::payload(head)? {
        Payload::Ipv4 => ip::ipv4(packet, head),
        Payload::Ipv6 => ip::ipv6(packet, head),
        Payload::Arp => Err(DropReason::NoService),
    }
}

/// The guest's own address, and no link-local one, for none of them reaches a service.
#[inline(always)]
fn check_source(policy: &PolicyEntry, ip: &Ip) -> Result<u8, DropReason> {
    if ip.is_ipv6 {
        let is_own = ip::same(ip.source, policy.ipv6) && !ip::same(ip.source, NO_ADDRESS);
        if !is_own || ip::is_mapped(ip.destination) {
            return Err(DropReason::SpoofedIpv6);
        }
        return Ok(local::IPV6);
    }
    if policy.ipv4 == 0 || !ip::same(ip.source, from_ipv4(policy.ipv4)) {
        return Err(DropReason::SpoofedIpv4);
    }
    Ok(local::IPV4)
}

/// Translates a packet of a service that may reach its client.
#[inline(always)]
pub fn answer(packet: &TcContext, policy: &PolicyEntry) -> Result<Passed, DropReason> {
    let head = frame::head(packet)?;
    let ip = read(packet, &head)?;
    // Pushed out since: the client's next packet brings it back.
    let work = services::workspace()?;
    let found = services::reverse(packet, &ip, policy.slot, work).ok_or(DropReason::NoService)?;
    rewrite_answer(packet, &ip, &found)?;
    count_answer(packet, work, policy.network, &found);
    Ok(Passed::On)
}

/// Counts a packet from a backend to a client in `network`.
#[inline(always)]
pub fn count_answer(
    packet: &TcContext,
    work: &mut Workspace,
    network: u32,
    found: &services::Found<'_>,
) {
    let address = found.translation.source;
    let (service, backend) = (found.service, found.source);
    services::count(work, network, address, service, backend, packet.len(), true);
}

/// Gives a packet from a backend, or an error about one to it, the service's address.
#[inline(always)]
pub fn rewrite_answer(
    packet: &TcContext,
    ip: &Ip,
    found: &services::Found<'_>,
) -> Result<(), DropReason> {
    // A router on the way reports in its own name.
    let reporter = if found.is_error && !ip::same(ip.source, found.source) {
        ip.source
    } else {
        found.translation.source
    };
    found.translate(packet, ip, reporter)?;
    packet
        .store(EthHdr::LEN - 8, &SERVICE_MAC, 0)
        .map_err(|_| DropReason::Malformed)
}
