//! Which backend a new flow to a service goes to, and which source port it has there (maps `SERVICES`,
//! `TRANSLATIONS`).

use core::hint::black_box;

use keelson_ebpf_common::{
    BACKENDS, Backend, DropReason, NO_BACKEND, ServiceEntry, ServiceKey, TABLE_PLACES, Translation,
    TranslationKey, Workspace, flow_hash, translation, way,
};

use crate::maps::{SERVICES, Translations};
use crate::services::{self, Scope};
use crate::{flows, ip};

/// The dynamic ports (RFC 6335, 6), a quarter of all.
const FIRST_DYNAMIC_PORT: u16 = 0xc000;
/// From one try to the next.
const PORT_STEP: u16 = 7919;

/// The service that the packet as it came is for.
#[inline(always)]
fn service(scope: Scope, work: &mut Workspace) -> Option<&'static ServiceEntry> {
    work.served.service = ServiceKey {
        address: work.key.destination,
        network: scope.network,
        port: work.key.destination_port,
        protocol: work.key.protocol,
        reserved: 0,
    };
    // SAFETY: the host replaces entries as a whole and waits for running programs before it changes
    // the map again.
    let service = SERVICES.get_ptr(&work.served.service)?;
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

/// Whether a packet goes where the ones before it went: to a backend that still serves. One that asks for a `new`
/// connection goes where the table says, though there may have been another one between the same ends: the client
/// uses its ports again, and that backend may drain.
#[inline(always)]
pub fn goes_on(scope: Scope, work: &mut Workspace, known: &Translation, new: bool) -> bool {
    if known.flags & translation::ANSWER != 0 {
        return true;
    }
    if new {
        return false;
    }
    let service = service(scope, work);
    let Some(backend) = service.and_then(|service| backend_at(service, known.backend)) else {
        return false;
    };
    ip::same(backend.address, known.destination) && backend.port == known.destination_port
}

/// Chooses a backend, and notes what the flow's packets and their answers become.
#[inline(always)]
pub fn create(
    translations: &Translations,
    scope: Scope,
    work: &mut Workspace,
    now: u64,
) -> Result<(), DropReason> {
    let service = service(scope, work).ok_or(DropReason::NoService)?;
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
        service_port: 0,
        service_protocol: 0,
        reserved: 0,
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
    if let Some(other) = services::find(translations, &work.answers, now) {
        return ip::same(other.source, work.key.destination)
            && other.source_port == work.key.destination_port
            && other.destination_port == work.key.source_port;
    }
    !flows::is_used_directly(scope, &work.answers, now)
}
