//! What consensus reads from the log.

use std::io;

use raft::eraftpb::{ConfState, Entry, Snapshot};
use raft::{GetEntriesContext, RaftState, Storage, StorageError};

use super::frame::{self, ENTRY_HEADER};
use super::sector::{self, PAYLOAD, SECTOR};
use super::segment::{self, Segment};
use super::{Log, Position, Slot};
use crate::error::Damage;

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

impl Log {
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

/// A snapshot's place in the log, as consensus wants it.
pub(crate) fn snapshot_of(at: Position, conf_state: ConfState) -> Snapshot {
    let mut snapshot = Snapshot::default();
    let metadata = snapshot.mut_metadata();
    metadata.index = at.index;
    metadata.term = at.term;
    metadata.set_conf_state(conf_state);
    snapshot
}
