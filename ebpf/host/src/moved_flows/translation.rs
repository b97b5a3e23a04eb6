//! What services have made of the ends of a flow that moves. Which backend it is that a flow goes to moves along;
//! where that stands among the service's backends, and its Ethernet address, is for the other host to say.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use aya::maps::{HashMap, Map, MapData, MapError};
use keelson_ebpf_common::{
    Address, Backend, NO_ADDRESS, PolicyEntry, ServiceEntry, ServiceKey, Translation,
    TranslationKey, local, map_name, phase, translation, way,
};
use serde::{Deserialize, Serialize};

use super::{BadFlow, TCP, UDP, from_idle, is_host, limit};
use crate::address::{from_map, to_map};
use crate::error::DatapathError;
use crate::object::Object;

/// What a flow of a service's client becomes, there and back, as it moves from host to host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MovedTranslation {
    service: IpAddr,
    service_port: u16,
    protocol: u8,
    client_port: u16,
    backend: IpAddr,
    backend_port: u16,
    /// The client's port as the backend sees it.
    seen_port: u16,
    idle_milliseconds: u32,
}

/// A pair of a map's entries: what the flow's packets become, and what their answers do.
type Pair = [(TranslationKey, Translation); 2];

/// A slot's map of translations.
type Translations = HashMap<MapData, TranslationKey, Translation>;

/// A slot's translations, and how many fit; `None` where there is no map of them.
pub fn open(object: &Object, slot: u32) -> Result<Option<(Translations, u32)>, DatapathError> {
    let failed = || DatapathError::map("read", map_name::TRANSLATIONS);
    // A slot has none before the host has its first service.
    let Ok(inner) = object.translations.get(&slot, 0) else {
        return Ok(None);
    };
    let inner: MapData = inner;
    let info = inner.info().map_err(failed())?;
    let map = Map::from_map_data(inner).and_then(HashMap::try_from);
    Ok(Some((map.map_err(failed())?, info.max_entries())))
}

/// The translations of an interface whose guest leaves, the one that was idle for longest first. Those that have
/// timed out stay, and fragments do.
pub fn leaving(
    object: &Object,
    entry: &PolicyEntry,
    now: Duration,
) -> Result<Vec<MovedTranslation>, DatapathError> {
    let Some((map, max)) = open(object, entry.slot)? else {
        return Ok(Vec::new());
    };
    let known: std::collections::HashMap<_, _> = map
        .iter()
        .take(max as usize)
        .filter_map(Result::ok)
        .collect();
    let pairs = known.iter().filter_map(|(key, becomes)| {
        let answers = answers_of(key, becomes)?;
        let back = known.get(&answers).filter(|back| is_back_to(back, key))?;
        let is_own = own_address(entry, from_map(key.source).is_ipv4()) == Some(key.source);
        if !is_own {
            return None;
        }
        let last_seen = becomes.last_seen_ns.max(back.last_seen_ns);
        MovedTranslation::new(
            key,
            becomes,
            now.saturating_sub(Duration::from_nanos(last_seen)),
        )
    });
    let mut leaving: Vec<_> = pairs.collect();
    leaving.sort_by_key(|moved| std::cmp::Reverse(moved.idle_milliseconds));
    Ok(leaving)
}

/// How the answers to a flow's packets come; `None` if the packets are answers, or fragments, themselves.
fn answers_of(key: &TranslationKey, becomes: &Translation) -> Option<TranslationKey> {
    if key.way != way::FORWARD || becomes.flags & translation::ANSWER != 0 {
        return None;
    }
    let is_hairpin = becomes.flags & translation::HAIRPIN != 0;
    Some(TranslationKey {
        source: becomes.destination,
        destination: becomes.source,
        source_port: becomes.destination_port,
        destination_port: becomes.source_port,
        protocol: key.protocol,
        way: if is_hairpin {
            way::FORWARD
        } else {
            way::REVERSE
        },
        reserved: [0; 2],
    })
}

/// Whether answers become those to packets with this key: another flow may have got the port since.
fn is_back_to(back: &Translation, key: &TranslationKey) -> bool {
    back.source == key.destination
        && back.source_port == key.destination_port
        && back.destination == key.source
        && back.destination_port == key.source_port
}

/// The address by which an interface can be a service's client, if it has it.
fn own_address(entry: &PolicyEntry, is_ipv4: bool) -> Option<Address> {
    let address = if is_ipv4 {
        to_map(IpAddr::from(entry.ipv4.to_ne_bytes()))
    } else {
        entry.ipv6
    };
    let is_there = if is_ipv4 {
        entry.ipv4 != 0
    } else {
        entry.ipv6 != NO_ADDRESS
    };
    is_there.then_some(address)
}

impl MovedTranslation {
    /// `None` if it has timed out.
    fn new(key: &TranslationKey, becomes: &Translation, idle: Duration) -> Option<Self> {
        let moved = Self {
            service: from_map(key.destination),
            service_port: key.destination_port,
            protocol: key.protocol,
            client_port: key.source_port,
            backend: from_map(becomes.destination),
            backend_port: becomes.destination_port,
            seen_port: becomes.source_port,
            idle_milliseconds: u32::try_from(idle.as_millis()).ok()?,
        };
        moved.is_alive().then_some(moved)
    }

    fn is_alive(&self) -> bool {
        Duration::from_millis(self.idle_milliseconds.into())
            < limit(self.protocol, phase::ESTABLISHED)
    }

    /// Whether this may be what the programs of a host have made of a flow.
    pub fn check(&self) -> Result<(), BadFlow> {
        if !is_host(self.service) || !is_host(self.backend) || self.service == self.backend {
            return Err(BadFlow::Peer);
        }
        if self.service.is_ipv4() != self.backend.is_ipv4() {
            return Err(BadFlow::Versions);
        }
        if !matches!(self.protocol, TCP | UDP) || self.service_port == 0 || self.backend_port == 0 {
            return Err(BadFlow::Ports);
        }
        Ok(())
    }

    /// The ends, as the guest's rules see them, of the flow that this is for: version of IP, protocol, the
    /// guest's port, and the backend's address and port.
    pub fn flow(&self) -> (u8, u8, u16, IpAddr, u16) {
        let local = if self.backend.is_ipv4() {
            local::IPV4
        } else {
            local::IPV6
        };
        let Self {
            protocol,
            seen_port,
            backend,
            backend_port,
            ..
        } = *self;
        (local, protocol, seen_port, backend, backend_port)
    }

    /// As an interface's map holds it; `None` if it has timed out, is of an address that the interface doesn't
    /// have, or of a service or backend that this host doesn't.
    pub fn pair(
        &self,
        entry: &PolicyEntry,
        services: &mut KnownServices<'_>,
        now: Duration,
    ) -> Result<Option<Pair>, DatapathError> {
        let own = own_address(entry, self.service.is_ipv4());
        let Some(own) = own.filter(|_| self.is_alive()) else {
            return Ok(None);
        };
        let key = self.key(own);
        let (address, port) = (to_map(self.backend), self.backend_port);
        let place = services.place(entry.network, &key, address, port)?;
        Ok(place.and_then(|(place, mac)| self.pair_at(own, place, mac, now)))
    }

    /// How the client's packets come.
    fn key(&self, own: Address) -> TranslationKey {
        TranslationKey {
            source: own,
            destination: to_map(self.service),
            source_port: self.client_port,
            destination_port: self.service_port,
            protocol: self.protocol,
            way: way::FORWARD,
            reserved: [0; 2],
        }
    }

    fn pair_at(&self, own: Address, place: u8, mac: [u8; 6], now: Duration) -> Option<Pair> {
        let key = self.key(own);
        let address = to_map(self.backend);
        let is_hairpin = address == own;
        let becomes = Translation {
            source: if is_hairpin { key.destination } else { own },
            destination: address,
            source_port: self.seen_port,
            destination_port: self.backend_port,
            mac,
            backend: place,
            flags: if is_hairpin { translation::HAIRPIN } else { 0 },
            service_port: 0,
            service_protocol: 0,
            reserved: 0,
            last_seen_ns: from_idle(now, self.idle_milliseconds),
        };
        let back = Translation {
            source: key.destination,
            destination: own,
            source_port: key.destination_port,
            destination_port: key.source_port,
            flags: becomes.flags | translation::ANSWER,
            ..becomes
        };
        let answers = answers_of(&key, &becomes)?;
        Some([(key, becomes), (answers, back)])
    }
}

/// The services that a host has, as far as they were asked for: an entry is large.
pub struct KnownServices<'a> {
    object: &'a Object,
    known: BTreeMap<ServiceKey, Option<ServiceEntry>>,
}

impl<'a> KnownServices<'a> {
    pub fn new(object: &'a Object) -> Self {
        Self {
            object,
            known: BTreeMap::new(),
        }
    }

    /// Where a backend stands among those of the service that packets with this key are for, and its Ethernet
    /// address; `None` if the service doesn't have it.
    fn place(
        &mut self,
        network: u32,
        key: &TranslationKey,
        address: Address,
        port: u16,
    ) -> Result<Option<(u8, [u8; 6])>, DatapathError> {
        let service = ServiceKey {
            address: key.destination,
            network,
            port: key.destination_port,
            protocol: key.protocol,
            reserved: 0,
        };
        if !self.known.contains_key(&service) {
            let entry = match self.object.services.get(&service, 0) {
                Ok(entry) => Some(entry),
                Err(MapError::KeyNotFound) => None,
                Err(error) => return Err(DatapathError::map("read", map_name::SERVICES)(error)),
            };
            self.known.insert(service, entry);
        }
        let entry = self.known.get(&service).and_then(Option::as_ref);
        let place = entry.and_then(|entry| {
            let mut backends = entry.backends.iter().zip(0_u8..);
            let is_it = |backend: &Backend| backend.address == address && backend.port == port;
            backends.find_map(|(backend, place)| is_it(backend).then_some((place, backend.mac)))
        });
        Ok(place)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: Duration = Duration::from_hours(1000);

    prop_compose! {
        fn anything()(
            ends in any::<(IpAddr, IpAddr)>(),
            ports in any::<(u16, u16, u16, u16)>(),
            protocol in prop_oneof![Just(TCP), Just(UDP), any::<u8>()],
            idle_milliseconds in prop_oneof![0..200_000_u32, any::<u32>()],
        ) -> MovedTranslation {
            MovedTranslation {
                service: ends.0,
                service_port: ports.0,
                protocol,
                client_port: ports.1,
                backend: ends.1,
                backend_port: ports.2,
                seen_port: ports.3,
                idle_milliseconds,
            }
        }
    }

    fn pair(moved: &MovedTranslation, is_hairpin: bool) -> (Address, Pair) {
        let backend = to_map(moved.backend);
        let mut other = backend;
        other[3] ^= 1;
        let own = if is_hairpin { backend } else { other };
        let pair = moved.pair_at(own, 7, [2; 6], NOW);
        (own, pair.expect("it is the client's"))
    }

    proptest! {
        #[test]
        fn what_a_host_has_the_other_one_gets(moved in anything(), is_hairpin: bool) {
            prop_assume!(moved.check() != Err(BadFlow::Peer));
            let (own, [(key, becomes), (answers, back)]) = pair(&moved, is_hairpin);
            prop_assert_eq!(answers_of(&key, &becomes), Some(answers));
            prop_assert!(is_back_to(&back, &key));
            prop_assert_eq!(answers_of(&answers, &back), None, "it is an answer itself");
            prop_assert_eq!((key.source, back.destination), (own, own));
            prop_assert_eq!((becomes.backend, becomes.mac), (7, [2; 6]));
            let idle = NOW.saturating_sub(Duration::from_nanos(becomes.last_seen_ns));
            let again = MovedTranslation::new(&key, &becomes, idle);
            prop_assert_eq!(again, moved.is_alive().then_some(moved));
        }

        #[test]
        fn what_no_host_has_is_refused(moved in anything()) {
            if moved.check().is_ok() {
                prop_assert_eq!(moved.service.is_ipv4(), moved.backend.is_ipv4());
                prop_assert!(matches!(moved.protocol, TCP | UDP));
                prop_assert!(moved.service_port != 0 && moved.backend_port != 0);
                prop_assert!(is_host(moved.service) && is_host(moved.backend));
            }
        }
    }
}
