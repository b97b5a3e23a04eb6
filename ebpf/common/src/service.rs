use crate::{Address, Tally};

/// The Ethernet address that every service's virtual address has, in every network: locally
/// administered, and no guest's.
pub const SERVICE_MAC: [u8; 6] = [0x02, 0x4b, 0x45, 0x45, 0x4c, 0x53];

/// Services that one host can have, each a virtual address, protocol and port.
pub const SERVICES: u32 = 1024;
/// Backends that one service can have.
pub const BACKENDS: usize = 128;
/// Places of a service's lookup table: a power of two, so that a mask finds one, and 64 times as many
/// as backends, so that their shares differ by less than two percent.
pub const TABLE_PLACES: usize = 8192;
/// What a place of a lookup table holds where a service has no backend.
pub const NO_BACKEND: u8 = u8::MAX;

/// What a packet to a service is addressed to.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceKey {
    /// The virtual address.
    pub address: Address,
    /// [`PolicyEntry::network`](crate::PolicyEntry::network): the network that the address is in.
    pub network: u32,
    /// The destination port.
    pub port: u16,
    /// IP protocol number: TCP or UDP.
    pub protocol: u8,
    /// Zero.
    pub reserved: u8,
}

/// Who answers for a service. The host replaces an entry as a whole, so that a packet sees one table.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceEntry {
    /// The backends; one keeps its place for as long as the service has it.
    pub backends: [Backend; BACKENDS],
    /// Hash of a flow's ends → place in `backends`, or [`NO_BACKEND`].
    pub table: [u8; TABLE_PLACES],
}

/// One backend of a service.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Its address; zeros where there is none.
    pub address: Address,
    /// Its port.
    pub port: u16,
    /// Its Ethernet address in the service's network.
    pub mac: [u8; 6],
}

/// A packet whose ends are translated, as it comes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TranslationKey {
    /// The packet's source.
    pub source: Address,
    /// Its destination.
    pub destination: Address,
    /// Its source port; of a later fragment, the first half of the identification.
    pub source_port: u16,
    /// Its destination port; of a later fragment, the second half of the identification.
    pub destination_port: u16,
    /// IP protocol number; of an IPv6 fragment zero.
    pub protocol: u8,
    /// One of [`way`].
    pub way: u8,
    /// Zero.
    pub reserved: [u8; 2],
}

/// Values of [`TranslationKey::way`].
pub mod way {
    /// From the client of a service.
    pub const FORWARD: u8 = 0;
    /// To the client of a service.
    pub const REVERSE: u8 = 1;
    /// Added to either for fragments behind the first.
    pub const FRAGMENT: u8 = 2;
}

/// What the ends of a packet become.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The new source.
    pub source: Address,
    /// The new destination.
    pub destination: Address,
    /// The new source port.
    pub source_port: u16,
    /// The new destination port.
    pub destination_port: u16,
    /// The Ethernet address of the new destination, where the packet goes to a backend.
    pub mac: [u8; 6],
    /// The backend's place in [`ServiceEntry::backends`].
    pub backend: u8,
    /// Bits of [`translation`].
    pub flags: u8,
    /// Of fragments: the service's port, which they don't have themselves. Else zero.
    pub service_port: u16,
    /// Of fragments: the service's protocol. Else zero.
    pub service_protocol: u8,
    /// Zero.
    pub reserved: u8,
    /// When a packet was last translated so, in nanoseconds of the coarse monotonic clock; lags by
    /// up to a second.
    pub last_seen_ns: u64,
}

/// Bits of [`Translation::flags`].
pub mod translation {
    /// The client is its own backend: the packet goes back where it came from.
    pub const HAIRPIN: u8 = 1;
    /// The packet answers, so that no backend is looked for.
    pub const ANSWER: u8 = 2;
}

/// What a CPU has at hand while it translates a packet: more than fits on a program's stack.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workspace {
    /// The packet as it came.
    pub key: TranslationKey,
    /// Of a flow that is new, its answers as they will come.
    pub answers: TranslationKey,
    /// What is about to be noted.
    pub becomes: Translation,
    /// What the packet is counted under, and the service that is asked about it.
    pub served: ServedKey,
    /// For the program that goes on: bits of [`translation`] of the packet.
    pub flags: u8,
    /// For the program that goes on: the service's protocol.
    pub service_protocol: u8,
    /// For the program that goes on: the service's port.
    pub service_port: u16,
    /// For the program that goes on: the source port that the guest used.
    pub source_port: u16,
    /// For the program that goes on: the destination port that the guest used.
    pub destination_port: u16,
    /// Zero.
    pub reserved: u32,
}

/// Backends of services whose packets are counted one by one on a host.
pub const COUNTED_BACKENDS: u32 = 4096;

/// What packets of services are counted under.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServedKey {
    /// The service.
    pub service: ServiceKey,
    /// The backend's address; zeros where it is not one backend's count.
    pub backend: Address,
    /// One of [`served`].
    pub kind: u32,
}

/// Values of [`ServedKey::kind`].
pub mod served {
    /// One backend's packets.
    pub const BACKEND: u32 = 0;
    /// Those of all backends without an entry of their own.
    pub const OTHERS: u32 = 1;
    /// What backends had that the service no longer has: no program writes this.
    pub const GONE: u32 = 2;
}

/// What went between clients on this host, or behind it, and a service.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// What clients sent.
    pub to_backend: Tally,
    /// What they were answered.
    pub from_backend: Tally,
}

/// The host's side of a network: its bridge, by which the host and all that is behind it reach
/// services.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GatewayEntry {
    /// [`PolicyEntry::network`](crate::PolicyEntry::network).
    pub network: u32,
    /// How the host attached the programs: 1 TCX, 2 clsact.
    pub hook: u8,
    /// Zero.
    pub reserved: [u8; 3],
    /// The interface's name, zero-terminated, for the host's use.
    pub name: [u8; crate::NAME_LENGTH],
}

/// A number that is the same for all packets of a flow to a service, and as good as random else.
#[inline]
pub const fn flow_hash(key: &TranslationKey) -> u64 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let (source, destination) = (key.source, key.destination);
    let ports = (key.source_port as u64) << 32 | (key.destination_port as u64) << 16;
    let words = [
        pair(source[0], source[1]),
        pair(source[2], source[3]),
        pair(destination[0], destination[1]),
        pair(destination[2], destination[3]),
        ports | key.protocol as u64,
    ];
    let mut hash = ODD;
    let mut index = 0;
    while index < words.len() {
        hash = (hash ^ words[index]).wrapping_mul(ODD);
        hash ^= hash >> 29;
        index += 1;
    }
    hash ^ hash >> 32
}

#[inline]
const fn pair(high: u32, low: u32) -> u64 {
    (high as u64) << 32 | low as u64
}
