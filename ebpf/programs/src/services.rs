//! Which backend a packet to a service goes to, and what the ends of a service's packets become (maps
//! `SERVICES`, `TRANSLATIONS`).
//!
//! The first packet of a flow, and every SYN, takes the backend that the service's lookup table has for its ends. What
//! its packets and their answers become is noted, so that the flow stays with its backend when the
//! table changes. A flow whose backend serves no longer gets another one with its next packet: a
//! datagram goes on there, of TCP that backend knows nothing, and resets it.

use aya_ebpf::programs::TcContext;
use keelson_ebpf_common::{
    Address, DropReason, ServedKey, ServiceKey, Translation, TranslationKey, Workspace, served,
    timeout, translation, way,
};

use crate::backends;
use crate::clock;
use crate::counters;
use crate::ip::{Ip, protocol};
use crate::maps::{STAGES, TRANSLATIONS, Translations, WORKSPACE};
use crate::translate;
use crate::transport::{self, Transport};

/// As with flows: how long `last_seen_ns` may lag.
const REFRESH_NS: u64 = 1_000_000_000;

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
    /// Which port of the service's address the packet concerns.
    pub service: ServicePort,
}

/// A port of a service.
#[derive(Clone, Copy)]
pub struct ServicePort {
    pub port: u16,
    pub protocol: u8,
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
        let service = fragment_port(translation);
        return Ok(found(translation, false, ip.source, service));
    }
    let transport = transport::transport(ip)?;
    if transport.is_icmp_error() {
        set_quoted_key(&mut work.key, packet, ip, way::FORWARD)?;
        let translation = find(translations, &work.key, now).ok_or(DropReason::NoService)?;
        let service = forward_port(translation, &work.key);
        return Ok(found(translation, true, work.key.source, service));
    }
    if !matches!(transport.protocol, protocol::TCP | protocol::UDP) {
        return Err(DropReason::NoService);
    }
    work.key = own_key(ip, &transport, way::FORWARD);
    let known = find(translations, &work.key, now);
    let new = transport.opens();
    let translation = match known.filter(|known| backends::goes_on(scope, work, known, new)) {
        Some(known) => known,
        None => {
            backends::create(translations, scope, work, now)?;
            find(translations, &work.key, now).ok_or(DropReason::NoService)?
        }
    };
    let service = forward_port(translation, &work.key);
    note_fragment(translations, ip, translation, work, service, way::FORWARD);
    Ok(found(translation, false, ip.source, service))
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
        let service = fragment_port(translation);
        return Some(found(translation, false, ip.source, service));
    }
    let transport = transport::transport(ip).ok()?;
    if transport.is_icmp_error() {
        set_quoted_key(&mut work.key, packet, ip, way::REVERSE).ok()?;
        let translation = find(translations, &work.key, now)?;
        let service = reverse_port(translation, &work.key);
        return Some(found(translation, true, work.key.source, service));
    }
    if !matches!(transport.protocol, protocol::TCP | protocol::UDP) {
        return None;
    }
    work.key = own_key(ip, &transport, way::REVERSE);
    let translation = find(translations, &work.key, now)?;
    let service = reverse_port(translation, &work.key);
    note_fragment(translations, ip, translation, work, service, way::REVERSE);
    Some(found(translation, false, ip.source, service))
}

#[inline(always)]
fn found(
    translation: &Translation,
    is_error: bool,
    source: Address,
    service: ServicePort,
) -> Found<'_> {
    Found {
        translation,
        is_error,
        source,
        service,
    }
}

/// What a packet to a port of a service's address concerns; of a service's answer to a client that is its
/// own backend, the port is the client's.
#[inline(always)]
fn forward_port(translation: &Translation, key: &TranslationKey) -> ServicePort {
    let port = if translation.flags & translation::ANSWER != 0 {
        translation.source_port
    } else {
        key.destination_port
    };
    ServicePort {
        port,
        protocol: key.protocol,
    }
}

/// What a packet that answers concerns.
#[inline(always)]
fn reverse_port(translation: &Translation, key: &TranslationKey) -> ServicePort {
    ServicePort {
        port: translation.source_port,
        protocol: key.protocol,
    }
}

/// What a later fragment concerns, as noted with its first one.
#[inline(always)]
fn fragment_port(translation: &Translation) -> ServicePort {
    ServicePort {
        port: translation.service_port,
        protocol: translation.service_protocol,
    }
}

/// Counts a packet between a client in `network` and a backend.
#[inline(always)]
pub fn count(
    work: &mut Workspace,
    network: u32,
    address: Address,
    ServicePort { port, protocol }: ServicePort,
    backend: Address,
    length: u32,
    is_answer: bool,
) {
    work.served = ServedKey {
        service: ServiceKey {
            address,
            network,
            port,
            protocol,
            reserved: 0,
        },
        backend,
        kind: served::BACKEND,
    };
    counters::count_served(&mut work.served, is_answer, length);
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
pub fn find<'a>(
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
    service: ServicePort,
    way: u8,
) {
    if ip.more_fragments {
        work.answers = fragment_key(ip, way);
        work.becomes = *translation;
        work.becomes.last_seen_ns = clock::now();
        work.becomes.service_port = service.port;
        work.becomes.service_protocol = service.protocol;
        // Without memory for it the other fragments are dropped.
        let _ = translations.insert(&work.answers, &work.becomes, 0);
    }
}
