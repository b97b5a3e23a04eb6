//! The replicated log on disk, and what of it is in memory.

mod frame;
mod segment;

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use raft::eraftpb::{ConfState, Entry, HardState, Snapshot};
use raft::{GetEntriesContext, RaftState, Storage, StorageError};

pub use self::segment::Owner;

use self::frame::ENTRY_HEADER;
use self::segment::{Header, Segment};
use crate::disk::{AlignedBytes, Disk};
use crate::{Limits, MemberError};

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
    hard_state: HardState,
    conf_state: ConfState,
    /// The snapshot that the keyspace can give.
    offered: Option<(Position, ConfState)>,
    buffer: Vec<u8>,
    aligned: AlignedBytes,
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
    offset: u64,
    length: u32,
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
        let mut log = Self {
            disk,
            owner,
            limits,
            segments: VecDeque::new(),
            spares: Vec::new(),
            next_number: 1,
            before: applied,
            slots: VecDeque::new(),
            cache: VecDeque::new(),
            cached_bytes: 0,
            hard_state: HardState::default(),
            offered: (applied.index > 0).then(|| (applied, conf_state.clone())),
            conf_state,
            buffer: Vec::new(),
            aligned: AlignedBytes::default(),
        };
        log.recover(applied)?;
        if log.hard_state.commit < applied.index {
            log.hard_state.commit = applied.index;
            log.hard_state.term = log.hard_state.term.max(applied.term);
        }
        if log.segments.is_empty() {
            if !may_be_new {
                return Err(MemberError::Corrupt("the log's files are missing".into()));
            }
            log.start_segment(1)?;
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
        if let Some(first) = entries.first() {
            self.truncate_from(first.index);
        }
        let Some(segment) = self.segments.back() else {
            return Err(MemberError::Corrupt("the log has no segment".into()));
        };
        let mut sequence = segment.sequence;
        let estimate: usize = entries
            .iter()
            .map(|entry| entry.data.len() + ENTRY_HEADER)
            .sum();
        if !segment.has_room(estimate + 2 * frame::BLOCK, self.limits.segment_bytes) {
            sequence += 1;
            self.start_segment(sequence)?;
        }
        let Some(segment) = self.segments.back_mut() else {
            return Err(MemberError::Corrupt("the log has no segment".into()));
        };
        let (start, slots) = (segment.offset, &mut self.slots);
        frame::encode(
            &mut self.buffer,
            sequence,
            self.next_number,
            entries,
            hard_state,
            None,
            |entry, at| {
                slots.push_back(Slot {
                    term: entry.term,
                    segment: sequence,
                    offset: start + at as u64,
                    length: u32::try_from(entry.data.len() + ENTRY_HEADER).unwrap_or(u32::MAX),
                });
            },
        );
        segment.append(self.aligned.copy_of(&self.buffer))?;
        self.next_number += 1;
        if let Some(last) = entries.last() {
            segment.last_index = segment.last_index.max(last.index);
        }
        if let Some(state) = hard_state {
            self.hard_state = state.clone();
        }
        for entry in entries {
            self.cached_bytes += entry.data.len();
            self.cache.push_back(entry.clone());
        }
        self.shrink_cache();
        Ok(())
    }

    /// Begins anew behind a snapshot that was installed; durable when this returns.
    pub fn restart(&mut self, at: Position, hard_state: &HardState) -> Result<(), MemberError> {
        let sequence = self.segments.back().map_or(0, |last| last.sequence) + 1;
        self.start_segment(sequence)?;
        let Some(segment) = self.segments.back_mut() else {
            return Err(MemberError::Corrupt("the log has no segment".into()));
        };
        let (buffer, number) = (&mut self.buffer, self.next_number);
        frame::encode(
            buffer,
            sequence,
            number,
            &[],
            Some(hard_state),
            Some(at),
            |_, _| {},
        );
        segment.append(self.aligned.copy_of(&self.buffer))?;
        self.next_number += 1;
        self.hard_state = hard_state.clone();
        self.forget(at);
        while self.segments.len() > 1 {
            if let Some(segment) = self.segments.pop_front() {
                self.retire(segment.sequence)?;
            }
        }
        Ok(())
    }

    /// Notes what the keyspace holds durably, for followers that are too far behind.
    pub fn offer_snapshot(&mut self, at: Position, conf_state: ConfState) {
        self.offered = Some((at, conf_state));
    }

    /// Whether more entries are kept than followers may expect.
    pub fn is_long(&self) -> bool {
        self.segments.len() > self.limits.segments
    }

    /// Notes a hard state that needs no sync: a commit index.
    pub fn set_hard_state(&mut self, state: HardState) {
        self.hard_state = state;
    }

    /// The hard state as it was last appended or noted.
    pub fn hard_state(&self) -> &HardState {
        &self.hard_state
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

    /// How many prepared files are missing.
    pub fn missing_spares(&self) -> usize {
        SPARE_SEGMENTS.saturating_sub(self.spares.len())
    }

    /// Takes a file that [`prepare_spare`] made.
    pub fn add_spare(&mut self, name: String) {
        self.spares.push(name);
    }

    fn recover(&mut self, applied: Position) -> Result<(), MemberError> {
        let names = self
            .disk
            .list()
            .map_err(MemberError::disk("list the data folder"))?;
        self.spares = names
            .iter()
            .filter(|name| name.starts_with("spare-"))
            .cloned()
            .collect();
        let mut sequences: Vec<u64> = names
            .iter()
            .filter_map(|name| segment::sequence_of(name))
            .collect();
        sequences.sort_unstable();
        // Older ones than a gap were being retired: all of their entries are applied.
        if let Some(gap) = (1..sequences.len())
            .rev()
            .find(|at| sequences[*at] != sequences[at - 1] + 1)
        {
            for sequence in sequences.drain(..gap) {
                self.retire(sequence)?;
            }
        }
        self.before = Position::default();
        let mut next_number = None;
        let count = sequences.len();
        for (at, sequence) in sequences.into_iter().enumerate() {
            let name = segment::name(sequence);
            let file = self
                .disk
                .open_for_blocks(&name, false)
                .map_err(MemberError::disk(format!("open {name}")))?;
            let (header, frames) = segment::read(&*file, sequence, self.owner, next_number)?;
            let last = at + 1 == count;
            if matches!(header, Header::None) || (frames.is_empty() && !last) {
                if !last {
                    return Err(MemberError::Corrupt(format!(
                        "{name} is not readable, and a later one is"
                    )));
                }
                self.retire(sequence)?;
                continue;
            }
            let mut segment = Segment {
                sequence,
                file,
                last_index: 0,
                offset: frame::BLOCK as u64,
            };
            for (offset, frame) in frames {
                next_number = Some(frame.number + 1);
                segment.offset = offset + frame.length as u64;
                self.replay(&mut segment, offset, frame);
            }
            self.segments.push_back(segment);
        }
        self.next_number = next_number.unwrap_or(1);
        if self.slots.is_empty() || self.last().index < applied.index {
            // Nothing, or only what the keyspace has already.
            self.forget(applied);
        } else if self.first() > applied.index + 1 {
            return Err(MemberError::Corrupt(format!(
                "the log begins at {}, the keyspace ends at {}",
                self.first(),
                applied.index
            )));
        }
        if self
            .term_of(applied.index)
            .is_some_and(|term| term != 0 && term != applied.term)
        {
            // A snapshot was installed, and the log was not told any more: what it has is void.
            self.forget(applied);
        }
        // The term before the first entry is not in the log.
        if self.before.index == applied.index {
            self.before = applied;
        } else if let Some(first) = self.slots.pop_front() {
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

    fn replay(&mut self, segment: &mut Segment, offset: u64, frame: frame::Frame) {
        if let Some(state) = frame.hard_state {
            self.hard_state = state;
        }
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
                offset: offset + at as u64,
                length: u32::try_from(entry.data.len() + ENTRY_HEADER).unwrap_or(u32::MAX),
            });
            self.cached_bytes += entry.data.len();
            self.cache.push_back(entry);
            self.shrink_cache();
        }
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

    fn start_segment(&mut self, sequence: u64) -> Result<(), MemberError> {
        let name = segment::name(sequence);
        if let Some(spare) = self.spares.pop() {
            self.disk
                .rename(&spare, &name)
                .map_err(MemberError::disk(format!("rename {spare} to {name}")))?;
        } else {
            segment::prepare(&*self.disk, &name, self.limits.segment_bytes)?;
        }
        let file = self
            .disk
            .open_for_blocks(&name, false)
            .map_err(MemberError::disk(format!("open {name}")))?;
        self.disk
            .sync()
            .map_err(MemberError::disk("sync the data folder"))?;
        self.segments
            .push_back(Segment::start(file, sequence, self.owner)?);
        Ok(())
    }

    fn retire(&mut self, sequence: u64) -> Result<(), MemberError> {
        let name = segment::name(sequence);
        if self.spares.len() < SPARE_SEGMENTS {
            let spare = spare_name(sequence);
            self.disk
                .rename(&name, &spare)
                .map_err(MemberError::disk(format!("rename {name} to {spare}")))?;
            self.spares.push(spare);
            return Ok(());
        }
        self.disk
            .remove(&name)
            .map_err(MemberError::disk(format!("remove {name}")))
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
        let mut bytes = vec![0; slot.length as usize];
        segment
            .file
            .read_at(&mut bytes, slot.offset)
            .map_err(|error| raft::Error::Store(StorageError::Other(Box::new(error))))?;
        // A frame's checksum was verified when it was read or written; the entry says who it is.
        frame::decode_entry(&bytes, 0)
            .map(|(entry, _)| entry)
            .filter(|entry| entry.index == index && entry.term == slot.term)
            .ok_or_else(|| {
                let text = format!(
                    "entry {index} in {} is corrupt",
                    segment::name(slot.segment)
                );
                raft::Error::Store(StorageError::Other(text.into()))
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
        Err(MemberError::Disk { source, .. })
            if source.kind() == std::io::ErrorKind::StorageFull =>
        {
            // What there is of it is room that others need more.
            match disk.remove(&name) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    Err(MemberError::disk(format!("remove {name}"))(error))
                }
                _ => Ok(None),
            }
        }
        Err(error) => Err(error),
    }
}

fn spare_name(sequence: u64) -> String {
    format!("spare-{sequence:016x}")
}

impl Storage for Log {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState::new(
            self.hard_state.clone(),
            self.conf_state.clone(),
        ))
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
            let entry = self.entry(index)?;
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
