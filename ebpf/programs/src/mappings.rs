//! Which external port a guest's port has, and whose an external port is (maps `NAT_POOLS`, `NAT_PORTS`,
//! `NAT_MAPPINGS`, `NAT_FORWARDS`, `NAT_CLAIMS`); see `keelson_ebpf_common::nat` for how they go together.

use aya_ebpf::programs::TcContext;
use keelson_ebpf_common::{
    Direction, DropReason, ForwardKey, Mapping, MappingKey, NO_POOL, NatClaim, NatGuest, NatPool,
    PortOwner, mapping_hash, nat_protocol, phase, port_index, stage, timeout,
};

use crate::atomic::compare_exchange;
use crate::maps::{Mappings, NAT_CLAIMS, NAT_FORWARDS, NAT_MAPPINGS, NAT_POOLS, NAT_PORTS};
use crate::transport::Transport;
use crate::{clock, frame, services};

/// As with flows: how long `last_seen_ns` may lag.
const REFRESH_NS: u64 = 1_000_000_000;

/// An external address, with a port of it.
#[derive(Clone, Copy)]
pub struct External<'a> {
    pub pool: &'a NatPool,
    /// The address's place in `NAT_POOLS`.
    pub index: u32,
    pub port: u16,
}

/// A guest's port that an external one leads to.
#[derive(Clone, Copy)]
pub struct Internal {
    /// The slot of the guest's interface.
    pub slot: u32,
    pub port: u16,
}

/// A guest's packet that can't go on.
pub struct Refused {
    pub reason: DropReason,
    /// The index of the guest's interface.
    pub ifindex: u32,
}

/// What a packet does to the mapping of its port.
#[derive(Clone, Copy)]
pub struct Use<'a> {
    pub direction: Direction,
    pub transport: &'a Transport,
    /// Whether there is anything behind the transport header.
    pub has_data: bool,
}

/// The pool at a place, if it is of this uplink.
#[inline(always)]
pub fn pool_of(index: u32, ifindex: u32) -> Option<&'static NatPool> {
    if index == NO_POOL {
        return None;
    }
    NAT_POOLS.get(index).filter(|pool| pool.ifindex == ifindex)
}

/// The external port of a guest's port at an uplink. If it has none, and the packet may open a flow, goes on
/// with `claim`, and comes back only if that fails. `None` if what the guest sends there is not translated.
#[inline(always)]
pub fn external<'a>(
    packet: &TcContext,
    guest: &NatGuest,
    ifindex: u32,
    key: &MappingKey,
    used: Use<'_>,
) -> Result<Option<External<'a>>, DropReason> {
    if let Some(forwarded) = forwarded(guest, ifindex, key) {
        return Ok(Some(forwarded));
    }
    let Some(pool) = pool_of(guest.pool, ifindex) else {
        return Ok(None);
    };
    let mappings = NAT_MAPPINGS
        .get(guest.slot)
        .ok_or(DropReason::PortsExhausted)?;
    let now = clock::now();
    let index = guest.pool;
    if let Some(mapping) = held(mappings, guest, key, now) {
        // SAFETY: map values stay readable and writable while the program runs; each field is one aligned
        // word. An entry that was evicted and used again meanwhile gets one port's time for another's.
        let mapping = unsafe { &mut *mapping };
        advance(mapping, used, now);
        let port = mapping.port;
        return Ok(Some(External { pool, index, port }));
    }
    if !can_open(used.transport) {
        return Err(DropReason::NotTranslatable);
    }
    let claim = NAT_CLAIMS
        .get_ptr_mut(0)
        .ok_or(DropReason::PortsExhausted)?;
    // SAFETY: the map is per CPU and the tc hooks run with preemption off: no one else has it.
    unsafe {
        *claim = NatClaim {
            guest: *guest,
            key: *key,
        }
    };
    let _ = services::go_on(packet, stage::CLAIM_PORT);
    Err(DropReason::PortsExhausted)
}

/// Gives a guest's port the external one that `external` wants for it; then `to_uplink` begins anew, or on the way
/// to another guest `turn_back`. A program of its own, for what the verifier has to go through before it would count for each try.
#[inline(always)]
pub fn claim(packet: &TcContext) -> Option<Refused> {
    let claim = NAT_CLAIMS.get_ptr(0)?;
    // SAFETY: see `external`.
    let NatClaim { guest, key } = unsafe { *claim };
    if give_port(&guest, &key).is_some() {
        let uplink = NAT_POOLS.get(guest.pool).map(|pool| pool.ifindex);
        let next = if uplink == Some(frame::ifindex(packet)) {
            stage::TO_UPLINK
        } else {
            stage::TURN_BACK
        };
        let _ = services::go_on(packet, next);
    }
    Some(Refused {
        reason: DropReason::PortsExhausted,
        ifindex: guest.ifindex,
    })
}

#[inline(always)]
fn give_port(guest: &NatGuest, key: &MappingKey) -> Option<()> {
    let pool = NAT_POOLS.get(guest.pool)?;
    let mappings = NAT_MAPPINGS.get(guest.slot)?;
    let now = clock::now();
    let mapping = Mapping {
        last_seen_ns: now,
        port: find_port(guest, pool, key, now)?,
        pool: guest.pool as u16,
        phase: phase::OPENING,
        finished: 0,
        reserved: [0; 2],
    };
    mappings.insert(key, mapping, 0).ok()
}

/// As [`external`], of a port that has one already.
#[inline(always)]
pub fn known_external<'a>(
    guest: &NatGuest,
    ifindex: u32,
    key: &MappingKey,
) -> Option<External<'a>> {
    if let Some(forwarded) = forwarded(guest, ifindex, key) {
        return Some(forwarded);
    }
    let pool = pool_of(guest.pool, ifindex)?;
    let mappings = NAT_MAPPINGS.get(guest.slot)?;
    let mapping = held(mappings, guest, key, clock::now())?;
    Some(External {
        pool,
        index: guest.pool,
        // SAFETY: see `external`.
        port: unsafe { (*mapping).port },
    })
}

/// The external port that is forwarded to a guest's port: what that sends comes from there.
#[inline(always)]
fn forwarded<'a>(guest: &NatGuest, ifindex: u32, key: &MappingKey) -> Option<External<'a>> {
    if guest.forward_pool == NO_POOL {
        return None;
    }
    let key = ForwardKey {
        slot: guest.slot,
        port: *key,
    };
    // SAFETY: reads aligned numbers; an entry that was replaced meanwhile gives another forward's port.
    let forwarded = unsafe { NAT_FORWARDS.get(key) }?;
    let pool = pool_of(forwarded.pool, ifindex)?;
    Some(External {
        pool,
        index: forwarded.pool,
        port: forwarded.port,
    })
}

/// Whose an external port is; the mapping of what is no forward is used.
#[inline(always)]
pub fn internal(index: u32, protocol: u8, local: u8, port: u16, used: Use<'_>) -> Option<Internal> {
    let now = clock::now();
    let (owner, mapping) = find_internal(index, protocol, local, port, now)?;
    if let Some(mapping) = mapping {
        // SAFETY: see `external`.
        advance(unsafe { &mut *mapping }, used, now);
    }
    Some(owner)
}

/// As [`internal`], but nothing is used.
#[inline(always)]
pub fn known_internal(index: u32, protocol: u8, local: u8, port: u16) -> Option<Internal> {
    find_internal(index, protocol, local, port, clock::now()).map(|(owner, _)| owner)
}

#[inline(always)]
fn find_internal(
    index: u32,
    protocol: u8,
    local: u8,
    port: u16,
    now: u64,
) -> Option<(Internal, Option<*mut Mapping>)> {
    let ports = NAT_PORTS.get(index)?;
    let owner = ports.get_ptr(port_index(protocol, port))?;
    // SAFETY: one aligned word, which others change meanwhile.
    let owner = PortOwner::from_word(unsafe { owner.read_volatile() });
    if owner.slot == 0 {
        return None;
    }
    let internal = Internal {
        slot: owner.slot,
        port: owner.port,
    };
    if owner.is_forward {
        return Some((internal, None));
    }
    let mapping = mapping_of(owner, index, protocol, local, port, now)?;
    Some((internal, Some(mapping)))
}

/// The living mapping by which a port's owner has it.
#[inline(always)]
fn mapping_of(
    owner: PortOwner,
    index: u32,
    protocol: u8,
    local: u8,
    port: u16,
    now: u64,
) -> Option<*mut Mapping> {
    let key = MappingKey {
        port: owner.port,
        protocol,
        local,
    };
    let mapping = living(NAT_MAPPINGS.get(owner.slot)?, &key, now)?;
    // SAFETY: see `external`.
    let found = unsafe { &*mapping };
    (found.port == port && u32::from(found.pool) == index).then_some(mapping)
}

/// The mapping of a guest's port, if the external port is its still: one that had timed out may have
/// lost it.
#[inline(always)]
fn held(mappings: &Mappings, guest: &NatGuest, key: &MappingKey, now: u64) -> Option<*mut Mapping> {
    let mapping = living(mappings, key, now)?;
    // SAFETY: see `external`.
    let (port, pool) = unsafe { ((*mapping).port, (*mapping).pool) };
    if u32::from(pool) != guest.pool {
        return None;
    }
    let ports = NAT_PORTS.get(guest.pool)?;
    let owner = ports.get_ptr(port_index(key.protocol, port))?;
    // SAFETY: see `find_internal`.
    let owner = unsafe { owner.read_volatile() };
    (owner == ours(guest, key)).then_some(mapping)
}

#[inline(always)]
fn ours(guest: &NatGuest, key: &MappingKey) -> u64 {
    let owner = PortOwner {
        slot: guest.slot,
        port: key.port,
        is_forward: false,
    };
    owner.word()
}

#[inline(always)]
fn living(mappings: &Mappings, key: &MappingKey, now: u64) -> Option<*mut Mapping> {
    let mapping = mappings.get_ptr_mut(key)?;
    // SAFETY: see `external`.
    let (phase, last_seen_ns) = unsafe { ((*mapping).phase, (*mapping).last_seen_ns) };
    let limit = match (key.protocol, phase) {
        (nat_protocol::TCP, phase::OPENING) => timeout::TCP_OPENING,
        (nat_protocol::TCP, phase::ESTABLISHED) => timeout::TCP_ESTABLISHED,
        (nat_protocol::TCP, phase::HALF_CLOSED) => timeout::TCP_HALF_CLOSED,
        (nat_protocol::TCP, _) => timeout::TCP_CLOSED,
        (nat_protocol::UDP, _) => timeout::DATAGRAM,
        _ => timeout::ICMP_ECHO,
    };
    (now.wrapping_sub(last_seen_ns) < limit).then_some(mapping)
}

#[inline(always)]
fn can_open(transport: &Transport) -> bool {
    !transport.resets() && !transport.finishes()
}

/// Moves a mapping on. Several connections may use it: one that has ended ends it only if no other sends.
#[inline(always)]
fn advance(mapping: &mut Mapping, used: Use<'_>, now: u64) {
    let transport = used.transport;
    if transport.resets() {
        mapping.phase = phase::CLOSED;
    } else if transport.finishes() {
        mapping.finished |= 1 << (used.direction as u8 & 1);
        mapping.phase = if mapping.finished == 3 {
            phase::CLOSED
        } else {
            phase::HALF_CLOSED
        };
    } else if mapping.phase == phase::CLOSED && (used.has_data || transport.opens()) {
        mapping.finished = 0;
        mapping.phase = phase::OPENING;
    } else if mapping.phase == phase::OPENING && used.direction == Direction::ToGuest {
        mapping.phase = phase::ESTABLISHED;
    }
    if now.wrapping_sub(mapping.last_seen_ns) > REFRESH_NS {
        mapping.last_seen_ns = now;
    }
}

/// Takes an external port for a guest's port: the same number if it is in the range and free, else one
/// that a hash gives. After sixteen tries the range counts as full: at three quarters of it taken, one
/// time in a hundred.
#[inline(always)]
fn find_port(guest: &NatGuest, pool: &NatPool, key: &MappingKey, now: u64) -> Option<u16> {
    let hash = mapping_hash(guest.slot, key);
    let mut port = first_port(pool, key.port);
    // No loop: see `services::find_port`.
    macro_rules! try_ports {
        ($($number:literal)*) => {
            if take_port(guest, key, port, now) {
                return Some(port);
            }
            $(
                port = other_port(pool, hash, $number);
                if take_port(guest, key, port, now) {
                    return Some(port);
                }
            )*
        };
    }
    try_ports!(1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
    None
}

#[inline(always)]
fn size(pool: &NatPool) -> u32 {
    u32::from(pool.last_port.wrapping_sub(pool.first_port)) + 1
}

#[inline(always)]
fn first_port(pool: &NatPool, wanted: u16) -> u16 {
    if wanted >= pool.first_port && wanted <= pool.last_port {
        return wanted;
    }
    pool.first_port
        .wrapping_add((u32::from(wanted) % size(pool)) as u16)
}

#[inline(always)]
fn other_port(pool: &NatPool, hash: u64, number: u64) -> u16 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let random = hash.wrapping_add(number).wrapping_mul(ODD) >> 32;
    let offset = random.wrapping_mul(u64::from(size(pool))) >> 32;
    pool.first_port.wrapping_add(offset as u16)
}

/// Makes a port the guest's, if nobody else has it.
#[inline(always)]
fn take_port(guest: &NatGuest, key: &MappingKey, port: u16, now: u64) -> bool {
    let Some(ports) = NAT_PORTS.get(guest.pool) else {
        return false;
    };
    let Some(owner) = ports.get_ptr_mut(port_index(key.protocol, port)) else {
        return false;
    };
    let ours = ours(guest, key);
    // SAFETY: one aligned word, which others change meanwhile.
    let before = unsafe { owner.read_volatile() };
    if before == ours {
        return true;
    }
    if before != 0 && is_taken(before, guest.pool, key, port, now) {
        return false;
    }
    // SAFETY: a word of a map's value.
    unsafe { compare_exchange(owner, before, ours) == before }
}

#[inline(always)]
fn is_taken(before: u64, pool: u32, key: &MappingKey, port: u16, now: u64) -> bool {
    let owner = PortOwner::from_word(before);
    owner.is_forward || mapping_of(owner, pool, key.protocol, key.local, port, now).is_some()
}
