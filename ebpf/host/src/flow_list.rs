//! The flows that an interface has at the moment.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use aya::maps::{ArrayOfMaps, HashMap, Map, MapData};
use keelson_ebpf_common::{Direction, FlowKey, FlowState, PolicyEntry, local, map_name, phase};

use crate::address::from_map;
use crate::datapath::Datapath;
use crate::error::DatapathError;

/// A flow of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// IP protocol number.
    pub protocol: u8,
    /// The guest's address and port; of an ICMP echo, its identifier.
    pub guest: (IpAddr, u16),
    /// The peer's address and port; of an ICMP echo, zero.
    pub peer: (IpAddr, u16),
    /// Who opened it.
    pub opener: Direction,
    /// How far it has come.
    pub state: FlowPhase,
    /// Since its last packet, exact to a second.
    pub idle: Duration,
}

/// How far a flow has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowPhase {
    /// One side has sent, nothing has come back.
    Opening,
    /// Both sides have sent.
    Established,
    /// TCP: one side has sent its FIN.
    HalfClosed,
    /// TCP: both sides have sent their FIN, or one a RST.
    Closed,
}

/// How many flows an interface has, and can have. Those that have timed out and were not pushed out
/// are among them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowUse {
    /// Flows in which both sides have sent.
    pub established: u32,
    /// How many of those fit.
    pub max_established: u32,
    /// Flows in which only one side has sent.
    pub opening: u32,
    /// How many of those fit.
    pub max_opening: u32,
}

impl Datapath {
    /// The flows of an interface, those that have timed out and were not pushed out among them.
    ///
    /// # Errors
    /// [`DatapathError::NotAttached`], [`DatapathError::Map`].
    pub fn flows(&self, interface: &str) -> Result<Vec<Flow>, DatapathError> {
        let (_, entry) = self.find(interface)?;
        let now = monotonic_now();
        let mut flows = Vec::new();
        for (outer, name) in [
            (&self.object.flows, map_name::FLOWS),
            (&self.object.opening_flows, map_name::OPENING_FLOWS),
        ] {
            let (inner, _) = open_flows(outer, entry.slot, name)?;
            // A flow that is pushed out while they are read is left out.
            flows.extend(
                inner
                    .iter()
                    .filter_map(Result::ok)
                    .map(|(key, state)| flow(&entry, &key, &state, now)),
            );
        }
        Ok(flows)
    }

    /// How many flows an interface has.
    pub(crate) fn flow_use(&self, entry: &PolicyEntry) -> Result<FlowUse, DatapathError> {
        let count = |outer, name| {
            let (inner, max) = open_flows(outer, entry.slot, name)?;
            // One that is pushed out while they are counted ends nothing.
            let count = inner.keys().flatten().take(max as usize).count();
            Ok((u32::try_from(count).unwrap_or(max), max))
        };
        let (established, max_established) = count(&self.object.flows, map_name::FLOWS)?;
        let (opening, max_opening) = count(&self.object.opening_flows, map_name::OPENING_FLOWS)?;
        Ok(FlowUse {
            established,
            max_established,
            opening,
            max_opening,
        })
    }
}

/// The flows of a slot, and how many fit.
pub fn open_flows(
    outer: &ArrayOfMaps<MapData>,
    slot: u32,
    name: &'static str,
) -> Result<(HashMap<MapData, FlowKey, FlowState>, u32), DatapathError> {
    let inner: MapData = outer
        .get(&slot, 0)
        .map_err(DatapathError::map("read", name))?;
    let info = inner.info().map_err(DatapathError::map("read", name))?;
    let flows = Map::from_map_data(inner)
        .and_then(HashMap::try_from)
        .map_err(DatapathError::map("read", name))?;
    Ok((flows, info.max_entries()))
}

fn flow(entry: &PolicyEntry, key: &FlowKey, state: &FlowState, now: Duration) -> Flow {
    let own = match key.local {
        local::IPV4 => IpAddr::V4(Ipv4Addr::from(entry.ipv4.to_ne_bytes())),
        local::IPV6 => from_map(entry.ipv6),
        _ => from_map(entry.link_local),
    };
    let is_echo = matches!(key.protocol, 1 | 58);
    Flow {
        protocol: key.protocol,
        guest: (own, key.guest_port),
        peer: (from_map(key.peer), if is_echo { 0 } else { key.peer_port }),
        opener: match state.opener {
            0 => Direction::FromGuest,
            _ => Direction::ToGuest,
        },
        state: match state.phase {
            phase::OPENING => FlowPhase::Opening,
            phase::ESTABLISHED => FlowPhase::Established,
            phase::HALF_CLOSED => FlowPhase::HalfClosed,
            _ => FlowPhase::Closed,
        },
        idle: now.saturating_sub(Duration::from_nanos(state.last_seen_ns)),
    }
}

/// The clock that the programs read.
pub fn monotonic_now() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::new(
        now.tv_sec.try_into().unwrap_or(0),
        now.tv_nsec.try_into().unwrap_or(0),
    )
}
