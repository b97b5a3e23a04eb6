//! Virtio devices.

pub mod block;
pub mod net;
