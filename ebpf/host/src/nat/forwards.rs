//! Ports of external addresses that lead to guests (maps `NAT_FORWARDS`, `NAT_PORTS`).

use std::collections::{BTreeMap, BTreeSet};

use keelson_ebpf_common::{
    ForwardKey, ForwardedPort, MappingKey, PolicyEntry, PortOwner, local, map_name, nat_protocol,
    port_index,
};

use super::pools::Pools;
use super::{MAX_FORWARDED_PORTS, Nat, PortForward, guests};
use crate::datapath::{Datapath, entries};
use crate::error::DatapathError;
use crate::interface;
use crate::policy::Protocol;
use crate::rule_tables::ignore_missing;

/// Refuses forwards of which one packet could take two.
pub fn check_unique(forwards: &[PortForward]) -> Result<(), DatapathError> {
    if forwards.len() > MAX_FORWARDED_PORTS {
        return Err(DatapathError::Full {
            map: map_name::NAT_FORWARDS,
        });
    }
    let mut external = BTreeSet::new();
    let mut internal = BTreeSet::new();
    for forward in forwards {
        let protocol = forward.protocol.number();
        if !external.insert((&forward.uplink, forward.address, protocol, forward.port)) {
            return Err(forward.invalid("stands in the list twice"));
        }
        let is_ipv4 = forward.address.is_ipv4();
        if !internal.insert((&forward.interface, is_ipv4, protocol, forward.guest_port)) {
            return Err(forward.invalid("leads to a guest's port that another leads to"));
        }
    }
    Ok(())
}

impl Datapath {
    /// Makes these the forwards. A port that changes hands does so at once: no packet goes astray.
    pub(super) fn settle_forwards(
        &mut self,
        wanted: &Nat,
        pools: &Pools,
    ) -> Result<(), DatapathError> {
        let wanted = self.resolve(wanted, pools)?;
        let mut owners = BTreeMap::new();
        for (key, forwarded) in &wanted {
            owners.insert(place(*key, *forwarded), *key);
        }
        let held = self.held_forwards()?;
        // The old external port of a guest's port that gets another one is known from here only: it ends first.
        for (key, forwarded) in &held {
            let moves = wanted.get(key).is_some_and(|now| now != forwarded);
            let place = place(*key, *forwarded);
            if moves && !owners.contains_key(&place) {
                self.write_owner(place, 0)?;
            }
        }
        for (key, forwarded) in &wanted {
            if held.get(key) != Some(forwarded) {
                self.write_forward(*key, *forwarded)?;
            }
            self.write_owner(place(*key, *forwarded), owner_word(*key))?;
        }
        for (key, forwarded) in held {
            if !wanted.contains_key(&key) {
                if !owners.contains_key(&place(key, forwarded)) {
                    self.write_owner(place(key, forwarded), 0)?;
                }
                self.remove_forward(key)?;
            }
        }
        Ok(())
    }

    /// Makes these the forwards to one interface, whatever the others are.
    pub(super) fn settle_forwards_to(
        &mut self,
        wanted: &Nat,
        pools: &Pools,
        entry: &PolicyEntry,
    ) -> Result<(), DatapathError> {
        let name = interface::from_bytes(&entry.name);
        let forwards = wanted.forwards.iter();
        for forward in forwards.filter(|forward| forward.interface == name) {
            let key = forward_key(forward, entry);
            let Some(forwarded) = forwarded(forward, entry, pools) else {
                // Its interface has no address of that version any more.
                if let Ok(held) = self.object.nat_forwards.get(&key, 0) {
                    self.write_owner(place(key, held), 0)?;
                    self.remove_forward(key)?;
                }
                continue;
            };
            self.write_forward(key, forwarded)?;
            self.write_owner(place(key, forwarded), owner_word(key))?;
        }
        Ok(())
    }

    /// Ends the forwards to an interface.
    pub(super) fn forget_forwards(&mut self, slot: u32) -> Result<(), DatapathError> {
        for (key, forwarded) in self.held_forwards()? {
            if key.slot == slot {
                self.write_owner(place(key, forwarded), 0)?;
                self.remove_forward(key)?;
            }
        }
        Ok(())
    }

    /// The forwards whose guests are attached and whose addresses there are.
    fn resolve(
        &self,
        wanted: &Nat,
        pools: &Pools,
    ) -> Result<BTreeMap<ForwardKey, ForwardedPort>, DatapathError> {
        if wanted.forwards.is_empty() {
            return Ok(BTreeMap::new());
        }
        let entries = entries(&self.object)?;
        let by_name: BTreeMap<String, _> = entries
            .values()
            .map(|entry| (interface::from_bytes(&entry.name), entry))
            .collect();
        let forwards = wanted.forwards.iter().filter_map(|forward| {
            let entry = by_name.get(&forward.interface)?;
            let forwarded = forwarded(forward, entry, pools)?;
            Some((forward_key(forward, entry), forwarded))
        });
        Ok(forwards.collect())
    }

    fn held_forwards(&self) -> Result<BTreeMap<ForwardKey, ForwardedPort>, DatapathError> {
        self.object
            .nat_forwards
            .iter()
            .collect::<Result<_, _>>()
            .map_err(DatapathError::map("read", map_name::NAT_FORWARDS))
    }

    fn write_forward(
        &mut self,
        key: ForwardKey,
        forwarded: ForwardedPort,
    ) -> Result<(), DatapathError> {
        self.object
            .nat_forwards
            .insert(key, forwarded, 0)
            .map_err(DatapathError::map("write", map_name::NAT_FORWARDS))
    }

    fn remove_forward(&mut self, key: ForwardKey) -> Result<(), DatapathError> {
        ignore_missing(self.object.nat_forwards.remove(&key))
            .map_err(DatapathError::map("write", map_name::NAT_FORWARDS))
    }

    /// Gives an external port to someone, if there is such an address still.
    fn write_owner(&mut self, (pool, index): Place, owner: u64) -> Result<(), DatapathError> {
        let Ok(mut ports) = self.ports(pool) else {
            return Ok(());
        };
        ports
            .set(index, owner, 0)
            .map_err(DatapathError::map("write", map_name::NAT_PORTS))
    }
}

/// An external address's place and a port's.
type Place = (u32, u32);

fn place(key: ForwardKey, forwarded: ForwardedPort) -> Place {
    let index = port_index(key.port.protocol, forwarded.port);
    (forwarded.pool, index)
}

/// The port that a forward leads to.
fn forward_key(forward: &PortForward, entry: &PolicyEntry) -> ForwardKey {
    ForwardKey {
        slot: entry.slot,
        port: MappingKey {
            port: forward.guest_port,
            protocol: match forward.protocol {
                Protocol::Tcp => nat_protocol::TCP,
                _ => nat_protocol::UDP,
            },
            local: if forward.address.is_ipv4() {
                local::IPV4
            } else {
                local::IPV6
            },
        },
    }
}

/// The port that leads there, if its address and the interface's are there.
fn forwarded(forward: &PortForward, entry: &PolicyEntry, pools: &Pools) -> Option<ForwardedPort> {
    let pool = *pools.get(&forward.external_address())?;
    guests::has_version(entry, forward.address).then_some(ForwardedPort {
        pool,
        port: forward.port,
        reserved: 0,
    })
}

fn owner_word(key: ForwardKey) -> u64 {
    let owner = PortOwner {
        slot: key.slot,
        port: key.port.port,
        is_forward: true,
    };
    owner.word()
}
