//! The packets in the guest's buffers.

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Instant;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::muxer::Muxer;
use super::packet::{HEADER_BYTES, Header};
use crate::memory::GuestMemory;

/// Packets of one direction before the other has its turn.
const BURST: usize = 256;
/// The most data of one packet: what Linux gives and takes at most.
const MAX_DATA: usize = 64 << 10;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (virtio 1.2, 5.10.6.7).
const TRANSPORT_RESET: u32 = 0;

/// Why a queue can't be served any more: the driver broke the rules.
#[derive(Debug, thiserror::Error)]
pub enum BrokenQueue {
    /// A ring is malformed.
    #[error("malformed ring: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// A packet is shorter than its header says, or too long.
    #[error("a packet's buffers have {found} bytes, and {wanted} are wanted")]
    Length {
        /// Bytes that there are.
        found: usize,
        /// Bytes that there must be.
        wanted: usize,
    },
    /// Buffers can't be read or written.
    #[error("a packet's buffers are not usable: {0}")]
    Buffer(#[from] std::io::Error),
}

/// One virtqueue and its interrupt.
pub struct PacketQueue {
    queue: Queue,
    memory: GuestMemory,
    call: EventFd,
    interrupt: bool,
}

type Chain = DescriptorChain<GuestMemory>;

impl PacketQueue {
    /// `queue` is checked and ready.
    pub const fn new(queue: Queue, memory: GuestMemory, call: EventFd) -> Self {
        Self {
            queue,
            memory,
            call,
            interrupt: false,
        }
    }

    /// The next chain; `None` until the driver's next notification.
    fn pop(&mut self) -> Result<Option<Chain>, BrokenQueue> {
        loop {
            if let Some(chain) = self.queue.iter(Arc::clone(&self.memory))?.next() {
                return Ok(Some(chain));
            }
            // One that came just before has no notification.
            if !self.queue.enable_notification(&*self.memory)? {
                return Ok(None);
            }
        }
    }

    fn put(&mut self, head: u16, written: usize) -> Result<(), BrokenQueue> {
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        self.queue.add_used(&*self.memory, head, written)?;
        self.interrupt = true;
        Ok(())
    }

    /// Interrupts the driver if it wants to know of what was put back.
    fn finish(&mut self) -> Result<(), BrokenQueue> {
        if std::mem::take(&mut self.interrupt) && self.queue.needs_notification(&*self.memory)? {
            // Fails only with the event's counter at its maximum.
            let _ = self.call.write(1);
        }
        Ok(())
    }
}

/// The guest's queues with the connections behind them.
pub struct Service {
    /// The connections.
    pub muxer: Muxer,
    receive: PacketQueue,
    transmit: PacketQueue,
    /// Buffers for the next packet to the guest.
    spare: Option<Chain>,
    data: Vec<u8>,
}

impl Service {
    /// Queues that were not served before, or go on behind their used rings.
    pub fn new(muxer: Muxer, receive: PacketQueue, transmit: PacketQueue) -> Self {
        Self {
            muxer,
            receive,
            transmit,
            spare: None,
            data: vec![0; MAX_DATA],
        }
    }

    /// Moves packets in both directions; whether there is more to do at once.
    pub fn turn(&mut self, now: Instant) -> Result<bool, BrokenQueue> {
        let blocked = !self.muxer.takes_packets();
        let more = self.take_packets()? | self.give_packets(now)?;
        let more = more || blocked && self.muxer.takes_packets();
        self.transmit.finish()?;
        self.receive.finish()?;
        Ok(more)
    }

    /// Tells the driver that all its connections are gone (5.10.6.7), if it listens.
    pub fn reset_transport(events: &mut PacketQueue) -> Result<(), BrokenQueue> {
        let Some(chain) = events.pop()? else {
            return Ok(());
        };
        let head = chain.head_index();
        let memory = Arc::clone(&events.memory);
        let mut writer = chain.writer(&*memory)?;
        writer.write_all(&TRANSPORT_RESET.to_le_bytes())?;
        events.put(head, 4)?;
        events.finish()
    }

    fn take_packets(&mut self) -> Result<bool, BrokenQueue> {
        for _ in 0..BURST {
            if !self.muxer.takes_packets() {
                // The guest's buffers bring this on.
                return Ok(false);
            }
            let Some(chain) = self.transmit.pop()? else {
                return Ok(false);
            };
            let head = chain.head_index();
            self.take_packet(chain)?;
            self.transmit.put(head, 0)?;
        }
        Ok(true)
    }

    fn take_packet(&mut self, chain: Chain) -> Result<(), BrokenQueue> {
        let memory = Arc::clone(&self.transmit.memory);
        let mut reader = chain.reader(&*memory)?;
        let found = reader.available_bytes();
        let mut bytes = [0; HEADER_BYTES];
        if found < HEADER_BYTES {
            let wanted = HEADER_BYTES;
            return Err(BrokenQueue::Length { found, wanted });
        }
        reader.read_exact(&mut bytes)?;
        let header = Header::decode(&bytes);
        let length = usize::try_from(header.length).unwrap_or(usize::MAX);
        if length > MAX_DATA || length > found - HEADER_BYTES {
            let wanted = HEADER_BYTES.saturating_add(length);
            return Err(BrokenQueue::Length { found, wanted });
        }
        let data = &mut self.data[..length];
        reader.read_exact(data)?;
        self.muxer.take(&header, data);
        Ok(())
    }

    fn give_packets(&mut self, now: Instant) -> Result<bool, BrokenQueue> {
        for _ in 0..BURST {
            if !self.muxer.has_packets() {
                return Ok(false);
            }
            let chain = match self.spare.take() {
                Some(chain) => chain,
                None => match self.receive.pop()? {
                    Some(chain) => chain,
                    None => return Ok(false),
                },
            };
            let memory = Arc::clone(&self.receive.memory);
            let mut writer = chain.clone().writer(&*memory)?;
            let found = writer.available_bytes();
            // A packet with data must fit as well as one without.
            if found <= HEADER_BYTES {
                let wanted = HEADER_BYTES + 1;
                return Err(BrokenQueue::Length { found, wanted });
            }
            let room = (found - HEADER_BYTES).min(MAX_DATA);
            let Some(header) = self.muxer.next(&mut self.data[..room], now) else {
                self.spare = Some(chain);
                return Ok(false);
            };
            let length = header.length as usize;
            writer.write_all(&header.encode())?;
            writer.write_all(&self.data[..length])?;
            self.receive
                .put(chain.head_index(), HEADER_BYTES + length)?;
        }
        Ok(true)
    }
}
