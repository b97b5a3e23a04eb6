//! The checksums of a group's blocks, in two slots that are written in turn.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::layout::{GROUP, u64_at};
use crate::disk::BLOCK;

/// Of checksums that are true once a header of their number, or a higher one, is there.
const MAGIC: [u8; 4] = *b"KSUM";
/// Of checksums before blocks are written. They are true until there is a header of a higher number.
const MARKS_MAGIC: [u8; 4] = *b"KSUW";
/// magic, checksum, nonce, group, number of the write
const GROUP_HEADER: usize = 4 + 4 + 8 + 8 + 8;

/// Instead of a checksum: the block was never written, and reads as zeros.
pub(super) const NEVER_WRITTEN: u32 = 0;
/// Instead of a checksum: the block was being written when the machine stopped, and nothing that was
/// committed refers to it. What it holds may be anything.
pub(super) const BEING_WRITTEN: u32 = 1;

/// Checksums of [`GROUP`] blocks.
#[derive(Debug)]
pub(super) struct Group {
    sums: Box<[AtomicU32]>,
    /// Whether they differ from those on disk.
    pub(super) changed: AtomicBool,
    /// Which of the two slots has what counts.
    slot: AtomicU32,
}

/// A group as it was read.
pub(super) struct Found {
    pub(super) group: Group,
    /// The highest number of its slots.
    pub(super) sync: u64,
}

impl Group {
    pub(super) fn new() -> Self {
        Self {
            sums: (0..GROUP).map(|_| AtomicU32::new(NEVER_WRITTEN)).collect(),
            changed: AtomicBool::new(false),
            slot: AtomicU32::new(0),
        }
    }

    /// Those of `count` blocks of the group, from `block` on.
    pub(super) fn sums_from(&self, block: u64, count: usize) -> &[AtomicU32] {
        let at = usize::try_from(block % GROUP).unwrap_or(0);
        &self.sums[at..at + count]
    }

    /// The slot that is written next. It counts from now on.
    pub(super) fn next_slot(&self) -> u64 {
        u64::from(self.slot.fetch_xor(1, Ordering::Relaxed) ^ 1)
    }

    /// What is written with the next header.
    pub(super) fn encode(&self, nonce: u64, number: u64, sync: u64) -> Vec<u8> {
        let sums = self.sums.iter().map(|sum| sum.load(Ordering::Acquire));
        encode(MAGIC, nonce, number, sync, sums)
    }

    /// What is written before some of the blocks are.
    pub(super) fn encode_marks(
        &self,
        nonce: u64,
        number: u64,
        sync: u64,
        is_being_written: impl Fn(u64) -> bool,
    ) -> Vec<u8> {
        let blocks = number * GROUP..;
        let sums = blocks.zip(&self.sums).map(|(block, sum)| {
            if is_being_written(block) {
                BEING_WRITTEN
            } else {
                sum.load(Ordering::Acquire)
            }
        });
        encode(MARKS_MAGIC, nonce, number, sync, sums)
    }

    /// What counts of two slots, beside a header of number `header`; `None` if it is damaged.
    pub(super) fn decode(slots: &[u8], nonce: u64, number: u64, header: u64) -> Option<Found> {
        let mut highest = 0;
        let mut chosen: Option<(u64, u32, &[u8])> = None;
        let mut settled = true;
        for (slot, bytes) in (0_u32..).zip(slots.chunks_exact(BLOCK)) {
            let is_marks = bytes[..4] == MARKS_MAGIC;
            if (bytes[..4] != MAGIC && !is_marks)
                || crc32fast::hash(&bytes[8..]).to_le_bytes() != bytes[4..8]
                || u64_at(bytes, 8) != nonce
                || u64_at(bytes, 16) != number
            {
                continue;
            }
            let sync = u64_at(bytes, 24);
            highest = highest.max(sync);
            // A later header would make something else of what is newer than this one.
            settled &= sync <= header;
            let counts = is_marks == (sync > header);
            if counts && chosen.is_none_or(|(newest, _, _)| newest < sync) {
                chosen = Some((sync, slot, bytes));
            }
        }
        let (_, slot, bytes) = chosen?;
        let sums = bytes[GROUP_HEADER..].as_chunks::<4>().0;
        let sums = sums[..usize::try_from(GROUP).ok()?].iter();
        let group = Self {
            sums: sums
                .map(|sum| AtomicU32::new(u32::from_le_bytes(*sum)))
                .collect(),
            changed: AtomicBool::new(!settled),
            slot: AtomicU32::new(slot),
        };
        Some(Found {
            group,
            sync: highest,
        })
    }
}

fn encode(
    magic: [u8; 4],
    nonce: u64,
    number: u64,
    sync: u64,
    sums: impl Iterator<Item = u32>,
) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(BLOCK);
    bytes.extend_from_slice(&magic);
    bytes.extend_from_slice(&[0; 4]);
    for value in [nonce, number, sync] {
        bytes.extend_from_slice(&value.to_le_bytes());
    }
    for sum in sums {
        bytes.extend_from_slice(&sum.to_le_bytes());
    }
    bytes.resize(BLOCK, 0);
    let sum = crc32fast::hash(&bytes[8..]);
    bytes[4..8].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// Neither [`NEVER_WRITTEN`] nor [`BEING_WRITTEN`].
///
/// CRC-32C: records hold a CRC-32 of themselves, so that by the same polynomial, a block would have
/// the checksum of each other one whose records are as long.
pub(super) fn checksum(nonce: u64, block: u64, bytes: &[u8]) -> u32 {
    let sum = crc32c::crc32c(&nonce.to_le_bytes());
    let sum = crc32c::crc32c_append(sum, &block.to_le_bytes());
    crc32c::crc32c_append(sum, bytes).max(BEING_WRITTEN + 1)
}
