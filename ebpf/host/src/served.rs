//! What went between services and their clients on this host (map `SERVED`).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use aya::maps::MapError;
use keelson_ebpf_common::{
    Address, COUNTED_BACKENDS, NO_ADDRESS, Served, ServedKey, ServiceKey, Tally, map_name, served,
};

use crate::address::{from_map, to_map};
use crate::datapath::Datapath;
use crate::error::DatapathError;
use crate::policy::Protocol;
use crate::rule_tables::ignore_missing;
use crate::services::Service;
use crate::slots;

/// A service of the host, and what its clients on this host or behind it sent there and were answered. What rules
/// of the client did not let out is not counted; what the backend's did not let in is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceUse {
    /// Number of the network that the address is in.
    pub network: u32,
    /// The virtual address.
    pub address: IpAddr,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The port.
    pub port: u16,
    /// Whose count it is; none: that of all backends which the service no longer has, or for which there
    /// is no room.
    pub backend: Option<IpAddr>,
    /// What clients sent.
    pub to_backend: Tally,
    /// What they were answered.
    pub from_backend: Tally,
}

impl Datapath {
    /// What was counted for each backend of each service since it is there, at most
    /// [`MAX_COUNTED_BACKENDS`](crate::MAX_COUNTED_BACKENDS) of them.
    ///
    /// # Errors
    /// [`DatapathError::Map`] if the kernel doesn't let the map be read.
    pub fn service_use(&self) -> Result<Vec<ServiceUse>, DatapathError> {
        let mut uses: BTreeMap<(ServiceKey, Address), Served> = BTreeMap::new();
        for key in self.served_keys()? {
            if let Some(served) = self.read_served(&key)? {
                add(uses.entry((key.service, key.backend)).or_default(), served);
            }
        }
        let uses = uses.into_iter().map(|((service, backend), served)| {
            let backend = (backend != NO_ADDRESS).then(|| from_map(backend));
            ServiceUse {
                network: service.network,
                address: from_map(service.address),
                protocol: Protocol::from_number(service.protocol),
                port: service.port,
                backend,
                to_backend: served.to_backend,
                from_backend: served.from_backend,
            }
        });
        Ok(uses.collect())
    }

    /// Begins to count for services and backends that are new, before any packet goes to them.
    pub(crate) fn begin_to_count(
        &mut self,
        wanted: &BTreeMap<ServiceKey, &Service>,
    ) -> Result<(), DatapathError> {
        let present = self.served_keys()?;
        let (backends, others) = keys(wanted);
        for key in others.difference(&present) {
            self.write_served(*key, Served::default())?;
        }
        let is_backend = |key: &&ServedKey| key.kind == served::BACKEND;
        let room = COUNTED_BACKENDS as usize;
        let free = room.saturating_sub(present.iter().filter(is_backend).count());
        let mut new: Vec<_> = backends.difference(&present).copied().collect();
        if new.len() > free {
            let left_out = new.len() - free;
            tracing::warn!(left_out, "no room to count for each backend of services");
            new.truncate(free);
        }
        for key in new {
            self.write_served(key, Served::default())?;
        }
        Ok(())
    }

    /// Counts no longer for services that are gone, and adds up what the others' backends had that are. Answers
    /// that such a backend still gives are counted with those of all others.
    pub(crate) fn end_to_count(
        &mut self,
        wanted: &BTreeMap<ServiceKey, &Service>,
    ) -> Result<(), DatapathError> {
        let (backends, _) = keys(wanted);
        for key in self.served_keys()? {
            let is_wanted = match key.kind {
                served::BACKEND => backends.contains(&key),
                _ => wanted.contains_key(&key.service),
            };
            if is_wanted {
                continue;
            }
            let had = self.read_served(&key)?;
            // First, so that no crash has it counted twice.
            ignore_missing(self.object.served.remove(&key))
                .map_err(DatapathError::map("write", map_name::SERVED))?;
            if let (Some(had), true) = (had, wanted.contains_key(&key.service)) {
                let gone = whole(key.service, served::GONE);
                let mut sum = self.read_served(&gone)?.unwrap_or_default();
                add(&mut sum, had);
                self.write_served(gone, sum)?;
            }
        }
        Ok(())
    }

    fn served_keys(&self) -> Result<BTreeSet<ServedKey>, DatapathError> {
        let keys: Result<BTreeSet<_>, _> = self.object.served.keys().collect();
        keys.map_err(DatapathError::map("read", map_name::SERVED))
    }

    /// What all CPUs counted.
    fn read_served(&self, key: &ServedKey) -> Result<Option<Served>, DatapathError> {
        let counts = match self.object.served.get(key, 0) {
            Ok(counts) => counts,
            Err(MapError::KeyNotFound) => return Ok(None),
            Err(error) => return Err(DatapathError::map("read", map_name::SERVED)(error)),
        };
        let mut sum = Served::default();
        for count in counts.iter() {
            add(&mut sum, *count);
        }
        Ok(Some(sum))
    }

    fn write_served(&mut self, key: ServedKey, counted: Served) -> Result<(), DatapathError> {
        let counts = slots::on_one_cpu(counted)?;
        self.object
            .served
            .insert(key, counts, 0)
            .map_err(DatapathError::map("write", map_name::SERVED))
    }
}

/// What is counted under for these services: of backends, and of all others.
fn keys(wanted: &BTreeMap<ServiceKey, &Service>) -> (BTreeSet<ServedKey>, BTreeSet<ServedKey>) {
    let backends = wanted.iter().flat_map(|(key, service)| {
        service.all().map(|backend| ServedKey {
            service: *key,
            backend: to_map(backend.address),
            kind: served::BACKEND,
        })
    });
    let others = wanted.keys().map(|key| whole(*key, served::OTHERS));
    (backends.collect(), others.collect())
}

fn whole(service: ServiceKey, kind: u32) -> ServedKey {
    ServedKey {
        service,
        backend: NO_ADDRESS,
        kind,
    }
}

fn add(sum: &mut Served, more: Served) {
    for (sum, more) in [
        (&mut sum.to_backend, more.to_backend),
        (&mut sum.from_backend, more.from_backend),
    ] {
        sum.packets = sum.packets.wrapping_add(more.packets);
        sum.bytes = sum.bytes.wrapping_add(more.bytes);
    }
}
