//! Services: virtual addresses that are balanced over guests (maps `SERVICES`, `TRANSLATIONS`).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use aya::maps::MapError;
use keelson_ebpf_common::{
    Address, BACKENDS, Backend, NO_ADDRESS, Neighbour, NeighbourKey, SERVICE_MAC, ServiceEntry,
    ServiceKey, TABLE_PLACES, map_name,
};

use crate::address::{MacAddress, from_map, to_map};
use crate::datapath::{Datapath, entries};
use crate::error::DatapathError;
use crate::policy::Protocol;
use crate::rule_tables::ignore_missing;
use crate::{grace_period, maglev, slots};

/// Backends that a service can have.
pub const MAX_BACKENDS: usize = BACKENDS;
/// Services that a host can have, each an address, protocol and port.
pub const MAX_SERVICES: usize = keelson_ebpf_common::SERVICES as usize;

/// Backends of services that are counted one by one; what others get is counted for the service.
pub const MAX_COUNTED_BACKENDS: usize = keelson_ebpf_common::COUNTED_BACKENDS as usize;

/// A port of a virtual address in a network, and who answers there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Number of the network that the address is in, as
    /// [`InterfacePolicy::network`](crate::InterfacePolicy::network).
    pub network: u32,
    /// The virtual address; no guest's.
    pub address: IpAddr,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The port.
    pub port: u16,
    /// Interfaces in the same network; new flows are shared evenly among them.
    pub backends: Vec<ServiceBackend>,
    /// More of those: they get no new flows, and keep the ones that they have.
    pub draining: Vec<ServiceBackend>,
}

/// One that answers for a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ServiceBackend {
    /// Its address, of the same version of IP as the service's.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// Its Ethernet address.
    pub mac: MacAddress,
}

impl Datapath {
    /// Makes these the services of the host; applying the same again costs little. A flow stays with
    /// its backend as long as the service has that, be it as one that drains, whatever else changes.
    ///
    /// # Errors
    /// [`DatapathError::InvalidService`] before anything is changed; [`DatapathError::Full`].
    pub fn set_services(&mut self, services: &[Service]) -> Result<(), DatapathError> {
        let mut wanted = BTreeMap::new();
        for service in services {
            service.validate()?;
            if wanted.insert(service.key(), service).is_some() {
                return Err(service.invalid("stands in the list twice"));
            }
        }
        if wanted.len() > MAX_SERVICES {
            return Err(DatapathError::Full {
                map: map_name::SERVICES,
            });
        }
        if !wanted.is_empty() {
            self.has_services = true;
            self.ensure_translations()?;
        }
        self.begin_to_count(&wanted)?;
        self.remove_services_except(&wanted)?;
        for (key, service) in &wanted {
            self.write_service(key, service)?;
        }
        self.end_to_count(&wanted)?;
        self.answer_for(&wanted.keys().map(place).collect())
    }

    /// Gives the host and every attached interface a map of translations, unless it has one.
    pub(crate) fn ensure_translations(&mut self) -> Result<(), DatapathError> {
        if !self.has_services {
            return Ok(());
        }
        let entries = entries(&self.object)?;
        let guests = entries.values().map(|entry| (entry.slot, self.max_flows));
        for (slot, flows) in guests.chain([(0, HOST_FLOWS)]).collect::<Vec<_>>() {
            slots::ensure_translations(&mut self.object, slot, flows)?;
        }
        Ok(())
    }

    /// The services of the host, whoever made them so.
    ///
    /// # Errors
    /// [`DatapathError::Map`] if the kernel doesn't let the map be read.
    pub fn services(&self) -> Result<Vec<Service>, DatapathError> {
        let entries: Result<Vec<_>, _> = self.object.services.iter().collect();
        let entries = entries.map_err(DatapathError::map("read", map_name::SERVICES))?;
        Ok(entries.iter().map(Service::from_map).collect())
    }

    fn service_keys(&self) -> Result<Vec<ServiceKey>, DatapathError> {
        self.object
            .services
            .keys()
            .collect::<Result<_, _>>()
            .map_err(DatapathError::map("read", map_name::SERVICES))
    }

    /// Whether an earlier process left services.
    pub(crate) fn adopt_services(&mut self) -> Result<(), DatapathError> {
        self.has_services = !self.service_keys()?.is_empty();
        self.ensure_translations()
    }

    fn remove_services_except(
        &mut self,
        wanted: &BTreeMap<ServiceKey, &Service>,
    ) -> Result<(), DatapathError> {
        for key in self.service_keys()? {
            if !wanted.contains_key(&key) {
                ignore_missing(self.object.services.remove(&key))
                    .map_err(DatapathError::map("write", map_name::SERVICES))?;
                grace_period::wait();
            }
        }
        Ok(())
    }

    fn write_service(&mut self, key: &ServiceKey, service: &Service) -> Result<(), DatapathError> {
        let before = match self.object.services.get(key, 0) {
            Ok(entry) => Some(entry),
            Err(MapError::KeyNotFound) => None,
            Err(error) => return Err(DatapathError::map("read", map_name::SERVICES)(error)),
        };
        let places = before.map_or([NOBODY; BACKENDS], |before| before.backends);
        let after = entry(&places, service);
        if before != Some(after) {
            self.object
                .services
                .insert(key, after, 0)
                .map_err(DatapathError::map("write", map_name::SERVICES))?;
            grace_period::wait();
        }
        Ok(())
    }

    /// Answers questions for these addresses, and for no others of services.
    fn answer_for(&mut self, addresses: &BTreeSet<NeighbourKey>) -> Result<(), DatapathError> {
        let write = || DatapathError::map("write", map_name::NEIGHBOURS);
        let answered: Result<Vec<_>, _> = self.object.neighbours.iter().collect();
        let answered = answered.map_err(DatapathError::map("read", map_name::NEIGHBOURS))?;
        for (key, neighbour) in answered {
            if neighbour.mac == SERVICE_MAC && !addresses.contains(&key) {
                ignore_missing(self.object.neighbours.remove(&key)).map_err(write())?;
            }
        }
        let neighbour = Neighbour {
            mac: SERVICE_MAC,
            reserved: [0; 2],
        };
        for key in addresses {
            self.object
                .neighbours
                .insert(key, neighbour, 0)
                .map_err(write())?;
        }
        Ok(())
    }
}

/// Flows that the host and all behind it can have with services.
const HOST_FLOWS: u32 = 1 << 16;

/// No backend.
const NOBODY: Backend = Backend {
    address: NO_ADDRESS,
    port: 0,
    mac: [0; 6],
};

fn place(key: &ServiceKey) -> NeighbourKey {
    NeighbourKey {
        network: key.network,
        address: key.address,
    }
}

/// An entry in which backends that have a place keep it. Those that drain have one too, by which their flows go on,
/// and the table has them nowhere.
fn entry(before: &[Backend; BACKENDS], service: &Service) -> ServiceEntry {
    let draining: BTreeSet<_> = service
        .draining
        .iter()
        .map(|backend| end(*backend))
        .collect();
    let mut wanted: Vec<Backend> = service.all().map(ServiceBackend::to_map).collect();
    let mut places = before.map(|held| {
        let kept = wanted.iter().position(|backend| *backend == held);
        kept.map_or(NOBODY, |index| wanted.swap_remove(index))
    });
    let free = places.iter_mut().filter(|place| **place == NOBODY);
    for (place, backend) in free.zip(wanted) {
        *place = backend;
    }
    let held = places
        .iter()
        .enumerate()
        .filter(|(_, held)| **held != NOBODY && !draining.contains(&(held.address, held.port)));
    let identities: Vec<(u8, u64)> = held
        .filter_map(|(place, held)| {
            let identity = maglev::identity(held.address, held.port);
            Some((u8::try_from(place).ok()?, identity))
        })
        .collect();
    let table: [u8; TABLE_PLACES] = maglev::table(&identities);
    ServiceEntry {
        backends: places,
        table,
    }
}

fn end(backend: ServiceBackend) -> (Address, u16) {
    (to_map(backend.address), backend.port)
}

impl ServiceBackend {
    fn from_map(backend: &Backend) -> Self {
        Self {
            address: from_map(backend.address),
            port: backend.port,
            mac: MacAddress(backend.mac),
        }
    }

    fn to_map(self) -> Backend {
        Backend {
            address: to_map(self.address),
            port: self.port,
            mac: self.mac.0,
        }
    }
}

impl Service {
    /// Its backends, those that drain among them.
    pub(crate) fn all(&self) -> impl Iterator<Item = ServiceBackend> {
        self.backends.iter().chain(&self.draining).copied()
    }

    fn from_map((key, entry): &(ServiceKey, ServiceEntry)) -> Self {
        let chosen: BTreeSet<u8> = entry.table.iter().copied().collect();
        let held = entry.backends.iter().zip(0_u8..);
        let held = held.filter(|(backend, _)| **backend != NOBODY);
        let (backends, draining): (Vec<_>, Vec<_>) =
            held.partition(|(_, place)| chosen.contains(place));
        let named = |held: Vec<(&Backend, u8)>| {
            let backends = held.into_iter();
            backends
                .map(|(backend, _)| ServiceBackend::from_map(backend))
                .collect()
        };
        Self {
            network: key.network,
            address: from_map(key.address),
            protocol: Protocol::from_number(key.protocol),
            port: key.port,
            backends: named(backends),
            draining: named(draining),
        }
    }

    fn key(&self) -> ServiceKey {
        ServiceKey {
            address: to_map(self.address),
            network: self.network,
            port: self.port,
            protocol: self.protocol.number(),
            reserved: 0,
        }
    }

    fn validate(&self) -> Result<(), DatapathError> {
        if self.network == 0 {
            return Err(self.invalid("is in no network"));
        }
        if !matches!(self.protocol, Protocol::Tcp | Protocol::Udp) {
            return Err(self.invalid("is neither TCP nor UDP"));
        }
        if self.port == 0 || self.all().any(|backend| backend.port == 0) {
            return Err(self.invalid("has a port of zero"));
        }
        if self.address.is_unspecified() || self.address.is_multicast() {
            return Err(self.invalid("has an address that can't be one host's"));
        }
        if self.all().count() > MAX_BACKENDS {
            return Err(self.invalid(&format!("has more than {MAX_BACKENDS} backends")));
        }
        let mut ends = BTreeSet::new();
        for backend in self.all() {
            if backend.address.is_ipv4() != self.address.is_ipv4() {
                return Err(self.invalid("has a backend of the other version of IP"));
            }
            if backend.address == self.address {
                return Err(self.invalid("is its own backend"));
            }
            if !ends.insert((backend.address, backend.port)) {
                return Err(self.invalid("has the same backend twice"));
            }
        }
        Ok(())
    }

    fn invalid(&self, problem: &str) -> DatapathError {
        DatapathError::InvalidService {
            service: self.to_string(),
            problem: problem.to_owned(),
        }
    }
}

impl fmt::Display for Service {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            address,
            protocol,
            port,
            ..
        } = self;
        write!(formatter, "{address} {protocol} {port}")
    }
}
