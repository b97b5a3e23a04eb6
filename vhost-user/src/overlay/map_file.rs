//! The map's blocks in the file: read, compared with their second copies, and written.

use std::io;
use std::path::Path;

use super::header::{self, BLOCK_BYTES, Header};
use super::map::{StripeMap, decode_block, encode_block};
use super::striped_file::MEMORY_ALIGNMENT;
use super::{OverlayError, Storage};
use crate::aligned_buffer::AlignedBuffer;

/// Blocks of the map that are read at once.
const READ_AHEAD: u64 = 256;

/// What is in the file of a block of the map.
#[derive(Clone, Copy, Debug)]
pub(super) struct BlockState {
    pub(super) generation: u64,
    /// The copy that has it.
    pub(super) copy: u8,
}

/// The state of each block, and the blocks whose copies differ.
pub(super) fn load_map(
    storage: &dyn Storage,
    path: &Path,
    header: &Header,
    map: &StripeMap,
) -> Result<(Vec<BlockState>, Vec<u64>), OverlayError> {
    let failed = |source| OverlayError::io("read the map of", path, source);
    let mut states = Vec::new();
    let mut behind = Vec::new();
    let mut first = 0;
    while first < header.map_blocks() {
        let count = (header.map_blocks() - first).min(READ_AHEAD);
        let copies = [0, 1].map(|copy| {
            let offset = header.map_offset(copy) + first * BLOCK_BYTES as u64;
            read_span(storage, offset, count)
        });
        let [one, two] = copies;
        let (one, two) = (one.map_err(failed)?, two.map_err(failed)?);
        let pairs = one
            .as_slice()
            .chunks_exact(BLOCK_BYTES)
            .zip(two.as_slice().chunks_exact(BLOCK_BYTES));
        for (block, (one, two)) in (first..).zip(pairs) {
            let one = decode_block(header.uuid, block, one);
            let two = decode_block(header.uuid, block, two);
            let same = one == two;
            let (copy, newest) = match (one, two) {
                (Some(one), Some(two)) if two.0 > one.0 => (1, two),
                (Some(one), _) => (0, one),
                (None, Some(two)) => (1, two),
                (None, None) => {
                    let stripes = block * header::STRIPES_PER_BLOCK;
                    return Err(OverlayError::DamagedMap {
                        path: path.into(),
                        block,
                        first_byte: stripes * u64::from(header.stripe_bytes),
                    });
                }
            };
            map.load_block(block, &newest.1);
            states.push(BlockState {
                generation: newest.0,
                copy,
            });
            if !same {
                behind.push(block);
            }
        }
        first += count;
    }
    Ok((states, behind))
}

/// Both copies of all blocks from one on, without a set bit.
pub(super) fn write_empty_blocks(
    storage: &dyn Storage,
    header: &Header,
    from: u64,
) -> io::Result<()> {
    let bits = [0; (BLOCK_BYTES - header::MAP_BLOCK_HEADER) / 8];
    let mut first = from;
    while first < header.map_blocks() {
        let count = (header.map_blocks() - first).min(READ_AHEAD);
        let mut span = buffer(count)?;
        let blocks = span.as_mut_slice().chunks_exact_mut(BLOCK_BYTES);
        for (block, bytes) in (first..).zip(blocks) {
            bytes.copy_from_slice(&encode_block(header.uuid, block, 1, &bits));
        }
        for copy in 0..2 {
            let offset = header.map_offset(copy) + first * BLOCK_BYTES as u64;
            storage.write_at(span.as_slice(), offset)?;
        }
        first += count;
    }
    Ok(())
}

fn buffer(blocks: u64) -> io::Result<AlignedBuffer> {
    let bytes = usize::try_from(blocks).unwrap_or(usize::MAX);
    AlignedBuffer::new(bytes.saturating_mul(BLOCK_BYTES), MEMORY_ALIGNMENT)
        .ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

fn read_span(storage: &dyn Storage, offset: u64, blocks: u64) -> io::Result<AlignedBuffer> {
    let mut span = buffer(blocks)?;
    storage.read_at(span.as_mut_slice(), offset)?;
    Ok(span)
}

/// Reads a header copy or a block of the map.
pub(super) fn read_block(storage: &dyn Storage, offset: u64) -> io::Result<[u8; BLOCK_BYTES]> {
    let span = read_span(storage, offset, 1)?;
    let mut block = [0; BLOCK_BYTES];
    block.copy_from_slice(span.as_slice());
    Ok(block)
}

/// Writes one.
pub(super) fn write_block(
    storage: &dyn Storage,
    block: &[u8; BLOCK_BYTES],
    offset: u64,
) -> io::Result<()> {
    let mut span = buffer(1)?;
    span.as_mut_slice().copy_from_slice(block);
    storage.write_at(span.as_slice(), offset)
}

/// The state of one of them.
pub(super) fn block_state(states: &mut [BlockState], block: u64) -> Option<&mut BlockState> {
    states.get_mut(usize::try_from(block).ok()?)
}
