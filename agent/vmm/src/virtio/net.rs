//! A network interface (virtio 1.2, 5.1) on a TAP device of the host.
//!
//! One receive and one transmit queue, served by one thread. Packets go between the guest's
//! buffers and the TAP by `readv` and `writev`, with the virtio header in front, so checksum and
//! segmentation offloads pass through to the host's network stack without a look at the packet.

mod buffers;
mod queues;
mod tap;
mod worker;

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
};

use super::{
    Activation, ActivationError, FEATURE_EVENT_IDX, FEATURE_INDIRECT, FEATURE_VERSION_1,
    VirtioDevice,
};
use crate::config::InterfaceConfig;
use crate::isolation::seccomp::Mode;

#[cfg(any(test, feature = "fuzzing"))]
pub use queues::{PacketQueue, Receiver, Transmitter};
pub use tap::{Tap, TapError};
use worker::Worker;

/// `VIRTIO_NET_S_LINK_UP`.
const LINK_UP: u16 = 1;
/// Receive, then transmit.
const QUEUE_SIZES: [u16; 2] = [256, 256];

const FEATURES: u64 = FEATURE_VERSION_1
    | FEATURE_EVENT_IDX
    | FEATURE_INDIRECT
    | 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_MTU
    | 1 << VIRTIO_NET_F_STATUS;

/// A network interface.
pub struct Net {
    id: String,
    tap: Arc<Tap>,
    mtu: u16,
    seccomp: Mode,
    /// `struct virtio_net_config` up to `mtu`: MAC, status, queue pairs, MTU.
    config: [u8; 12],
    worker: Option<Worker>,
}

impl Net {
    /// An interface on `tap`, which outlives the guest's reboots.
    pub fn new(config: &InterfaceConfig, tap: Arc<Tap>, seccomp: Mode) -> Self {
        let mut bytes = [0; 12];
        bytes[..6].copy_from_slice(&config.mac.octets());
        bytes[6..8].copy_from_slice(&LINK_UP.to_le_bytes());
        bytes[8..10].copy_from_slice(&1u16.to_le_bytes());
        bytes[10..12].copy_from_slice(&config.mtu.to_le_bytes());
        Self {
            id: config.id.clone(),
            tap,
            mtu: config.mtu,
            seccomp,
            config: bytes,
            worker: None,
        }
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (byte, value) in data.iter_mut().zip(self.config.iter().skip(start)) {
            *byte = *value;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError> {
        self.tap
            .set_offloads(activation.features)
            .map_err(|e| ActivationError(e.to_string()))?;
        self.worker = Worker::start(
            &self.id,
            Arc::clone(&self.tap),
            self.mtu,
            self.seccomp,
            activation,
        )?;
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}
