//! Frames: what one sync makes durable, entries and hard state, under one checksum.
//!
//! A frame begins on a block and is padded to whole blocks, so that a write that is torn can't harm
//! a frame that was synced before. It names the segment and its own number: what an older use of the
//! file left behind is not taken for a frame.

use raft::eraftpb::{Entry, HardState};

use super::Position;

/// Frames begin at multiples of this.
pub(super) use crate::disk::BLOCK;
const MAGIC: u32 = 0x4b4c_4652;
/// magic, checksum, segment, number, payload length
const HEADER: usize = 4 + 4 + 8 + 8 + 4;
const KIND_ENTRY: u8 = 1;
const KIND_HARD_STATE: u8 = 2;
const KIND_RESTART: u8 = 3;
/// kind, type, term, index, length
pub(super) const ENTRY_HEADER: usize = 1 + 1 + 8 + 8 + 4;
/// Largest payload: what raft hands over at once is far less.
const MAX_PAYLOAD: usize = 256 * 1024 * 1024;

/// A frame as it is read.
#[derive(Debug, Default)]
pub(super) struct Frame {
    pub(super) number: u64,
    /// Entries, each with its place in the frame.
    pub(super) entries: Vec<(Entry, usize)>,
    pub(super) hard_state: Option<HardState>,
    /// A snapshot was installed: entries before are void, those behind this position follow.
    pub(super) restart: Option<Position>,
    /// Bytes up to the next frame.
    pub(super) length: usize,
}

/// Writes a frame into `buffer`, but for its padding; calls `placed` with the offset of each entry in it.
pub(super) fn encode(
    buffer: &mut Vec<u8>,
    segment: u64,
    number: u64,
    entries: &[Entry],
    hard_state: Option<&HardState>,
    restart: Option<Position>,
    mut placed: impl FnMut(&Entry, usize),
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
        placed(entry, buffer.len());
        buffer.push(KIND_ENTRY);
        buffer.push(u8::try_from(entry.entry_type).unwrap_or(0));
        buffer.extend_from_slice(&entry.term.to_le_bytes());
        buffer.extend_from_slice(&entry.index.to_le_bytes());
        let length = u32::try_from(entry.data.len()).unwrap_or(u32::MAX);
        buffer.extend_from_slice(&length.to_le_bytes());
        buffer.extend_from_slice(&entry.data);
    }
    if let Some(state) = hard_state {
        buffer.push(KIND_HARD_STATE);
        for number in [state.term, state.vote, state.commit] {
            buffer.extend_from_slice(&number.to_le_bytes());
        }
    }
    let payload = u32::try_from(buffer.len() - HEADER).unwrap_or(u32::MAX);
    buffer[0..4].copy_from_slice(&MAGIC.to_le_bytes());
    buffer[8..16].copy_from_slice(&segment.to_le_bytes());
    buffer[16..24].copy_from_slice(&number.to_le_bytes());
    buffer[24..28].copy_from_slice(&payload.to_le_bytes());
    let sum = crc32fast::hash(&buffer[8..]);
    buffer[4..8].copy_from_slice(&sum.to_le_bytes());
}

/// The frame at the start of `bytes`, if there is a whole one of this segment.
pub(super) fn decode(bytes: &[u8], segment: u64) -> Option<Frame> {
    let header = bytes.get(..HEADER)?;
    let u32_at = |at: usize| {
        u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
    };
    if u32_at(0) != MAGIC || u64_at(header, 8)? != segment {
        return None;
    }
    let payload = usize::try_from(u32_at(24))
        .ok()
        .filter(|length| *length <= MAX_PAYLOAD)?;
    let body = bytes.get(8..HEADER + payload)?;
    if crc32fast::hash(body) != u32_at(4) {
        return None;
    }
    let mut frame = Frame {
        number: u64_at(header, 16)?,
        length: (HEADER + payload).next_multiple_of(BLOCK),
        ..Frame::default()
    };
    let mut at = HEADER;
    while at < HEADER + payload {
        match bytes[at] {
            KIND_ENTRY => {
                let (entry, length) = decode_entry(&bytes[..HEADER + payload], at)?;
                frame.entries.push((entry, at));
                at += length;
            }
            KIND_HARD_STATE => {
                frame.hard_state = Some(HardState {
                    term: u64_at(bytes, at + 1)?,
                    vote: u64_at(bytes, at + 9)?,
                    commit: u64_at(bytes, at + 17)?,
                });
                at += 25;
            }
            KIND_RESTART => {
                frame.restart = Some(Position {
                    index: u64_at(bytes, at + 1)?,
                    term: u64_at(bytes, at + 9)?,
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
