//! What happened to packets, for those who wait for it.

use std::net::IpAddr;

use aya::maps::{MapData, RingBuf};
use keelson_ebpf_common::{Direction, DropReason, Event, happening, map_name};

use crate::address::from_map;
use crate::datapath::Datapath;
use crate::error::DatapathError;
use crate::interface;

/// Something that happened to a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PacketEvent {
    /// When, in nanoseconds of the monotonic clock (`CLOCK_MONOTONIC`).
    pub time_ns: u64,
    /// The interface; empty if it is gone.
    pub interface: String,
    /// Which way the packet went.
    pub direction: Direction,
    /// What happened.
    pub happening: Happening,
    /// Source and destination; `None` if it isn't IP.
    pub addresses: Option<(IpAddr, IpAddr)>,
    /// Source and destination port of TCP and UDP; of ICMP its type and zero.
    pub ports: (u16, u16),
    /// EtherType.
    pub ether_type: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Bytes of the packet, from the Ethernet header on.
    pub length: u32,
}

/// What happened to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Happening {
    /// It was dropped.
    Dropped(DropReason),
    /// It opened a flow.
    Opened,
    /// It ended a TCP flow.
    Closed,
}

/// Which events are wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// Drops.
    pub drops: bool,
    /// Beginnings and ends of flows.
    pub flows: bool,
}

/// Reads events; there is one of it.
pub struct EventReader {
    ring: RingBuf<MapData>,
}

impl Datapath {
    /// The reader of events; `None` from the second call on.
    pub fn take_event_reader(&mut self) -> Option<EventReader> {
        let ring = self.object.events.take()?;
        Some(EventReader { ring })
    }

    /// Says which events the programs are to write from now on: none at first. What nobody reads
    /// stays in the ring buffer, and later events are lost.
    ///
    /// # Errors
    /// [`DatapathError::Map`] if the kernel doesn't let the map be written.
    pub fn observe(&mut self, observed: Observed) -> Result<(), DatapathError> {
        let bit = |wanted: bool, kind: u8| u32::from(wanted) << kind;
        let bits = bit(observed.drops, happening::DROPPED)
            | bit(observed.flows, happening::OPENED)
            | bit(observed.flows, happening::CLOSED);
        self.object
            .observed
            .set(0, bits, 0)
            .map_err(DatapathError::map("write", map_name::OBSERVED))
    }
}

impl EventReader {
    /// The events that are there, at most `limit`. Interface names are those of the calling thread's
    /// network namespace.
    pub fn read(&mut self, limit: usize) -> Vec<PacketEvent> {
        let mut events = Vec::new();
        while events.len() < limit {
            let Some(item) = self.ring.next() else { break };
            if item.len() >= size_of::<Event>() {
                // SAFETY: the item has the bytes of an event, any of which are valid, and need not be
                // aligned for this.
                let event: Event = unsafe { item.as_ptr().cast::<Event>().read_unaligned() };
                events.extend(translate(&event));
            }
        }
        events
    }
}

impl std::fmt::Debug for EventReader {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("EventReader")
            .finish_non_exhaustive()
    }
}

/// `None` if a later version wrote it.
fn translate(event: &Event) -> Option<PacketEvent> {
    let happening = match event.kind {
        happening::DROPPED => {
            let reason = DropReason::ALL.get(usize::from(event.reason))?;
            Happening::Dropped(*reason)
        }
        happening::OPENED => Happening::Opened,
        happening::CLOSED => Happening::Closed,
        _ => return None,
    };
    let is_ip = matches!(event.ether_type, 0x0800 | 0x86dd);
    Some(PacketEvent {
        time_ns: event.time_ns,
        interface: interface::name(event.ifindex).unwrap_or_default(),
        direction: match event.direction {
            0 => Direction::FromGuest,
            _ => Direction::ToGuest,
        },
        happening,
        addresses: is_ip.then(|| (from_map(event.source), from_map(event.destination))),
        ports: (event.source_port, event.destination_port),
        ether_type: event.ether_type,
        protocol: event.protocol,
        length: event.length,
    })
}
