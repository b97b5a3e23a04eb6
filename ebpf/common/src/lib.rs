//! Map types shared by the eBPF programs and the host side.
//!
//! Every type is `repr(C)`, without implicit padding and valid for any bit pattern, so that a map's
//! bytes mean the same on both sides. Addresses are in network byte order as they lie in a packet;
//! ports are numbers in host byte order unless a field says otherwise. A change to any of these
//! types is a change of [`LAYOUT_VERSION`].
#![no_std]

mod counters;
mod flow;
#[cfg(feature = "host")]
mod pod;
mod policy;
mod rules;

pub use counters::{CounterKey, Direction, DirectionTallies, DropReason, REASON_SLOTS, Tally};
pub use flow::{FlowKey, FlowState, FragmentKey, phase, timeout};
pub use policy::{NAME_LENGTH, PolicyEntry};
pub use rules::{ALLOW_ALL, PortKey, SourceKey, port_prefix_length};

/// Version of the pinned maps' layout. The host refuses pinned maps of another version.
pub const LAYOUT_VERSION: u64 = 1;

/// Names of the maps, which are also their file names below the pin root.
pub mod map_name {
    /// Interface index → [`PolicyEntry`](crate::PolicyEntry).
    pub const POLICIES: &str = "POLICIES";
    /// Rule table and peer address → class of peers (longest prefix match).
    pub const PEER_CLASSES: &str = "PEER_CLASSES";
    /// Class of peers, protocol and port → allowed (longest prefix match).
    pub const ALLOWED_PORTS: &str = "ALLOWED_PORTS";
    /// Flows that guests opened.
    pub const FLOWS: &str = "FLOWS";
    /// Fragmented datagrams whose first fragment passed.
    pub const FRAGMENTS: &str = "FRAGMENTS";
    /// Interface index and direction → [`DirectionTallies`](crate::DirectionTallies), per CPU.
    pub const COUNTERS: &str = "COUNTERS";
}

/// Names of the programs in the object.
pub mod program_name {
    /// Decides about packets that a guest sends.
    pub const FROM_GUEST: &str = "from_guest";
    /// Decides about packets on their way to a guest.
    pub const TO_GUEST: &str = "to_guest";
}
