//! Which stripes are in a file: one bit each, read without locks, never cleared.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use uuid::Uuid;

use super::header::{BLOCK_BYTES, MAP_BLOCK_HEADER, STRIPES_PER_BLOCK};

const WORDS: usize = (BLOCK_BYTES - MAP_BLOCK_HEADER) / 8;

/// The bits of one block of the map.
pub type BlockBits = [u64; WORDS];

/// The map in memory. Blocks without a set bit take no room.
#[derive(Debug)]
pub struct StripeMap {
    blocks: Box<[OnceLock<Box<[AtomicU64; WORDS]>>]>,
}

impl StripeMap {
    /// A map with all bits clear, for up to `blocks` blocks.
    pub fn new(blocks: u64) -> Self {
        Self {
            blocks: (0..blocks).map(|_| OnceLock::new()).collect(),
        }
    }

    /// Whether a stripe is in the file. What was written before its bit was set is visible.
    pub fn contains(&self, stripe: u64) -> bool {
        let (block, word, bit) = place(stripe);
        let words = self.blocks.get(block).and_then(OnceLock::get);
        words
            .and_then(|words| words.get(word))
            .is_some_and(|word| word.load(Ordering::Acquire) & bit != 0)
    }

    /// Sets a stripe's bit, once its data is written. Returns the block that has changed, if
    /// the bit was clear.
    pub fn insert(&self, stripe: u64) -> Option<u64> {
        let (block, word, bit) = place(stripe);
        let words = self.blocks.get(block)?.get_or_init(empty);
        let before = words.get(word)?.fetch_or(bit, Ordering::AcqRel);
        (before & bit == 0).then_some(block as u64)
    }

    /// The bits of a block now.
    pub fn block(&self, block: u64) -> BlockBits {
        let mut bits = [0; WORDS];
        let words = usize::try_from(block)
            .ok()
            .and_then(|block| self.blocks.get(block)?.get());
        if let Some(words) = words {
            for (bit, word) in bits.iter_mut().zip(words.iter()) {
                *bit = word.load(Ordering::Acquire);
            }
        }
        bits
    }

    /// Adds the bits of a block that was read.
    pub fn load_block(&self, block: u64, bits: &BlockBits) {
        if bits.iter().all(|bits| *bits == 0) {
            return;
        }
        let cell = usize::try_from(block)
            .ok()
            .and_then(|block| self.blocks.get(block));
        if let Some(cell) = cell {
            for (word, bits) in cell.get_or_init(empty).iter().zip(bits) {
                word.fetch_or(*bits, Ordering::AcqRel);
            }
        }
    }

    /// Stripes in the file.
    pub fn count(&self) -> u64 {
        let words = self
            .blocks
            .iter()
            .filter_map(OnceLock::get)
            .flat_map(|words| words.iter());
        words
            .map(|word| u64::from(word.load(Ordering::Relaxed).count_ones()))
            .sum()
    }
}

fn empty() -> Box<[AtomicU64; WORDS]> {
    Box::new([const { AtomicU64::new(0) }; WORDS])
}

#[allow(
    clippy::cast_possible_truncation,
    reason = "a block's index fits: the map is in memory; the rest is below 2^16"
)]
fn place(stripe: u64) -> (usize, usize, u64) {
    let within = stripe % STRIPES_PER_BLOCK;
    (
        (stripe / STRIPES_PER_BLOCK) as usize,
        (within / 64) as usize,
        1 << (within % 64),
    )
}

/// A block of the map as it is in the file, in one of two copies.
///
/// The checksum covers the file's identity and the block's index too, so that a block is never
/// taken for another one.
pub fn encode_block(
    uuid: Uuid,
    index: u64,
    generation: u64,
    bits: &BlockBits,
) -> [u8; BLOCK_BYTES] {
    let mut out = [0; BLOCK_BYTES];
    out[8..16].copy_from_slice(&index.to_le_bytes());
    out[16..24].copy_from_slice(&generation.to_le_bytes());
    for (bytes, word) in out[MAP_BLOCK_HEADER..].chunks_exact_mut(8).zip(bits) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    let checksum = checksum(uuid, &out);
    out[..4].copy_from_slice(&checksum.to_le_bytes());
    out
}

/// A copy's generation and bits, or nothing if it isn't whole or belongs elsewhere.
pub fn decode_block(uuid: Uuid, index: u64, copy: &[u8]) -> Option<(u64, BlockBits)> {
    let copy: &[u8; BLOCK_BYTES] = copy.try_into().ok()?;
    let number = |range: std::ops::Range<usize>| {
        let bytes = copy.get(range).and_then(|bytes| bytes.try_into().ok());
        u64::from_le_bytes(bytes.unwrap_or_default())
    };
    let (low, _) = copy.split_first_chunk::<4>()?;
    if u32::from_le_bytes(*low) != checksum(uuid, copy) || number(8..16) != index {
        return None;
    }
    let mut bits = [0; WORDS];
    for (bytes, word) in copy[MAP_BLOCK_HEADER..].chunks_exact(8).zip(&mut bits) {
        *word = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
    }
    Some((number(16..24), bits))
}

fn checksum(uuid: Uuid, block: &[u8; BLOCK_BYTES]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(uuid.as_bytes());
    hasher.update(&block[4..]);
    hasher.finalize()
}
