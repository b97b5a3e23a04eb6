//! External addresses and who has their ports (maps `NAT_POOLS`, `NAT_PORTS`, `NAT_ADDRESSES`).

use std::collections::{BTreeMap, BTreeSet};

use aya::maps::{Array, Map, MapData};
use keelson_ebpf_common::{
    Direction, ExternalKey, NAT_POOLS, NO_ADDRESS, NatPool, POOL_PORTS, Tally, map_name,
    passed_index,
};

use super::uplinks::{self, Present};
use super::{ExternalAddress, Nat};
use crate::address::{from_map, to_map};
use crate::datapath::Datapath;
use crate::error::DatapathError;
use crate::rule_tables::ignore_missing;
use crate::{grace_period, inner_map, interface, slots};

/// External addresses that there are, with their places.
pub type Pools = BTreeMap<ExternalAddress, u32>;

impl Datapath {
    /// Gives each wanted address of an uplink that is there a place, with ports; one that has a place
    /// keeps it, whatever became of its uplink meanwhile.
    pub(super) fn settle_pools(
        &mut self,
        wanted: &Nat,
        present: &Present,
    ) -> Result<Pools, DatapathError> {
        let mut pools = self.known_pools(wanted)?;
        let mut taken: BTreeSet<u32> = self.held_pools()?.into_keys().collect();
        for (address, ports) in &wanted.addresses {
            let Some(ifindex) = present.get(&address.uplink) else {
                continue;
            };
            let pool = NatPool {
                address: to_map(address.address),
                ifindex: *ifindex,
                first_port: *ports.start(),
                last_port: *ports.end(),
            };
            let index = if let Some(index) = pools.get(address) {
                *index
            } else {
                let mut places = 0..NAT_POOLS;
                let free = places.find(|index| !taken.contains(index));
                let index = free.ok_or(DatapathError::Full {
                    map: map_name::NAT_POOLS,
                })?;
                self.create_ports(index)?;
                index
            };
            taken.insert(index);
            self.write_pool(index, pool)?;
            pools.insert(address.clone(), index);
        }
        Ok(pools)
    }

    /// The wanted addresses that have a place.
    pub(super) fn known_pools(&self, wanted: &Nat) -> Result<Pools, DatapathError> {
        let uplinks = uplinks::entries(&self.object)?;
        let mut pools = Pools::new();
        for (index, pool) in self.held_pools()? {
            let Some(entry) = uplinks.get(&pool.ifindex) else {
                continue;
            };
            let address = ExternalAddress {
                uplink: interface::from_bytes(&entry.name),
                address: from_map(pool.address),
            };
            if wanted.addresses.contains_key(&address) {
                pools.insert(address, index);
            }
        }
        Ok(pools)
    }

    pub(super) fn held_pools(&self) -> Result<BTreeMap<u32, NatPool>, DatapathError> {
        let mut held = BTreeMap::new();
        for index in 0..NAT_POOLS {
            let pool = self.object.nat_pools.get(&index, 0);
            let pool = pool.map_err(DatapathError::map("read", map_name::NAT_POOLS))?;
            if pool.address != NO_ADDRESS {
                held.insert(index, pool);
            }
        }
        Ok(held)
    }

    fn write_pool(&mut self, index: u32, pool: NatPool) -> Result<(), DatapathError> {
        self.object
            .nat_pools
            .set(index, pool, 0)
            .map_err(DatapathError::map("write", map_name::NAT_POOLS))
    }

    fn create_ports(&mut self, index: u32) -> Result<(), DatapathError> {
        for direction in [Direction::FromGuest, Direction::ToGuest] {
            let zeros = slots::per_cpu(Tally::default())?;
            self.object
                .translated
                .set(passed_index(index, direction), zeros, 0)
                .map_err(DatapathError::map("write", map_name::TRANSLATED))?;
        }
        let inner = &self.object.inner;
        let ports = inner.create(map_name::NAT_PORTS, POOL_PORTS)?;
        self.object
            .nat_ports
            .set(index, &ports, 0)
            .map_err(DatapathError::map("write", map_name::NAT_PORTS))
    }

    /// Who has the ports of an address.
    pub(super) fn ports(&self, index: u32) -> Result<Array<MapData, u64>, DatapathError> {
        let ports: Result<MapData, _> = self.object.nat_ports.get(&index, 0);
        ports
            .and_then(Map::from_map_data)
            .and_then(Array::try_from)
            .map_err(DatapathError::map("read", map_name::NAT_PORTS))
    }

    /// Lets what comes for these addresses be looked at, and for no others.
    pub(super) fn settle_addresses(&mut self, pools: &Pools) -> Result<(), DatapathError> {
        let mut wanted = BTreeMap::new();
        for index in pools.values() {
            let pool = self.object.nat_pools.get(index, 0);
            let pool = pool.map_err(DatapathError::map("read", map_name::NAT_POOLS))?;
            let key = ExternalKey {
                address: pool.address,
                ifindex: pool.ifindex,
            };
            wanted.insert(key, *index);
        }
        let write = || DatapathError::map("write", map_name::NAT_ADDRESSES);
        let held: Result<Vec<_>, _> = self.object.nat_addresses.keys().collect();
        for key in held.map_err(DatapathError::map("read", map_name::NAT_ADDRESSES))? {
            if !wanted.contains_key(&key) {
                ignore_missing(self.object.nat_addresses.remove(&key)).map_err(write())?;
            }
        }
        for (key, index) in wanted {
            self.object
                .nat_addresses
                .insert(key, index, 0)
                .map_err(write())?;
        }
        Ok(())
    }

    /// Gives the memory of other addresses back, after nothing refers to them any more.
    pub(super) fn remove_pools_except(&mut self, pools: &Pools) -> Result<(), DatapathError> {
        let wanted: BTreeSet<u32> = pools.values().copied().collect();
        let held = self.held_pools()?;
        let gone: Vec<u32> = held.into_keys().filter(|i| !wanted.contains(i)).collect();
        if gone.is_empty() {
            return Ok(());
        }
        grace_period::wait();
        for index in gone {
            inner_map::remove(&self.root.map(map_name::NAT_PORTS), index)
                .map_err(DatapathError::map("write", map_name::NAT_PORTS))?;
            self.write_pool(index, NatPool::default())?;
        }
        Ok(())
    }
}
