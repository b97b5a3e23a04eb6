//! Packets between a virtqueue and the TAP.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_MRG_RXBUF,
};
use virtio_queue::{Queue, QueueOwnedT, QueueT};

use super::buffers::{BufferError, GuestBuffers, MAX_VECTORS};
use super::tap::{HEADER_BYTES, TapQueue};
use crate::memory::GuestMemory;
use crate::virtio::UsedRing;

/// The largest packet with segmentation offload: 64 KiB of IP and an Ethernet header with VLAN.
const LARGEST_OFFLOADED: usize = 65_535 + 18 + HEADER_BYTES;
/// The largest without: the TAP's MTU decides, which is seldom above this.
const LARGEST_PLAIN: usize = 1500 + 18 + HEADER_BYTES;
/// Offset of `num_buffers` in `struct virtio_net_hdr_v1`.
const NUM_BUFFERS: usize = 10;
/// Packets before the other direction gets its turn.
const BURST: usize = 256;

/// Why a queue can't be served any more: the driver broke the rules.
#[derive(Debug, thiserror::Error)]
pub enum BrokenQueue {
    /// A ring is malformed.
    #[error("malformed ring: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// Memory of the ring or of a buffer is not there.
    #[error("{0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// A buffer is not usable.
    #[error("{0}")]
    Buffer(#[from] BufferError),
    /// A chain's buffers have the wrong direction, or none.
    #[error("chain {0} has no buffers of the queue's direction")]
    Direction(u16),
}

/// Why a turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// The source is empty: wait for it to become ready.
    Drained,
    /// The burst is used up; there is more.
    More,
    /// There are no buffers for the next packet: wait for the driver's notification.
    NoBuffers,
}

/// A virtqueue of packets.
pub struct PacketQueue {
    queue: Queue,
    used: UsedRing,
    memory: GuestMemory,
    buffers: GuestBuffers,
}

impl PacketQueue {
    /// `queue` is checked and ready.
    pub fn new(queue: Queue, memory: GuestMemory) -> Self {
        let buffers = GuestBuffers::new(Arc::clone(&memory));
        Self {
            used: UsedRing::of(&queue),
            queue,
            memory,
            buffers,
        }
    }

    /// Appends the next chain's buffers of one direction; returns its head and how many there are.
    fn next_chain(&mut self, writable: bool) -> Result<Option<Chain>, BrokenQueue> {
        let Some(chain) = self.queue.iter(Arc::clone(&self.memory))?.next() else {
            return Ok(None);
        };
        let head = chain.head_index();
        let (vectors, bytes) = (self.buffers.len(), self.buffers.bytes());
        for descriptor in chain {
            if descriptor.is_write_only() != writable {
                return Err(BrokenQueue::Direction(head));
            }
            self.buffers.push(descriptor.addr(), descriptor.len())?;
        }
        let chain = Chain {
            head,
            vectors: self.buffers.len() - vectors,
            bytes: self.buffers.bytes() - bytes,
        };
        if chain.bytes == 0 {
            return Err(BrokenQueue::Direction(head));
        }
        Ok(Some(chain))
    }
}

/// One descriptor chain among the buffers.
#[derive(Debug, Clone, Copy)]
struct Chain {
    head: u16,
    vectors: usize,
    bytes: usize,
}

/// From the TAP to the guest.
pub struct Receiver {
    packets: PacketQueue,
    chains: VecDeque<Chain>,
    mergeable: bool,
    /// Bytes that must be there before a packet is read: the TAP truncates what doesn't fit.
    needed: usize,
}

impl Receiver {
    /// A receiver for a driver with these features.
    pub fn new(packets: PacketQueue, features: u64, mtu: u16) -> Self {
        let offload = 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6;
        let plain = LARGEST_PLAIN.max(usize::from(mtu) + 18 + HEADER_BYTES);
        let needed = if features & offload != 0 {
            LARGEST_OFFLOADED
        } else {
            plain
        };
        let mergeable = features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        // Without mergeable buffers each packet gets one chain, which the driver made large enough.
        let needed = if mergeable { needed } else { HEADER_BYTES + 1 };
        Self {
            packets,
            chains: VecDeque::new(),
            mergeable,
            needed,
        }
    }

    /// Moves packets until a turn ends; returns whether to interrupt the driver.
    pub fn run(&mut self, tap: &TapQueue) -> Result<(Turn, bool), BrokenQueue> {
        let before = self.packets.used.index();
        let turn = self.receive(tap)?;
        Ok((
            turn,
            self.packets
                .used
                .needs_interrupt(&self.packets.memory, before)?,
        ))
    }

    fn receive(&mut self, tap: &TapQueue) -> Result<Turn, BrokenQueue> {
        for _ in 0..BURST {
            if !self.refill()? {
                return Ok(Turn::NoBuffers);
            }
            match tap.read(&self.packets.buffers) {
                Ok(Some(length)) => self.complete(length)?,
                Ok(None) => return Ok(Turn::Drained),
                Err(e) => {
                    log_tap_error("read", &e);
                    return Ok(Turn::Drained);
                }
            }
        }
        Ok(Turn::More)
    }

    /// Collects buffers for the next packet; returns whether there are enough.
    fn refill(&mut self) -> Result<bool, BrokenQueue> {
        let memory = Arc::clone(&self.packets.memory);
        loop {
            // A chain can have as many buffers as the queue entries; leave room for one.
            let room =
                self.packets.buffers.len() + usize::from(self.packets.queue.size()) <= MAX_VECTORS;
            let enough = self.packets.buffers.bytes() >= self.needed || !room;
            if enough && !self.chains.is_empty() {
                return Ok(true);
            }
            if let Some(chain) = self.packets.next_chain(true)? {
                self.chains.push_back(chain);
            } else if !self.packets.queue.enable_notification(&*memory)? {
                return Ok(false);
            }
        }
    }

    /// Gives a packet of `length` bytes, which is in the first buffers, to the driver.
    fn complete(&mut self, length: usize) -> Result<(), BrokenQueue> {
        let fits = if self.mergeable {
            self.packets.buffers.bytes()
        } else {
            self.chains.front().map_or(0, |chain| chain.bytes)
        };
        if length > fits {
            tracing::debug!(
                length,
                fits,
                "a packet is too large for the guest's buffers: dropped"
            );
            return Ok(());
        }
        let mut rest = length;
        let mut vectors = 0;
        let mut used = Vec::with_capacity(1);
        while let Some(chain) = self.chains.front().copied().filter(|_| rest > 0) {
            let written = rest.min(chain.bytes);
            used.push((chain.head, u32::try_from(written).unwrap_or(u32::MAX)));
            rest -= written;
            vectors += chain.vectors;
            self.chains.pop_front();
        }
        let count = u16::try_from(used.len()).unwrap_or(u16::MAX);
        self.packets.buffers.mark_written(length);
        self.packets
            .buffers
            .write_at(NUM_BUFFERS, &count.to_le_bytes())?;
        self.packets.buffers.remove_first(vectors);
        self.packets.used.publish(&self.packets.memory, &used)?;
        Ok(())
    }
}

/// From the guest to the TAP.
pub struct Transmitter {
    packets: PacketQueue,
}

impl Transmitter {
    /// A transmitter.
    pub const fn new(packets: PacketQueue) -> Self {
        Self { packets }
    }

    /// Moves packets until a turn ends; returns whether to interrupt the driver.
    pub fn run(&mut self, tap: &TapQueue) -> Result<(Turn, bool), BrokenQueue> {
        let before = self.packets.used.index();
        let turn = self.transmit(tap)?;
        Ok((
            turn,
            self.packets
                .used
                .needs_interrupt(&self.packets.memory, before)?,
        ))
    }

    fn transmit(&mut self, tap: &TapQueue) -> Result<Turn, BrokenQueue> {
        let memory = Arc::clone(&self.packets.memory);
        self.packets.queue.disable_notification(&*memory)?;
        for _ in 0..BURST {
            self.packets.buffers.clear();
            let Some(chain) = self.packets.next_chain(false)? else {
                if self.packets.queue.enable_notification(&*memory)? {
                    continue;
                }
                return Ok(Turn::Drained);
            };
            // What the TAP refuses is lost, as on a wire: a malformed header, or the link is down.
            match tap.write(&self.packets.buffers) {
                Ok(Some(_)) => {}
                Ok(None) => tracing::debug!("the TAP's queue is full: a packet is dropped"),
                Err(e) => log_tap_error("write", &e),
            }
            self.packets.used.publish(&memory, &[(chain.head, 0)])?;
        }
        Ok(Turn::More)
    }
}

/// EIO says that the TAP is down, EINVAL that the guest's header is wrong: both are not news.
fn log_tap_error(direction: &str, error: &io::Error) {
    tracing::debug!("the TAP refuses a {direction}: {error}");
}
