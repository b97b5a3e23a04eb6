use crate::Address;

/// Bytes of an interface name with its terminating zero (`IFNAMSIZ`).
pub const NAME_LENGTH: usize = 16;

/// What the programs know about one guest interface.
///
/// The host always replaces an entry as a whole and waits for running programs before the old one's
/// memory or rule tables are used again, so a program sees either the old or the new entry.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PolicyEntry {
    /// The guest's IPv6 address, or zeros.
    pub ipv6: Address,
    /// Its link-local address: `fe80::/64` and its MAC address (RFC 4291, appendix A); zeros if it
    /// has no IPv6.
    pub link_local: Address,
    /// The guest's IPv4 address, network byte order, or zero.
    pub ipv4: u32,
    /// Number of this policy, never used again: flows that another one let be are judged again.
    pub generation: u32,
    /// Table of the rules for packets toward the guest.
    pub ingress_table: u32,
    /// Table of the rules for packets from the guest, or [`ALLOW_ALL`](crate::ALLOW_ALL).
    pub egress_table: u32,
    /// Number of the network that the interface is in.
    pub network: u32,
    /// The interface's place in the maps that hold one element or one map per interface.
    pub slot: u32,
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// The largest IP packet, in bytes.
    pub mtu: u16,
    /// Bits of [`flag`].
    pub flags: u16,
    /// How the host attached the programs, for its own use: 1 TCX, 2 clsact.
    pub hook: u8,
    /// Zero.
    pub reserved: [u8; 5],
    /// The interface's name, zero-terminated, for the host's use.
    pub name: [u8; NAME_LENGTH],
}

/// Bits of [`PolicyEntry::flags`].
pub mod flag {
    /// Guests of the network don't reach each other.
    pub const ISOLATED: u16 = 1;
    /// What the guest sends is limited.
    pub const LIMITED_FROM_GUEST: u16 = 2;
    /// What is sent to the guest is limited.
    pub const LIMITED_TO_GUEST: u16 = 4;
    /// Packets are captured.
    pub const CAPTURED: u16 = 8;
    /// The host answers the guest's DHCP, of both versions of IP.
    pub const ANSWERS_DHCP: u16 = 16;
    /// The host answers the guest's router solicitations.
    pub const ANSWERS_SOLICITATIONS: u16 = 32;
    /// The network has guests on other hosts.
    pub const SPANS_HOSTS: u16 = 64;
}

/// A guest's place in a network, by its MAC address.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StationKey {
    /// [`PolicyEntry::network`].
    pub network: u32,
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// Zero.
    pub reserved: [u8; 2],
}

/// What one place of the map `NEAR_STATIONS` holds.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NearStation {
    /// [`PolicyEntry::network`], or zero if nobody has the place.
    pub network: u32,
    /// The guest's MAC address, as it lies in memory.
    pub mac: [u16; 3],
    /// Zero.
    pub reserved: u16,
    /// The index of its interface.
    pub ifindex: u32,
}

/// Places in the map `NEAR_STATIONS`: several for each interface, so that few want the same.
pub const NEAR_STATION_PLACES: u32 = 4 * crate::SLOTS;

impl NearStation {
    /// The place of a guest, by its network and its MAC address as it lies in memory.
    #[inline(always)]
    pub const fn place(network: u32, mac: [u16; 3]) -> u32 {
        /// 2^32 divided by the golden ratio (Knuth, The Art of Computer Programming, 6.4).
        const MULTIPLIER: u32 = 0x9e37_79b1;
        let address = (mac[1] as u32) << 16 | mac[2] as u32;
        let mixed = (network ^ address).wrapping_mul(MULTIPLIER);
        mixed >> (u32::BITS - NEAR_STATION_PLACES.ilog2())
    }
}

/// An address in a network.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NeighbourKey {
    /// [`PolicyEntry::network`].
    pub network: u32,
    /// The address.
    pub address: Address,
}

/// Who has an address in a network.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// The MAC address.
    pub mac: [u8; 6],
    /// Zero.
    pub reserved: [u8; 2],
}
