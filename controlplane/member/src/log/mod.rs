//! The replicated log on disk, and what of it is in memory.

mod frame;
mod sector;
mod segment;
mod vote;

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::{Arc, OnceLock};

use raft::eraftpb::{ConfState, Entry, HardState, Snapshot};
use raft::{GetEntriesContext, RaftState, Storage, StorageError};

use self::frame::{ENTRY_HEADER, Place};
use self::sector::{PAYLOAD, SECTOR};
use self::segment::{Content, Segment};
pub(crate) use self::vote::FILE as VOTE_FILE;
use self::vote::{Mark, Vote, VoteFile};
use crate::disk::{AlignedBytes, Disk, DiskFile};
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

    /// How many prepared files are missing.
    pub fn missing_spares(&self) -> usize {
        SPARE_SEGMENTS.saturating_sub(self.spares.len())
    }

    /// Takes a file that [`prepare_spare`] made.
    pub fn add_spare(&mut self, name: String) {
        self.spares.push(name);
    }

    /// Takes over what was read.
    fn replay(&mut self, segments: Vec<FoundSegment>) -> Result<(), MemberError> {
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
    fn finish_install(&mut self, applied: Position) -> Result<(), MemberError> {
        if applied.index == 0 || self.votes.vote.installing != applied {
            return Ok(());
        }
        let mut state = self.hard_state();
        state.term = state.term.max(applied.term);
        state.commit = applied.index;
        self.restart(applied, &state)
    }

    /// Refuses a log that lacks what was synced, or what the keyspace has.
    fn check(&mut self, applied: Position) -> Result<(), MemberError> {
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

    fn start_segment(&mut self) -> Result<(), MemberError> {
        let sequence = self.segments.back().map_or(0, |last| last.sequence) + 1;
        let name = segment::name(sequence);
        let spare = if let Some(spare) = self.spares.pop() {
            spare
        } else {
            // Under its own name only once it is whole.
            let spare = spare_name(sequence);
            segment::prepare(&*self.disk, &spare, self.limits.segment_bytes)?;
            spare
        };
        self.disk
            .rename(&spare, &name)
            .map_err(MemberError::disk(format!("rename {spare} to {name}")))?;
        let file = self
            .disk
            .open_for_blocks(&name, false)
            .map_err(MemberError::disk(format!("open {name}")))?;
        self.disk
            .sync()
            .map_err(MemberError::disk("sync the data folder"))?;
        self.segments.push_back(Segment::start(
            file,
            sequence,
            self.owner,
            self.next_number,
            self.limits.segment_bytes,
        )?);
        Ok(())
    }

    fn retire(&mut self, sequence: u64) -> Result<(), MemberError> {
        let name = segment::name(sequence);
        if self.spares.len() < SPARE_SEGMENTS {
            let spare = spare_name(sequence);
            self.disk
                .rename(&name, &spare)
                .map_err(MemberError::disk(format!("rename {name} to {spare}")))?;
            // A number comes twice if a segment with nothing in it was retired: the file of before is
            // replaced.
            if !self.spares.contains(&spare) {
                self.spares.push(spare);
            }
            return Ok(());
        }
        self.disk
            .remove(&name)
            .map_err(MemberError::disk(format!("remove {name}")))
    }

    /// Reads one entry; `None` if its sectors are damaged.
    fn read_slot(&self, segment: &Segment, slot: &Slot) -> io::Result<Option<Entry>> {
        let (offset, length) = (slot.offset as usize, slot.length as usize);
        let (first, end) = (offset / PAYLOAD, (offset + length).div_ceil(PAYLOAD));
        let mut sealed = vec![0; (end - first) * SECTOR];
        let start = u64::from(slot.block) * frame::BLOCK as u64;
        match segment
            .file
            .read_at(&mut sealed, start + (first * SECTOR) as u64)
        {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            other => other?,
        }
        let place = u32::try_from(first).unwrap_or(u32::MAX);
        let content = sector::open(&sealed, sector::seed(self.owner), None, place);
        Ok(content
            .and_then(|content| frame::decode_entry(&content, offset % PAYLOAD))
            .map(|(entry, _)| entry))
    }

    fn entry(&self, index: u64) -> raft::Result<Entry> {
        let cached_from = self.last().index + 1 - self.cache.len() as u64;
        if index >= cached_from {
            let at = usize::try_from(index - cached_from).unwrap_or(usize::MAX);
            return self
                .cache
                .get(at)
                .cloned()
                .ok_or(raft::Error::Store(StorageError::Unavailable));
        }
        let at = usize::try_from(index - self.first()).unwrap_or(usize::MAX);
        let slot = self
            .slots
            .get(at)
            .ok_or(raft::Error::Store(StorageError::Unavailable))?;
        let segment = self
            .segments
            .iter()
            .find(|segment| segment.sequence == slot.segment)
            .ok_or(raft::Error::Store(StorageError::Unavailable))?;
        self.read_slot(segment, slot)
            .map_err(|error| raft::Error::Store(StorageError::Other(Box::new(error))))?
            .filter(|entry| entry.index == index && entry.term == slot.term)
            .ok_or_else(|| {
                let damage = Damage(format!(
                    "entry {index} in {} is damaged",
                    segment::name(slot.segment)
                ));
                let _ = self.damage.set(damage.clone());
                raft::Error::Store(StorageError::Other(Box::new(damage)))
            })
    }
}

/// Creates a prepared file for [`Log::add_spare`]; `None` if there is no room for it now. Slow: may
/// run beside the log.
pub fn prepare_spare(
    disk: &dyn Disk,
    number: u64,
    limits: &Limits,
) -> Result<Option<String>, MemberError> {
    let name = format!("spare-new-{number:016x}");
    match segment::prepare(disk, &name, limits.segment_bytes) {
        Ok(()) => Ok(Some(name)),
        Err(MemberError::Disk { source, .. }) if source.kind() == io::ErrorKind::StorageFull => {
            // What there is of it is room that others need more.
            match disk.remove(&name) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    Err(MemberError::disk(format!("remove {name}"))(error))
                }
                _ => Ok(None),
            }
        }
        Err(error) => Err(error),
    }
}

/// What a folder has of a log.
struct Found {
    segments: Vec<FoundSegment>,
    spares: Vec<String>,
    /// Segments that hold nothing that is needed.
    unused: Vec<u64>,
}

struct FoundSegment {
    sequence: u64,
    file: Arc<dyn DiskFile>,
    first: u64,
    frames: Vec<(u64, frame::Frame)>,
}

impl Found {
    fn read(disk: &dyn Disk, owner: Owner, size: u64) -> Result<Self, MemberError> {
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

fn block_of(offset: u64) -> u32 {
    u32::try_from(offset / frame::BLOCK as u64).unwrap_or(u32::MAX)
}

fn spare_name(sequence: u64) -> String {
    format!("spare-{sequence:016x}")
}

impl Storage for Log {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState::new(self.hard_state(), self.conf_state.clone()))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low < self.first() {
            return Err(raft::Error::Store(StorageError::Compacted));
        }
        let limit = max_size.into().unwrap_or(u64::MAX);
        let mut size = 0;
        let mut entries = Vec::new();
        for index in low..high {
            let entry = match self.entry(index) {
                // Consensus would panic: the member ends when it advances.
                Err(_) if self.damage.get().is_some() => break,
                other => other?,
            };
            size += (entry.data.len() + ENTRY_HEADER) as u64;
            if size > limit && !entries.is_empty() {
                break;
            }
            entries.push(entry);
        }
        Ok(entries)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index < self.before.index {
            return Err(raft::Error::Store(StorageError::Compacted));
        }
        self.term_of(index)
            .ok_or(raft::Error::Store(StorageError::Unavailable))
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.first())
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last().index)
    }

    /// Says of what a snapshot would be; its data is streamed beside the log.
    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<Snapshot> {
        let useful = |(at, conf_state): &&(Position, ConfState)| {
            let mut members = conf_state.voters.iter().chain(&conf_state.learners);
            at.index >= request_index && members.any(|id| *id == to)
        };
        match self.offered.as_ref().filter(useful) {
            Some((at, conf_state)) => Ok(snapshot_of(*at, conf_state.clone())),
            None => Err(raft::Error::Store(
                StorageError::SnapshotTemporarilyUnavailable,
            )),
        }
    }
}

/// A snapshot's place in the log, as consensus wants it.
pub(crate) fn snapshot_of(at: Position, conf_state: ConfState) -> Snapshot {
    let mut snapshot = Snapshot::default();
    let metadata = snapshot.mut_metadata();
    metadata.index = at.index;
    metadata.term = at.term;
    metadata.set_conf_state(conf_state);
    snapshot
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
