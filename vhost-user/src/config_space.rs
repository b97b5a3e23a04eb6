//! The device configuration space, `struct virtio_blk_config` (virtio 1.2, 5.2.4).

use crate::disk::Disk;
use crate::image::SECTOR_SIZE;
use crate::request::{MAX_RANGE_SECTORS, MAX_RANGES};

/// Bytes that a frontend may read; past the structure's own end they are zero.
pub const CONFIG_SPACE_SIZE: usize = 256;

/// Offset of the `writeback` field, the only one that a driver may write.
pub const WRITEBACK_OFFSET: u32 = 32;

/// Largest buffer in one descriptor, in bytes.
pub const SIZE_MAX: u32 = 1 << 20;

const CAPACITY_OFFSET: usize = 0;
const SIZE_MAX_OFFSET: usize = 8;
const SEG_MAX_OFFSET: usize = 12;
const BLOCK_SIZE_OFFSET: usize = 20;
const TOPOLOGY_OFFSET: usize = 24;
const NUM_QUEUES_OFFSET: usize = 34;
const MAX_DISCARD_SECTORS_OFFSET: usize = 36;
const MAX_DISCARD_RANGES_OFFSET: usize = 40;
const DISCARD_ALIGNMENT_OFFSET: usize = 44;
const MAX_ZEROES_SECTORS_OFFSET: usize = 48;
const MAX_ZEROES_RANGES_OFFSET: usize = 52;
const ZEROES_MAY_UNMAP_OFFSET: usize = 56;

/// The most data buffers in a request: what fits into the queue beside header and status, so
/// that drivers without indirect descriptors get along, and no more than 1 MiB of pages.
pub fn seg_max(queue_size: u16) -> u32 {
    u32::from(queue_size.clamp(3, 256)) - 2
}

/// Lays the configuration out.
pub fn config_space(
    disk: &Disk,
    queues: u16,
    queue_size: u16,
    writeback: bool,
) -> [u8; CONFIG_SPACE_SIZE] {
    let mut space = [0; CONFIG_SPACE_SIZE];
    let mut put = |offset: usize, bytes: &[u8]| {
        if let Some(field) = space.get_mut(offset..offset + bytes.len()) {
            field.copy_from_slice(bytes);
        }
    };
    let properties = disk.properties();
    let sizes = properties.block_sizes;
    put(CAPACITY_OFFSET, &disk.capacity_sectors().to_le_bytes());
    put(SIZE_MAX_OFFSET, &SIZE_MAX.to_le_bytes());
    put(SEG_MAX_OFFSET, &seg_max(queue_size).to_le_bytes());
    put(BLOCK_SIZE_OFFSET, &sizes.logical.to_le_bytes());
    // physical_block_exp, alignment_offset, min_io_size, opt_io_size, in logical blocks.
    let blocks = (sizes.physical / sizes.logical).max(1);
    let exponent = u8::try_from(blocks.ilog2()).unwrap_or(0);
    let minimum = u16::try_from(blocks).unwrap_or(1);
    put(TOPOLOGY_OFFSET, &[exponent, 0]);
    put(TOPOLOGY_OFFSET + 2, &minimum.to_le_bytes());
    let optimal = sizes.optimal / sizes.logical;
    put(TOPOLOGY_OFFSET + 4, &optimal.to_le_bytes());
    put(WRITEBACK_OFFSET as usize, &[u8::from(writeback)]);
    put(NUM_QUEUES_OFFSET, &queues.to_le_bytes());
    if properties.discard {
        let sectors = MAX_RANGE_SECTORS.to_le_bytes();
        let ranges = u32::try_from(MAX_RANGES).unwrap_or(1).to_le_bytes();
        let alignment = u64::from(sizes.logical.max(sizes.physical)) / SECTOR_SIZE;
        let alignment = u32::try_from(alignment).unwrap_or(1).to_le_bytes();
        put(MAX_DISCARD_SECTORS_OFFSET, &sectors);
        put(MAX_DISCARD_RANGES_OFFSET, &ranges);
        put(DISCARD_ALIGNMENT_OFFSET, &alignment);
        put(MAX_ZEROES_SECTORS_OFFSET, &sectors);
        put(MAX_ZEROES_RANGES_OFFSET, &ranges);
        put(ZEROES_MAY_UNMAP_OFFSET, &[1]);
    }
    space
}
