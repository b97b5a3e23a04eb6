//! A driver for virtio consoles (Virtio 1.3, 5.3) of one port.

use super::device::{Device, wait_for};
use super::queue::{Descriptor, Queue};
use super::{FEATURE_EVENT_INDEX, FEATURE_INDIRECT};
use crate::clock::Deadline;
use crate::error::Error;
use crate::interrupts::Vector;
use crate::memory::Buffer;

/// The virtio device type.
pub const KIND: u16 = 3;
/// `VIRTIO_CONSOLE_F_SIZE` and `VIRTIO_CONSOLE_F_EMERG_WRITE`.
const FEATURES: u64 = 1 << 0 | 1 << 2;
/// Registers: columns and rows, ports, and a character that is printed at once.
const COLUMNS: u64 = 0;
const ROWS: u64 = 2;
const EMERGENCY_WRITE: u64 = 8;

/// Bytes that a buffer for input has.
pub const INPUT: usize = 16;
/// Bytes that can be sent in one go.
pub const OUTPUT: usize = 64 << 10;
const QUEUE_SIZE_LIMIT: u16 = 16;
const SEND_MILLISECONDS: u64 = 10_000;

/// A console.
pub struct Terminal {
    pub device: Device,
    pub receive: Queue,
    pub transmit: Queue,
    received: Buffer,
    sending: Buffer,
    table: Buffer,
    changes: Vector,
}

impl Terminal {
    /// Sets the device up and gives it all receive buffers.
    pub fn open(mut device: Device) -> Result<Self, Error> {
        let offered = device.offered()?;
        if offered & FEATURES != FEATURES {
            return Err(Error::Unexpected {
                what: "device features",
                value: offered,
            });
        }
        device.negotiate(FEATURES | FEATURE_EVENT_INDEX | FEATURE_INDIRECT)?;
        let changes = device.configuration_changes()?;
        let mut receive = device.queue(0, QUEUE_SIZE_LIMIT)?;
        let transmit = device.queue(1, QUEUE_SIZE_LIMIT)?;
        let received = Buffer::allocate(usize::from(receive.size()) * INPUT, 16)?;
        for index in 0..receive.size() {
            let part = received.slice(usize::from(index) * INPUT, INPUT);
            receive.add(&[Descriptor::writable(part.address(), INPUT as u32)])?;
        }
        receive.want_interrupt(true);
        device.start()?;
        receive.notify()?;
        Ok(Self {
            receive,
            transmit,
            received,
            sending: Buffer::allocate(OUTPUT, 4096)?,
            table: Buffer::allocate(3 * 16, 16)?,
            changes,
            device,
        })
    }

    /// Prints without a queue.
    pub fn emergency_write(&self, text: &[u8]) -> Result<(), Error> {
        let registers = self.device.specific();
        text.iter()
            .try_for_each(|byte| registers.write32(EMERGENCY_WRITE, u32::from(*byte)))
    }

    /// Columns and rows.
    pub fn size(&self) -> Result<(u16, u16), Error> {
        let registers = self.device.specific();
        Ok((registers.read16(COLUMNS)?, registers.read16(ROWS)?))
    }

    /// How often the device told that its registers have changed.
    pub fn changes(&self) -> u64 {
        self.changes.count()
    }

    /// Prints, in two pieces of an indirect table: a device must not care.
    pub fn print(&mut self, text: &[u8]) -> Result<(), Error> {
        self.sending.write(0, text);
        let (at, half) = (self.sending.address(), text.len() / 2);
        let parts = [
            Descriptor::readable(at, half as u32),
            Descriptor::readable(at + half as u64, (text.len() - half) as u32),
        ];
        self.send(&[Descriptor::table(&self.table, &parts)])
    }

    /// Makes chains of one descriptor each available, notifies once, and waits until all are used.
    pub fn send(&mut self, chains: &[Descriptor]) -> Result<(), Error> {
        for chain in chains {
            self.transmit.add(&[*chain])?;
        }
        self.transmit.notify()?;
        let transmit = &mut self.transmit;
        for _ in chains {
            let deadline = Deadline::after_milliseconds(SEND_MILLISECONDS);
            wait_for(deadline, "printed buffer", || {
                transmit.want_interrupt(true);
                transmit.take_used()
            })?;
        }
        Ok(())
    }

    /// The memory that is sent from.
    pub fn sending(&self) -> &Buffer {
        &self.sending
    }

    /// Input that has come, if there is some: how many bytes of `into` it is.
    pub fn take_input(&mut self, into: &mut [u8; INPUT]) -> Result<Option<usize>, Error> {
        self.receive.want_interrupt(true);
        let Some(used) = self.receive.take_used()? else {
            return Ok(None);
        };
        let length = used.written as usize;
        if length > INPUT {
            return Err(Error::Unexpected {
                what: "input's length",
                value: u64::from(used.written),
            });
        }
        // A chain of one descriptor got back is the next to be taken, so a head keeps its buffer.
        let part = self.received.slice(usize::from(used.head) * INPUT, INPUT);
        part.read(0, &mut into[..length]);
        self.receive
            .add(&[Descriptor::writable(part.address(), INPUT as u32)])?;
        self.receive.notify()?;
        Ok(Some(length))
    }
}
