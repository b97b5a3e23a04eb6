//! Virtio devices on PCI, without the transitional interface (Virtio 1.3).

pub mod block;
pub mod device;
pub mod net;
pub mod queue;
pub mod socket;
pub mod terminal;

/// `VIRTIO_F_RING_INDIRECT_DESC` (6).
pub const FEATURE_INDIRECT: u64 = 1 << 28;
/// `VIRTIO_F_RING_EVENT_IDX` (6).
pub const FEATURE_EVENT_INDEX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1` (6).
pub const FEATURE_VERSION_1: u64 = 1 << 32;
