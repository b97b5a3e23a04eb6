//! The replicated log on disk, and what of it is in memory.

mod files;
mod frame;
mod recovery;
mod sector;
mod segment;
mod storage;
mod vote;

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, OnceLock};

use raft::eraftpb::{ConfState, Entry, HardState};

pub use self::files::prepare_spare;
use self::frame::{ENTRY_HEADER, Place};
use self::recovery::Found;
use self::sector::{PAYLOAD, SECTOR};
use self::segment::Segment;
pub(crate) use self::storage::snapshot_of;
pub(crate) use self::vote::FILE as VOTE_FILE;
use self::vote::{Mark, Vote, VoteFile};
use crate::disk::{AlignedBytes, Disk};
use crate::error::Damage;
use crate::planted::{PlantedBug, is_planted};
use crate::{Limits, MemberError};

/// A segment that is being prepared, for there was no spare.
const NEXT: &str = "next-";
/// Prepared files that are kept for the next segments.
const SPARE_SEGMENTS: usize = 3;

/// The log of one member.
pub struct Log {
    disk: Arc<dyn Disk>,
    owner: Owner,
    limits: Limits,
    /// In order; the last one is written to.
    segments: VecDeque<Segment>,
    /// Names of prepared files.
    spares: Vec<String>,
    next_number: u64,
    /// What lies before the first entry.
    before: Position,
    slots: VecDeque<Slot>,
    /// The newest entries.
    cache: VecDeque<Entry>,
    cached_bytes: usize,
    votes: VoteFile,
    /// The highest index that is known to be committed.
    commit: u64,
    conf_state: ConfState,
    /// The snapshot that the keyspace can give.
    offered: Option<(Position, ConfState)>,
    buffer: Vec<u8>,
    sealed: Vec<u8>,
    aligned: AlignedBytes,
    damage: OnceLock<Damage>,
}

/// Whose log it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// The cluster.
    pub cluster_id: u64,
    /// The member.
    pub member_id: u64,
}

/// An index and the term of its entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Position {
    /// Log index.
    pub index: u64,
    /// Term of its entry.
    pub term: u64,
}

/// Where an entry is.
#[derive(Debug, Clone, Copy)]
struct Slot {
    term: u64,
    segment: u64,
    /// Of the frame, in blocks.
    block: u32,
    /// Of the entry in its frame.
    offset: u32,
    length: u32,
}

impl Owner {
    fn foreign(self, what: &str, found: Self) -> MemberError {
        MemberError::Foreign(format!(
            "{what} belongs to member {:x} of cluster {:x}, this is member {:x} of cluster {:x}: \
             start it with the options that made it, or on its own folder",
            found.member_id, found.cluster_id, self.member_id, self.cluster_id
        ))
    }
}

impl Log {
    /// Opens the log in `disk`, or, if it may be new, starts one behind `applied`, whose state the
    /// keyspace has.
    pub fn open(
        disk: Arc<dyn Disk>,
        owner: Owner,
        applied: Position,
        conf_state: ConfState,
        may_be_new: bool,
        limits: Limits,
    ) -> Result<Self, MemberError> {
        let found = Found::read(&*disk, owner, limits.segment_bytes)?;
        let is_new = found.segments.is_empty();
        if is_new && !may_be_new {
            return Err(MemberError::Corrupt("the log's files are missing".into()));
        }
        let votes = match VoteFile::open(&*disk, owner) {
            Ok(Some(votes)) => votes,
            // What is left of a first start that was broken off.
            _ if is_new => VoteFile::create(&*disk, owner, Vote::default())?,
            Ok(None) => {
                return Err(MemberError::Corrupt(format!(
                    "{} is missing: what this member voted is not known",
                    vote::FILE
                )));
            }
            Err(error) => return Err(error),
        };
        let mut log = Self {
            disk,
            owner,
            limits,
            segments: VecDeque::new(),
            spares: found.spares,
            next_number: 1,
            before: Position::default(),
            slots: VecDeque::new(),
            cache: VecDeque::new(),
            cached_bytes: 0,
            commit: applied.index.max(votes.mark.commit),
            votes,
            offered: (applied.index > 0).then(|| (applied, conf_state.clone())),
            conf_state,
            buffer: Vec::new(),
            sealed: Vec::new(),
            aligned: AlignedBytes::default(),
            damage: OnceLock::new(),
        };
        for sequence in found.unused {
            log.retire(sequence)?;
        }
        if is_new {
            let vote = Vote {
                term: log.votes.vote.term.max(applied.term),
                ..log.votes.vote
            };
            log.votes.write(vote)?;
            log.begin(applied)?;
        } else {
            log.replay(found.segments)?;
            log.finish_install(applied)?;
            log.check(applied)?;
        }
        log.commit = log.commit.min(log.last().index);
        if is_planted(PlantedBug::DropVote) {
            log.votes.vote.candidate = 0;
        }
        Ok(log)
    }

    /// Appends entries, replacing those of the same and higher indices, and the hard state; durable
    /// when this returns.
    pub fn append(
        &mut self,
        entries: &[Entry],
        hard_state: Option<&HardState>,
    ) -> Result<(), MemberError> {
        if let Some(state) = hard_state {
            self.commit = self.commit.max(state.commit);
            let (term, vote) = (state.term, state.vote);
            if (term, vote) != (self.votes.vote.term, self.votes.vote.candidate) {
                let installing = self.votes.vote.installing;
                self.votes.write(Vote {
                    term,
                    candidate: vote,
                    installing,
                })?;
            }
        }
        let (Some(first), Some(last)) = (entries.first(), entries.last()) else {
            return Ok(());
        };
        self.truncate_from(first.index);
        self.append_frame(entries, None)?;
        if let Some(segment) = self.segments.back_mut() {
            segment.last_index = segment.last_index.max(last.index);
        }
        for entry in entries {
            self.cached_bytes += entry.data.len();
            self.cache.push_back(entry.clone());
        }
        self.shrink_cache();
        Ok(())
    }

    /// Says that a snapshot will be installed, durably: from now on, the keyspace may have it and the
    /// log not know of it. [`Log::restart`] follows.
    pub fn begin_install(&mut self, at: Position) -> Result<(), MemberError> {
        self.votes.write(Vote {
            installing: at,
            ..self.votes.vote
        })
    }

    /// Begins anew behind a snapshot that was installed; durable when this returns.
    pub fn restart(&mut self, at: Position, hard_state: &HardState) -> Result<(), MemberError> {
        self.begin(at)?;
        self.commit = self.commit.max(hard_state.commit);
        self.votes.write(Vote {
            term: hard_state.term,
            candidate: hard_state.vote,
            installing: Position::default(),
        })
    }

    /// Begins a segment behind a position, and gives up those before.
    fn begin(&mut self, at: Position) -> Result<(), MemberError> {
        self.start_segment()?;
        self.forget(at);
        self.commit = at.index;
        self.append_frame(&[], Some(at))?;
        while self.segments.len() > 1 {
            if let Some(segment) = self.segments.pop_front() {
                self.retire(segment.sequence)?;
            }
        }
        Ok(())
    }

    fn append_frame(
        &mut self,
        entries: &[Entry],
        restart: Option<Position>,
    ) -> Result<(), MemberError> {
        let missing = || MemberError::Corrupt("the log has no segment".into());
        let bytes = entries.iter().map(|entry| entry.data.len() + ENTRY_HEADER);
        let estimate = bytes.sum::<usize>() / PAYLOAD * SECTOR + 2 * frame::BLOCK;
        let segment = self.segments.back().ok_or_else(missing)?;
        if !segment.has_room(estimate, self.limits.segment_bytes) {
            self.start_segment()?;
        }
        let segment = self.segments.back_mut().ok_or_else(missing)?;
        let place = Place {
            segment: segment.sequence,
            number: self.next_number,
        };
        let slots = &mut self.slots;
        let block = block_of(segment.offset);
        frame::encode(
            &mut self.buffer,
            place,
            self.votes.generation,
            entries,
            restart,
            |entry, offset| {
                slots.push_back(Slot {
                    term: entry.term,
                    segment: place.segment,
                    block,
                    offset,
                    length: u32::try_from(entry.data.len() + ENTRY_HEADER).unwrap_or(u32::MAX),
                });
            },
        );
        let seed = sector::seed(self.owner);
        sector::seal(&self.buffer, seed, place.number, &mut self.sealed);
        segment.append(self.aligned.copy_of(&self.sealed))?;
        self.next_number += 1;
        self.votes.mark(Mark {
            frame: place.number,
            commit: self.commit,
        })
    }

    /// Notes what the keyspace holds durably, for followers that are too far behind.
    pub fn offer_snapshot(&mut self, at: Position, conf_state: ConfState) {
        self.offered = Some((at, conf_state));
    }

    /// Whether more entries are kept than followers may expect.
    pub fn is_long(&self) -> bool {
        self.segments.len() > self.limits.segments
    }

    /// Notes a commit index, durably.
    pub fn persist_commit(&mut self, commit: u64) -> Result<(), MemberError> {
        self.commit = self.commit.max(commit);
        self.votes.mark(Mark {
            frame: self.next_number - 1,
            commit: self.commit,
        })?;
        self.votes.sync()
    }

    /// Notes a commit index, which needs no sync: it is found again.
    pub fn set_commit(&mut self, commit: u64) {
        self.commit = self.commit.max(commit);
    }

    /// The hard state as it was last appended or noted.
    pub fn hard_state(&self) -> HardState {
        HardState {
            term: self.votes.vote.term,
            vote: self.votes.vote.candidate,
            commit: self.commit,
        }
    }

    /// Notes the configuration after a change.
    pub fn set_conf_state(&mut self, state: ConfState) {
        self.conf_state = state;
    }

    /// Gives up entries up to `index`: the keyspace has them, durably. Files go when all of their
    /// entries are given up.
    pub fn release(&mut self, index: u64) -> Result<(), MemberError> {
        let last = self.last().index;
        let index = index.min(last);
        if index <= self.before.index {
            return Ok(());
        }
        let count = usize::try_from(index - self.before.index).unwrap_or(usize::MAX);
        let term = self.slots[count - 1].term;
        self.slots.drain(..count);
        self.before = Position { index, term };
        let excess = self.cache.len().saturating_sub(self.slots.len());
        for entry in self.cache.drain(..excess) {
            self.cached_bytes -= entry.data.len();
        }
        while self.segments.len() > 1 && self.segments[0].last_index <= index {
            if let Some(segment) = self.segments.pop_front() {
                self.retire(segment.sequence)?;
            }
        }
        Ok(())
    }

    /// The first entry's index.
    pub fn first(&self) -> u64 {
        self.before.index + 1
    }

    /// The last entry, or what lies before the first.
    pub fn last(&self) -> Position {
        Position {
            index: self.before.index + self.slots.len() as u64,
            term: self.slots.back().map_or(self.before.term, |slot| slot.term),
        }
    }

    /// What was found damaged, if anything was, while an entry was read.
    pub fn damage(&self) -> Option<MemberError> {
        let damage = self.damage.get()?;
        Some(MemberError::Corrupt(damage.0.clone()))
    }

    /// Forgets every entry: the log goes on behind a position.
    fn forget(&mut self, before: Position) {
        self.slots.clear();
        self.cache.clear();
        self.cached_bytes = 0;
        self.before = before;
    }

    /// The term of an entry, or of what lies before the first; 0 if it is not known.
    fn term_of(&self, index: u64) -> Option<u64> {
        if index == self.before.index {
            return Some(self.before.term);
        }
        let at = usize::try_from(index.checked_sub(self.first())?).ok()?;
        self.slots.get(at).map(|slot| slot.term)
    }

    fn truncate_from(&mut self, index: u64) {
        while self.last().index >= index && !self.slots.is_empty() {
            self.slots.pop_back();
            if let Some(entry) = self.cache.pop_back() {
                self.cached_bytes -= entry.data.len();
            }
        }
    }

    fn shrink_cache(&mut self) {
        while self.cached_bytes > self.limits.log_cache_bytes && self.cache.len() > 1 {
            if let Some(entry) = self.cache.pop_front() {
                self.cached_bytes -= entry.data.len();
            }
        }
    }
}

fn block_of(offset: u64) -> u32 {
    u32::try_from(offset / frame::BLOCK as u64).unwrap_or(u32::MAX)
}

impl fmt::Debug for Log {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Log")
            .field("first", &self.first())
            .field("last", &self.last())
            .finish_non_exhaustive()
    }
}
