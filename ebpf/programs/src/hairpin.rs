//! What a guest sends to the uplink's address, to a port that is a guest's (RFC 4787, 6): both ends are translated at
//! once, as if the packet had left by the uplink and come back, and it goes straight to that guest's interface. So
//! answers come to the uplink's address, too, and are translated the same way. The guest's rules see the uplink's
//! address. What is to ports of nobody is the host's. At the ingress hook of a network's bridge.
//!
//! Maps: `NAT_GUESTS`, `NAT_SLOTS`, `NAT_FRAGMENTS`, `POLICIES`; those of `mappings`.

use aya_ebpf::programs::TcContext;
use keelson_ebpf_common::{
    Address, Direction, DropReason, MappingKey, NO_POOL, NatGuest, NatPool, flag, timeout,
};

use crate::ip::{self, Ip};
use crate::mappings::{self, Refused};
use crate::maps::{NAT_FRAGMENTS, NAT_GUESTS, NAT_POOLS, POLICIES};
use crate::{Passed, clock, counters, services, translate, transport, uplink};

/// A guest that sends to the address of an uplink.
struct Client<'a> {
    guest: &'a NatGuest,
    pool: &'a NatPool,
    /// The address's place in `NAT_POOLS`.
    index: u32,
}

/// Whether a packet may be one to a guest's port of an uplink's address. Of guests without any of such an address
/// none is.
#[inline(always)]
pub fn concerns(ip: &Ip) -> bool {
    client(ip).is_some()
}

/// Sends a packet to the guest whose port it is for; `None` for what is the host's.
#[inline(always)]
pub fn turn(packet: &TcContext) -> Result<Option<Passed>, Refused> {
    let Some((head, payload)) = uplink::read_head(packet) else {
        return Ok(None);
    };
    // What can't be read is for the host to refuse.
    let Ok(ip) = uplink::read_ip(packet, &head, payload) else {
        return Ok(None);
    };
    let Some(client) = client(&ip) else {
        return Ok(None);
    };
    let refused = |reason| Refused {
        reason,
        ifindex: client.guest.ifindex,
    };
    turn_of(packet, &client, &ip).map_err(refused)
}

#[inline(always)]
fn client(ip: &Ip) -> Option<Client<'static>> {
    // SAFETY: see `uplink::to_uplink`.
    let guest = unsafe { NAT_GUESTS.get(ip.source) }?;
    let index = if is_at(guest.pool, ip.destination) {
        guest.pool
    } else if is_at(guest.forward_pool, ip.destination) {
        guest.forward_pool
    } else {
        return None;
    };
    let pool = NAT_POOLS.get(index)?;
    Some(Client { guest, pool, index })
}

#[inline(always)]
fn is_at(index: u32, address: Address) -> bool {
    index != NO_POOL
        && NAT_POOLS
            .get(index)
            .is_some_and(|pool| ip::same(pool.address, address))
}

#[inline(always)]
fn turn_of(packet: &TcContext, client: &Client<'_>, ip: &Ip) -> Result<Option<Passed>, DropReason> {
    if ip.fragment_offset != 0 {
        return Ok(later_fragment(packet, client, ip));
    }
    let Ok(transport) = transport::transport(ip) else {
        return Ok(None);
    };
    if transport.is_icmp_error() {
        return Ok(error(packet, client, ip));
    }
    // An echo to the address is the host's to answer.
    let known = uplink::nat_protocol(ip.protocol).filter(|_| !transport.is_any_icmp());
    let Some(protocol) = known else {
        return Ok(None);
    };
    let local = uplink::local(ip);
    let port = transport.destination_port;
    let Some(owner) = mappings::known_internal(client.index, protocol, local, port) else {
        return Ok(None);
    };
    let Some(target) = target(client, owner.slot, ip) else {
        return Ok(None);
    };
    let key = MappingKey {
        port: transport.source_port,
        protocol,
        local,
    };
    let used = uplink::used(Direction::FromGuest, ip, &transport);
    let uplink = client.pool.ifindex;
    let Some(external) = mappings::external(packet, client.guest, uplink, &key, used)? else {
        return Ok(None);
    };
    let used = uplink::used(Direction::ToGuest, ip, &transport);
    let _ = mappings::internal(client.index, protocol, local, port, used);
    let work = services::workspace()?;
    let ends = [external.pool.address, target.address];
    work.becomes = uplink::ends(ends, [external.port, owner.port]);
    translate::packet(packet, ip, &work.becomes)?;
    if ip.more_fragments {
        uplink::note_fragment(ip, client.index, owner.slot);
    }
    deliver(packet, client, &target).map(Some)
}

/// A guest that a packet turns to.
struct TargetGuest {
    address: Address,
    ifindex: u32,
    mac: [u8; 6],
}

/// The guest with a slot, if the client may reach it: in an isolated network no other guest may.
#[inline(always)]
fn target(client: &Client<'_>, slot: u32, ip: &Ip) -> Option<TargetGuest> {
    let address = uplink::guest_address(slot, ip)?;
    // SAFETY: see `uplink::to_uplink`.
    let guest = unsafe { NAT_GUESTS.get(address) }?;
    // SAFETY: the host replaces entries as a whole and waits for running programs before it changes the map again.
    let policy = unsafe { POLICIES.get(guest.ifindex) }?;
    if policy.flags & flag::ISOLATED != 0 && guest.ifindex != client.guest.ifindex {
        return None;
    }
    Some(TargetGuest {
        address,
        ifindex: guest.ifindex,
        mac: policy.mac,
    })
}

#[inline(always)]
fn later_fragment(packet: &TcContext, client: &Client<'_>, ip: &Ip) -> Option<Passed> {
    // SAFETY: as in `uplink::to_guest`.
    let first = unsafe { NAT_FRAGMENTS.get(uplink::fragment_key(ip, client.index)) }?;
    if clock::now().wrapping_sub(first.first_seen_ns) >= timeout::FRAGMENTS {
        return None;
    }
    let target = target(client, first.slot, ip)?;
    let work = services::workspace().ok()?;
    work.becomes = uplink::ends([client.pool.address, target.address], [0; 2]);
    translate::packet(packet, ip, &work.becomes).ok()?;
    deliver(packet, client, &target).ok()
}

/// What a guest reports about a packet that turned to it.
#[inline(always)]
fn error(packet: &TcContext, client: &Client<'_>, ip: &Ip) -> Option<Passed> {
    let quoted = transport::quoted(packet, ip).ok()?;
    let protocol = uplink::quoted_protocol(&quoted)?;
    if !ip::same(quoted.source, ip.destination) || !ip::same(quoted.destination, ip.source) {
        return None;
    }
    let local = uplink::local(ip);
    let owner = mappings::known_internal(client.index, protocol, local, quoted.source_port)?;
    let target = target(client, owner.slot, ip)?;
    let key = MappingKey {
        port: quoted.destination_port,
        protocol,
        local,
    };
    let external = mappings::known_external(client.guest, client.pool.ifindex, &key)?;
    let work = services::workspace().ok()?;
    let ends = [external.pool.address, target.address];
    work.becomes = uplink::ends(ends, [external.port, owner.port]);
    translate::error(packet, ip, external.pool.address, &work.becomes, false).ok()?;
    deliver(packet, client, &target).ok()
}

/// Counts the packet as one that left by the uplink and one that came by it, and sends it to its guest.
#[inline(always)]
fn deliver(
    packet: &TcContext,
    client: &Client<'_>,
    target: &TargetGuest,
) -> Result<Passed, DropReason> {
    // From the gateway, as what it routes.
    let gateway: [u8; 6] = packet.load(0).map_err(|_| DropReason::Malformed)?;
    packet
        .store(0, &[target.mac, gateway], 0)
        .map_err(|_| DropReason::Malformed)?;
    let length = packet.len();
    counters::count_translated(client.index, Direction::FromGuest, length);
    counters::count_translated(client.index, Direction::ToGuest, length);
    Ok(Passed::To(target.ifindex))
}
