/// Bytes of an interface name with its terminating zero (`IFNAMSIZ`).
pub const NAME_LENGTH: usize = 16;

/// What the programs know about one guest interface.
///
/// The host always replaces an entry as a whole and waits for running programs before the old one's
/// memory or rule tables are used again, so a program sees either the old or the new entry.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PolicyEntry {
    /// Number of this attachment, never used again: flows of an interface that is gone can't be
    /// taken for those of a later one with the same index.
    pub interface_id: u32,
    /// The guest's IPv4 address, network byte order.
    pub ipv4: [u8; 4],
    /// Table of the rules for packets toward the guest.
    pub ingress_table: u32,
    /// Table of the rules for packets from the guest, or [`ALLOW_ALL`](crate::ALLOW_ALL).
    pub egress_table: u32,
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// How the host attached the programs, for its own use: 1 TCX, 2 clsact.
    pub hook: u8,
    /// Zero.
    pub reserved: u8,
    /// The interface's name, zero-terminated, for the host's use.
    pub name: [u8; NAME_LENGTH],
}
