//! The flows of a guest that moves to another host: read from one host's maps, checked, and written into
//! the other's.
//!
//! What is of one host alone stays there: its clock, so that the time since the last packet moves; the
//! numbers of its policies, so that the other host's rules judge each flow anew with its next packet; and
//! what source NAT has made of a flow's ends.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use aya::maps::{HashMap, MapData};
use keelson_ebpf_common::{
    Direction, FlowKey, FlowState, NO_ADDRESS, PolicyEntry, local, map_name, phase, timeout,
};
use serde::{Deserialize, Serialize};

use crate::address::{from_map, to_map};
use crate::datapath::Datapath;
use crate::error::DatapathError;
use crate::flow_list::{monotonic_now, open_flows};

mod translation;

use translation::KnownServices;
pub use translation::MovedTranslation;

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
/// The last value of `FlowKey::peer_port` of an ICMP echo, which says who asked.
const LAST_ASKER: u16 = 2;
/// Every bit of `FlowState::finished`.
const BOTH_FINISHED: u8 = 3;

/// A flow as it moves from host to host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MovedFlow {
    peer: IpAddr,
    guest_port: u16,
    peer_port: u16,
    protocol: u8,
    local: u8,
    opened_by_guest: bool,
    /// Whether it was among the flows of which both sides have sent.
    answered: bool,
    phase: u8,
    finished: u8,
    idle_milliseconds: u32,
}

/// The flows of an interface as they move from host to host; in each list the one that was idle for longest comes
/// first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MovedFlows {
    /// Those whose ends are the peers' own.
    pub direct: Vec<MovedFlow>,
    /// Those that the guest opened through a service: the backend is the peer.
    pub through_services: Vec<MovedFlow>,
    /// What services have made of the ends of those.
    pub translations: Vec<MovedTranslation>,
}

impl MovedFlows {
    /// How many flows they are.
    pub fn count(&self) -> usize {
        self.direct.len() + self.through_services.len()
    }
}

/// What an interface's maps hold when its guest leaves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeavingFlows {
    /// The flows that can move.
    pub flows: MovedFlows,
    /// Ports of the guest that have an external one at an uplink of this host.
    pub mapped_ports: u32,
}

/// A flow as an interface's maps hold it, and whether it is among those of which both sides have sent.
type Entry = (FlowKey, FlowState, bool);

/// Why a flow that came from another host is not one that this host's programs could have made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadFlow {
    /// The peer has no address, or one that stands for another.
    #[error("its peer's address is not one that a packet can have")]
    Peer,
    /// The guest's address is of another version of IP than the peer's.
    #[error("its ends are of different versions of IP")]
    Versions,
    /// ICMP of the other version of IP, or ports where the protocol has none.
    #[error("its protocol and its ports contradict each other")]
    Ports,
    /// A number that stands for nothing.
    #[error("its state is none that a flow can be in")]
    State,
}

impl Datapath {
    /// The flows of an interface whose guest leaves this host. Those that have timed out stay.
    ///
    /// # Errors
    /// [`DatapathError::NotAttached`], [`DatapathError::Map`].
    pub fn leaving_flows(&self, interface: &str) -> Result<LeavingFlows, DatapathError> {
        let (_, entry) = self.find(interface)?;
        let now = monotonic_now();
        let mut leaving = LeavingFlows::default();
        for (outer, name, answered) in [
            (&self.object.flows, map_name::FLOWS, true),
            (&self.object.opening_flows, map_name::OPENING_FLOWS, false),
        ] {
            let (inner, max) = open_flows(outer, entry.slot, name)?;
            // One that is pushed out while they are read stays.
            for (key, state) in inner.iter().take(max as usize).filter_map(Result::ok) {
                let kind = match state.translated {
                    0 => &mut leaving.flows.direct,
                    _ => &mut leaving.flows.through_services,
                };
                kind.extend(MovedFlow::new(&key, &state, answered, now));
            }
        }
        let idle = |flow: &MovedFlow| std::cmp::Reverse(flow.idle_milliseconds);
        leaving.flows.direct.sort_by_key(idle);
        leaving.flows.through_services.sort_by_key(idle);
        leaving.flows.translations = translation::leaving(&self.object, &entry, now)?;
        leaving.mapped_ports = self.count_mappings(entry.slot)?;
        Ok(leaving)
    }

    /// Gives an interface flows that its guest has brought from another host; how many it took. Of more
    /// than it has room for, those that were idle for longest are left out; of those to services, the ones
    /// whose service or backend this host doesn't have.
    ///
    /// # Errors
    /// [`DatapathError::BadFlow`] before anything is changed; [`DatapathError::NotAttached`],
    /// [`DatapathError::Map`].
    pub fn take_flows(
        &mut self,
        interface: &str,
        flows: &MovedFlows,
    ) -> Result<usize, DatapathError> {
        let (_, entry) = self.find(interface)?;
        let now = monotonic_now();
        let bad = |problem| DatapathError::BadFlow {
            interface: interface.to_owned(),
            problem,
        };
        let mut entries = entries_of(&flows.direct, 0, &entry, now).map_err(bad)?;
        let translated = entries_of(&flows.through_services, 1, &entry, now).map_err(bad)?;
        let checked = flows
            .translations
            .iter()
            .try_for_each(MovedTranslation::check);
        checked.map_err(bad)?;
        let known = self.take_translations(&flows.translations, &entry, now)?;
        // Without its translation a flow would take what answers it for something else.
        entries.extend(
            translated
                .into_iter()
                .filter(|(key, ..)| known.contains(&ends(key))),
        );
        let mut taken = 0;
        for (outer, name, answered) in [
            (&self.object.flows, map_name::FLOWS, true),
            (&self.object.opening_flows, map_name::OPENING_FLOWS, false),
        ] {
            let (inner, max) = open_flows(outer, entry.slot, name)?;
            let mut entries: Vec<_> = entries.iter().filter(|entry| entry.2 == answered).collect();
            entries.sort_by_key(|(_, state, _)| state.last_seen_ns);
            let surplus = entries.len().saturating_sub(max as usize);
            taken += insert(inner, &entries[surplus..], name)?;
        }
        Ok(taken)
    }

    /// Puts translations in force, as many as there is room for; the ends of the flows that they are for.
    fn take_translations(
        &mut self,
        translations: &[MovedTranslation],
        entry: &PolicyEntry,
        now: Duration,
    ) -> Result<BTreeSet<FlowEnds>, DatapathError> {
        let mut taken = BTreeSet::new();
        let Some((mut map, max)) = translation::open(&self.object, entry.slot)? else {
            return Ok(taken);
        };
        let surplus = translations.len().saturating_sub(max as usize / 2);
        let mut services = KnownServices::new(&self.object);
        for moved in &translations[surplus..] {
            let Some(pair) = moved.pair(entry, &mut services, now)? else {
                continue;
            };
            for (key, becomes) in pair {
                map.insert(key, becomes, 0)
                    .map_err(DatapathError::map("write", map_name::TRANSLATIONS))?;
            }
            taken.insert(moved.flow());
        }
        Ok(taken)
    }

    fn count_mappings(&self, slot: u32) -> Result<u32, DatapathError> {
        // A slot whose guest was never translated has no map.
        let inner: MapData = match self.object.nat_mappings.get(&slot, 0) {
            Ok(inner) => inner,
            Err(_) => return Ok(0),
        };
        let failed = || DatapathError::map("read", map_name::NAT_MAPPINGS);
        let max = inner.info().map_err(failed())?.max_entries();
        let mappings = aya::maps::Map::from_map_data(inner)
            .and_then(HashMap::<_, keelson_ebpf_common::MappingKey, keelson_ebpf_common::Mapping>::try_from)
            .map_err(failed())?;
        let count = mappings.keys().flatten().take(max as usize).count();
        Ok(u32::try_from(count).unwrap_or(max))
    }
}

fn insert(
    mut map: HashMap<MapData, FlowKey, FlowState>,
    entries: &[&Entry],
    name: &'static str,
) -> Result<usize, DatapathError> {
    for (key, state, _) in entries {
        map.insert(key, state, 0)
            .map_err(DatapathError::map("write", name))?;
    }
    Ok(entries.len())
}

fn entries_of(
    flows: &[MovedFlow],
    translated: u8,
    entry: &PolicyEntry,
    now: Duration,
) -> Result<Vec<Entry>, BadFlow> {
    let mut entries = Vec::new();
    for flow in flows {
        if let Some((key, state)) = flow.entry(entry, now)? {
            let state = FlowState {
                translated,
                ..state
            };
            entries.push((key, state, flow.answered));
        }
    }
    Ok(entries)
}

/// Which of the guest's addresses, protocol, the guest's port, and the peer's address and port.
type FlowEnds = (u8, u8, u16, IpAddr, u16);

fn ends(key: &FlowKey) -> FlowEnds {
    let peer = from_map(key.peer);
    (key.local, key.protocol, key.guest_port, peer, key.peer_port)
}

/// When something was last seen that has been idle for so long. This host may have been up for less time: it
/// lives on for that much longer.
fn from_idle(now: Duration, idle_milliseconds: u32) -> u64 {
    let last_seen = now.saturating_sub(Duration::from_millis(idle_milliseconds.into()));
    u64::try_from(last_seen.as_nanos()).unwrap_or(u64::MAX)
}

/// Whether an address is one that a packet can have, and doesn't stand for another.
fn is_host(address: IpAddr) -> bool {
    let is_mapped = matches!(address, IpAddr::V6(peer) if peer.to_ipv4_mapped().is_some());
    !address.is_unspecified() && !is_mapped
}

impl MovedFlow {
    /// `None` if it has timed out.
    fn new(key: &FlowKey, state: &FlowState, answered: bool, now: Duration) -> Option<Self> {
        let idle = now.saturating_sub(Duration::from_nanos(state.last_seen_ns));
        if idle >= limit(key.protocol, state.phase) {
            return None;
        }
        Some(Self {
            peer: from_map(key.peer),
            guest_port: key.guest_port,
            peer_port: key.peer_port,
            protocol: key.protocol,
            local: key.local,
            opened_by_guest: state.opener == Direction::FromGuest as u8,
            answered,
            phase: state.phase,
            finished: state.finished,
            idle_milliseconds: u32::try_from(idle.as_millis()).ok()?,
        })
    }

    /// As an interface's maps hold it; `None` if it has timed out, or is of an address that the interface
    /// doesn't have.
    fn entry(
        &self,
        entry: &PolicyEntry,
        now: Duration,
    ) -> Result<Option<(FlowKey, FlowState)>, BadFlow> {
        self.check()?;
        let has_address = match self.local {
            local::IPV4 => entry.ipv4 != 0,
            local::IPV6 => entry.ipv6 != NO_ADDRESS,
            _ => entry.link_local != NO_ADDRESS,
        };
        let idle = Duration::from_millis(self.idle_milliseconds.into());
        if !has_address || idle >= limit(self.protocol, self.phase) {
            return Ok(None);
        }
        let opener = if self.opened_by_guest {
            Direction::FromGuest
        } else {
            Direction::ToGuest
        };
        let key = FlowKey {
            peer: to_map(self.peer),
            guest_port: self.guest_port,
            peer_port: self.peer_port,
            protocol: self.protocol,
            local: self.local,
            reserved: [0; 2],
        };
        let state = FlowState {
            last_seen_ns: from_idle(now, self.idle_milliseconds),
            // Older than any policy: the rules judge it anew.
            generation: 0,
            opener: opener as u8,
            phase: self.phase,
            finished: self.finished,
            translated: 0,
        };
        Ok(Some((key, state)))
    }

    fn check(&self) -> Result<(), BadFlow> {
        if !is_host(self.peer) {
            return Err(BadFlow::Peer);
        }
        let is_ipv4 = match self.local {
            local::IPV4 => true,
            local::IPV6 | local::LINK_LOCAL => false,
            _ => return Err(BadFlow::State),
        };
        if is_ipv4 != self.peer.is_ipv4() {
            return Err(BadFlow::Versions);
        }
        let ports_fit = match self.protocol {
            TCP | UDP => true,
            ICMP | ICMPV6 => {
                is_ipv4 == (self.protocol == ICMP) && (1..=LAST_ASKER).contains(&self.peer_port)
            }
            _ => self.guest_port == 0 && self.peer_port == 0,
        };
        if !ports_fit {
            return Err(BadFlow::Ports);
        }
        if self.phase > phase::CLOSED || self.finished > BOTH_FINISHED {
            return Err(BadFlow::State);
        }
        Ok(())
    }
}

/// As the programs have it.
fn limit(protocol: u8, state: u8) -> Duration {
    Duration::from_nanos(match (protocol, state) {
        (TCP, phase::OPENING) => timeout::TCP_OPENING,
        (TCP, phase::ESTABLISHED) => timeout::TCP_ESTABLISHED,
        (TCP, phase::HALF_CLOSED) => timeout::TCP_HALF_CLOSED,
        (TCP, _) => timeout::TCP_CLOSED,
        (ICMP | ICMPV6, _) => timeout::ICMP_ECHO,
        _ => timeout::DATAGRAM,
    })
}

#[cfg(test)]
mod tests;
