//! A driver for virtio network devices (Virtio 1.3, 5.1): one queue pair, no offloads.

use super::FEATURE_EVENT_INDEX;
use super::device::{Device, wait_for};
use super::queue::{Descriptor, Queue};
use crate::clock::Deadline;
use crate::error::Error;
use crate::memory::Buffer;

/// The virtio device type.
pub const KIND: u16 = 1;
/// The longest frame sent or taken, without its checksum.
pub const FRAME_LIMIT: usize = 1514;

const FEATURE_MAC: u64 = 1 << 5;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const QUEUE_SIZE_LIMIT: u16 = 64;
/// `struct virtio_net_hdr` with `num_buffers`, which is always there without the legacy interface.
const HEADER_SIZE: usize = 12;
const BUFFER_SIZE: usize = 2048;
const SEND_MILLISECONDS: u64 = 2000;

/// A network device.
pub struct Network {
    receive: Queue,
    transmit: Queue,
    /// One buffer for each descriptor of the receive queue.
    received: Buffer,
    sending: Buffer,
    mac: [u8; 6],
    /// Resets the device when this is dropped.
    _device: Device,
}

impl Network {
    /// Sets the device up and gives it all receive buffers.
    pub fn open(mut device: Device) -> Result<Self, Error> {
        device.negotiate(FEATURE_MAC | FEATURE_EVENT_INDEX)?;
        let mut mac = [0; 6];
        for (offset, byte) in (0..).zip(&mut mac) {
            *byte = device.specific().read8(offset)?;
        }
        let mut receive = device.queue(RECEIVE, QUEUE_SIZE_LIMIT)?;
        let transmit = device.queue(TRANSMIT, QUEUE_SIZE_LIMIT)?;
        let received = Buffer::allocate(usize::from(receive.size()) * BUFFER_SIZE, 4096)?;
        let sending = Buffer::allocate(BUFFER_SIZE, 4096)?;
        for index in 0..receive.size() {
            let part = received.slice(usize::from(index) * BUFFER_SIZE, BUFFER_SIZE);
            receive.add(&[Descriptor::writable(part.address(), BUFFER_SIZE as u32)])?;
        }
        device.start()?;
        receive.notify_always()?;
        Ok(Self {
            receive,
            transmit,
            received,
            sending,
            mac,
            _device: device,
        })
    }

    /// The MAC address that the device gives.
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Sends a frame and waits until the device has taken it.
    pub fn send(&mut self, frame: &[u8]) -> Result<(), Error> {
        if frame.len() > FRAME_LIMIT {
            return Err(Error::BadArgument);
        }
        self.sending.write(0, &[0; HEADER_SIZE]);
        self.sending.write(HEADER_SIZE, frame);
        let length = (HEADER_SIZE + frame.len()) as u32;
        self.transmit
            .add(&[Descriptor::readable(self.sending.address(), length)])?;
        self.transmit.notify()?;
        let transmit = &mut self.transmit;
        wait_for(
            Deadline::after_milliseconds(SEND_MILLISECONDS),
            "sent frame",
            || {
                transmit.want_interrupt(true);
                transmit.take_used()
            },
        )?;
        Ok(())
    }

    /// Copies the next frame out and gives its length; `None` when the deadline passes.
    pub fn receive(
        &mut self,
        frame: &mut [u8; FRAME_LIMIT],
        deadline: Deadline,
    ) -> Result<Option<usize>, Error> {
        let receive = &mut self.receive;
        let used = wait_for(deadline, "frame", || {
            receive.want_interrupt(true);
            receive.take_used()
        });
        let used = match used {
            Ok(used) => used,
            Err(Error::Timeout(_)) => return Ok(None),
            Err(error) => return Err(error),
        };
        let written = used.written as usize;
        if !(HEADER_SIZE..=BUFFER_SIZE).contains(&written) {
            return Err(Error::Unexpected {
                what: "received length",
                value: written as u64,
            });
        }
        // A chain of one descriptor got back is the next to be taken, so a head keeps its buffer.
        let part = self
            .received
            .slice(usize::from(used.head) * BUFFER_SIZE, BUFFER_SIZE);
        let length = (written - HEADER_SIZE).min(FRAME_LIMIT);
        part.read(HEADER_SIZE, &mut frame[..length]);
        self.receive
            .add(&[Descriptor::writable(part.address(), BUFFER_SIZE as u32)])?;
        self.receive.notify()?;
        Ok(Some(length))
    }
}
