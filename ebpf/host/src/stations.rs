//! Who is in which network on this host: what `STATIONS` and `NEIGHBOURS` hold for an interface.

use std::collections::BTreeMap;

use keelson_ebpf_common::{
    Address, NO_ADDRESS, NearStation, Neighbour, NeighbourKey, PolicyEntry, StationKey, from_ipv4,
    map_name,
};

use crate::error::DatapathError;
use crate::object::Object;
use crate::policy::InterfacePolicy;
use crate::rule_tables::ignore_missing;
use crate::{address, interface, tunnel};

/// Lets the guests of its network find the interface, unless the guest is another host's.
pub fn add(object: &mut Object, ifindex: u32, entry: &PolicyEntry) -> Result<(), DatapathError> {
    if entry.network == 0 {
        return Ok(());
    }
    // One that is on its way here is reached where it is.
    if tunnel::is_remote(object, &station(entry))? {
        return Ok(());
    }
    let station = station(entry);
    object
        .stations
        .insert(station, ifindex, 0)
        .map_err(DatapathError::map("write", map_name::STATIONS))?;
    add_near(object, &station, ifindex)?;
    let neighbour = Neighbour {
        mac: entry.mac,
        reserved: [0; 2],
    };
    for key in neighbours(entry) {
        object
            .neighbours
            .insert(key, neighbour, 0)
            .map_err(DatapathError::map("write", map_name::NEIGHBOURS))?;
    }
    Ok(())
}

/// Takes back what [`add`] did for `old`, but for what `new` has as well.
pub fn remove(
    object: &mut Object,
    old: &PolicyEntry,
    new: Option<&PolicyEntry>,
) -> Result<(), DatapathError> {
    if old.network == 0 {
        return Ok(());
    }
    if new.is_none_or(|new| station(new) != station(old)) {
        remove_station(object, &station(old))?;
    }
    let kept: Vec<NeighbourKey> = new.into_iter().flat_map(neighbours).collect();
    for key in neighbours(old).filter(|key| !kept.contains(key)) {
        ignore_missing(object.neighbours.remove(&key))
            .map_err(DatapathError::map("write", map_name::NEIGHBOURS))?;
    }
    Ok(())
}

/// From now on nobody finds the guest on this host.
pub fn remove_station(object: &mut Object, station: &StationKey) -> Result<(), DatapathError> {
    let (place, mac) = place(station);
    let near = object
        .near_stations
        .get(&place, 0)
        .map_err(DatapathError::map("read", map_name::NEAR_STATIONS))?;
    if (near.network, near.mac) == (station.network, mac) {
        set_near(object, place, NearStation::default())?;
    }
    ignore_missing(object.stations.remove(station))
        .map_err(DatapathError::map("write", map_name::STATIONS))
}

/// Gives a station its place among those that are found without hashing; whoever had it is found in the other map.
fn add_near(object: &mut Object, station: &StationKey, ifindex: u32) -> Result<(), DatapathError> {
    let (place, mac) = place(station);
    let near = NearStation {
        network: station.network,
        mac,
        reserved: 0,
        ifindex,
    };
    let found = object
        .near_stations
        .get(&place, 0)
        .map_err(DatapathError::map("read", map_name::NEAR_STATIONS))?;
    if found == near {
        return Ok(());
    }
    // A program that reads while it is written must not find one guest's address with another's interface.
    set_near(object, place, NearStation::default())?;
    set_near(object, place, near)
}

fn set_near(object: &mut Object, place: u32, near: NearStation) -> Result<(), DatapathError> {
    object
        .near_stations
        .set(place, near, 0)
        .map_err(DatapathError::map("write", map_name::NEAR_STATIONS))
}

fn place(station: &StationKey) -> (u32, [u16; 3]) {
    let bytes = station.mac;
    let mac = [0, 2, 4].map(|first| u16::from_ne_bytes([bytes[first], bytes[first + 1]]));
    (NearStation::place(station.network, mac), mac)
}

/// Refuses a policy whose addresses another interface of the same network has.
pub fn check_unique(
    policy: &InterfacePolicy,
    ifindex: u32,
    entries: &BTreeMap<u32, PolicyEntry>,
) -> Result<(), DatapathError> {
    let others = entries.iter().filter(|(other, entry)| {
        **other != ifindex
            && policy.network != 0
            && entry.network == policy.network
            && interface::from_bytes(&entry.name) != policy.name
    });
    for (_, other) in others {
        let ipv4 = policy.ipv4.map(|ipv4| u32::from_ne_bytes(ipv4.octets()));
        let ipv6 = policy.ipv6.map(|ipv6| address::to_map(ipv6.into()));
        let taken = if other.mac == policy.mac.0 {
            Some(("mac", policy.mac.to_string()))
        } else if ipv4 == Some(other.ipv4) {
            Some(("ipv4", policy.ipv4.map_or(String::new(), |a| a.to_string())))
        } else if ipv6 == Some(other.ipv6) {
            Some(("ipv6", policy.ipv6.map_or(String::new(), |a| a.to_string())))
        } else {
            None
        };
        if let Some((field, value)) = taken {
            let holder = interface::from_bytes(&other.name);
            return Err(policy.invalid(
                field,
                format!("{value} is the address of {holder} in the same network"),
            ));
        }
    }
    Ok(())
}

fn station(entry: &PolicyEntry) -> StationKey {
    StationKey {
        network: entry.network,
        mac: entry.mac,
        reserved: [0; 2],
    }
}

fn neighbours(entry: &PolicyEntry) -> impl Iterator<Item = NeighbourKey> {
    let ipv4 = (entry.ipv4 != 0).then(|| from_ipv4(entry.ipv4));
    let ipv6 = [entry.ipv6, entry.link_local].map(|ipv6| (ipv6 != NO_ADDRESS).then_some(ipv6));
    let network = entry.network;
    [ipv4, ipv6[0], ipv6[1]]
        .into_iter()
        .flatten()
        .map(move |address: Address| NeighbourKey { network, address })
}
