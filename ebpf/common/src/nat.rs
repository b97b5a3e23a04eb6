//! Source NAT to the host's uplinks, and ports of theirs that are forwarded to guests.
//!
//! A guest's port has one external port, whomever it is used with (endpoint-independent mapping, RFC 4787
//! 4.1): what the guest's rules let in reaches it there. Each guest has a map of its own from its ports to
//! external ones, the least recently used of which make room, and each external address an array that says
//! who has a port. A port whose owner's map no longer has it is free: nothing needs to clean up.

use crate::Address;

/// External addresses that one host can have, each on one uplink.
pub const NAT_POOLS: u32 = 64;
/// [`NatGuest::pool`] of a guest whose source is not translated.
pub const NO_POOL: u32 = u32::MAX;
/// Ports of an external address: of TCP, of UDP, and identifiers of ICMP echo.
pub const POOL_PORTS: u32 = 3 << 16;
/// Fragmented datagrams to external addresses that can be on the way at a time.
pub const NAT_FRAGMENTS: u32 = 4096;
/// Ports of external addresses that can be forwarded.
pub const PORT_FORWARDS: u32 = 1 << 16;

/// An interface that leads outside, for the host's own use.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UplinkEntry {
    /// How the host attached the programs: 1 TCX, 2 clsact.
    pub hook: u8,
    /// Zero.
    pub reserved: [u8; 3],
    /// The interface's name, zero-terminated.
    pub name: [u8; crate::NAME_LENGTH],
}

/// An address of an uplink.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExternalKey {
    /// The address.
    pub address: Address,
    /// Index of the uplink.
    pub ifindex: u32,
}

/// An external address that guests share, and the ports that they get.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NatPool {
    /// The external address; zeros where there is no pool.
    pub address: Address,
    /// Index of the uplink.
    pub ifindex: u32,
    /// The first port that guests get.
    pub first_port: u16,
    /// The last one.
    pub last_port: u16,
}

/// A guest's address whose packets are translated at an uplink.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NatGuest {
    /// [`PolicyEntry::slot`](crate::PolicyEntry::slot) of its interface.
    pub slot: u32,
    /// Place in the map of pools of the external address that its packets get, or [`NO_POOL`].
    pub pool: u32,
    /// Index of its interface, where drops are counted.
    pub ifindex: u32,
    /// Place of an external address whose ports are forwarded to it, or [`NO_POOL`] if none are.
    pub forward_pool: u32,
}

/// A guest's port that is to get an external one.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NatClaim {
    /// The guest.
    pub guest: NatGuest,
    /// Its port.
    pub key: MappingKey,
}

/// The addresses of the interface with a slot.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NatSlot {
    /// The guest's IPv4 address, or zeros.
    pub ipv4: Address,
    /// Its IPv6 address, or zeros.
    pub ipv6: Address,
}

/// A guest's port.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MappingKey {
    /// The port, or the identifier of an ICMP echo.
    pub port: u16,
    /// One of [`nat_protocol`].
    pub protocol: u8,
    /// One of [`local`](crate::local).
    pub local: u8,
}

/// The external port of a guest's port.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// When it was last used, in nanoseconds of the coarse monotonic clock; lags by up to a second.
    pub last_seen_ns: u64,
    /// The external port.
    pub port: u16,
    /// Its address's place in the map of pools.
    pub pool: u16,
    /// One of [`phase`](crate::phase).
    pub phase: u8,
    /// TCP: who has sent a FIN, as bits `1 << direction`.
    pub finished: u8,
    /// Zero.
    pub reserved: [u8; 2],
}

/// Protocols that have ports to translate: their places in an array of [`POOL_PORTS`].
pub mod nat_protocol {
    /// TCP.
    pub const TCP: u8 = 0;
    /// UDP.
    pub const UDP: u8 = 1;
    /// ICMP echo, of either version.
    pub const ECHO: u8 = 2;
}

/// Index of a port in an array of [`POOL_PORTS`].
#[inline]
pub const fn port_index(protocol: u8, port: u16) -> u32 {
    (protocol as u32) << 16 | port as u32
}

/// Who has an external port, as one word that changes at once; zero for nobody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortOwner {
    /// The slot of the guest's interface.
    pub slot: u32,
    /// The guest's port.
    pub port: u16,
    /// Whether the port is forwarded to the guest, instead of given to it for what it sends.
    pub is_forward: bool,
}

impl PortOwner {
    const FORWARD: u64 = 1 << 16;

    /// As the array has it.
    #[inline]
    pub const fn word(self) -> u64 {
        let forward = if self.is_forward { Self::FORWARD } else { 0 };
        (self.slot as u64) << 32 | forward | self.port as u64
    }

    /// From the array.
    #[inline]
    pub const fn from_word(word: u64) -> Self {
        let [a, b, ..] = word.to_le_bytes();
        Self {
            slot: (word >> 32) as u32,
            port: u16::from_le_bytes([a, b]),
            is_forward: word & Self::FORWARD != 0,
        }
    }
}

/// A guest's port that an external one is forwarded to.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ForwardKey {
    /// The slot of the guest's interface.
    pub slot: u32,
    /// The guest's port.
    pub port: MappingKey,
}

/// The external port that is forwarded to it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForwardedPort {
    /// The external address's place in the map of pools.
    pub pool: u32,
    /// The external port.
    pub port: u16,
    /// Zero.
    pub reserved: u16,
}

/// A fragmented datagram to an external address.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NatFragmentKey {
    /// Who sends it.
    pub source: Address,
    /// Identification as in the header; IPv4's in the first two bytes.
    pub identification: [u8; 4],
    /// The external address's place in the map of pools.
    pub pool: u16,
    /// IP protocol number; zero for IPv6, where only the first fragment is sure to have it.
    pub protocol: u8,
    /// Zero.
    pub reserved: u8,
}

/// Whose it is.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NatFragment {
    /// When the first fragment came, in nanoseconds of the coarse monotonic clock.
    pub first_seen_ns: u64,
    /// The slot of the guest's interface.
    pub slot: u32,
    /// Zero.
    pub reserved: u32,
}

/// A number that is the same for a guest's port, and as good as random else.
#[inline]
pub const fn mapping_hash(slot: u32, key: &MappingKey) -> u64 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let word = (slot as u64) << 32
        | (key.protocol as u64) << 24
        | (key.local as u64) << 16
        | key.port as u64;
    let mut hash = (word ^ ODD).wrapping_mul(ODD);
    hash ^= hash >> 29;
    hash = hash.wrapping_mul(ODD);
    hash ^ hash >> 32
}
