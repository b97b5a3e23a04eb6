//! A driver for virtio block devices (Virtio 1.3, 5.2): several requests in flight, spread over all of the
//! device's queues.

use super::device::{Device, wait_for};
use super::queue::{Descriptor, Queue};
use super::{FEATURE_EVENT_INDEX, FEATURE_INDIRECT};
use crate::clock::Deadline;
use crate::error::Error;
use crate::memory::Buffer;

/// The virtio device type.
pub const KIND: u16 = 2;
/// Bytes of a sector, whatever the device's block size.
pub const SECTOR: usize = 512;
/// Requests in flight, at most.
pub const DEPTH_LIMIT: usize = 64;
/// Queues used, at most.
const QUEUE_LIMIT: usize = 16;
const QUEUE_SIZE_LIMIT: u16 = 256;
/// Data buffers in one request: more than one, so that chains are longer than the shortest.
const SEGMENT_LIMIT: usize = 4;

const FEATURE_SEGMENTS: u64 = 1 << 2;
const FEATURE_READ_ONLY: u64 = 1 << 5;
const FEATURE_FLUSH: u64 = 1 << 9;
const FEATURE_QUEUES: u64 = 1 << 12;

const CAPACITY: u64 = 0;
const SEGMENTS: u64 = 12;

const HEADER_SIZE: usize = 16;
const STATUS_OFFSET: usize = HEADER_SIZE;
/// An indirect table for the longest chain.
const TABLE_SIZE: usize = (SEGMENT_LIMIT + 2) * 16;
/// Neither of the statuses that a device can give.
const STATUS_PENDING: u8 = 0xff;

/// The request succeeded.
pub const STATUS_OK: u8 = 0;
/// The device or the driver is at fault.
pub const STATUS_IO_ERROR: u8 = 1;
/// The device doesn't know the request.
pub const STATUS_UNSUPPORTED: u8 = 2;

/// What a request does (5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reads sectors.
    Read,
    /// Writes sectors.
    Write,
    /// Makes finished writes durable; has no data.
    Flush,
    /// Reads the 20 bytes of the disk's serial.
    Identify,
    /// A number that is no request.
    Unknown,
}

impl Kind {
    fn number(self) -> u32 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Flush => 4,
            Self::Identify => 8,
            Self::Unknown => 0x7fff_fff0,
        }
    }
}

/// A request that the device has answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The slot it was in, which is free again.
    pub slot: usize,
    /// Its first sector.
    pub sector: u64,
    /// Its bytes of data.
    pub length: usize,
    /// Its status byte.
    pub status: u8,
}

/// Where a request in flight has its data.
#[derive(Clone, Copy)]
struct Slot {
    control: Buffer,
    data: Buffer,
    sector: u64,
    length: usize,
    /// Where the descriptors are, if not in the queue's own table.
    table: Option<Buffer>,
    /// The queue and the head of its chain, while it is in flight.
    in_flight: Option<(usize, u16)>,
}

/// Descriptors of a request, and how many of them it has.
type Chain = ([Descriptor; SEGMENT_LIMIT + 2], usize);

impl Slot {
    /// Header, data in up to `segments` pieces of whole sectors, status (5.2.6).
    fn chain(&self, kind: Kind, segments: usize) -> Chain {
        let control = self.control.address();
        let mut chain = [Descriptor::readable(0, 0); SEGMENT_LIMIT + 2];
        chain[0] = Descriptor::readable(control, HEADER_SIZE as u32);
        let mut parts = 1;
        let mut done = 0;
        let piece = self.length.div_ceil(SECTOR).div_ceil(segments) * SECTOR;
        while done < self.length {
            let part = piece.min(self.length - done);
            let address = self.data.slice(done, part).address();
            chain[parts] = match kind {
                Kind::Read | Kind::Identify => Descriptor::writable(address, part as u32),
                Kind::Write | Kind::Flush | Kind::Unknown => {
                    Descriptor::readable(address, part as u32)
                }
            };
            parts += 1;
            done += part;
        }
        chain[parts] = Descriptor::writable(control + STATUS_OFFSET as u64, 1);
        (chain, parts + 1)
    }
}

/// A block device with `depth` slots for requests.
pub struct Block {
    queues: [Option<Queue>; QUEUE_LIMIT],
    queue_count: usize,
    slots: [Option<Slot>; DEPTH_LIMIT],
    capacity: u64,
    segments: usize,
    device: Device,
}

impl Block {
    /// Sets the device up, with room for `depth` requests of at most `request_size` bytes each.
    pub fn open(mut device: Device, depth: usize, request_size: usize) -> Result<Self, Error> {
        device.negotiate(
            FEATURE_READ_ONLY
                | FEATURE_FLUSH
                | FEATURE_SEGMENTS
                | FEATURE_QUEUES
                | FEATURE_INDIRECT
                | FEATURE_EVENT_INDEX,
        )?;
        let capacity = device.specific().read64(CAPACITY)?;
        let segments = if device.features() & FEATURE_SEGMENTS == 0 {
            1
        } else {
            device.specific().read32(SEGMENTS)? as usize
        };
        let queue_count = usize::from(device.queues()?).min(QUEUE_LIMIT);
        let mut queues = [const { None }; QUEUE_LIMIT];
        for (index, queue) in queues.iter_mut().enumerate().take(queue_count) {
            *queue = Some(device.queue(index as u16, QUEUE_SIZE_LIMIT)?);
        }
        device.start()?;
        let indirect = device.features() & FEATURE_INDIRECT != 0;
        let mut slots = [None; DEPTH_LIMIT];
        for (index, slot) in slots.iter_mut().enumerate().take(depth) {
            // Every second slot has its own table, so that devices see chains of both kinds.
            let table = indirect && index % 2 == 1;
            *slot = Some(Slot {
                control: Buffer::allocate(HEADER_SIZE + 1, 16)?,
                data: Buffer::allocate(request_size, 4096)?,
                sector: 0,
                length: 0,
                table: table
                    .then(|| Buffer::allocate(TABLE_SIZE, 16))
                    .transpose()?,
                in_flight: None,
            });
        }
        let segments = segments.clamp(1, SEGMENT_LIMIT);
        Ok(Self {
            queues,
            queue_count,
            slots,
            capacity,
            segments,
            device,
        })
    }

    /// Sectors of the disk.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// The capacity in sectors as the device says it now.
    pub fn current_capacity(&self) -> Result<u64, Error> {
        self.device.specific().read64(CAPACITY)
    }

    /// Whether the device refuses writes.
    pub fn read_only(&self) -> bool {
        self.device.features() & FEATURE_READ_ONLY != 0
    }

    /// Whether the device has a cache that must be flushed.
    pub fn can_flush(&self) -> bool {
        self.device.features() & FEATURE_FLUSH != 0
    }

    /// The device below.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// How many queues are in use.
    pub fn queue_count(&self) -> usize {
        self.queue_count
    }

    /// The first queue, for those who want to break it.
    pub fn first_queue(&mut self) -> Result<&mut Queue, Error> {
        self.queues[0].as_mut().ok_or(Error::QueueFull)
    }

    /// A slot with no request in flight.
    pub fn free_slot(&self) -> Option<usize> {
        self.slots
            .iter()
            .position(|slot| slot.is_some_and(|slot| slot.in_flight.is_none()))
    }

    /// Whether any request is in flight.
    pub fn busy(&self) -> bool {
        self.slots
            .iter()
            .flatten()
            .any(|slot| slot.in_flight.is_some())
    }

    /// A slot's data.
    pub fn data(&self, slot: usize) -> Result<Buffer, Error> {
        self.slots[slot]
            .map(|slot| slot.data)
            .ok_or(Error::QueueFull)
    }

    /// Makes a request available to the device; [`Self::notify`] tells it. [`Error::QueueFull`] means
    /// that others must be answered first.
    pub fn submit(
        &mut self,
        index: usize,
        kind: Kind,
        sector: u64,
        length: usize,
    ) -> Result<(), Error> {
        let mut slot = self.slots[index].ok_or(Error::QueueFull)?;
        slot.sector = sector;
        slot.length = length;
        slot.control.write32(0, kind.number());
        slot.control.write32(4, 0);
        slot.control.write64(8, sector);
        slot.control.write8(STATUS_OFFSET, STATUS_PENDING);
        let (chain, parts) = slot.chain(kind, self.segments);
        let chain = &chain[..parts];
        let number = index % self.queue_count.max(1);
        let queue = self.queues[number].as_mut().ok_or(Error::QueueFull)?;
        let head = match &slot.table {
            Some(table) => queue.add(&[Descriptor::table(table, chain)])?,
            None => queue.add(chain)?,
        };
        slot.in_flight = Some((number, head));
        self.slots[index] = Some(slot);
        Ok(())
    }

    /// Tells the device of submitted requests.
    pub fn notify(&mut self) -> Result<(), Error> {
        self.queues.iter_mut().flatten().try_for_each(Queue::notify)
    }

    /// The next answered request, if there is one.
    pub fn poll(&mut self) -> Result<Option<Completion>, Error> {
        for (number, queue) in self.queues.iter_mut().enumerate() {
            let Some(queue) = queue else { continue };
            let Some(used) = queue.take_used()? else {
                continue;
            };
            let owner = |slot: &Option<Slot>| {
                slot.is_some_and(|slot| slot.in_flight == Some((number, used.head)))
            };
            let wrong = Error::Unexpected {
                what: "used chain's head",
                value: used.head.into(),
            };
            let index = self.slots.iter().position(owner).ok_or(wrong)?;
            let Some(slot) = &mut self.slots[index] else {
                return Err(wrong);
            };
            slot.in_flight = None;
            let status = slot.control.read8(STATUS_OFFSET);
            let completion = Completion {
                slot: index,
                sector: slot.sector,
                length: slot.length,
                status,
            };
            return Ok(Some(completion));
        }
        Ok(None)
    }

    /// Waits for the next answered request by interrupt.
    pub fn complete(&mut self, deadline: Deadline) -> Result<Completion, Error> {
        wait_for(deadline, "answer from the disk", || {
            if let Some(completion) = self.poll()? {
                return Ok(Some(completion));
            }
            self.queues
                .iter()
                .flatten()
                .for_each(|queue| queue.want_interrupt(true));
            // What came before the device could see the wish raises no interrupt.
            self.poll()
        })
    }

    /// Runs one request alone and gives its status byte.
    pub fn request(
        &mut self,
        kind: Kind,
        sector: u64,
        length: usize,
        deadline: Deadline,
    ) -> Result<u8, Error> {
        let slot = self.free_slot().ok_or(Error::QueueFull)?;
        self.submit(slot, kind, sector, length)?;
        self.notify()?;
        Ok(self.complete(deadline)?.status)
    }
}
