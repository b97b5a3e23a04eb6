//! The disk as all its queues see it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::image::SECTOR_SIZE;
use crate::layer::{BlockDevice, Properties};

/// Bytes of a `VIRTIO_BLK_T_GET_ID` answer (virtio 1.2, 5.2.6).
pub const SERIAL_SIZE: usize = 20;

/// A disk's contents, and how to present them.
#[derive(Debug)]
pub struct Disk {
    device: Arc<dyn BlockDevice>,
    properties: Properties,
    sectors: AtomicU64,
    /// The serial number, padded with zeroes.
    pub serial: [u8; SERIAL_SIZE],
    /// Whether each write has to be durable before it completes, because the driver can't
    /// flush or has switched the write cache off.
    pub write_through: AtomicBool,
}

impl Disk {
    /// A disk without a driver, so with each write durable.
    pub fn new(device: Arc<dyn BlockDevice>, serial: [u8; SERIAL_SIZE]) -> Self {
        let properties = device.properties();
        Self {
            device,
            properties,
            sectors: AtomicU64::new(properties.bytes.div_ceil(SECTOR_SIZE)),
            serial,
            write_through: AtomicBool::new(true),
        }
    }

    /// The contents: the topmost layer.
    pub fn device(&self) -> &Arc<dyn BlockDevice> {
        &self.device
    }

    /// What the contents are like; their size as of the start.
    pub fn properties(&self) -> &Properties {
        &self.properties
    }

    /// What the guest sees, in sectors of 512 bytes.
    pub fn capacity_sectors(&self) -> u64 {
        self.sectors.load(Ordering::Acquire)
    }

    /// The disk's size in bytes as the guest sees it.
    pub fn capacity_bytes(&self) -> u64 {
        self.capacity_sectors() * SECTOR_SIZE
    }

    /// Takes over the size that the contents have now. Returns whether it has changed.
    pub fn remeasure(&self) -> io::Result<bool> {
        let sectors = self.device.remeasure()?.div_ceil(SECTOR_SIZE);
        Ok(self.sectors.swap(sectors, Ordering::AcqRel) != sectors)
    }
}
