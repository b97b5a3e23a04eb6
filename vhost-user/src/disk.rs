//! The disk as all its queues see it.

use std::sync::atomic::AtomicBool;

use crate::image::Image;

/// Bytes of a `VIRTIO_BLK_T_GET_ID` answer (virtio 1.2, 5.2.6).
pub const SERIAL_SIZE: usize = 20;

/// An image, and how to present it.
#[derive(Debug)]
pub struct Disk {
    /// The open image.
    pub image: Image,
    /// The serial number, padded with zeroes.
    pub serial: [u8; SERIAL_SIZE],
    /// Whether each write has to be durable before it completes, because the driver can't
    /// flush or has switched the write cache off.
    pub write_through: AtomicBool,
}

impl Disk {
    /// A disk without a driver, so with each write durable.
    pub fn new(image: Image, serial: [u8; SERIAL_SIZE]) -> Self {
        Self {
            image,
            serial,
            write_through: AtomicBool::new(true),
        }
    }
}
