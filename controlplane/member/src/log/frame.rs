//! Frames: what one sync makes durable, entries or the log's new beginning.
//!
//! A frame is cut into sectors (see [`super::sector`]). It begins on a block and is padded to whole
//! blocks, so that a write that is torn can't harm a frame that was synced before. It names the
//! segment and its own number: what an older use of the file left behind is not taken for a frame.

use raft::eraftpb::Entry;

use super::Position;
use super::sector::{self, PAYLOAD, SECTOR};

/// Frames begin at multiples of this.
pub(super) use crate::disk::BLOCK;
const MAGIC: u32 = 0x4b4c_4652;
/// magic, checksum, segment, number, generation of the vote, payload length
const HEADER: usize = 4 + 4 + 8 + 8 + 8 + 4;
const KIND_ENTRY: u8 = 1;
const KIND_RESTART: u8 = 3;
/// kind, type, term, index, length
pub(super) const ENTRY_HEADER: usize = 1 + 1 + 8 + 8 + 4;
/// Largest payload: what raft hands over at once is far less.
const MAX_PAYLOAD: usize = 256 * 1024 * 1024;

/// What tells a frame from others.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    /// The segment that it is in.
    pub(super) segment: u64,
    /// Its number: one more than that of the frame before.
    pub(super) number: u64,
}

/// A frame as it is read.
#[derive(Debug, Default)]
pub(super) struct Frame {
    pub(super) number: u64,
    /// Generation of the vote when it was written.
    pub(super) vote: u64,
    /// Entries, each with its place in the frame.
    pub(super) entries: Vec<(Entry, u32)>,
    /// The log begins anew: entries before are void, those behind this position follow.
    pub(super) restart: Option<Position>,
    /// Bytes up to the next frame.
    pub(super) length: usize,
}

/// Writes a frame into `buffer`, not cut into sectors yet; calls `placed` with the offset of each
/// entry in it.
pub(super) fn encode(
    buffer: &mut Vec<u8>,
    place: Place,
    vote: u64,
    entries: &[Entry],
    restart: Option<Position>,
    mut placed: impl FnMut(&Entry, u32),
) {
    buffer.clear();
    buffer.resize(HEADER, 0);
    if let Some(position) = restart {
        buffer.push(KIND_RESTART);
        for number in [position.index, position.term] {
            buffer.extend_from_slice(&number.to_le_bytes());
        }
    }
    for entry in entries {
        placed(entry, u32::try_from(buffer.len()).unwrap_or(u32::MAX));
        buffer.push(KIND_ENTRY);
        buffer.push(u8::try_from(entry.entry_type).unwrap_or(0));
        buffer.extend_from_slice(&entry.term.to_le_bytes());
        buffer.extend_from_slice(&entry.index.to_le_bytes());
        let length = u32::try_from(entry.data.len()).unwrap_or(u32::MAX);
        buffer.extend_from_slice(&length.to_le_bytes());
        buffer.extend_from_slice(&entry.data);
    }
    let payload = u32::try_from(buffer.len() - HEADER).unwrap_or(u32::MAX);
    buffer[0..4].copy_from_slice(&MAGIC.to_le_bytes());
    buffer[8..16].copy_from_slice(&place.segment.to_le_bytes());
    buffer[16..24].copy_from_slice(&place.number.to_le_bytes());
    buffer[24..32].copy_from_slice(&vote.to_le_bytes());
    buffer[32..36].copy_from_slice(&payload.to_le_bytes());
    let sum = crc32fast::hash(&buffer[8..]);
    buffer[4..8].copy_from_slice(&sum.to_le_bytes());
}

/// The frame at the start of `bytes`, if it is there, whole.
pub(super) fn decode(bytes: &[u8], seed: u32, place: Place) -> Option<Frame> {
    let first = sector::open(bytes.get(..SECTOR)?, seed, Some(place.number), 0)?;
    let (header, _) = first.split_first_chunk::<HEADER>()?;
    let u32_at = |at: usize| {
        u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
    };
    if u32_at(0) != MAGIC
        || u64_at(header, 8)? != place.segment
        || u64_at(header, 16)? != place.number
    {
        return None;
    }
    let payload = usize::try_from(u32_at(32))
        .ok()
        .filter(|length| *length <= MAX_PAYLOAD)?;
    let length = HEADER + payload;
    let sectors = length.div_ceil(PAYLOAD);
    let sealed = bytes.get(..sectors * SECTOR)?;
    let mut content = sector::open(sealed, seed, Some(place.number), 0)?;
    content.truncate(length);
    if crc32fast::hash(&content[8..]) != u32_at(4) {
        return None;
    }
    let mut frame = Frame {
        number: place.number,
        vote: u64_at(header, 24)?,
        length: (sectors * SECTOR).next_multiple_of(BLOCK),
        ..Frame::default()
    };
    let mut at = HEADER;
    while at < length {
        match content[at] {
            KIND_ENTRY => {
                let (entry, length) = decode_entry(&content, at)?;
                frame.entries.push((entry, u32::try_from(at).ok()?));
                at += length;
            }
            KIND_RESTART => {
                frame.restart = Some(Position {
                    index: u64_at(&content, at + 1)?,
                    term: u64_at(&content, at + 9)?,
                });
                at += 17;
            }
            _ => return None,
        }
    }
    Some(frame)
}

/// The entry at `at`, and its length there.
pub(super) fn decode_entry(bytes: &[u8], at: usize) -> Option<(Entry, usize)> {
    let header = bytes.get(at..at + ENTRY_HEADER)?;
    let length = u32::from_le_bytes([header[18], header[19], header[20], header[21]]);
    let length = usize::try_from(length).ok()?;
    let data = bytes.get(at + ENTRY_HEADER..)?.get(..length)?;
    if header[0] != KIND_ENTRY {
        return None;
    }
    let entry = Entry {
        entry_type: i32::from(header[1]),
        term: u64_at(header, 2)?,
        index: u64_at(header, 10)?,
        data: data.to_vec(),
        ..Entry::default()
    };
    Some((entry, ENTRY_HEADER + length))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at + 8)?;
    Some(u64::from_le_bytes(bytes.try_into().ok()?))
}
