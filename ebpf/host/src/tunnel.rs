//! The tunnel to other hosts, and their guests (maps `TUNNEL`, `OVERLAYS`, `REMOTE_STATIONS`,
//! `REMOTE_NEIGHBOURS`).

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use aya::maps::MapError;
use keelson_ebpf_common::{
    Direction, Neighbour, NeighbourKey, OVERLAYS, REMOTE_STATIONS, RemoteStation, StationKey,
    Tally, TunnelEntry, map_name,
};

use crate::address::{MacAddress, to_map};
use crate::counters::{self, DirectionCounters};
use crate::datapath::{Datapath, entries};
use crate::error::DatapathError;
use crate::hook::{self, HookMode, TUNNEL_HOOKS, Target};
use crate::object::Object;
use crate::rule_tables::ignore_missing;
use crate::{grace_period, interface, stations};

/// Interfaces of guests of other hosts that a host can know.
pub const MAX_REMOTE_STATIONS: usize = REMOTE_STATIONS as usize;
/// Networks that span hosts that a host can know.
pub const MAX_OVERLAYS: usize = OVERLAYS as usize;

/// This host's end of the tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// A VXLAN device in metadata mode (`ip link add … type vxlan external`).
    pub device: String,
    /// The address from which this host sends, and to which others do.
    pub address: IpAddr,
    /// The UDP port, of all hosts.
    pub port: u16,
}

/// An interface of a guest of another host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteInterface {
    /// Number of its network, as [`InterfacePolicy::network`](crate::InterfacePolicy::network).
    pub network: u32,
    /// The network's VXLAN network identifier (24 bits).
    pub vni: u32,
    /// Its Ethernet address.
    pub mac: MacAddress,
    /// Its IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// Its IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
    /// Its host's end of the tunnel.
    pub host: IpAddr,
}

/// What passed the tunnel since its device was made, and what did not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TunnelCounters {
    /// What guests of this host sent to others.
    pub sent: Tally,
    /// What came for guests of this host, before their own policies decided; and what was dropped.
    pub received: DirectionCounters,
}

impl Datapath {
    /// Makes this the host's end of the tunnel; `None` for none. The programs are attached to the device if they
    /// are not.
    ///
    /// # Errors
    /// [`DatapathError::InterfaceMissing`], [`DatapathError::Hook`].
    pub fn set_tunnel(&mut self, tunnel: Option<&Tunnel>) -> Result<(), DatapathError> {
        let before = entry(&self.object)?;
        let Some(tunnel) = tunnel else {
            return self.forget_tunnel(&before);
        };
        let ifindex = interface::index(&tunnel.device)?;
        if before.ifindex != ifindex {
            self.forget_tunnel(&before)?;
        }
        let mode = if before.ifindex == ifindex {
            HookMode::from_byte(before.hook)
        } else {
            self.zero_counters(ifindex)?;
            self.mode
        };
        let now = TunnelEntry {
            address: to_map(tunnel.address),
            ifindex,
            port: tunnel.port,
            hook: mode.to_byte(),
            reserved: 0,
            name: interface::to_bytes(&tunnel.device),
        };
        if now != before {
            self.write_tunnel(now)?;
        }
        self.ensure_tunnel(&now)
    }

    /// Makes these the networks that span hosts: their numbers, by their identifiers.
    ///
    /// # Errors
    /// [`DatapathError::Full`].
    pub fn set_overlays(&mut self, overlays: &BTreeMap<u32, u32>) -> Result<(), DatapathError> {
        let write = |error| DatapathError::map("write", map_name::OVERLAYS)(error);
        let known: BTreeMap<u32, u32> = self
            .object
            .overlays
            .iter()
            .collect::<Result<_, _>>()
            .map_err(DatapathError::map("read", map_name::OVERLAYS))?;
        for vni in known.keys().filter(|vni| !overlays.contains_key(vni)) {
            ignore_missing(self.object.overlays.remove(vni)).map_err(write)?;
        }
        for (vni, network) in overlays {
            if known.get(vni) != Some(network) {
                self.object
                    .overlays
                    .insert(vni, network, 0)
                    .map_err(write)?;
            }
        }
        Ok(())
    }

    /// Makes these the interfaces of a guest of another host, or of none (`[]`). While a
    /// guest is moved, it may have an interface on this host as well: guests here reach the other one.
    ///
    /// # Errors
    /// [`DatapathError::Full`].
    pub fn set_remote(
        &mut self,
        guest: &str,
        interfaces: Vec<RemoteInterface>,
    ) -> Result<(), DatapathError> {
        let known = self.remote.get_or_insert_default();
        let before = known.get(guest).cloned().unwrap_or_default();
        if before == interfaces {
            return Ok(());
        }
        // Noted first: what is cut short is done by whoever says the same again.
        known.remove(guest);
        for interface in &interfaces {
            write_remote(&mut self.object, interface)?;
        }
        for old in &before {
            remove_remote(&mut self.object, old, &interfaces)?;
        }
        if interfaces.is_empty() {
            self.find_stations_here()?;
        }
        if !interfaces.is_empty() {
            self.remote
                .get_or_insert_default()
                .insert(guest.to_owned(), interfaces);
        }
        Ok(())
    }

    /// As [`set_remote`](Self::set_remote) for all guests of other hosts; what is known of further ones is
    /// removed, be it from an earlier process.
    ///
    /// # Errors
    /// [`DatapathError::Full`].
    pub fn set_all_remote(
        &mut self,
        guests: BTreeMap<String, Vec<RemoteInterface>>,
    ) -> Result<(), DatapathError> {
        let all = || guests.values().flatten();
        if all().count() > MAX_REMOTE_STATIONS {
            return Err(DatapathError::Full {
                map: map_name::REMOTE_STATIONS,
            });
        }
        for interface in all() {
            write_remote(&mut self.object, interface)?;
        }
        let stations: Vec<_> = all().map(station).collect();
        let neighbours: Vec<_> = all().flat_map(neighbours).collect();
        remove_others(
            &mut self.object.remote_stations,
            map_name::REMOTE_STATIONS,
            stations,
        )?;
        remove_others(
            &mut self.object.remote_neighbours,
            map_name::REMOTE_NEIGHBOURS,
            neighbours,
        )?;
        self.remote = Some(guests);
        self.find_stations_here()
    }

    /// Lets guests find those of this host that no other host has (any more).
    fn find_stations_here(&mut self) -> Result<(), DatapathError> {
        for (ifindex, entry) in entries(&self.object)? {
            stations::add(&mut self.object, ifindex, &entry)?;
        }
        Ok(())
    }

    /// What passed the tunnel, and what did not; `None` without one.
    ///
    /// # Errors
    /// [`DatapathError::Map`] if the kernel doesn't let a map be read.
    pub fn tunnel_counters(&self) -> Result<Option<TunnelCounters>, DatapathError> {
        let tunnel = entry(&self.object)?;
        if tunnel.ifindex == 0 {
            return Ok(None);
        }
        let passed = |direction: Direction| {
            let tallies = self.object.tunnelled.get(&(direction as u32), 0);
            let tallies = tallies.map_err(DatapathError::map("read", map_name::TUNNELLED))?;
            Ok(counters::total(tallies.iter()))
        };
        let dropped = self.read_counters(tunnel.ifindex, 0)?.unwrap_or_default();
        Ok(Some(TunnelCounters {
            sent: passed(Direction::FromGuest)?,
            received: DirectionCounters {
                passed: passed(Direction::ToGuest)?,
                ..dropped.to_guest
            },
        }))
    }

    /// Replaces the program of the tunnel's device in place; forgets a device that is gone.
    pub(crate) fn adopt_tunnel(&mut self) -> Result<(), DatapathError> {
        let tunnel = entry(&self.object)?;
        if tunnel.ifindex == 0 {
            return Ok(());
        }
        let name = interface::from_bytes(&tunnel.name);
        if interface::name(tunnel.ifindex).as_ref() == Some(&name) {
            self.ensure_tunnel(&tunnel)
        } else {
            self.forget_tunnel(&tunnel)
        }
    }

    fn ensure_tunnel(&mut self, tunnel: &TunnelEntry) -> Result<(), DatapathError> {
        let name = interface::from_bytes(&tunnel.name);
        hook::ensure_anew(&mut self.object, &self.root, target(&name, tunnel))
    }

    fn forget_tunnel(&mut self, tunnel: &TunnelEntry) -> Result<(), DatapathError> {
        if tunnel.ifindex == 0 {
            return Ok(());
        }
        let name = interface::from_bytes(&tunnel.name);
        hook::forget(&self.root, target(&name, tunnel))?;
        self.write_tunnel(TunnelEntry::default())?;
        grace_period::wait();
        self.remove_counters(tunnel.ifindex)
    }

    fn write_tunnel(&mut self, tunnel: TunnelEntry) -> Result<(), DatapathError> {
        self.object
            .tunnel
            .set(0, tunnel, 0)
            .map_err(DatapathError::map("write", map_name::TUNNEL))
    }
}

/// This host's end of the tunnel; zeros for none.
pub fn entry(object: &Object) -> Result<TunnelEntry, DatapathError> {
    object
        .tunnel
        .get(&0, 0)
        .map_err(DatapathError::map("read", map_name::TUNNEL))
}

fn target<'a>(name: &'a str, tunnel: &TunnelEntry) -> Target<'a> {
    Target {
        name,
        ifindex: tunnel.ifindex,
        mode: HookMode::from_byte(tunnel.hook),
        hooks: &TUNNEL_HOOKS,
    }
}

fn station(interface: &RemoteInterface) -> StationKey {
    StationKey {
        network: interface.network,
        mac: interface.mac.0,
        reserved: [0; 2],
    }
}

fn neighbours(interface: &RemoteInterface) -> Vec<NeighbourKey> {
    let ipv4 = interface.ipv4.map(IpAddr::from);
    let ipv6 = interface.ipv6.map(IpAddr::from);
    let link_local = ipv6.map(|_| IpAddr::from(interface.mac.link_local()));
    let addresses = [ipv4, ipv6, link_local].into_iter().flatten();
    let network = interface.network;
    addresses
        .map(|address| NeighbourKey {
            network,
            address: to_map(address),
        })
        .collect()
}

fn neighbour(interface: &RemoteInterface) -> Neighbour {
    Neighbour {
        mac: interface.mac.0,
        reserved: [0; 2],
    }
}

fn remote_station(interface: &RemoteInterface) -> RemoteStation {
    RemoteStation {
        host: to_map(interface.host),
        vni: interface.vni,
    }
}

/// Whether another host has the guest.
pub fn is_remote(object: &Object, key: &StationKey) -> Result<bool, DatapathError> {
    let found = found(object.remote_stations.get(key, 0));
    found
        .map(|found| found.is_some())
        .map_err(DatapathError::map("read", map_name::REMOTE_STATIONS))
}

/// The station first: an address that is answered for is one that can be reached.
fn write_remote(object: &mut Object, interface: &RemoteInterface) -> Result<(), DatapathError> {
    object
        .remote_stations
        .insert(station(interface), remote_station(interface), 0)
        .map_err(DatapathError::map("write", map_name::REMOTE_STATIONS))?;
    // Of a guest that left, its device may still be here.
    stations::remove_station(object, &station(interface))?;
    for key in neighbours(interface) {
        object
            .remote_neighbours
            .insert(key, neighbour(interface), 0)
            .map_err(DatapathError::map("write", map_name::REMOTE_NEIGHBOURS))?;
    }
    Ok(())
}

/// Removes what is known of an interface, but for what `kept` or meanwhile another guest has.
fn remove_remote(
    object: &mut Object,
    old: &RemoteInterface,
    kept: &[RemoteInterface],
) -> Result<(), DatapathError> {
    let kept_neighbours: Vec<_> = kept.iter().flat_map(neighbours).collect();
    for key in neighbours(old) {
        let found = found(object.remote_neighbours.get(&key, 0))
            .map_err(DatapathError::map("read", map_name::REMOTE_NEIGHBOURS))?;
        if found == Some(neighbour(old)) && !kept_neighbours.contains(&key) {
            ignore_missing(object.remote_neighbours.remove(&key))
                .map_err(DatapathError::map("write", map_name::REMOTE_NEIGHBOURS))?;
        }
    }
    let key = station(old);
    let found = found(object.remote_stations.get(&key, 0))
        .map_err(DatapathError::map("read", map_name::REMOTE_STATIONS))?;
    if found == Some(remote_station(old)) && !kept.iter().any(|kept| station(kept) == key) {
        ignore_missing(object.remote_stations.remove(&key))
            .map_err(DatapathError::map("write", map_name::REMOTE_STATIONS))?;
    }
    Ok(())
}

fn found<T>(result: Result<T, MapError>) -> Result<Option<T>, MapError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

fn remove_others<K: aya::Pod + Ord, V: aya::Pod>(
    map: &mut aya::maps::HashMap<aya::maps::MapData, K, V>,
    name: &'static str,
    mut wanted: Vec<K>,
) -> Result<(), DatapathError> {
    wanted.sort_unstable();
    let known: Vec<K> = map
        .keys()
        .collect::<Result<_, _>>()
        .map_err(DatapathError::map("read", name))?;
    for key in known {
        if wanted.binary_search(&key).is_err() {
            ignore_missing(map.remove(&key)).map_err(DatapathError::map("write", name))?;
        }
    }
    Ok(())
}
