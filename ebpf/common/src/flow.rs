/// A flow that a guest opened, seen from the guest.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// [`PolicyEntry::interface_id`](crate::PolicyEntry::interface_id).
    pub interface_id: u32,
    /// The guest's address, network byte order.
    pub guest: [u8; 4],
    /// The peer's address, network byte order.
    pub peer: [u8; 4],
    /// The guest's port, or the identifier of an ICMP echo, or zero.
    pub guest_port: u16,
    /// The peer's port, or zero.
    pub peer_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub reserved: [u8; 3],
}

/// How far a flow has come.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowState {
    /// When a packet of the flow was last seen, in nanoseconds of the monotonic clock.
    pub last_seen_ns: u64,
    /// One of [`phase`].
    pub phase: u32,
    /// Zero.
    pub reserved: u32,
}

/// Values of [`FlowState::phase`].
pub mod phase {
    /// The guest has sent, nothing has come back.
    pub const OPENING: u32 = 0;
    /// Both sides have sent.
    pub const ESTABLISHED: u32 = 1;
    /// TCP only: a FIN or RST was seen.
    pub const CLOSING: u32 = 2;
}

/// After how long without a packet a flow is forgotten, in nanoseconds.
pub mod timeout {
    const SECOND: u64 = 1_000_000_000;
    /// TCP that was never answered: covers Linux's retransmissions of a SYN up to 63 s after the first.
    pub const TCP_OPENING: u64 = 75 * SECOND;
    /// TCP in use. RFC 5382 REQ-5 asks for at least 2 hours 4 minutes.
    pub const TCP_ESTABLISHED: u64 = 24 * 3600 * SECOND;
    /// TCP after a FIN or RST: the 4 minutes that RFC 5382 REQ-5 names for a closing connection.
    pub const TCP_CLOSING: u64 = 240 * SECOND;
    /// UDP and other protocols (RFC 4787 REQ-5: at least 2 minutes).
    pub const DATAGRAM: u64 = 120 * SECOND;
    /// ICMP echo (RFC 5508 REQ-2: at least 60 seconds).
    pub const ICMP_ECHO: u64 = 60 * SECOND;
    /// A fragmented datagram, as long as Linux tries to reassemble one (`ipfrag_time`).
    pub const FRAGMENTS: u64 = 30 * SECOND;
}

/// A fragmented IPv4 datagram (RFC 791: source, destination, protocol and identification).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FragmentKey {
    /// [`PolicyEntry::interface_id`](crate::PolicyEntry::interface_id).
    pub interface_id: u32,
    /// Source address, network byte order.
    pub source: [u8; 4],
    /// Destination address, network byte order.
    pub destination: [u8; 4],
    /// Identification as in the header.
    pub identification: [u8; 2],
    /// IP protocol number.
    pub protocol: u8,
    /// [`Direction`](crate::Direction) as a number.
    pub direction: u8,
}
