//! Where things are in the file.

use crate::disk::BLOCK;

pub(super) const BLOCK_BYTES: u64 = BLOCK as u64;
/// Two slots, each twice.
pub(super) const HEADER_BLOCKS: u64 = 4;
/// Blocks with checksums in one group.
pub(super) const GROUP: u64 = 1000;

/// Where a group's checksums are.
pub(super) fn group_start(number: u64) -> u64 {
    (HEADER_BLOCKS + number * (GROUP + 2)) * BLOCK_BYTES
}

/// Where a block is.
pub(super) fn place(block: u64) -> u64 {
    group_start(block / GROUP) + (2 + block % GROUP) * BLOCK_BYTES
}

/// Groups for so many bytes of the engine.
pub(super) fn group_count(length: u64) -> u64 {
    length.div_ceil(BLOCK_BYTES).div_ceil(GROUP)
}

/// Length of the file for so many bytes of the engine.
pub(super) fn file_length(length: u64) -> u64 {
    match length.div_ceil(BLOCK_BYTES) {
        0 => HEADER_BLOCKS * BLOCK_BYTES,
        blocks => place(blocks - 1) + BLOCK_BYTES,
    }
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(number)
}
