//! Segments: the log's files. Each is filled with zeros before its first use and used again when its
//! entries are not needed any more, so that a sync writes data and no metadata of the file system.

use std::sync::Arc;

use crate::MemberError;
use crate::disk::{AlignedBytes, Disk, DiskFile};

use super::frame::{self, BLOCK, Frame};

const MAGIC: &[u8; 8] = b"KEELLOG\0";
const FORMAT: u64 = 1;

/// Whose log it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// The cluster.
    pub cluster_id: u64,
    /// The member.
    pub member_id: u64,
}

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

/// What a segment's file begins with.
pub(super) enum Header {
    /// This segment's.
    Own,
    /// Anything else: the file was prepared, and never used for this segment.
    None,
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
    /// Makes a prepared file this segment.
    pub(super) fn start(
        file: Arc<dyn DiskFile>,
        sequence: u64,
        owner: Owner,
    ) -> Result<Self, MemberError> {
        file.write_at(AlignedBytes::default().copy_of(&header(sequence, owner)), 0)
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

/// Reads a segment: its header, and its frames, which begin with number `first`.
///
/// The frames end where the next one is not whole. If a later one is, then what lies between was
/// synced once: it is corrupt, not torn.
pub(super) fn read(
    file: &dyn DiskFile,
    sequence: u64,
    owner: Owner,
    first: Option<u64>,
) -> Result<(Header, Vec<(u64, Frame)>), MemberError> {
    let what = || format!("read {}", name(sequence));
    let length = file.length().map_err(MemberError::disk(what()))?;
    let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
    file.read_at(&mut bytes, 0)
        .map_err(MemberError::disk(what()))?;
    let known = check_header(&bytes, sequence, owner)?;
    let mut frames: Vec<(u64, Frame)> = Vec::new();
    let mut at = BLOCK;
    let mut next = first;
    while let Some(frame) = bytes
        .get(at..)
        .and_then(|rest| frame::decode(rest, sequence))
    {
        if next.is_some_and(|next| frame.number != next) {
            break;
        }
        next = Some(frame.number + 1);
        let length = frame.length;
        frames.push((at as u64, frame));
        at += length;
    }
    let mut later = at + BLOCK;
    while later < bytes.len() {
        // A frame that follows the missing one's successor was written after the missing one was synced.
        if let Some(frame) = frame::decode(&bytes[later..], sequence)
            && next.is_none_or(|next| frame.number > next)
        {
            return Err(MemberError::Corrupt(format!(
                "{} is corrupt at byte {at}: frame {} follows at byte {later}",
                name(sequence),
                frame.number
            )));
        }
        later += BLOCK;
    }
    if matches!(known, Header::None) && !frames.is_empty() {
        return Err(MemberError::Corrupt(format!(
            "{} has frames and no header",
            name(sequence)
        )));
    }
    Ok((known, frames))
}

fn header(sequence: u64, owner: Owner) -> Vec<u8> {
    let mut block = Vec::with_capacity(BLOCK);
    block.extend_from_slice(MAGIC);
    for number in [FORMAT, owner.cluster_id, owner.member_id, sequence] {
        block.extend_from_slice(&number.to_le_bytes());
    }
    let sum = crc32fast::hash(&block);
    block.extend_from_slice(&sum.to_le_bytes());
    block.resize(BLOCK, 0);
    block
}

fn check_header(bytes: &[u8], sequence: u64, owner: Owner) -> Result<Header, MemberError> {
    let Some(block) = bytes.get(..44) else {
        return Ok(Header::None);
    };
    let (body, sum) = block.split_at(40);
    if crc32fast::hash(body).to_le_bytes() != *sum || &body[..8] != MAGIC {
        return Ok(Header::None);
    }
    let number = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&body[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    if number(8) > FORMAT {
        return Err(MemberError::Newer {
            what: name(sequence),
            found: number(8),
            known: FORMAT,
        });
    }
    let found = Owner {
        cluster_id: number(16),
        member_id: number(24),
    };
    if found != owner {
        return Err(MemberError::Foreign(format!(
            "{} belongs to member {:x} of cluster {:x}, this is member {:x} of cluster {:x}: \
             start it with the options that made it, or on its own folder",
            name(sequence),
            found.member_id,
            found.cluster_id,
            owner.member_id,
            owner.cluster_id
        )));
    }
    Ok(if number(32) == sequence {
        Header::Own
    } else {
        Header::None
    })
}
