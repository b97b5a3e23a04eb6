/// Which way a packet goes, seen from the guest.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The guest sent it.
    FromGuest = 0,
    /// It is on its way to the guest.
    ToGuest = 1,
}

impl Direction {
    /// The other way.
    #[must_use]
    pub const fn reverse(self) -> Self {
        match self {
            Self::FromGuest => Self::ToGuest,
            Self::ToGuest => Self::FromGuest,
        }
    }
}

/// Key of the map of dropped packets.
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

/// Index of an interface's passed packets of one direction: one element is all that a packet which
/// passes touches.
#[inline]
pub const fn passed_index(slot: u32, direction: Direction) -> u32 {
    slot * 2 + direction as u32
}

/// What was dropped on one interface in one direction on one CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DirectionTallies {
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
    /// A header is cut short, contradicts itself, or is none that a sane host sends.
    Malformed = 1,
    /// The frame carries a VLAN tag.
    Vlan = 2,
    /// The guest used a source MAC address that isn't its own.
    SpoofedMac = 3,
    /// A source IPv4 address that the sender can't have.
    SpoofedIpv4 = 4,
    /// The guest sent ARP in another's name.
    SpoofedArp = 5,
    /// The guest answered as a DHCP server, of either version.
    DhcpServer = 6,
    /// One guest to another in a network that keeps them apart.
    Isolated = 7,
    /// Neither IPv4, IPv6 nor ARP.
    UnknownProtocol = 8,
    /// Not addressed to this guest.
    WrongDestination = 9,
    /// A later fragment of a datagram whose first fragment has not passed, or one that overlaps the first.
    Fragment = 10,
    /// No rule allows it.
    NotAllowed = 11,
    /// A source IPv6 address that the sender can't have.
    SpoofedIpv6 = 12,
    /// The guest sent neighbour discovery in another's name.
    SpoofedNeighbour = 13,
    /// The guest acted as a router: an advertisement or a redirect.
    RouterAdvertisement = 14,
    /// A chain of IPv6 extension headers that is too long or holds a forbidden one.
    ExtensionHeaders = 15,
    /// Larger than the network's MTU.
    Oversized = 16,
    /// An IPv4 header with options.
    IpOptions = 17,
    /// More than the interface's limits allow.
    RateLimited = 18,
    /// To a service's address, but to no port that a service has.
    NoService = 19,
    /// To a service without a backend that serves.
    NoBackend = 20,
    /// Another flow to the same backend has the source port, and no other was free.
    PortInUse = 21,
    /// No port of the uplink's address was free.
    PortsExhausted = 22,
    /// To the outside, by a protocol that has no ports, or an answer to nothing that was translated.
    NotTranslatable = 23,
    /// To a guest of another host, while this host has no tunnel.
    NoTunnel = 24,
    /// From a host that doesn't have the sender, or of a network that spans no hosts.
    UnknownPeer = 25,
    /// The guest sent to the UDP port by which hosts reach each other.
    TunnelPort = 26,
}

impl DropReason {
    /// All reasons, in order of their numbers.
    pub const ALL: [Self; 27] = [
        Self::NoPolicy,
        Self::Malformed,
        Self::Vlan,
        Self::SpoofedMac,
        Self::SpoofedIpv4,
        Self::SpoofedArp,
        Self::DhcpServer,
        Self::Isolated,
        Self::UnknownProtocol,
        Self::WrongDestination,
        Self::Fragment,
        Self::NotAllowed,
        Self::SpoofedIpv6,
        Self::SpoofedNeighbour,
        Self::RouterAdvertisement,
        Self::ExtensionHeaders,
        Self::Oversized,
        Self::IpOptions,
        Self::RateLimited,
        Self::NoService,
        Self::NoBackend,
        Self::PortInUse,
        Self::PortsExhausted,
        Self::NotTranslatable,
        Self::NoTunnel,
        Self::UnknownPeer,
        Self::TunnelPort,
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
            Self::Isolated => "isolated",
            Self::UnknownProtocol => "unknown-protocol",
            Self::WrongDestination => "wrong-destination",
            Self::Fragment => "fragment",
            Self::NotAllowed => "not-allowed",
            Self::SpoofedIpv6 => "spoofed-ipv6",
            Self::SpoofedNeighbour => "spoofed-neighbour",
            Self::RouterAdvertisement => "router-advertisement",
            Self::ExtensionHeaders => "extension-headers",
            Self::Oversized => "oversized",
            Self::IpOptions => "ip-options",
            Self::RateLimited => "rate-limited",
            Self::NoService => "no-service",
            Self::NoBackend => "no-backend",
            Self::PortInUse => "port-in-use",
            Self::PortsExhausted => "ports-exhausted",
            Self::NotTranslatable => "not-translatable",
            Self::NoTunnel => "no-tunnel",
            Self::UnknownPeer => "unknown-peer",
            Self::TunnelPort => "tunnel-port",
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
            Self::Isolated => "The network keeps its guests apart.",
            Self::UnknownProtocol => "The frame carries neither IPv4, IPv6 nor ARP.",
            Self::WrongDestination => "The packet is not addressed to this guest.",
            Self::Fragment => {
                "The datagram's first fragment has not passed, or this one overlaps it."
            }
            Self::NotAllowed => "No rule allows the packet.",
            Self::SpoofedIpv6 => "The source IPv6 address is not one that the sender can have.",
            Self::SpoofedNeighbour => "The guest sent neighbour discovery in another's name.",
            Self::RouterAdvertisement => "The guest acted as a router.",
            Self::ExtensionHeaders => {
                "The chain of IPv6 extension headers is too long or holds a forbidden one."
            }
            Self::Oversized => "The packet is larger than the network's MTU.",
            Self::IpOptions => "The IPv4 header has options.",
            Self::RateLimited => "More is sent than the interface's limits allow.",
            Self::NoService => "The address is a service's, but no service has the port.",
            Self::NoBackend => "The service has no backend that serves.",
            Self::PortInUse => {
                "Another flow to the same backend has the source port, and no other was free."
            }
            Self::PortsExhausted => "No port of the uplink's address was free.",
            Self::NotTranslatable => {
                "Source NAT knows TCP, UDP, ICMP echo and ICMP errors about those."
            }
            Self::NoTunnel => "The guest is on another host, and this one has no tunnel.",
            Self::UnknownPeer => {
                "The packet came by the tunnel from a host that doesn't have its sender."
            }
            Self::TunnelPort => "The guest sent to the UDP port by which hosts reach each other.",
        }
    }
}

impl core::fmt::Display for DropReason {
    fn fmt(&self, formatter: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        formatter.write_str(self.as_str())
    }
}
