//! How the rate of an interface in one direction is limited.
//!
//! A token bucket is kept as one time: when all that was let through would be paid for at the limited
//! rate (GCRA, ITU-T I.371). A packet may go on if that is no later than now and the burst, and moves it
//! on by what it costs. So a packet that is larger than what is left goes on, and what follows waits:
//! the average is kept, whatever the packets' sizes.

/// Parts of a nanosecond that times and costs of packets are counted in.
pub const TICKS_PER_NS: u64 = 16;

/// Parts of a tick that costs of bytes are counted in, as a power of two.
pub const BYTE_COST_BITS: u32 = 16;

/// Times that are further ahead than this, in ticks, have passed: the clock has gone around.
pub const HORIZON: u64 = 1 << 44;

/// The limits of an interface in one direction; all zero for none.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limit {
    /// What a byte costs, in ticks times two to the power of [`BYTE_COST_BITS`]; zero for no limit.
    pub byte_cost: u64,
    /// What a packet costs, in ticks; zero for no limit.
    pub packet_cost: u64,
    /// How far ahead what is let through may be paid for, in ticks.
    pub burst: u64,
}

/// What an interface used of its limits in one direction. Of a cache line's size, so that interfaces
/// don't share one.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bucket {
    /// When the bytes that were let through are paid for, in ticks of the monotonic clock.
    pub bytes_paid: u64,
    /// When the packets are.
    pub packets_paid: u64,
    /// Zero.
    pub reserved: [u64; 6],
}
