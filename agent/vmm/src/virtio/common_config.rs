//! The common configuration structure of a virtio PCI device (virtio 1.2, 4.1.4.3).

use serde::{Deserialize, Serialize};

use super::QueueLayout;

/// Bytes of the structure with the fields that this device has.
pub(super) const BYTES: u64 = 0x38;

pub(super) const STATUS_DRIVER_OK: u8 = 4;
pub(super) const STATUS_FEATURES_OK: u8 = 8;

/// A queue as the driver has configured it so far.
#[derive(Debug, Clone, Copy)]
pub(super) struct QueueConfig {
    pub(super) layout: QueueLayout,
    pub(super) max_size: u16,
    pub(super) enabled: bool,
}

/// What a write means to the transport.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum CommonWrite {
    /// Nothing more to do.
    Done,
    /// The device status is written.
    Status(u8),
    /// The configuration's vector is chosen.
    ConfigVector(u16),
    /// A queue's vector is chosen.
    QueueVector(u16, u16),
}

/// The structure's registers that have no effect of their own.
#[derive(Debug)]
pub(super) struct CommonConfig {
    device_features: u64,
    pub(super) driver_features: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    queue_select: u16,
    pub(super) queues: Vec<QueueConfig>,
}

/// The registers as they are saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct CommonState {
    pub(super) driver_features: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    queue_select: u16,
    queues: Vec<(QueueLayout, bool)>,
}

/// Registers that are kept elsewhere.
#[derive(Debug, Clone, Copy)]
pub(super) struct Registers {
    pub(super) status: u8,
    pub(super) config_vector: u16,
    pub(super) queue_vector: u16,
    pub(super) config_generation: u8,
}

impl CommonConfig {
    pub(super) fn new(device_features: u64, queue_sizes: &[u16]) -> Self {
        let queues = queue_sizes
            .iter()
            .map(|&max_size| QueueConfig {
                layout: QueueLayout {
                    size: max_size,
                    ..QueueLayout::default()
                },
                max_size,
                enabled: false,
            })
            .collect();
        Self {
            device_features,
            driver_features: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            queue_select: 0,
            queues,
        }
    }

    /// Back to the state before any driver.
    pub(super) fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.max_size).collect();
        *self = Self::new(self.device_features, &sizes);
    }

    /// The registers as they are saved.
    pub(super) fn save(&self) -> CommonState {
        CommonState {
            driver_features: self.driver_features,
            device_feature_select: self.device_feature_select,
            driver_feature_select: self.driver_feature_select,
            queue_select: self.queue_select,
            queues: self.queues.iter().map(|q| (q.layout, q.enabled)).collect(),
        }
    }

    /// Takes what [`Self::save`] gave.
    pub(super) fn restore(&mut self, state: &CommonState) -> Result<(), String> {
        if state.queues.len() != self.queues.len() {
            return Err(format!(
                "it has {} queues, not {}",
                self.queues.len(),
                state.queues.len()
            ));
        }
        if state.driver_features & !self.device_features != 0 {
            return Err(format!(
                "it lacks features that the guest's driver uses: {:#x}",
                state.driver_features & !self.device_features
            ));
        }
        for (queue, (layout, enabled)) in self.queues.iter_mut().zip(&state.queues) {
            if layout.size > queue.max_size {
                return Err(format!(
                    "its queues have {} entries, not {}",
                    queue.max_size, layout.size
                ));
            }
            queue.layout = *layout;
            queue.enabled = *enabled;
        }
        self.driver_features = state.driver_features;
        self.device_feature_select = state.device_feature_select;
        self.driver_feature_select = state.driver_feature_select;
        self.queue_select = state.queue_select;
        Ok(())
    }

    /// The queue that the next queue registers are about.
    pub(super) const fn selected(&self) -> u16 {
        self.queue_select
    }

    /// Whether the driver accepted only what was offered.
    pub(super) const fn features_are_valid(&self) -> bool {
        self.driver_features & !self.device_features == 0
            && self.driver_features & super::FEATURE_VERSION_1 != 0
    }

    /// Reads any bytes of the structure.
    pub(super) fn read(&self, offset: u64, data: &mut [u8], registers: Registers) {
        let image = self.image(registers);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (byte, index) in data.iter_mut().zip(start..) {
            *byte = image.get(index).copied().unwrap_or(0);
        }
    }

    fn image(&self, registers: Registers) -> [u8; 0x38] {
        let half = |features: u64, select: u32| match select {
            0 => (features & 0xffff_ffff) as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        let mut image = [0; 0x38];
        let mut put = |offset: usize, bytes: &[u8]| {
            image[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        put(0x00, &self.device_feature_select.to_le_bytes());
        put(
            0x04,
            &half(self.device_features, self.device_feature_select).to_le_bytes(),
        );
        put(0x08, &self.driver_feature_select.to_le_bytes());
        put(
            0x0c,
            &half(self.driver_features, self.driver_feature_select).to_le_bytes(),
        );
        put(0x10, &registers.config_vector.to_le_bytes());
        put(
            0x12,
            &u16::try_from(self.queues.len())
                .unwrap_or(u16::MAX)
                .to_le_bytes(),
        );
        put(0x14, &[registers.status, registers.config_generation]);
        put(0x16, &self.queue_select.to_le_bytes());
        put(0x1a, &registers.queue_vector.to_le_bytes());
        // A queue that doesn't exist has size 0.
        if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
            put(0x18, &queue.layout.size.to_le_bytes());
            put(0x1c, &u16::from(queue.enabled).to_le_bytes());
            // Each queue has a doorbell of its own: the offset is its index.
            put(0x1e, &self.queue_select.to_le_bytes());
            put(0x20, &queue.layout.descriptors.to_le_bytes());
            put(0x28, &queue.layout.available.to_le_bytes());
            put(0x30, &queue.layout.used.to_le_bytes());
        }
        image
    }

    /// Writes one field, or half of a 64-bit one. Other accesses are not allowed to drivers
    /// (virtio 1.2, 4.1.3.1), and do nothing.
    pub(super) fn write(&mut self, offset: u64, data: &[u8], negotiating: bool) -> CommonWrite {
        if !matches!(data.len(), 1 | 2 | 4 | 8) {
            return CommonWrite::Done;
        }
        let value = data
            .iter()
            .rev()
            .fold(0, |value, byte| value << 8 | u64::from(*byte));
        let value32 = (value & 0xffff_ffff) as u32;
        let value16 = (value & 0xffff) as u16;
        match (offset, data.len()) {
            (0x00, 4) => self.device_feature_select = value32,
            (0x08, 4) => self.driver_feature_select = value32,
            (0x0c, 4) if negotiating => self.accept_features(value32),
            (0x10, 2) => return CommonWrite::ConfigVector(value16),
            (0x14, 1) => return CommonWrite::Status(data[0]),
            (0x16, 2) => self.queue_select = value16,
            (0x1a, 2) => return CommonWrite::QueueVector(self.queue_select, value16),
            (0x18 | 0x1c | 0x20..=0x34, _) => self.write_queue(offset, data.len(), value),
            _ => {}
        }
        CommonWrite::Done
    }

    fn accept_features(&mut self, value: u32) {
        let value = u64::from(value);
        match self.driver_feature_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    fn write_queue(&mut self, offset: u64, length: usize, value: u64) {
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else {
            return;
        };
        // An enabled queue is the device's: only a reset gives it back.
        if queue.enabled {
            return;
        }
        let layout = &mut queue.layout;
        let low = |old: u64| old & !0xffff_ffff | value & 0xffff_ffff;
        let high = |old: u64| old & 0xffff_ffff | value << 32;
        match (offset, length) {
            (0x18, 2) if value <= u64::from(queue.max_size) => {
                layout.size = (value & 0xffff) as u16;
            }
            (0x1c, 2) => queue.enabled = value == 1,
            (0x20, 8) => layout.descriptors = value,
            (0x20, 4) => layout.descriptors = low(layout.descriptors),
            (0x24, 4) => layout.descriptors = high(layout.descriptors),
            (0x28, 8) => layout.available = value,
            (0x28, 4) => layout.available = low(layout.available),
            (0x2c, 4) => layout.available = high(layout.available),
            (0x30, 8) => layout.used = value,
            (0x30, 4) => layout.used = low(layout.used),
            (0x34, 4) => layout.used = high(layout.used),
            _ => {}
        }
    }
}
