//! A network interface (virtio 1.2, 5.1) on a TAP device of the host.
//!
//! Each pair of queues is served by a thread of its own, or by the kernel (`/dev/vhost-net`). In a
//! thread, packets go between the guest's buffers and the TAP by `readv` and `writev`, with the virtio
//! header in front, so checksum and segmentation offloads pass through to the host's network stack
//! without a look at the packet. How many of the pairs are in use the driver says on the control queue
//! (5.1.5.1), which its vCPU's thread serves.

mod buffers;
mod control;
mod pairs;
mod queues;
mod tap;
mod vhost;
mod worker;

use std::collections::BTreeMap;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
};

use super::{
    Activation, ActivationError, FEATURE_EVENT_IDX, FEATURE_INDIRECT, FEATURE_VERSION_1,
    VirtioDevice,
};
use crate::config::InterfaceConfig;
use crate::isolation::seccomp::Mode;

pub use control::ControlQueue;
use pairs::{Driver, HostSide, QueuePairs};
#[cfg(any(test, feature = "fuzzing"))]
pub use queues::{PacketQueue, Receiver, Transmitter};
#[cfg(any(test, feature = "fuzzing"))]
pub use tap::TapQueue;
pub use tap::{Tap, TapError};

/// `VIRTIO_NET_S_LINK_UP`.
const LINK_UP: u16 = 1;
const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;

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

/// Of an interface with several queue pairs.
const FEATURES_OF_SEVERAL: u64 = 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_MQ;

/// A network interface.
pub struct Net {
    host: HostSide,
    queue_sizes: Vec<u16>,
    /// `struct virtio_net_config` up to `mtu`: MAC, status, queue pairs, MTU.
    config: [u8; 12],
    /// How many queue pairs the driver uses.
    pairs_in_use: u16,
    /// What is written into memory is to be in this process's log, which the kernel doesn't write.
    notes_writes: bool,
    /// The control queue's number, since the last driver that was ready.
    control: Option<u16>,
    active: Option<Active>,
}

/// What a ready driver's queues are.
struct Active {
    pairs: QueuePairs,
    control: Option<ControlQueue>,
    driver: Driver,
}

impl Net {
    /// An interface on `tap`, which outlives the guest's reboots.
    pub fn new(config: &InterfaceConfig, tap: Arc<Tap>, seccomp: Mode) -> Self {
        let pairs = tap.pairs();
        let mut bytes = [0; 12];
        bytes[..6].copy_from_slice(&config.mac.octets());
        bytes[6..8].copy_from_slice(&LINK_UP.to_le_bytes());
        bytes[8..10].copy_from_slice(&pairs.to_le_bytes());
        bytes[10..12].copy_from_slice(&config.mtu.to_le_bytes());
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * usize::from(pairs)];
        if pairs > 1 {
            queue_sizes.push(CONTROL_QUEUE_SIZE);
        }
        Self {
            host: HostSide {
                id: config.id.clone(),
                tap,
                mtu: config.mtu,
                seccomp,
            },
            queue_sizes,
            config: bytes,
            pairs_in_use: 1,
            notes_writes: false,
            control: None,
            active: None,
        }
    }

    fn has_several_pairs(&self) -> bool {
        self.host.tap.pairs() > 1
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        if self.has_several_pairs() {
            FEATURES | FEATURES_OF_SEVERAL
        } else {
            FEATURES
        }
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (byte, value) in data.iter_mut().zip(self.config.iter().skip(start)) {
            *byte = *value;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivationError> {
        let features = activation.features;
        self.host
            .tap
            .set_offloads(features)
            .map_err(|e| ActivationError(e.to_string()))?;
        let several = features & 1 << VIRTIO_NET_F_MQ != 0;
        if !activation.resumed || !several {
            self.pairs_in_use = 1;
        }
        // Behind the pairs that the driver knows of (5.1.2).
        let pairs = if several { self.host.tap.pairs() } else { 1 };
        self.control = (features & 1 << VIRTIO_NET_F_CTRL_VQ != 0).then_some(2 * pairs);
        let driver = Driver {
            memory: activation.memory,
            features,
            health: activation.health,
        };
        let mut queues: BTreeMap<_, _> = activation
            .queues
            .into_iter()
            .map(|queue| (queue.index, queue))
            .collect();
        let control = self.control.and_then(|index| queues.remove(&index));
        queues.retain(|index, _| *index < 2 * pairs);
        let mut pairs = QueuePairs::new(
            self.host.clone(),
            driver.clone(),
            queues,
            !self.notes_writes,
        );
        pairs.serve(self.pairs_in_use)?;
        let control = control
            .map(|queue| {
                let event_idx = features & FEATURE_EVENT_IDX != 0;
                let opened = queue.layout.open(queue.index, &driver.memory, event_idx);
                let opened = opened.map_err(|e| ActivationError(e.to_string()))?;
                let memory = Arc::clone(&driver.memory);
                Ok(ControlQueue::new(opened, memory, queue.call))
            })
            .transpose()?;
        self.active = Some(Active {
            pairs,
            control,
            driver,
        });
        // Commands may be there already, notified while the device wasn't active.
        if let Some(control) = self.control {
            self.notify(control);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.pairs_in_use = 1;
        if let Err(e) = self.host.tap.use_pairs(1) {
            tracing::warn!("{}: {e}", self.host.id);
        }
    }

    fn pause(&mut self) -> Result<(), String> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        if let Err(reason) = active.pairs.pause() {
            if let Err(e) = active.pairs.serve(self.pairs_in_use) {
                tracing::warn!("{}: the interface can't go on: {e}", self.host.id);
                active.driver.health.needs_reset();
            }
            return Err(reason);
        }
        self.active = None;
        Ok(())
    }

    fn save(&self) -> Vec<u8> {
        self.pairs_in_use.to_le_bytes().to_vec()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), String> {
        // Nothing is what an interface of one pair kept before there were several.
        let pairs = match *state {
            [] => 1,
            [low, high] => u16::from_le_bytes([low, high]),
            _ => return Err("an interface's state has two bytes".to_owned()),
        };
        if !(1..=self.host.tap.pairs()).contains(&pairs) {
            return Err(format!(
                "its driver uses {pairs} queue pairs, and there are {}",
                self.host.tap.pairs()
            ));
        }
        self.pairs_in_use = pairs;
        Ok(())
    }

    fn note_writes(&mut self, on: bool) -> Result<(), String> {
        if self.notes_writes == on {
            return Ok(());
        }
        self.notes_writes = on;
        match &mut self.active {
            Some(active) if self.host.tap.has_vhost() => {
                active.pairs.allow_vhost(!on, self.pairs_in_use)
            }
            _ => Ok(()),
        }
    }

    /// Changing the pairs is done before the driver goes on.
    fn handles_notifications(&self, index: u16) -> bool {
        self.control == Some(index)
    }

    fn notify(&mut self, _index: u16) {
        let Some(active) = &mut self.active else {
            return;
        };
        let (pairs, in_use) = (&mut active.pairs, &mut self.pairs_in_use);
        let Some(control) = &mut active.control else {
            return;
        };
        let served = control.serve(|count| {
            if !(1..=pairs.count()).contains(&count) {
                return false;
            }
            if let Err(e) = pairs.serve(count) {
                tracing::warn!("{}: can't serve {count} queue pairs: {e}", self.host.id);
                return false;
            }
            *in_use = count;
            true
        });
        if let Err(e) = served {
            tracing::warn!("{}: the control queue is broken: {e}", self.host.id);
            active.driver.health.needs_reset();
            self.active = None;
        }
    }
}
