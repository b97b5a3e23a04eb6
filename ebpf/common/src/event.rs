use crate::Address;

/// Something that happened to a packet, as the ring buffer has it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// When, in nanoseconds of the monotonic clock.
    pub time_ns: u64,
    /// The interface.
    pub ifindex: u32,
    /// Bytes of the packet, from the Ethernet header on.
    pub length: u32,
    /// The packet's source; zeros if it isn't IP.
    pub source: Address,
    /// The packet's destination.
    pub destination: Address,
    /// Zero for protocols without ports; an ICMP type.
    pub source_port: u16,
    /// Zero for protocols without ports.
    pub destination_port: u16,
    /// The type of what the Ethernet frame carries.
    pub ether_type: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// [`Direction`](crate::Direction) as a number.
    pub direction: u8,
    /// One of [`happening`].
    pub kind: u8,
    /// The [`DropReason`](crate::DropReason) of a drop as a number.
    pub reason: u8,
    /// Zero.
    pub reserved: [u8; 6],
}

/// Values of [`Event::kind`], and bits `1 << kind` of what is observed.
pub mod happening {
    /// The packet was dropped.
    pub const DROPPED: u8 = 0;
    /// The packet opened a flow.
    pub const OPENED: u8 = 1;
    /// TCP: the packet ended a flow.
    pub const CLOSED: u8 = 2;
}

/// Bytes of the ring buffer.
pub const EVENTS_BYTES: u32 = 1 << 20;
