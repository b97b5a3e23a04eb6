//! Walking a split virtqueue's descriptor chain (virtio 1.2, 2.7.5).
//!
//! Every field comes from the guest and may change while it is read: each descriptor is copied
//! once and only the copy is looked at. Any violation ends the walk with an error instead of a
//! shortened chain, because a shortened write would be acknowledged as whole.

use virtio_bindings::bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

/// Most descriptors in one indirect table. Drivers keep to `seg_max` + 2, and Linux may make
/// that larger than the queue, so the queue's size is no limit here.
pub const MAX_INDIRECT: u32 = 1024;

const DESCRIPTOR_SIZE: u32 = 16;

/// A stretch of guest physical memory. Not yet known to exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The first byte.
    pub address: GuestAddress,
    /// Bytes, more than 0.
    pub len: u32,
}

/// How a guest broke the rules for descriptor chains. The queue can't go on after this, since
/// there is no place to report the request's failure to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// The index isn't in the table.
    #[error("descriptor index {index} is outside the table of {size}")]
    IndexOutOfRange {
        /// The index asked for.
        index: u32,
        /// Descriptors in the table.
        size: u32,
    },
    /// The descriptor itself isn't in guest memory.
    #[error("the descriptor at {address:#x} is outside guest memory")]
    Unreadable {
        /// Guest physical address of the descriptor.
        address: u64,
    },
    /// More links than descriptors: a loop.
    #[error("the descriptor chain is longer than its table, so it loops")]
    Loop,
    /// An indirect descriptor, which the driver didn't negotiate.
    #[error("an indirect descriptor without VIRTIO_F_INDIRECT_DESC")]
    IndirectNotNegotiated,
    /// An indirect table inside an indirect table.
    #[error("an indirect descriptor inside an indirect table")]
    NestedIndirect,
    /// An indirect descriptor that also has a next one.
    #[error("an indirect descriptor with a next one")]
    IndirectWithNext,
    /// An indirect table of an impossible length.
    #[error("an indirect table of {len} bytes")]
    IndirectLength {
        /// Bytes.
        len: u32,
    },
    /// A buffer for the device to read after one for it to write.
    #[error("a device-readable descriptor after a device-writable one")]
    ReadableAfterWritable,
    /// More than 2^32 - 1 bytes together.
    #[error("a descriptor chain of more than 2^32 - 1 bytes")]
    TooManyBytes,
}

/// Where a queue's descriptors are.
#[derive(Clone, Copy, Debug)]
pub struct DescriptorTable {
    /// Guest physical address of descriptor 0.
    pub address: GuestAddress,
    /// Descriptors in the table.
    pub size: u32,
    /// Whether the driver negotiated indirect descriptors.
    pub indirect: bool,
}

/// The buffers of one chain, in the guest's order. Reused from request to request.
#[derive(Debug, Default)]
pub struct DescriptorChain {
    /// Buffers for the device to read.
    pub readable: Vec<Segment>,
    /// Buffers for the device to write.
    pub writable: Vec<Segment>,
}

impl DescriptorChain {
    /// Collects the chain that starts at `head`, replacing what was here before.
    pub fn collect(
        &mut self,
        memory: &GuestMemoryMmap,
        table: DescriptorTable,
        head: u16,
    ) -> Result<(), ChainError> {
        self.readable.clear();
        self.writable.clear();
        let mut table = table;
        let mut index = u32::from(head);
        let mut inside_indirect = false;
        let mut links_left = table.size;
        let mut total: u32 = 0;
        loop {
            links_left = links_left.checked_sub(1).ok_or(ChainError::Loop)?;
            let descriptor = read(memory, table, index)?;
            let flags = u32::from(descriptor.flags());
            if flags & VRING_DESC_F_INDIRECT != 0 {
                if inside_indirect {
                    return Err(ChainError::NestedIndirect);
                }
                table = enter_indirect(table, descriptor, flags)?;
                links_left = table.size;
                index = 0;
                inside_indirect = true;
                continue;
            }
            total = total
                .checked_add(descriptor.len())
                .ok_or(ChainError::TooManyBytes)?;
            self.push(descriptor, flags & VRING_DESC_F_WRITE != 0)?;
            if flags & VRING_DESC_F_NEXT == 0 {
                return Ok(());
            }
            index = u32::from(descriptor.next());
        }
    }

    fn push(&mut self, descriptor: Descriptor, writable: bool) -> Result<(), ChainError> {
        if !writable && !self.writable.is_empty() {
            return Err(ChainError::ReadableAfterWritable);
        }
        if descriptor.len() > 0 {
            let segment = Segment {
                address: descriptor.addr(),
                len: descriptor.len(),
            };
            if writable {
                self.writable.push(segment);
            } else {
                self.readable.push(segment);
            }
        }
        Ok(())
    }
}

fn enter_indirect(
    table: DescriptorTable,
    descriptor: Descriptor,
    flags: u32,
) -> Result<DescriptorTable, ChainError> {
    if !table.indirect {
        return Err(ChainError::IndirectNotNegotiated);
    }
    if flags & VRING_DESC_F_NEXT != 0 {
        return Err(ChainError::IndirectWithNext);
    }
    let len = descriptor.len();
    let size = len / DESCRIPTOR_SIZE;
    if !len.is_multiple_of(DESCRIPTOR_SIZE) || size == 0 || size > MAX_INDIRECT {
        return Err(ChainError::IndirectLength { len });
    }
    Ok(DescriptorTable {
        address: descriptor.addr(),
        size,
        indirect: true,
    })
}

fn read(
    memory: &GuestMemoryMmap,
    table: DescriptorTable,
    index: u32,
) -> Result<Descriptor, ChainError> {
    if index >= table.size {
        return Err(ChainError::IndexOutOfRange {
            index,
            size: table.size,
        });
    }
    let unreadable = ChainError::Unreadable {
        address: table.address.raw_value(),
    };
    let offset = u64::from(index) * u64::from(DESCRIPTOR_SIZE);
    let address = table.address.checked_add(offset).ok_or(unreadable)?;
    memory
        .read_obj(address)
        .map_err(|_| ChainError::Unreadable {
            address: address.raw_value(),
        })
}
