/// Which way a packet goes, seen from the guest.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The guest sent it.
    FromGuest = 0,
    /// It is on its way to the guest.
    ToGuest = 1,
}

/// Key of the counters map.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CounterKey {
    /// Interface index; zero counts packets that no interface's counters exist for.
    pub ifindex: u32,
    /// [`Direction`] as a number.
    pub direction: u32,
}

/// Packets and bytes (whole Ethernet frames; for a segmentation offload, one large frame).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Number of packets.
    pub packets: u64,
    /// Their bytes, from the Ethernet header on.
    pub bytes: u64,
}

/// Slots for reasons in [`DirectionTallies`]; more than [`DropReason`] has, so that a new reason
/// needs no new layout, and a power of two, so that a mask keeps an index in bounds.
pub const REASON_SLOTS: usize = 32;

/// The counters of one interface and direction on one CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DirectionTallies {
    /// What went on.
    pub passed: Tally,
    /// What was dropped, by [`DropReason`].
    pub dropped: [Tally; REASON_SLOTS],
}

/// Why a packet was dropped. The number is the slot in [`DirectionTallies::dropped`].
#[repr(u32)]
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DropReason {
    /// The interface has no policy (yet, or any more).
    NoPolicy = 0,
    /// A header is cut short or contradicts itself.
    Malformed = 1,
    /// The frame carries a VLAN tag.
    Vlan = 2,
    /// The guest used a source MAC address that isn't its own.
    SpoofedMac = 3,
    /// A source IPv4 address that the sender can't have.
    SpoofedIpv4 = 4,
    /// The guest sent ARP in another's name.
    SpoofedArp = 5,
    /// The guest answered as a DHCP server.
    DhcpServer = 6,
    /// IPv6, which has no policy yet.
    Ipv6 = 7,
    /// Neither IPv4 nor ARP.
    UnknownProtocol = 8,
    /// Not addressed to this guest.
    WrongDestination = 9,
    /// A later fragment of a datagram whose first fragment has not passed.
    Fragment = 10,
    /// No rule allows it.
    NotAllowed = 11,
}

impl DropReason {
    /// All reasons, in order of their numbers.
    pub const ALL: [Self; 12] = [
        Self::NoPolicy,
        Self::Malformed,
        Self::Vlan,
        Self::SpoofedMac,
        Self::SpoofedIpv4,
        Self::SpoofedArp,
        Self::DhcpServer,
        Self::Ipv6,
        Self::UnknownProtocol,
        Self::WrongDestination,
        Self::Fragment,
        Self::NotAllowed,
    ];

    /// The slot in [`DirectionTallies::dropped`].
    pub const fn slot(self) -> usize {
        self as usize
    }

    /// A stable name for tables, JSON and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NoPolicy => "no-policy",
            Self::Malformed => "malformed",
            Self::Vlan => "vlan",
            Self::SpoofedMac => "spoofed-mac",
            Self::SpoofedIpv4 => "spoofed-ipv4",
            Self::SpoofedArp => "spoofed-arp",
            Self::DhcpServer => "dhcp-server",
            Self::Ipv6 => "ipv6",
            Self::UnknownProtocol => "unknown-protocol",
            Self::WrongDestination => "wrong-destination",
            Self::Fragment => "fragment",
            Self::NotAllowed => "not-allowed",
        }
    }

    /// One sentence for people.
    pub const fn description(self) -> &'static str {
        match self {
            Self::NoPolicy => "The interface has no policy.",
            Self::Malformed => "A header is cut short or contradicts itself.",
            Self::Vlan => "The frame carries a VLAN tag.",
            Self::SpoofedMac => "The source MAC address is not the guest's own.",
            Self::SpoofedIpv4 => "The source IPv4 address is not one that the sender can have.",
            Self::SpoofedArp => "The guest sent ARP in another's name.",
            Self::DhcpServer => "The guest answered as a DHCP server.",
            Self::Ipv6 => "IPv6 is not supported yet.",
            Self::UnknownProtocol => "The frame carries neither IPv4 nor ARP.",
            Self::WrongDestination => "The packet is not addressed to this guest.",
            Self::Fragment => "The datagram's first fragment has not passed.",
            Self::NotAllowed => "No rule allows the packet.",
        }
    }
}

impl core::fmt::Display for DropReason {
    fn fmt(&self, formatter: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        formatter.write_str(self.as_str())
    }
}
