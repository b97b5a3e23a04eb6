//! Whose packets are translated (maps `NAT_GUESTS`, `NAT_SLOTS`, `NAT_MAPPINGS`).

use std::collections::BTreeMap;
use std::net::IpAddr;

use keelson_ebpf_common::{
    Address, NO_ADDRESS, NO_POOL, NatGuest, NatSlot, PolicyEntry, from_ipv4, map_name,
};

use super::pools::Pools;
use super::{ExternalAddress, Nat, PortForward, SourceNat};
use crate::datapath::{Datapath, entries};
use crate::error::DatapathError;
use crate::object::Object;
use crate::rule_tables::ignore_missing;
use crate::{interface, slots};

impl Datapath {
    /// Makes these the guests whose packets are translated.
    pub(super) fn settle_nat_guests(
        &mut self,
        wanted: &Nat,
        pools: &Pools,
    ) -> Result<(), DatapathError> {
        let mut guests = BTreeMap::new();
        for (ifindex, entry) in entries(&self.object)? {
            let own = wanted.guests_of(ifindex, &entry, pools);
            if !own.is_empty() {
                self.prepare_nat_slot(wanted, &entry)?;
                guests.extend(own);
            }
        }
        for (address, guest) in held(&self.object)? {
            if guests.get(&address) == Some(&guest) {
                guests.remove(&address);
            } else if !guests.contains_key(&address) {
                remove(&mut self.object, &address)?;
            }
        }
        for (address, guest) in guests {
            self.write_nat_guest(address, guest)?;
        }
        Ok(())
    }

    /// The same of one interface, whatever the others are.
    pub(super) fn settle_nat_guest(
        &mut self,
        wanted: &Nat,
        pools: &Pools,
        ifindex: u32,
        entry: &PolicyEntry,
    ) -> Result<(), DatapathError> {
        let own = wanted.guests_of(ifindex, entry, pools);
        let before = self.object.nat_slots.get(&entry.slot, 0);
        let before = before.map_err(DatapathError::map("read", map_name::NAT_SLOTS))?;
        if !own.is_empty() {
            self.prepare_nat_slot(wanted, entry)?;
        }
        for address in [before.ipv4, before.ipv6] {
            let is_kept = own.iter().any(|(kept, _)| *kept == address);
            let held = self.object.nat_guests.get(&address, 0).ok();
            if !is_kept && held.is_some_and(|held: NatGuest| held.slot == entry.slot) {
                remove(&mut self.object, &address)?;
            }
        }
        for (address, guest) in own {
            self.write_nat_guest(address, guest)?;
        }
        Ok(())
    }

    fn prepare_nat_slot(&mut self, wanted: &Nat, entry: &PolicyEntry) -> Result<(), DatapathError> {
        let addresses = NatSlot {
            ipv4: ipv4_of(entry),
            ipv6: entry.ipv6,
        };
        self.object
            .nat_slots
            .set(entry.slot, addresses, 0)
            .map_err(DatapathError::map("write", map_name::NAT_SLOTS))?;
        let limit = wanted.networks.get(&entry.network);
        let limit = limit.map_or(1, |nat| nat.max_mappings);
        slots::ensure_mappings(&mut self.object, entry.slot, limit)
    }

    fn write_nat_guest(&mut self, address: Address, guest: NatGuest) -> Result<(), DatapathError> {
        self.object
            .nat_guests
            .insert(address, guest, 0)
            .map_err(DatapathError::map("write", map_name::NAT_GUESTS))
    }

    /// Takes an interface's slot out of everything. Before the slot is another's.
    pub(crate) fn forget_nat(&mut self, slot: u32) -> Result<(), DatapathError> {
        for (address, guest) in held(&self.object)? {
            if guest.slot == slot {
                remove(&mut self.object, &address)?;
            }
        }
        self.forget_forwards(slot)?;
        self.object
            .nat_slots
            .set(slot, NatSlot::default(), 0)
            .map_err(DatapathError::map("write", map_name::NAT_SLOTS))
    }
}

impl Nat {
    /// What the addresses of an interface get.
    fn guests_of(
        &self,
        ifindex: u32,
        entry: &PolicyEntry,
        pools: &Pools,
    ) -> Vec<(Address, NatGuest)> {
        let nat = self.networks.get(&entry.network);
        let name = interface::from_bytes(&entry.name);
        let place = |address: ExternalAddress| pools.get(&address).copied();
        let mut guests = Vec::new();
        for (own, is_ipv4) in [(ipv4_of(entry), true), (entry.ipv6, false)] {
            if own == NO_ADDRESS {
                continue;
            }
            let mut external = nat.into_iter().flat_map(SourceNat::external_addresses);
            let external = external.find(|external| external.address.is_ipv4() == is_ipv4);
            let pool = external.and_then(place).unwrap_or(NO_POOL);
            let mut forwards = self.forwards.iter();
            let forward = forwards
                .find(|forward| forward.interface == name && forward.address.is_ipv4() == is_ipv4);
            let forward_pool = forward.map(PortForward::external_address);
            let forward_pool = forward_pool.and_then(place).unwrap_or(NO_POOL);
            if pool != NO_POOL || forward_pool != NO_POOL {
                let guest = NatGuest {
                    slot: entry.slot,
                    pool,
                    ifindex,
                    forward_pool,
                };
                guests.push((own, guest));
            }
        }
        guests
    }
}

fn ipv4_of(entry: &PolicyEntry) -> Address {
    match entry.ipv4 {
        0 => NO_ADDRESS,
        ipv4 => from_ipv4(ipv4),
    }
}

fn held(object: &Object) -> Result<Vec<(Address, NatGuest)>, DatapathError> {
    object
        .nat_guests
        .iter()
        .collect::<Result<_, _>>()
        .map_err(DatapathError::map("read", map_name::NAT_GUESTS))
}

fn remove(object: &mut Object, address: &Address) -> Result<(), DatapathError> {
    ignore_missing(object.nat_guests.remove(address))
        .map_err(DatapathError::map("write", map_name::NAT_GUESTS))
}

/// Whether an interface has an address of the same version.
pub fn has_version(entry: &PolicyEntry, address: IpAddr) -> bool {
    match address {
        IpAddr::V4(_) => entry.ipv4 != 0,
        IpAddr::V6(_) => entry.ipv6 != NO_ADDRESS,
    }
}
