//! How rules lie in two longest-prefix-match maps.
//!
//! A rule table is a set of peer prefixes; the longest one that covers a peer's address gives that
//! peer's *class*. The host gives a class all ports that any rule covering the prefix allows, so two
//! lookups decide, whatever the number of rules. The second one gives the counter of the rule that
//! comes first among those that allow the port.

use crate::Address;

/// The rule table that allows everything and has no entries.
pub const ALLOW_ALL: u32 = 0;

/// Key of the peer class map after its prefix length: up to 160 bits are matched.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerKey {
    /// Rule table; always matched wholly.
    pub table: u32,
    /// Peer address.
    pub address: Address,
}

impl PeerKey {
    /// Bits of the table, which precede those of the address prefix.
    pub const TABLE_BITS: u32 = 32;
    /// Bits of a lookup's key.
    pub const BITS: u32 = 160;
}

/// Key of the allowed ports map after its prefix length: up to 56 bits are matched.
///
/// A prefix of 32 bits allows a class every protocol, one of 40 every port of one protocol.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortKey {
    /// Class of peers; always matched wholly.
    pub class: u32,
    /// IP protocol number.
    pub protocol: u8,
    /// Destination port, network byte order; ICMP's type and code; zero for protocols without ports.
    pub port: [u8; 2],
    /// Zero, never matched.
    pub reserved: u8,
}

impl PortKey {
    /// Bits of the class.
    pub const CLASS_BITS: u32 = 32;
    /// Bits of a lookup's key.
    pub const BITS: u32 = 56;
}

/// Key of the map that counts what rules allowed.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleKey {
    /// [`PolicyEntry::slot`](crate::PolicyEntry::slot).
    pub slot: u32,
    /// [`Direction`](crate::Direction) as a number.
    pub direction: u32,
    /// The rule's counter, which the allowed ports map has as its value; never [`UNCOUNTED`].
    pub counter: u64,
}

/// The counter of rules that nobody counts.
pub const UNCOUNTED: u64 = 0;

/// Prefix length of a [`PortKey`] that matches class, protocol and the first `bits` of the port.
pub const fn port_prefix_length(bits: u32) -> u32 {
    PortKey::CLASS_BITS + 8 + bits
}
