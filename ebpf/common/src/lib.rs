//! Map types shared by the eBPF programs and the host side.
//!
//! Every type is `repr(C)`, without implicit padding and valid for any bit pattern, so that a map's
//! bytes mean the same on both sides. Addresses are in network byte order as they lie in a packet;
//! ports are numbers in host byte order unless a field says otherwise. A change to any of these
//! types is a change of [`LAYOUT_VERSION`], which the host's `migration` then has to know of.
#![no_std]

mod address;
mod capture;
mod counters;
mod event;
mod flow;
mod limit;
mod nat;
#[cfg(feature = "host")]
mod pod;
mod policy;
mod question;
mod rules;
mod service;
mod tunnel;

pub use address::{Address, IPV4_PREFIX_BITS, NO_ADDRESS, from_ipv4};
pub use capture::{CAPTURED_BYTES, CaptureHeader, CaptureRecord, NOT_DROPPED, SNAP_LIMIT};
pub use counters::{
    CounterKey, Direction, DirectionTallies, DropReason, REASON_SLOTS, Tally, passed_index,
};
pub use event::{EVENTS_BYTES, Event, happening};
pub use flow::{FlowKey, FlowState, FragmentKey, FragmentState, local, phase, timeout};
pub use limit::{BYTE_COST_BITS, Bucket, HORIZON, Limit, TICKS_PER_NS};
pub use nat::{
    ExternalKey, ForwardKey, ForwardedPort, Mapping, MappingKey, NAT_FRAGMENTS, NAT_POOLS, NO_POOL,
    NatClaim, NatFragment, NatFragmentKey, NatGuest, NatPool, NatSlot, POOL_PORTS, PORT_FORWARDS,
    PortOwner, UplinkEntry, mapping_hash, nat_protocol, port_index,
};
pub use policy::{
    NAME_LENGTH, NEAR_STATION_PLACES, NearStation, Neighbour, NeighbourKey, PolicyEntry,
    StationKey, flag,
};
pub use question::{
    ANSWER_MARK, QUESTION_BURST_NS, QUESTION_INTERVAL_NS, QUESTION_LIMIT, QUESTIONS_BYTES, Question,
};
pub use rules::{ALLOW_ALL, PeerKey, PortKey, RuleKey, UNCOUNTED, port_prefix_length};
pub use service::{
    BACKENDS, Backend, COUNTED_BACKENDS, GatewayEntry, NO_BACKEND, SERVICE_MAC, SERVICES, Served,
    ServedKey, ServiceEntry, ServiceKey, TABLE_PLACES, Translation, TranslationKey, Workspace,
    flow_hash, served, translation, way,
};
pub use tunnel::{OVERLAYS, REMOTE_STATIONS, RemoteStation, TunnelEntry};

/// Version of the pinned maps' layout. The host takes over pinned maps of earlier ones from
/// [`OLDEST_LAYOUT`] on and refuses later ones.
pub const LAYOUT_VERSION: u64 = 7;

/// The earliest version that can be taken over.
pub const OLDEST_LAYOUT: u64 = 5;

/// Guest interfaces that one host can have, plus one: slot zero is nobody's.
pub const SLOTS: u32 = 4096;

/// Names of the maps, which are also their file names below the pin root.
pub mod map_name {
    /// Interface index → [`PolicyEntry`](crate::PolicyEntry).
    pub const POLICIES: &str = "POLICIES";
    /// Rule table and peer address → class of peers (longest prefix match).
    pub const PEER_CLASSES: &str = "PEER_CLASSES";
    /// Class of peers, protocol and port → counter of the rule that allows it (longest prefix match).
    pub const ALLOWED_PORTS: &str = "ALLOWED_PORTS";
    /// Slot → map of the interface's flows in which both sides have sent.
    pub const FLOWS: &str = "FLOWS";
    /// Slot → map of the interface's flows in which only one side has sent.
    pub const OPENING_FLOWS: &str = "OPENING_FLOWS";
    /// Slot → map of fragmented datagrams whose first fragment passed.
    pub const FRAGMENTS: &str = "FRAGMENTS";
    /// Network and MAC address → index of the guest's interface on this host.
    pub const STATIONS: &str = "STATIONS";
    /// Place → [`NearStation`](crate::NearStation), a part of [`STATIONS`] that is found without hashing.
    pub const NEAR_STATIONS: &str = "NEAR_STATIONS";
    /// Network and address → [`Neighbour`](crate::Neighbour).
    pub const NEIGHBOURS: &str = "NEIGHBOURS";
    /// Slot and direction → [`Tally`](crate::Tally) of passed packets, per CPU.
    pub const PASSED: &str = "PASSED";
    /// Interface index and direction → [`DirectionTallies`](crate::DirectionTallies), per CPU.
    pub const DROPPED: &str = "DROPPED";
    /// [`RuleKey`](crate::RuleKey) → [`Tally`](crate::Tally) of what the rule allowed, per CPU.
    pub const ALLOWED: &str = "ALLOWED";
    /// Slot and direction → [`Limit`](crate::Limit).
    pub const LIMITS: &str = "LIMITS";
    /// Slot and direction → [`Bucket`](crate::Bucket).
    pub const BUCKETS: &str = "BUCKETS";
    /// [`ServiceKey`](crate::ServiceKey) → [`ServiceEntry`](crate::ServiceEntry).
    pub const SERVICES: &str = "SERVICES";
    /// [`ServedKey`](crate::ServedKey) → [`Served`](crate::Served), per CPU.
    pub const SERVED: &str = "SERVED";
    /// Slot → map of [`TranslationKey`](crate::TranslationKey) →
    /// [`Translation`](crate::Translation); slot zero is the host's.
    pub const TRANSLATIONS: &str = "TRANSLATIONS";
    /// One element: the [`Workspace`](crate::Workspace) of a CPU, per CPU.
    pub const WORKSPACE: &str = "WORKSPACE";
    /// Interface index of a bridge → [`GatewayEntry`](crate::GatewayEntry).
    pub const GATEWAYS: &str = "GATEWAYS";
    /// The programs that others go on with, by [`stage`](crate::stage). Programs of before an upgrade go
    /// on with the ones that it put here: if what they leave for the next one changes, this map has
    /// another form.
    pub const STAGES: &str = "STAGES";
    /// One element: the packet that a CPU is capturing, per CPU.
    pub const CAPTURING: &str = "CAPTURING";
    /// Ring buffer of [`CaptureHeader`](crate::CaptureHeader) and a packet's bytes.
    pub const CAPTURED: &str = "CAPTURED";
    /// Ring buffer of [`Question`](crate::Question).
    pub const QUESTIONS: &str = "QUESTIONS";
    /// Slot → until when the questions that the interface asked are paid for, in nanoseconds of the
    /// monotonic clock.
    pub const QUESTION_TIMES: &str = "QUESTION_TIMES";
    /// Ring buffer of [`Event`](crate::Event).
    pub const EVENTS: &str = "EVENTS";
    /// One element: which kinds of events someone waits for.
    pub const OBSERVED: &str = "OBSERVED";
    /// Interface index of an uplink → [`UplinkEntry`](crate::UplinkEntry).
    pub const UPLINKS: &str = "UPLINKS";
    /// Uplink and address → the address's place in [`NAT_POOLS`].
    pub const NAT_ADDRESSES: &str = "NAT_ADDRESSES";
    /// External addresses: [`NatPool`](crate::NatPool).
    pub const NAT_POOLS: &str = "NAT_POOLS";
    /// Place in [`NAT_POOLS`] → array of [`PortOwner`](crate::PortOwner).
    pub const NAT_PORTS: &str = "NAT_PORTS";
    /// A guest's address → [`NatGuest`](crate::NatGuest).
    pub const NAT_GUESTS: &str = "NAT_GUESTS";
    /// Slot → [`NatSlot`](crate::NatSlot).
    pub const NAT_SLOTS: &str = "NAT_SLOTS";
    /// Slot → map of [`MappingKey`](crate::MappingKey) → [`Mapping`](crate::Mapping).
    pub const NAT_MAPPINGS: &str = "NAT_MAPPINGS";
    /// One element: the [`NatClaim`](crate::NatClaim) of a CPU, per CPU.
    pub const NAT_CLAIMS: &str = "NAT_CLAIMS";
    /// [`ForwardKey`](crate::ForwardKey) → [`ForwardedPort`](crate::ForwardedPort).
    pub const NAT_FORWARDS: &str = "NAT_FORWARDS";
    /// [`NatFragmentKey`](crate::NatFragmentKey) → [`NatFragment`](crate::NatFragment).
    pub const NAT_FRAGMENTS: &str = "NAT_FRAGMENTS";
    /// Place in [`NAT_POOLS`] and direction → [`Tally`](crate::Tally) of what was translated, per CPU.
    pub const TRANSLATED: &str = "TRANSLATED";
    /// One element: the host's [`TunnelEntry`](crate::TunnelEntry).
    pub const TUNNEL: &str = "TUNNEL";
    /// VXLAN network identifier → number of the network.
    pub const OVERLAYS: &str = "OVERLAYS";
    /// Network and MAC address → [`RemoteStation`](crate::RemoteStation) of a guest of another host.
    pub const REMOTE_STATIONS: &str = "REMOTE_STATIONS";
    /// Network and address → [`Neighbour`](crate::Neighbour) on another host.
    pub const REMOTE_NEIGHBOURS: &str = "REMOTE_NEIGHBOURS";
    /// Direction → [`Tally`](crate::Tally) of what passed the tunnel, per CPU.
    pub const TUNNELLED: &str = "TUNNELLED";
    /// All of them.
    pub const ALL: [&str; 42] = [
        POLICIES,
        PEER_CLASSES,
        ALLOWED_PORTS,
        FLOWS,
        OPENING_FLOWS,
        FRAGMENTS,
        STATIONS,
        NEAR_STATIONS,
        NEIGHBOURS,
        SERVICES,
        SERVED,
        TRANSLATIONS,
        WORKSPACE,
        GATEWAYS,
        STAGES,
        PASSED,
        DROPPED,
        ALLOWED,
        LIMITS,
        BUCKETS,
        CAPTURING,
        CAPTURED,
        QUESTIONS,
        QUESTION_TIMES,
        EVENTS,
        OBSERVED,
        UPLINKS,
        NAT_ADDRESSES,
        NAT_POOLS,
        NAT_PORTS,
        NAT_GUESTS,
        NAT_SLOTS,
        NAT_MAPPINGS,
        NAT_CLAIMS,
        NAT_FORWARDS,
        NAT_FRAGMENTS,
        TRANSLATED,
        TUNNEL,
        OVERLAYS,
        REMOTE_STATIONS,
        REMOTE_NEIGHBOURS,
        TUNNELLED,
    ];
}

/// Names of the programs in the object.
pub mod program_name {
    /// Lets packets of established flows pass that a guest sends.
    pub const FROM_GUEST: &str = "from_guest";
    /// Lets packets of established flows pass on their way to a guest.
    pub const TO_GUEST: &str = "to_guest";
    /// Decides about all other packets that a guest sends.
    pub const JUDGE_FROM_GUEST: &str = "judge_from_guest";
    /// Decides about all other packets on their way to a guest.
    pub const JUDGE_TO_GUEST: &str = "judge_to_guest";
    /// Translates packets that a guest sends to a service.
    pub const SERVICE_FROM_GUEST: &str = "service_from_guest";
    /// Decides about packets that a guest sent to a service, translated.
    pub const FROM_CLIENT: &str = "from_client";
    /// Translates packets of a service on their way to a guest.
    pub const SERVICE_TO_GUEST: &str = "service_to_guest";
    /// Translates packets to services that come from the host or by it.
    pub const SERVICE_FROM_HOST: &str = "service_from_host";
    /// Translates the answers to them.
    pub const SERVICE_TO_HOST: &str = "service_to_host";
    /// Translates what guests send, on its way out of an uplink.
    pub const TO_UPLINK: &str = "to_uplink";
    /// Gives the port that a guest sends from a port of the uplink's address.
    pub const CLAIM_PORT: &str = "claim_port";
    /// Sends what guests send to ports that guests have of an uplink's address to those.
    pub const TURN_BACK: &str = "turn_back";
    /// Translates what comes from an uplink for guests.
    pub const FROM_UPLINK: &str = "from_uplink";
    /// Sends what guests send to the hosts that have its destination.
    pub const TO_PEER: &str = "to_peer";
    /// Delivers what comes from other hosts to guests.
    pub const FROM_TUNNEL: &str = "from_tunnel";
    /// All of them.
    pub const ALL: [&str; 15] = [
        FROM_GUEST,
        TO_GUEST,
        JUDGE_FROM_GUEST,
        JUDGE_TO_GUEST,
        SERVICE_FROM_GUEST,
        FROM_CLIENT,
        SERVICE_TO_GUEST,
        SERVICE_FROM_HOST,
        SERVICE_TO_HOST,
        TO_UPLINK,
        CLAIM_PORT,
        TURN_BACK,
        FROM_UPLINK,
        TO_PEER,
        FROM_TUNNEL,
    ];
}

/// Indexes of the map of programs that others go on with.
pub mod stage {
    /// [`SERVICE_FROM_GUEST`](crate::program_name::SERVICE_FROM_GUEST).
    pub const SERVICE_FROM_GUEST: u32 = 0;
    /// [`FROM_CLIENT`](crate::program_name::FROM_CLIENT).
    pub const FROM_CLIENT: u32 = 1;
    /// [`SERVICE_TO_GUEST`](crate::program_name::SERVICE_TO_GUEST).
    pub const SERVICE_TO_GUEST: u32 = 2;
    /// [`CLAIM_PORT`](crate::program_name::CLAIM_PORT).
    pub const CLAIM_PORT: u32 = 3;
    /// [`TO_UPLINK`](crate::program_name::TO_UPLINK), anew.
    pub const TO_UPLINK: u32 = 4;
    /// [`TO_PEER`](crate::program_name::TO_PEER).
    pub const TO_PEER: u32 = 5;
    /// [`TURN_BACK`](crate::program_name::TURN_BACK).
    pub const TURN_BACK: u32 = 6;
    /// [`JUDGE_FROM_GUEST`](crate::program_name::JUDGE_FROM_GUEST).
    pub const JUDGE_FROM_GUEST: u32 = 7;
    /// [`JUDGE_TO_GUEST`](crate::program_name::JUDGE_TO_GUEST).
    pub const JUDGE_TO_GUEST: u32 = 8;
    /// How many there can be.
    pub const COUNT: u32 = 16;
}
