//! Reading a log that was there before: what its files hold, and whether anything is missing.

use std::sync::Arc;

use super::frame::{self, ENTRY_HEADER};
use super::segment::{self, Content, Segment};
use super::vote::{self, Mark};
use super::{Log, NEXT, Owner, Position, SPARE_SEGMENTS, Slot, block_of};
use crate::MemberError;
use crate::disk::{Disk, DiskFile};
use crate::planted::{PlantedBug, is_planted};

/// What a folder has of a log.
pub(super) struct Found {
    pub segments: Vec<FoundSegment>,
    pub spares: Vec<String>,
    /// Segments that hold nothing that is needed.
    pub unused: Vec<u64>,
}

pub(super) struct FoundSegment {
    sequence: u64,
    file: Arc<dyn DiskFile>,
    first: u64,
    frames: Vec<(u64, frame::Frame)>,
}

impl Found {
    pub(super) fn read(disk: &dyn Disk, owner: Owner, size: u64) -> Result<Self, MemberError> {
        let names = disk
            .list()
            .map_err(MemberError::disk("list the data folder"))?;
        let mut sequences: Vec<u64> = names
            .iter()
            .filter_map(|name| segment::sequence_of(name))
            .collect();
        sequences.sort_unstable();
        let mut found = Self {
            segments: Vec::new(),
            spares: whole_spares(disk, names, size)?,
            unused: Vec::new(),
        };
        // Older ones than a gap were being retired: all of their entries are applied.
        if let Some(gap) = (1..sequences.len())
            .rev()
            .find(|at| sequences[*at] != sequences[at - 1] + 1)
        {
            found.unused.extend(sequences.drain(..gap));
        }
        let count = sequences.len();
        for (at, sequence) in sequences.into_iter().enumerate() {
            let name = segment::name(sequence);
            let file = disk
                .open_for_blocks(&name, false)
                .map_err(MemberError::disk(format!("open {name}")))?;
            match segment::read(&*file, sequence, owner)? {
                // It was begun, and nothing was synced to it.
                Content::Nothing if at + 1 == count => found.unused.push(sequence),
                Content::Nothing => {
                    return Err(segment::damaged(sequence, 0, "its header is lost"));
                }
                Content::Frames { first, frames } => found.segments.push(FoundSegment {
                    sequence,
                    file,
                    first,
                    frames,
                }),
            }
        }
        Ok(found)
    }
}

/// Prepared files. One that was not finished is removed.
fn whole_spares(
    disk: &dyn Disk,
    names: Vec<String>,
    size: u64,
) -> Result<Vec<String>, MemberError> {
    let mut spares = Vec::new();
    for name in names {
        if name.starts_with(NEXT) {
            disk.remove(&name)
                .map_err(MemberError::disk(format!("remove {name}")))?;
        }
        if !name.starts_with("spare-") {
            continue;
        }
        let length = disk
            .open_for_blocks(&name, false)
            .and_then(|file| file.length())
            .map_err(MemberError::disk(format!("open {name}")))?;
        if length == size && spares.len() < SPARE_SEGMENTS {
            spares.push(name);
        } else {
            disk.remove(&name)
                .map_err(MemberError::disk(format!("remove {name}")))?;
        }
    }
    Ok(spares)
}

impl Log {
    /// Takes over what was read.
    pub(super) fn replay(&mut self, segments: Vec<FoundSegment>) -> Result<(), MemberError> {
        let mut next = None;
        for found in segments {
            if next.is_some_and(|next| next != found.first) {
                return Err(segment::damaged(
                    found.sequence - 1,
                    0,
                    "frames are missing at its end: the next segment begins with a later one",
                ));
            }
            let mut segment = Segment {
                sequence: found.sequence,
                file: found.file,
                last_index: 0,
                offset: frame::BLOCK as u64,
            };
            let mut number = found.first;
            for (offset, frame) in found.frames {
                number = frame.number + 1;
                segment.offset = offset + frame.length as u64;
                if frame.vote > self.votes.generation {
                    return Err(MemberError::Corrupt(format!(
                        "{} is older than the log: what this member voted is lost",
                        vote::FILE
                    )));
                }
                self.replay_frame(&mut segment, offset, frame);
            }
            next = Some(number);
            self.segments.push_back(segment);
        }
        self.next_number = next.unwrap_or(1);
        Ok(())
    }

    fn replay_frame(&mut self, segment: &mut Segment, offset: u64, frame: frame::Frame) {
        if let Some(at) = frame.restart {
            for earlier in &mut self.segments {
                earlier.last_index = 0;
            }
            segment.last_index = 0;
            self.forget(at);
        }
        for (entry, at) in frame.entries {
            let begins = self.slots.is_empty() && self.before.index + 1 != entry.index;
            if begins || entry.index > self.last().index + 1 || entry.index <= self.before.index {
                // The first entry that is left.
                self.forget(Position {
                    index: entry.index.saturating_sub(1),
                    term: 0,
                });
            }
            self.truncate_from(entry.index);
            segment.last_index = segment.last_index.max(entry.index);
            self.slots.push_back(Slot {
                term: entry.term,
                segment: segment.sequence,
                block: block_of(offset),
                offset: at,
                length: u32::try_from(entry.data.len() + ENTRY_HEADER).unwrap_or(u32::MAX),
            });
            self.cached_bytes += entry.data.len();
            self.cache.push_back(entry);
            self.shrink_cache();
        }
    }

    /// The member ended after the keyspace had a snapshot and before the log knew of it: what the log
    /// has is void.
    pub(super) fn finish_install(&mut self, applied: Position) -> Result<(), MemberError> {
        if applied.index == 0 || self.votes.vote.installing != applied {
            return Ok(());
        }
        let mut state = self.hard_state();
        state.term = state.term.max(applied.term);
        state.commit = applied.index;
        self.restart(applied, &state)
    }

    /// Refuses a log that lacks what was synced, or what the keyspace has.
    pub(super) fn check(&mut self, applied: Position) -> Result<(), MemberError> {
        let last = self.last();
        let corrupt = |how: String| Err(MemberError::Corrupt(how));
        let mut mark = self.votes.mark;
        if is_planted(PlantedBug::CutDamagedLog) {
            mark = Mark::default();
        }
        if mark.frame >= self.next_number {
            return corrupt(format!(
                "the log ends before frame {}, and frame {} was synced: its end is lost",
                self.next_number, mark.frame
            ));
        }
        if self.before.index > applied.index {
            return corrupt(format!(
                "the log begins at {}, the keyspace ends at {}",
                self.first(),
                applied.index
            ));
        }
        if last.index < applied.index.max(mark.commit) {
            return corrupt(format!(
                "the log ends at {}, and {} was committed: its end is lost",
                last.index,
                applied.index.max(mark.commit)
            ));
        }
        let known = self.term_of(applied.index).unwrap_or(0);
        if known != 0 && known != applied.term {
            return corrupt(format!(
                "entry {} is of term {known} in the log, and of term {} in the keyspace",
                applied.index, applied.term
            ));
        }
        if last.term > self.votes.vote.term {
            return corrupt(format!(
                "the log has entries of term {}, {} knows of term {}: it is an older one",
                last.term,
                vote::FILE,
                self.votes.vote.term
            ));
        }
        // The term before the first entry is not in the log, unless it begins there.
        if self.before.index == applied.index {
            self.before = applied;
        } else if self.before.term == 0
            && let Some(first) = self.slots.pop_front()
        {
            self.before = Position {
                index: self.before.index + 1,
                term: first.term,
            };
            if self.cache.len() > self.slots.len()
                && let Some(entry) = self.cache.pop_front()
            {
                self.cached_bytes -= entry.data.len();
            }
        }
        Ok(())
    }
}
