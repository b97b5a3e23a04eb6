//! Tells aya that the types may be copied to and from maps byte by byte.

use aya::Pod;

use crate::{
    Bucket, CounterKey, DirectionTallies, Event, ExternalKey, FlowKey, FlowState, ForwardKey,
    ForwardedPort, FragmentKey, FragmentState, GatewayEntry, Limit, Mapping, MappingKey, NatClaim,
    NatFragment, NatFragmentKey, NatGuest, NatPool, NatSlot, NearStation, Neighbour, NeighbourKey,
    PeerKey, PolicyEntry, PortKey, RemoteStation, RuleKey, Served, ServedKey, ServiceEntry,
    ServiceKey, StationKey, Tally, Translation, TranslationKey, TunnelEntry, UplinkEntry,
    Workspace,
};

/// Each type is `repr(C)`, made of integers only, without padding, as the sizes prove.
macro_rules! pod {
    ($($name:ty = $size:literal),* $(,)?) => {
        $(
            const _: () = assert!(size_of::<$name>() == $size);
            // SAFETY: integers without padding: every byte is initialised and any bytes are valid.
            unsafe impl Pod for $name {}
        )*
    };
}

pod! {
    Bucket = 64,
    CounterKey = 8,
    DirectionTallies = 512,
    Event = 64,
    ExternalKey = 20,
    FlowKey = 24,
    FlowState = 16,
    ForwardKey = 8,
    ForwardedPort = 8,
    FragmentKey = 24,
    FragmentState = 16,
    GatewayEntry = 24,
    Limit = 24,
    Mapping = 16,
    MappingKey = 4,
    NatClaim = 20,
    NatFragment = 16,
    NatFragmentKey = 24,
    NatGuest = 16,
    NatPool = 24,
    NatSlot = 32,
    NearStation = 16,
    Neighbour = 8,
    NeighbourKey = 20,
    PeerKey = 20,
    PolicyEntry = 88,
    PortKey = 8,
    RemoteStation = 20,
    RuleKey = 16,
    Served = 32,
    ServedKey = 44,
    ServiceEntry = 11264,
    ServiceKey = 24,
    StationKey = 12,
    Tally = 16,
    Translation = 56,
    TranslationKey = 40,
    TunnelEntry = 40,
    UplinkEntry = 20,
    Workspace = 192,
}
