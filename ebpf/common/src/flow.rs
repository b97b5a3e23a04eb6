use crate::Address;

/// A flow, seen from the guest. Flows of different guests are in different maps.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// The peer's address.
    pub peer: Address,
    /// The guest's port, or the identifier of an ICMP echo, or zero.
    pub guest_port: u16,
    /// The peer's port, or zero.
    pub peer_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// One of [`local`]: which of its addresses the guest uses.
    pub local: u8,
    /// Zero.
    pub reserved: [u8; 2],
}

/// Values of [`FlowKey::local`].
pub mod local {
    /// The guest's IPv4 address.
    pub const IPV4: u8 = 0;
    /// The guest's IPv6 address.
    pub const IPV6: u8 = 1;
    /// The guest's link-local IPv6 address.
    pub const LINK_LOCAL: u8 = 2;
}

/// How far a flow has come.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowState {
    /// When a packet of the flow was last seen, in nanoseconds of the coarse monotonic clock; lags
    /// by up to a second.
    pub last_seen_ns: u64,
    /// [`PolicyEntry::generation`](crate::PolicyEntry::generation) of the rules that let it be.
    pub generation: u32,
    /// Who opened it: a [`Direction`](crate::Direction) as a number.
    pub opener: u8,
    /// One of [`phase`].
    pub phase: u8,
    /// TCP: who has sent a FIN, as bits `1 << direction`.
    pub finished: u8,
    /// One if the guest opened it through a service: what comes back is translated.
    pub translated: u8,
}

/// Values of [`FlowState::phase`].
pub mod phase {
    /// One side has sent, nothing has come back.
    pub const OPENING: u8 = 0;
    /// Both sides have sent.
    pub const ESTABLISHED: u8 = 1;
    /// TCP: one side has sent its FIN.
    pub const HALF_CLOSED: u8 = 2;
    /// TCP: both sides have sent their FIN, or one a RST.
    pub const CLOSED: u8 = 3;
}

/// After how long without a packet a flow is forgotten, in nanoseconds.
pub mod timeout {
    const SECOND: u64 = 1_000_000_000;
    /// TCP that was never answered: covers Linux's retransmissions of a SYN up to 63 s after the first.
    pub const TCP_OPENING: u64 = 75 * SECOND;
    /// TCP in use. RFC 5382 REQ-5 asks for at least 2 hours 4 minutes.
    pub const TCP_ESTABLISHED: u64 = 24 * 3600 * SECOND;
    /// TCP after one FIN: the other side may go on for long.
    pub const TCP_HALF_CLOSED: u64 = 3600 * SECOND;
    /// TCP after both FINs or a RST: the 4 minutes that RFC 5382 REQ-5 names.
    pub const TCP_CLOSED: u64 = 240 * SECOND;
    /// UDP and other protocols (RFC 4787 REQ-5: at least 2 minutes).
    pub const DATAGRAM: u64 = 120 * SECOND;
    /// ICMP echo (RFC 5508 REQ-2: at least 60 seconds).
    pub const ICMP_ECHO: u64 = 60 * SECOND;
    /// A fragmented datagram, as long as Linux tries to reassemble one (`ipfrag_time`).
    pub const FRAGMENTS: u64 = 30 * SECOND;
}

/// A fragmented datagram of one guest (RFC 791, RFC 8200 4.5).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FragmentKey {
    /// The peer's address.
    pub peer: Address,
    /// Identification as in the header; IPv4's in the first two bytes.
    pub identification: [u8; 4],
    /// IP protocol number; zero for IPv6, where only the first fragment is sure to have it.
    pub protocol: u8,
    /// [`Direction`](crate::Direction) as a number.
    pub direction: u8,
    /// One of [`local`].
    pub local: u8,
    /// Zero.
    pub reserved: u8,
}

/// What is known of a fragmented datagram whose first fragment passed.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FragmentState {
    /// When that was, in nanoseconds of the coarse monotonic clock.
    pub first_seen_ns: u64,
    /// Where the first fragment ends in the datagram, in bytes: others begin there or later.
    pub first_end: u32,
    /// As of the flow, [`FlowState::translated`].
    pub translated: u32,
}
