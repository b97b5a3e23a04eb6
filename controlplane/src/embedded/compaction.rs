//! Clears history, in steps small enough not to hold up writes.

use std::collections::VecDeque;
use std::ops::Bound;
use std::time::{Duration, Instant};

use redb::ReadableTable;

use super::errors::Engine;
use super::record::{Change, Position};
use super::tables::{Key, Number, WriteTables};
use super::view::history_record;
use crate::{Revision, StateError};

/// How much history is kept without being asked to compact.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retention {
    /// All of it: only [`compact`](crate::StateStore::compact) clears it.
    Everything,
    /// This many revisions, and up to a tenth more.
    Revisions(u32),
    /// What was current during this time, and up to a tenth longer.
    Time(Duration),
}

/// Entries of history looked at in one step.
const STEP: usize = 500;

/// History being cleared up to a compacted revision.
#[derive(Debug)]
pub(super) struct Clearing {
    target: Revision,
    /// Entries before this are done.
    next: Key,
}

impl Clearing {
    pub(super) fn up_to(target: Revision) -> Self {
        Self {
            target,
            next: (0, 0),
        }
    }

    /// Clears some; returns whether that was the end.
    pub(super) fn step(&mut self, tables: &mut WriteTables<'_>) -> Result<bool, StateError> {
        let mut doomed = Vec::new();
        let mut next = None;
        let entries = tables
            .history
            .range(self.next..(self.target, 0))
            .engine("scan history")?;
        for (looked_at, entry) in entries.enumerate() {
            let (key, bytes) = entry.engine("scan history")?;
            let (main, sub) = key.value();
            if looked_at == STEP {
                next = Some((main, sub));
                break;
            }
            let record = history_record(Position { main, sub }, bytes.value())?;
            let deleted = matches!(record.change, Change::Delete(_));
            if deleted || self.is_superseded(tables, record.key(), (main, sub))? {
                doomed.push((record.key().clone(), (main, sub)));
            }
        }
        for (key, (main, sub)) in doomed {
            tables.history.remove((main, sub)).engine("clear history")?;
            tables
                .index
                .remove((&key[..], main, sub))
                .engine("clear history")?;
        }
        if let Some(next) = next {
            self.next = next;
            return Ok(false);
        }
        Number::Cleared.write(&mut tables.meta, self.target)?;
        Ok(true)
    }

    /// Whether the key changed again, up to the compacted revision.
    fn is_superseded(
        &self,
        tables: &WriteTables<'_>,
        key: &[u8],
        (main, sub): Key,
    ) -> Result<bool, StateError> {
        let later = (
            Bound::Excluded((key, main, sub)),
            Bound::Included((key, self.target, u32::MAX)),
        );
        let mut later = tables
            .index
            .range::<(&[u8], Revision, u32)>(later)
            .engine("seek a revision")?;
        Ok(later
            .next()
            .transpose()
            .engine("seek a revision")?
            .is_some())
    }
}

/// Decides when to compact.
#[derive(Debug)]
pub(super) struct Compactor {
    retention: Retention,
    /// When the store was at which revision, the oldest first.
    samples: VecDeque<(Instant, Revision)>,
}

impl Compactor {
    pub(super) fn new(retention: Retention) -> Self {
        Self {
            retention,
            samples: VecDeque::new(),
        }
    }

    /// When [`target`](Self::target) wants to be asked again although nothing was written.
    pub(super) fn next_sample(&self) -> Option<Instant> {
        match (self.retention, self.samples.back()) {
            (Retention::Time(time), Some((last, _))) => Some(*last + time / 10),
            _ => None,
        }
    }

    /// The revision to compact to, if it is time.
    pub(super) fn target(
        &mut self,
        now: Instant,
        revision: Revision,
        compacted: Revision,
    ) -> Option<Revision> {
        match self.retention {
            Retention::Everything => None,
            Retention::Revisions(keep) => {
                let slack = i64::from(keep / 10).max(1);
                let target = revision - i64::from(keep);
                (target >= compacted + slack && target > 0).then_some(target)
            }
            Retention::Time(time) => self.sample(now, time, revision, compacted),
        }
    }

    fn sample(
        &mut self,
        now: Instant,
        time: Duration,
        revision: Revision,
        compacted: Revision,
    ) -> Option<Revision> {
        if self.next_sample().is_none_or(|next| next <= now) {
            self.samples.push_back((now, revision));
        }
        let mut target = None;
        while let Some((at, revision)) = self.samples.front().copied() {
            if now.duration_since(at) < time {
                break;
            }
            target = Some(revision);
            self.samples.pop_front();
        }
        target.filter(|target| *target > compacted)
    }
}
