//! Which backend a packet to a service goes to, and what the ends of a service's packets become (maps
//! `SERVICES`, `TRANSLATIONS`).
//!
//! The first packet of a flow takes the backend that the service's lookup table has for its ends. What
//! its packets and their answers become is noted, so that the flow stays with its backend when the
//! table changes. A flow whose backend serves no longer gets another one with its next packet: a
//! datagram goes on there, of TCP that backend knows nothing, and resets it.

use core::hint::black_box;

use aya_ebpf::programs::TcContext;
use keelson_ebpf_common::{
    Address, BACKENDS, Backend, DropReason, NO_BACKEND, ServiceEntry, ServiceKey, TABLE_PLACES,
    Translation, TranslationKey, Workspace, flow_hash, timeout, translation, way,
};

use crate::clock;
use crate::flows;
use crate::ip::{self, Ip, protocol};
use crate::maps::{SERVICES, STAGES, TRANSLATIONS, Translations, WORKSPACE};
use crate::translate;
use crate::transport::{self, Transport};

/// As with flows: how long `last_seen_ns` may lag.
const REFRESH_NS: u64 = 1_000_000_000;
/// The dynamic ports (RFC 6335, 6), a quarter of all.
const FIRST_DYNAMIC_PORT: u16 = 0xc000;
/// From one try to the next.
const PORT_STEP: u16 = 7919;

/// Whose services and translations are meant.
#[derive(Clone, Copy)]
pub struct Scope {
    /// The network that the packet is in.
    pub network: u32,
    /// The interface's slot; zero for the host.
    pub slot: u32,
    /// One of `keelson_ebpf_common::local`, of a guest.
    pub local: u8,
}

/// What a packet becomes.
pub struct Found<'a> {
    pub translation: &'a Translation,
    pub is_error: bool,
    /// The address whose packets are translated: who reports an error may be another.
    pub source: Address,
}

impl Found<'_> {
    /// Translates the packet; of an error, who reports it becomes `reporter`.
    #[inline(always)]
    pub fn translate(
        &self,
        packet: &TcContext,
        ip: &Ip,
        reporter: Address,
    ) -> Result<(), DropReason> {
        if self.is_error {
            translate::error(packet, ip, reporter, self.translation, false)
        } else {
            translate::packet(packet, ip, self.translation)
        }
    }
}

/// Goes on with another program of `STAGES`; comes back only if it isn't there.
#[inline(always)]
pub fn go_on(packet: &TcContext, stage: u32) -> DropReason {
    // SAFETY: nothing here has anything to drop.
    unsafe { STAGES.tail_call(packet, stage) };
    DropReason::NoService
}

/// What a CPU has at hand; no one else has it until the packet's last program ends.
#[inline(always)]
pub fn workspace() -> Result<&'static mut Workspace, DropReason> {
    let workspace = WORKSPACE.get_ptr_mut(0).ok_or(DropReason::NoService)?;
    // SAFETY: the map is per CPU and the tc hooks run with preemption off: no one else has it.
    Ok(unsafe { &mut *workspace })
}

/// What becomes of a packet from a client to a service's address.
#[inline(always)]
pub fn forward<'a>(
    packet: &TcContext,
    ip: &Ip,
    scope: Scope,
    work: &mut Workspace,
) -> Result<Found<'a>, DropReason> {
    let translations = TRANSLATIONS.get(scope.slot).ok_or(DropReason::NoService)?;
    let now = clock::now();
    if ip.fragment_offset != 0 {
        work.key = fragment_key(ip, way::FORWARD);
        let translation = find(translations, &work.key, now).ok_or(DropReason::Fragment)?;
        return Ok(found(translation, false, ip.source));
    }
    let transport = transport::transport(ip)?;
    if transport.is_icmp_error() {
        set_quoted_key(&mut work.key, packet, ip, way::FORWARD)?;
        let translation = find(translations, &work.key, now).ok_or(DropReason::NoService)?;
        return Ok(found(translation, true, work.key.source));
    }
    if !matches!(transport.protocol, protocol::TCP | protocol::UDP) {
        return Err(DropReason::NoService);
    }
    work.key = own_key(ip, &transport, way::FORWARD);
    let known = find(translations, &work.key, now);
    let translation = match known.filter(|known| is_served(scope, &work.key, known)) {
        Some(known) => known,
        None => {
            create(translations, scope, work, now)?;
            find(translations, &work.key, now).ok_or(DropReason::NoService)?
        }
    };
    note_fragment(translations, ip, translation, work, way::FORWARD);
    Ok(found(translation, false, ip.source))
}

/// What becomes of a packet from a backend to a client; `None` if it is no answer of a service.
#[inline(always)]
pub fn reverse<'a>(
    packet: &TcContext,
    ip: &Ip,
    slot: u32,
    work: &mut Workspace,
) -> Option<Found<'a>> {
    let translations = TRANSLATIONS.get(slot)?;
    let now = clock::now();
    if ip.fragment_offset != 0 {
        work.key = fragment_key(ip, way::REVERSE);
        let translation = find(translations, &work.key, now)?;
        return Some(found(translation, false, ip.source));
    }
    let transport = transport::transport(ip).ok()?;
    if transport.is_icmp_error() {
        set_quoted_key(&mut work.key, packet, ip, way::REVERSE).ok()?;
        let translation = find(translations, &work.key, now)?;
        return Some(found(translation, true, work.key.source));
    }
    if !matches!(transport.protocol, protocol::TCP | protocol::UDP) {
        return None;
    }
    work.key = own_key(ip, &transport, way::REVERSE);
    let translation = find(translations, &work.key, now)?;
    note_fragment(translations, ip, translation, work, way::REVERSE);
    Some(found(translation, false, ip.source))
}

#[inline(always)]
fn found(translation: &Translation, is_error: bool, source: Address) -> Found<'_> {
    Found {
        translation,
        is_error,
        source,
    }
}

#[inline(always)]
fn own_key(ip: &Ip, transport: &Transport, way: u8) -> TranslationKey {
    TranslationKey {
        source: ip.source,
        destination: ip.destination,
        source_port: transport.source_port,
        destination_port: transport.destination_port,
        protocol: ip.protocol,
        way,
        reserved: [0; 2],
    }
}

/// Makes the key that of packets which go the way of an ICMP error, of the flow whose other way the
/// packet that it quotes went.
#[inline(always)]
fn set_quoted_key(
    key: &mut TranslationKey,
    packet: &TcContext,
    ip: &Ip,
    way: u8,
) -> Result<(), DropReason> {
    let quoted = transport::quoted(packet, ip)?;
    if !quoted.has_flow || !matches!(quoted.protocol, protocol::TCP | protocol::UDP) {
        return Err(DropReason::NoService);
    }
    *key = TranslationKey {
        source: quoted.destination,
        destination: quoted.source,
        source_port: quoted.destination_port,
        destination_port: quoted.source_port,
        protocol: quoted.protocol,
        way,
        reserved: [0; 2],
    };
    Ok(())
}

#[inline(always)]
fn fragment_key(ip: &Ip, way: u8) -> TranslationKey {
    let [a, b, c, d] = ip.identification;
    TranslationKey {
        source: ip.source,
        destination: ip.destination,
        source_port: u16::from_be_bytes([a, b]),
        destination_port: u16::from_be_bytes([c, d]),
        protocol: if ip.is_ipv6 { 0 } else { ip.protocol },
        way: way + way::FRAGMENT,
        reserved: [0; 2],
    }
}

/// A translation that was used lately enough.
#[inline(always)]
fn find<'a>(
    translations: &Translations,
    key: &TranslationKey,
    now: u64,
) -> Option<&'a Translation> {
    let found = translations.get_ptr_mut(key)?;
    // SAFETY: map values stay readable and writable while the program runs. CPUs may race on the time,
    // one aligned word. An entry that was evicted and used again meanwhile gives another translation,
    // of the same interface: the packet is one that the other side has no flow for.
    let found = unsafe { &mut *found };
    let limit = if key.way >= way::FRAGMENT {
        timeout::FRAGMENTS
    } else if key.protocol == protocol::TCP {
        timeout::TCP_ESTABLISHED
    } else {
        timeout::DATAGRAM
    };
    let age = now.wrapping_sub(found.last_seen_ns);
    if age >= limit {
        return None;
    }
    if age > REFRESH_NS {
        found.last_seen_ns = now;
    }
    Some(found)
}

/// Lets the other fragments of a datagram follow its first one.
#[inline(always)]
fn note_fragment(
    translations: &Translations,
    ip: &Ip,
    translation: &Translation,
    work: &mut Workspace,
    way: u8,
) {
    if ip.more_fragments {
        work.answers = fragment_key(ip, way);
        work.becomes = *translation;
        work.becomes.last_seen_ns = clock::now();
        // Without memory for it the other fragments are dropped.
        let _ = translations.insert(&work.answers, &work.becomes, 0);
    }
}

#[inline(always)]
fn service(scope: Scope, key: &TranslationKey) -> Option<&'static ServiceEntry> {
    let key = ServiceKey {
        address: key.destination,
        network: scope.network,
        port: key.destination_port,
        protocol: key.protocol,
        reserved: 0,
    };
    // SAFETY: the host replaces entries as a whole and waits for running programs before it changes
    // the map again.
    let service = SERVICES.get_ptr(key)?;
    Some(unsafe { &*service })
}

/// The backend at a place; `None` for [`NO_BACKEND`]. The verifier must see a bound on the very number
/// that is used: before Linux 6.8 it forgets what it learnt by a comparison once the number is on the
/// stack.
#[inline(always)]
fn backend_at(service: &ServiceEntry, place: u8) -> Option<&Backend> {
    if usize::from(place) >= BACKENDS {
        return None;
    }
    let place = black_box(usize::from(place)) & (BACKENDS - 1);
    service.backends.get(place)
}

/// Whether the backend of a flow still serves.
#[inline(always)]
fn is_served(scope: Scope, key: &TranslationKey, known: &Translation) -> bool {
    if known.flags & translation::ANSWER != 0 {
        return true;
    }
    let service = service(scope, key);
    let Some(backend) = service.and_then(|service| backend_at(service, known.backend)) else {
        return false;
    };
    ip::same(backend.address, known.destination) && backend.port == known.destination_port
}

/// Chooses a backend, and notes what the flow's packets and their answers become.
#[inline(always)]
fn create(
    translations: &Translations,
    scope: Scope,
    work: &mut Workspace,
    now: u64,
) -> Result<(), DropReason> {
    let service = service(scope, &work.key).ok_or(DropReason::NoService)?;
    let hash = flow_hash(&work.key);
    // The compiler would leave out the bound, and the verifier must see it.
    let place = black_box(hash as usize) & (TABLE_PLACES - 1);
    let place = service.table.get(place).copied().unwrap_or(NO_BACKEND);
    let backend = backend_at(service, place).ok_or(DropReason::NoBackend)?;
    let is_hairpin = ip::same(backend.address, work.key.source);
    work.answers = TranslationKey {
        source: backend.address,
        source_port: backend.port,
        way: if is_hairpin {
            way::FORWARD
        } else {
            way::REVERSE
        },
        destination_port: work.key.source_port,
        protocol: work.key.protocol,
        destination: if is_hairpin {
            work.key.destination
        } else {
            work.key.source
        },
        reserved: [0; 2],
    };
    if !find_port(translations, scope, work, (hash >> 32) as u16, now) {
        return Err(DropReason::PortInUse);
    }
    let flags = if is_hairpin { translation::HAIRPIN } else { 0 };
    // Of a hairpin both ends have the same Ethernet address; of others the answers keep theirs.
    work.becomes = Translation {
        source: work.key.destination,
        destination: work.key.source,
        source_port: work.key.destination_port,
        destination_port: work.key.source_port,
        mac: backend.mac,
        backend: place,
        flags: flags | translation::ANSWER,
        reserved: [0; 4],
        last_seen_ns: now,
    };
    // Without memory for one of them the flow does not come about.
    translations
        .insert(&work.answers, &work.becomes, 0)
        .map_err(|_| DropReason::NoService)?;
    work.becomes.source = work.answers.destination;
    work.becomes.destination = backend.address;
    work.becomes.source_port = work.answers.destination_port;
    work.becomes.destination_port = backend.port;
    work.becomes.flags = flags;
    translations
        .insert(&work.key, &work.becomes, 0)
        .map_err(|_| DropReason::NoService)
}

/// Gives the flow a source port at the backend by which its answers are told from others': its own,
/// if that is free.
#[inline(always)]
fn find_port(
    translations: &Translations,
    scope: Scope,
    work: &mut Workspace,
    first: u16,
    now: u64,
) -> bool {
    // No loop: verifiers before Linux 6.8 may take one for endless whose counter is on the stack.
    is_free(translations, scope, work, now)
        || is_other_free(translations, scope, work, first, now)
        || is_other_free(
            translations,
            scope,
            work,
            first.wrapping_add(PORT_STEP),
            now,
        )
        || is_other_free(
            translations,
            scope,
            work,
            first.wrapping_sub(PORT_STEP),
            now,
        )
}

/// As [`is_free`], of another port.
#[inline(always)]
fn is_other_free(
    translations: &Translations,
    scope: Scope,
    work: &mut Workspace,
    port: u16,
    now: u64,
) -> bool {
    work.answers.destination_port = FIRST_DYNAMIC_PORT | port;
    is_free(translations, scope, work, now)
}

/// Whether answers that come so belong to no other flow.
#[inline(always)]
fn is_free(translations: &Translations, scope: Scope, work: &Workspace, now: u64) -> bool {
    if let Some(other) = find(translations, &work.answers, now) {
        return ip::same(other.source, work.key.destination)
            && other.source_port == work.key.destination_port
            && other.destination_port == work.key.source_port;
    }
    !flows::is_used_directly(scope, &work.answers, now)
}
