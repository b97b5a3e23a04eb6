//! Segments: the log's files. Each is filled with zeros before its first use and used again when its
//! entries are not needed any more, so that a sync writes data and no metadata of the file system.
//! None is ever shorter than it was prepared.

use std::sync::Arc;

use crate::MemberError;
use crate::disk::{AlignedBytes, Disk, DiskFile};
use crate::planted::{PlantedBug, is_planted};

use super::Owner;
use super::frame::{self, BLOCK, Frame, Place};
use super::sector::{self, SECTOR, Sector};

const MAGIC: &[u8; 8] = b"KEELLOG\0";
/// The first, with one checksum for a frame, was never released.
const FORMAT: u64 = 2;
/// magic; format, cluster, member, sequence, first frame, size; checksum
const HEADER: usize = 8 + 6 * 8 + 4;

/// An open segment.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) sequence: u64,
    pub(super) file: Arc<dyn DiskFile>,
    /// Highest index of an entry in it; 0 if there is none.
    pub(super) last_index: u64,
    /// Where the next frame goes.
    pub(super) offset: u64,
}

/// What is in a segment's file.
pub(super) enum Content {
    /// Frames, each with its offset.
    Frames {
        /// Number of the first one, also if it is not there.
        first: u64,
        /// Those that are there.
        frames: Vec<(u64, Frame)>,
    },
    /// Nothing of this segment: the file was prepared, and never used for it.
    Nothing,
}

pub(super) fn name(sequence: u64) -> String {
    format!("log-{sequence:016x}")
}

pub(super) fn sequence_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("log-")?;
    (digits.len() == 16).then(|| u64::from_str_radix(digits, 16).ok())?
}

/// Creates a file of zeros, durably.
pub(super) fn prepare(disk: &dyn Disk, name: &str, size: u64) -> Result<(), MemberError> {
    let what = || format!("prepare {name}");
    let file = disk
        .open_for_blocks(name, true)
        .map_err(MemberError::disk(what()))?;
    let mut memory = AlignedBytes::default();
    let at_once = usize::try_from(size).unwrap_or(1 << 20).min(1 << 20);
    let zeros = memory.copy_of(&vec![0; at_once]);
    let mut offset = 0;
    while offset < size {
        file.write_at(zeros, offset)
            .map_err(MemberError::disk(what()))?;
        offset += zeros.len() as u64;
    }
    file.sync_data().map_err(MemberError::disk(what()))
}

impl Segment {
    /// Makes a prepared file of `size` bytes this segment, whose first frame has the number `first`.
    pub(super) fn start(
        file: Arc<dyn DiskFile>,
        sequence: u64,
        owner: Owner,
        first: u64,
        size: u64,
    ) -> Result<Self, MemberError> {
        let block = header([
            FORMAT,
            owner.cluster_id,
            owner.member_id,
            sequence,
            first,
            size,
        ]);
        file.write_at(AlignedBytes::default().copy_of(&block), 0)
            .map_err(MemberError::disk(format!("start {}", name(sequence))))?;
        // Before its first frame: a loss of power could keep that one and not the header.
        file.sync_data()
            .map_err(MemberError::disk(format!("start {}", name(sequence))))?;
        Ok(Self {
            sequence,
            file,
            last_index: 0,
            offset: BLOCK as u64,
        })
    }

    /// Appends a frame, durably.
    pub(super) fn append(&mut self, frame: &[u8]) -> Result<(), MemberError> {
        let what = || format!("append to {}", name(self.sequence));
        self.file
            .write_at(frame, self.offset)
            .map_err(MemberError::disk(what()))?;
        self.file.sync_data().map_err(MemberError::disk(what()))?;
        self.offset += frame.len() as u64;
        Ok(())
    }

    /// Whether a frame fits; an empty segment takes any.
    pub(super) fn has_room(&self, frame: usize, size: u64) -> bool {
        self.offset == BLOCK as u64 || self.offset + frame as u64 <= size
    }
}

/// Reads a segment.
///
/// The frames end where the next one is not whole: it was never written, or torn by a crash. It is
/// damaged, and was there, if a later one is there, or one of its sectors is neither of it nor of
/// before.
pub(super) fn read(
    file: &dyn DiskFile,
    sequence: u64,
    owner: Owner,
) -> Result<Content, MemberError> {
    let what = || format!("read {}", name(sequence));
    let length = file.length().map_err(MemberError::disk(what()))?;
    if length < BLOCK as u64 {
        return Err(damaged(sequence, 0, "it is cut off"));
    }
    let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
    file.read_at(&mut bytes, 0)
        .map_err(MemberError::disk(what()))?;
    let seed = sector::seed(owner);
    let Some((first, size)) = check_header(&bytes, sequence, owner)? else {
        // A header that was torn is of before, or zeros: the file was this segment's if it is neither.
        let header = &bytes[..HEADER];
        let is_other = header.iter().any(|byte| *byte != 0) && !is_header(header);
        if is_other || has_frame(&bytes[BLOCK..], seed, sequence) {
            return Err(damaged(sequence, 0, "its header is not whole"));
        }
        return Ok(Content::Nothing);
    };
    if length < size {
        return Err(damaged(sequence, 0, "it is cut off"));
    }
    let mut frames: Vec<(u64, Frame)> = Vec::new();
    let (mut at, mut number) = (BLOCK, first);
    let place = |number| Place {
        segment: sequence,
        number,
    };
    while let Some(frame) = bytes
        .get(at..)
        .and_then(|rest| frame::decode(rest, seed, place(number)))
    {
        let length = frame.length;
        frames.push((at as u64, frame));
        at += length;
        number += 1;
    }
    if !is_planted(PlantedBug::CutDamagedLog) {
        check_end(bytes.get(at..).unwrap_or_default(), seed, number)
            .map_err(|(offset, how)| damaged(sequence, at + offset, how))?;
    }
    Ok(Content::Frames { first, frames })
}

/// Whether there is a frame of this segment.
fn has_frame(bytes: &[u8], seed: u32, sequence: u64) -> bool {
    match bytes.get(..SECTOR).map(|first| sector::look(first, seed)) {
        Some(Sector::Whole { frame, .. }) => {
            let place = Place {
                segment: sequence,
                number: frame,
            };
            frame::decode(bytes, seed, place).is_some()
        }
        _ => false,
    }
}

/// Refuses what a torn write can't leave behind the last frame; `number` is that of the next.
fn check_end(bytes: &[u8], seed: u32, number: u64) -> Result<(), (usize, &'static str)> {
    // Where the frame that is not whole ends, as far as it is there.
    let mut end = BLOCK.min(bytes.len());
    let mut first_damaged = None;
    for (at, sector) in bytes.chunks(SECTOR).enumerate() {
        match sector::look(sector, seed) {
            Sector::Whole { frame, .. } if frame > number => {
                return Err((0, "a frame is damaged: later ones follow"));
            }
            Sector::Whole { frame, .. } if frame == number => end = end.max((at + 1) * SECTOR),
            Sector::Damaged => first_damaged = first_damaged.or(Some(at * SECTOR)),
            _ => {}
        }
    }
    match first_damaged {
        Some(at) if at < end => Err((at, "a sector of the last frame is damaged")),
        _ => Ok(()),
    }
}

/// Something that was synced is not there.
pub(super) fn damaged(sequence: u64, at: usize, how: &str) -> MemberError {
    MemberError::Corrupt(format!("{} is damaged at byte {at}: {how}", name(sequence)))
}

fn header(numbers: [u64; 6]) -> Vec<u8> {
    let mut block = Vec::with_capacity(BLOCK);
    block.extend_from_slice(MAGIC);
    for number in numbers {
        block.extend_from_slice(&number.to_le_bytes());
    }
    let sum = crc32fast::hash(&block);
    block.extend_from_slice(&sum.to_le_bytes());
    block.resize(BLOCK, 0);
    block
}

fn is_header(bytes: &[u8]) -> bool {
    bytes
        .get(..HEADER)
        .and_then(|header| header.split_last_chunk::<4>())
        .is_some_and(|(body, sum)| {
            &body[..8] == MAGIC && crc32fast::hash(body).to_le_bytes() == *sum
        })
}

/// The first frame's number and the file's size; `None` if the header is none of this segment.
fn check_header(
    bytes: &[u8],
    sequence: u64,
    owner: Owner,
) -> Result<Option<(u64, u64)>, MemberError> {
    let number = |at: usize| {
        let mut number = [0; 8];
        number.copy_from_slice(&bytes[at..at + 8]);
        u64::from_le_bytes(number)
    };
    let what = || name(sequence);
    if bytes.len() >= HEADER && &bytes[..8] == MAGIC && number(8) == 1 {
        return Err(MemberError::Older {
            what: what(),
            found: 1,
            known: FORMAT,
        });
    }
    if !is_header(bytes) {
        return Ok(None);
    }
    if number(8) > FORMAT {
        return Err(MemberError::Newer {
            what: what(),
            found: number(8),
            known: FORMAT,
        });
    }
    let found = Owner {
        cluster_id: number(16),
        member_id: number(24),
    };
    if found != owner {
        return Err(owner.foreign(&what(), found));
    }
    Ok((number(32) == sequence).then(|| (number(40), number(48))))
}
