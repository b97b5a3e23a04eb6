//! Source NAT at the host's uplinks. `to_uplink` gives what guests send outside an address of the uplink
//! and a port of that address; `from_uplink` gives what answers, and what is sent to forwarded ports, the
//! guest's address and port. No rules are asked here: those of the guest's interface see the other side as
//! it is, before and after. What the host itself sends and gets is left alone.
//!
//! Maps: `NAT_GUESTS`, `NAT_ADDRESSES`, `NAT_SLOTS`, `NAT_FRAGMENTS`; those of `mappings`.

use aya_ebpf::programs::TcContext;
use keelson_ebpf_common::{
    Address, Direction, DropReason, ExternalKey, MappingKey, NO_ADDRESS, NO_POOL, NatFragment,
    NatFragmentKey, NatGuest, Translation, from_ipv4, local, nat_protocol, timeout,
};
use network_types::udp::UdpHdr;

use crate::frame::{self, Head, Payload};
use crate::ip::{self, Ip, protocol};
use crate::mappings::{self, Refused, Use};
use crate::maps::{NAT_ADDRESSES, NAT_FRAGMENTS, NAT_GUESTS, NAT_SLOTS};
use crate::transport::{self, Quoted, Transport};
use crate::{clock, services, translate};

/// A packet that is translated.
pub struct Translated {
    /// The external address's place in `NAT_POOLS`.
    pub pool: u32,
}

/// Translates what a guest sends; `None` for what goes on as it is.
#[inline(always)]
pub fn to_uplink(packet: &TcContext) -> Result<Option<Translated>, Refused> {
    let Some((head, payload)) = read_head(packet) else {
        return Ok(None);
    };
    let source = source(&head, payload);
    // SAFETY: reads aligned numbers; the host waits for running programs before it uses a slot again.
    let Some(guest) = (unsafe { NAT_GUESTS.get(source) }) else {
        return Ok(host_error(packet, &head, payload));
    };
    let refused = |reason| Refused {
        reason,
        ifindex: guest.ifindex,
    };
    let ip = read_ip(packet, &head, payload).map_err(refused)?;
    from_guest(packet, guest, &ip).map_err(refused)
}

/// Translates what comes for a guest; `None` for what is the host's.
#[inline(always)]
pub fn from_uplink(packet: &TcContext) -> Option<Translated> {
    let (head, payload) = read_head(packet)?;
    let key = ExternalKey {
        address: destination(&head, payload),
        ifindex: frame::ifindex(packet),
    };
    // SAFETY: reads one number.
    let pool = *unsafe { NAT_ADDRESSES.get(key) }?;
    // What can't be read is for the host to refuse.
    let ip = read_ip(packet, &head, payload).ok()?;
    to_guest(packet, pool, &ip)
}

#[inline(always)]
pub fn read_head(packet: &TcContext) -> Option<(Head, Payload)> {
    let head = frame::head(packet).ok()?;
    match frame::payload(&head) {
        Ok(payload @ (Payload::Ipv4 | Payload::Ipv6)) => Some((head, payload)),
        _ => None,
    }
}

#[inline(always)]
pub fn read_ip(
    packet: &TcContext,
    head: &Head,
    payload: Payload,
) -> Result<&'static Ip, DropReason> {
    match payload {
        Payload::Ipv6 => ip::ipv6(packet, head),
        _ => ip::ipv4(packet, head),
    }
}

#[inline(always)]
fn source(head: &Head, payload: Payload) -> Address {
    let [_, _, a, b, c] = head.network;
    match payload {
        Payload::Ipv6 => [a, b, c, head.rest[0]],
        _ => from_ipv4(b),
    }
}

#[inline(always)]
fn destination(head: &Head, payload: Payload) -> Address {
    match payload {
        Payload::Ipv6 => [head.rest[1], head.rest[2], head.rest[3], head.rest[4]],
        _ => from_ipv4(head.network[4]),
    }
}

#[inline(always)]
pub fn nat_protocol(ip_protocol: u8) -> Option<u8> {
    match ip_protocol {
        protocol::TCP => Some(nat_protocol::TCP),
        protocol::UDP => Some(nat_protocol::UDP),
        protocol::ICMP | protocol::ICMPV6 => Some(nat_protocol::ECHO),
        _ => None,
    }
}

#[inline(always)]
pub fn local(ip: &Ip) -> u8 {
    if ip.is_ipv6 { local::IPV6 } else { local::IPV4 }
}

#[inline(always)]
fn from_guest(
    packet: &TcContext,
    guest: &NatGuest,
    ip: &Ip,
) -> Result<Option<Translated>, DropReason> {
    let ifindex = frame::ifindex(packet);
    if ip.fragment_offset != 0 {
        // It passed the guest's rules behind its first one, and has no port to translate.
        let index = if guest.pool == NO_POOL {
            guest.forward_pool
        } else {
            guest.pool
        };
        let Some(pool) = mappings::pool_of(index, ifindex) else {
            return Ok(None);
        };
        let work = services::workspace()?;
        work.becomes = ends([pool.address, ip.destination], [0; 2]);
        translate::packet(packet, ip, &work.becomes)?;
        return Ok(Some(Translated { pool: index }));
    }
    let transport = transport::transport(ip)?;
    if transport.is_icmp_error() {
        return error_from_guest(packet, guest, ip);
    }
    let is_echo = transport.is_any_icmp();
    let known = nat_protocol(ip.protocol).filter(|_| !is_echo || transport.is_echo_request());
    let Some(protocol) = known else {
        return match mappings::pool_of(guest.pool, ifindex) {
            Some(_) => Err(DropReason::NotTranslatable),
            None => Ok(None),
        };
    };
    let key = MappingKey {
        port: transport.source_port,
        protocol,
        local: local(ip),
    };
    let used = used(Direction::FromGuest, ip, &transport);
    let Some(external) = mappings::external(packet, guest, ifindex, &key, used)? else {
        return Ok(None);
    };
    let work = services::workspace()?;
    let ports = [external.port, transport.destination_port];
    work.becomes = ends([external.pool.address, ip.destination], ports);
    translate::packet(packet, ip, &work.becomes)?;
    let pool = external.index;
    Ok(Some(Translated { pool }))
}

/// What a guest reports, to whoever sent it, about a packet that it got: to anyone else it is not translated, for
/// that one's address would come out of the quoted packet, which no rule was asked about.
#[inline(always)]
fn error_from_guest(
    packet: &TcContext,
    guest: &NatGuest,
    ip: &Ip,
) -> Result<Option<Translated>, DropReason> {
    let ifindex = frame::ifindex(packet);
    let quoted = transport::quoted(packet, ip)?;
    let is_own = ip::same(quoted.destination, ip.source) && ip::same(quoted.source, ip.destination);
    let known = quoted_protocol(&quoted).filter(|_| is_own);
    let external = known.and_then(|protocol| {
        let key = MappingKey {
            port: quoted.destination_port,
            protocol,
            local: local(ip),
        };
        mappings::known_external(guest, ifindex, &key)
    });
    let Some(external) = external else {
        return match mappings::pool_of(guest.pool, ifindex) {
            Some(_) => Err(DropReason::NotTranslatable),
            None => Ok(None),
        };
    };
    let work = services::workspace()?;
    let ports = [external.port, quoted.source_port];
    work.becomes = ends([external.pool.address, quoted.source], ports);
    translate::error(packet, ip, external.pool.address, &work.becomes, false)?;
    let pool = external.index;
    Ok(Some(Translated { pool }))
}

/// The protocol of a packet that came for a guest. No echo is asked of one from outside.
#[inline(always)]
pub fn quoted_protocol(quoted: &Quoted) -> Option<u8> {
    match quoted.protocol {
        protocol::TCP | protocol::UDP if quoted.has_flow => nat_protocol(quoted.protocol),
        _ => None,
    }
}

/// What the host reports about a packet that it could not pass on to a guest: the other side knows the
/// external address only.
#[inline(always)]
fn host_error(packet: &TcContext, head: &Head, payload: Payload) -> Option<Translated> {
    let is_icmp = match payload {
        Payload::Ipv6 => head.network[1].to_ne_bytes()[2] == protocol::ICMPV6,
        _ => head.network[2].to_ne_bytes()[1] == protocol::ICMP,
    };
    if !is_icmp {
        return None;
    }
    let ip = read_ip(packet, head, payload).ok()?;
    if ip.fragment_offset != 0 || !transport::transport(&ip).ok()?.is_icmp_error() {
        return None;
    }
    let quoted = transport::quoted(packet, &ip).ok()?;
    let protocol = quoted_protocol(&quoted)?;
    if !ip::same(quoted.source, ip.destination) {
        return None;
    }
    // SAFETY: see `to_uplink`.
    let guest = unsafe { NAT_GUESTS.get(quoted.destination) }?;
    let key = MappingKey {
        port: quoted.destination_port,
        protocol,
        local: local(&ip),
    };
    let external = mappings::known_external(guest, frame::ifindex(packet), &key)?;
    let work = services::workspace().ok()?;
    let ports = [external.port, quoted.source_port];
    work.becomes = ends([external.pool.address, quoted.source], ports);
    translate::error(packet, &ip, ip.source, &work.becomes, false).ok()?;
    let pool = external.index;
    Some(Translated { pool })
}

#[inline(always)]
fn to_guest(packet: &TcContext, pool: u32, ip: &Ip) -> Option<Translated> {
    if ip.fragment_offset != 0 {
        let key = fragment_key(ip, pool);
        // SAFETY: reads aligned numbers; an entry that was evicted meanwhile gives another datagram's
        // guest, which can't put it together.
        let first = unsafe { NAT_FRAGMENTS.get(key) }?;
        if clock::now().wrapping_sub(first.first_seen_ns) >= timeout::FRAGMENTS {
            return None;
        }
        let work = services::workspace().ok()?;
        work.becomes = ends([ip.source, guest_address(first.slot, ip)?], [0; 2]);
        translate::packet(packet, ip, &work.becomes).ok()?;
        return Some(Translated { pool });
    }
    let transport = transport::transport(ip).ok()?;
    if transport.is_icmp_error() {
        return error_to_guest(packet, pool, ip);
    }
    let is_echo = transport.is_any_icmp();
    let protocol = nat_protocol(ip.protocol).filter(|_| !is_echo || transport.is_echo_reply())?;
    let used = used(Direction::ToGuest, ip, &transport);
    let port = transport.destination_port;
    let internal = mappings::internal(pool, protocol, local(ip), port, used)?;
    let work = services::workspace().ok()?;
    let source_port = if is_echo {
        internal.port
    } else {
        transport.source_port
    };
    let addresses = [ip.source, guest_address(internal.slot, ip)?];
    work.becomes = ends(addresses, [source_port, internal.port]);
    translate::packet(packet, ip, &work.becomes).ok()?;
    if ip.more_fragments {
        note_fragment(ip, pool, internal.slot);
    }
    Some(Translated { pool })
}

/// What someone on the way, or the other side, reports about a packet that a guest sent.
#[inline(always)]
fn error_to_guest(packet: &TcContext, pool: u32, ip: &Ip) -> Option<Translated> {
    let quoted = transport::quoted(packet, ip).ok()?;
    let protocol = nat_protocol(quoted.protocol).filter(|_| quoted.has_flow)?;
    if !ip::same(quoted.source, ip.destination) {
        return None;
    }
    let internal = mappings::known_internal(pool, protocol, local(ip), quoted.source_port)?;
    let work = services::workspace().ok()?;
    let addresses = [quoted.destination, guest_address(internal.slot, ip)?];
    work.becomes = ends(addresses, [quoted.destination_port, internal.port]);
    let is_echo = protocol == nat_protocol::ECHO;
    translate::error(packet, ip, ip.source, &work.becomes, is_echo).ok()?;
    Some(Translated { pool })
}

#[inline(always)]
pub fn guest_address(slot: u32, ip: &Ip) -> Option<Address> {
    let addresses = NAT_SLOTS.get(slot)?;
    let address = if ip.is_ipv6 {
        addresses.ipv6
    } else {
        addresses.ipv4
    };
    // Zeros where the interface is gone.
    (!ip::same(address, NO_ADDRESS)).then_some(address)
}

#[inline(always)]
pub fn used<'a>(direction: Direction, ip: &Ip, transport: &'a Transport) -> Use<'a> {
    let header = if ip.protocol == protocol::TCP {
        u32::from(ip.first[3].to_ne_bytes()[0] >> 4) * 4
    } else {
        UdpHdr::LEN as u32
    };
    Use {
        direction,
        transport,
        has_data: ip.length > header,
    }
}

#[inline(always)]
pub fn ends([source, destination]: [Address; 2], ports: [u16; 2]) -> Translation {
    Translation {
        source,
        destination,
        source_port: ports[0],
        destination_port: ports[1],
        mac: [0; 6],
        backend: 0,
        flags: 0,
        service_port: 0,
        service_protocol: 0,
        reserved: 0,
        last_seen_ns: 0,
    }
}

#[inline(always)]
pub fn fragment_key(ip: &Ip, pool: u32) -> NatFragmentKey {
    NatFragmentKey {
        source: ip.source,
        identification: ip.identification,
        pool: pool as u16,
        protocol: if ip.is_ipv6 { 0 } else { ip.protocol },
        reserved: 0,
    }
}

#[inline(always)]
pub fn note_fragment(ip: &Ip, pool: u32, slot: u32) {
    let first = NatFragment {
        first_seen_ns: clock::now(),
        slot,
        reserved: 0,
    };
    // Without memory for it the other fragments are the host's, which can't put them together.
    let _ = NAT_FRAGMENTS.insert(fragment_key(ip, pool), first, 0);
}
