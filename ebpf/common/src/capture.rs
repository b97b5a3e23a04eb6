/// Bytes of a packet that are captured at most.
pub const SNAP_LIMIT: usize = 4096;

/// Bytes of the ring buffer of captured packets.
pub const CAPTURED_BYTES: u32 = 1 << 22;

/// What stands before a captured packet's bytes in the ring buffer.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CaptureHeader {
    /// When, in nanoseconds of the monotonic clock.
    pub time_ns: u64,
    /// The interface.
    pub ifindex: u32,
    /// Bytes of the packet, from the Ethernet header on.
    pub length: u32,
    /// Packets that this CPU could not write since it wrote its last one.
    pub lost: u32,
    /// [`Direction`](crate::Direction) as a number.
    pub direction: u8,
    /// The [`DropReason`](crate::DropReason) as a number, or [`NOT_DROPPED`].
    pub verdict: u8,
    /// Bytes of the packet that follow.
    pub captured: u16,
}

/// [`CaptureHeader::verdict`] of a packet that went on.
pub const NOT_DROPPED: u8 = u8::MAX;

/// Where a CPU puts a packet together before it goes into the ring buffer.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CaptureRecord {
    /// What stands before the bytes.
    pub header: CaptureHeader,
    /// The packet's first bytes.
    pub data: [u8; SNAP_LIMIT],
}
