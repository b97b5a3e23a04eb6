//! The layers of the keyspace, and how they are read as one.

use std::ops::{Bound, ControlFlow};
use std::sync::Arc;

use bytes::Bytes;
use keelson_etcd_api::mvccpb::KeyValue;

use super::digest::Digests;
use super::engine::{Base, invert, revert};
use super::lease::Leases;
use super::metadata::Metadata;
use super::overlay::{Change, Overlay};
use super::range::{KeyRange, RangeEnd};
use super::read::key_value;
use super::version::Version;
use crate::MemberError;

/// Everything that applying an entry changes, under one lock.
pub(super) struct State {
    pub(super) metadata: Metadata,
    pub(super) leases: Leases,
    /// The newest layer, the only one that changes.
    pub(super) active: Overlay,
    /// The layer that is being flushed.
    pub(super) flushing: Option<Arc<Overlay>>,
    /// What was flushed.
    pub(super) base: Base,
    /// What was applied.
    pub(super) digests: Digests,
    /// The compacted revision as of the last flush.
    pub(super) flushed_compaction: i64,
}

/// How many changes are wanted at once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Budget {
    pub(super) changes: usize,
    /// Of their keys and values.
    pub(super) bytes: usize,
}

impl Budget {
    /// Whether `next` is wanted after `changes`, and takes it off: the rest of a revision always is.
    pub(super) fn allows(&mut self, changes: &[Change], next: &Change) -> bool {
        let spent = self.changes == 0 || self.bytes == 0;
        let begins = changes
            .last()
            .is_none_or(|last| last.revision < next.revision);
        if spent && begins {
            return false;
        }
        let bytes = next.key.len() + next.version.value.len();
        self.changes = self.changes.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
        true
    }
}

/// A key with its version, as a walk finds it: the value of a flushed one is not read yet.
pub(super) struct Found<'a> {
    pub(super) key: Bytes,
    pub(super) revision: i64,
    version: Version,
    /// Where the value is, if it is not in memory.
    base: Option<&'a Base>,
}

impl Found<'_> {
    /// With its value.
    pub(super) fn pair(self) -> Result<KeyValue, MemberError> {
        let version = match self.base {
            Some(base) => base.with_value(&self.key, self.revision, self.version)?,
            None => self.version,
        };
        Ok(key_value(self.key, self.revision, version))
    }

    /// With an empty value.
    pub(super) fn pair_without_value(mut self) -> KeyValue {
        self.version.value = Bytes::new();
        key_value(self.key, self.revision, self.version)
    }
}

/// Versions of one key that are stepped over before the engine is asked anew for the next key.
const STEPS_BEFORE_SEEK: usize = 8;

impl State {
    /// The newest version of `key` at `revision`, which may be a deletion.
    pub(super) fn newest(
        &self,
        key: &[u8],
        revision: i64,
    ) -> Result<Option<(i64, Version)>, MemberError> {
        for overlay in self.overlays() {
            if let Some((at, version)) = overlay.newest(key, revision) {
                return Ok(Some((at, version.clone())));
            }
        }
        self.base.newest(key, revision)
    }

    /// Calls `visit` with each key of `range` that exists at `revision`, in order.
    pub(super) fn walk(
        &self,
        range: &KeyRange,
        revision: i64,
        mut visit: impl FnMut(Found<'_>) -> Result<ControlFlow<()>, MemberError>,
    ) -> Result<(), MemberError> {
        if range.end == RangeEnd::Single {
            if let Some((at, version)) = self.newest(&range.start, revision)?
                && !version.is_deletion()
            {
                let key = range.start.clone();
                visit(Found {
                    key,
                    revision: at,
                    version,
                    base: None,
                })
                .map(drop)?;
            }
            return Ok(());
        }
        if range.is_empty() {
            return Ok(());
        }
        let bounds = bounds(range);
        let mut memory = Vec::new();
        for overlay in self.overlays() {
            let keys = overlay.keys.range::<Bytes, _>(bounds.clone());
            memory.push((overlay, keys.peekable()));
        }
        let mut base = BaseWalk::new(&self.base, range, revision)?;
        loop {
            let smallest = memory
                .iter_mut()
                .filter_map(|(_, keys)| keys.peek().map(|(key, _)| *key))
                .min()
                .cloned();
            let key = match (smallest, base.key()) {
                (None, None) => return Ok(()),
                (Some(key), None) => key,
                (None, Some(key)) => key.clone(),
                (Some(memory), Some(base)) => memory.min(base.clone()),
            };
            let mut found = None;
            for (overlay, keys) in &mut memory {
                if let Some((_, places)) = keys.next_if(|(candidate, _)| **candidate == key)
                    && found.is_none()
                {
                    let newest = overlay.newest_of(places, revision);
                    found = newest.map(|(at, version)| (at, version.clone()));
                }
            }
            let mut stored = None;
            if base.key() == Some(&key) {
                let below = base.take()?;
                if found.is_none() {
                    found = below;
                    stored = Some(&self.base);
                }
            }
            if let Some((at, version)) = found
                && !version.is_deletion()
                && visit(Found {
                    key,
                    revision: at,
                    version,
                    base: stored,
                })?
                .is_break()
            {
                return Ok(());
            }
        }
    }

    /// Changes from `revision` on, in order, whole revisions until a budget is spent; and whether
    /// these are all.
    pub(super) fn changes(
        &self,
        revision: i64,
        mut budget: Budget,
    ) -> Result<(Vec<Change>, bool), MemberError> {
        let mut changes = Vec::new();
        let whole = self.base.changes(revision, &mut budget, &mut changes)?;
        if !whole {
            return Ok((changes, false));
        }
        for overlay in self.overlays().rev() {
            let from = overlay
                .changes
                .partition_point(|change| change.revision < revision);
            for change in &overlay.changes[from..] {
                if !budget.allows(&changes, change) {
                    return Ok((changes, false));
                }
                changes.push(change.clone());
            }
        }
        Ok((changes, true))
    }

    /// The oldest revision that is in memory only.
    pub(super) fn first_unflushed(&self) -> Option<i64> {
        let first = self
            .overlays()
            .rev()
            .find_map(|overlay| overlay.changes.first());
        first.map(|change| change.revision)
    }

    /// The layers in memory, newest first.
    fn overlays(&self) -> impl DoubleEndedIterator<Item = &Overlay> {
        [Some(&self.active), self.flushing.as_deref()]
            .into_iter()
            .flatten()
    }
}

fn bounds(range: &KeyRange) -> (Bound<Bytes>, Bound<Bytes>) {
    let end = match &range.end {
        RangeEnd::Before(end) => Bound::Excluded(end.clone()),
        RangeEnd::Single | RangeEnd::Open => Bound::Unbounded,
    };
    (Bound::Included(range.start.clone()), end)
}

/// The newest versions of the engine's keys in a range, one key after the other.
struct BaseWalk<'a> {
    base: &'a Base,
    range: &'a KeyRange,
    revision: i64,
    entries: redb::Range<'static, super::engine::IndexKey, &'static [u8]>,
    next: Option<(Bytes, i64, Version)>,
}

impl<'a> BaseWalk<'a> {
    fn new(base: &'a Base, range: &'a KeyRange, revision: i64) -> Result<Self, MemberError> {
        let mut walk = Self {
            base,
            range,
            revision,
            entries: seek(base, range, &range.start)?,
            next: None,
        };
        walk.advance(None)?;
        Ok(walk)
    }

    fn key(&self) -> Option<&Bytes> {
        self.next.as_ref().map(|(key, _, _)| key)
    }

    fn take(&mut self) -> Result<Option<(i64, Version)>, MemberError> {
        let Some((key, revision, version)) = self.next.take() else {
            return Ok(None);
        };
        self.advance(Some(&key))?;
        Ok(Some((revision, version)))
    }

    /// Finds the next key after `done` that has a version at the revision.
    fn advance(&mut self, done: Option<&Bytes>) -> Result<(), MemberError> {
        let what = "read a range";
        let mut steps = 0;
        while let Some(entry) = self.entries.next() {
            let (at, bytes) = entry.map_err(MemberError::engine(what))?;
            let (key, stored) = at.value();
            if done.is_some_and(|done| done == key) {
                steps += 1;
                if steps > STEPS_BEFORE_SEEK {
                    steps = 0;
                    let mut after = key.to_vec();
                    after.push(0);
                    self.entries = seek(self.base, self.range, &after)?;
                }
                continue;
            }
            if stored < invert(self.revision) {
                continue; // newer than the revision
            }
            let revision = revert(stored);
            let version = Version::decode_index(key, revision, bytes.value())?;
            self.next = Some((Bytes::copy_from_slice(key), revision, version));
            return Ok(());
        }
        Ok(())
    }
}

fn seek(
    base: &Base,
    range: &KeyRange,
    from: &[u8],
) -> Result<redb::Range<'static, super::engine::IndexKey, &'static [u8]>, MemberError> {
    let what = "read a range";
    match &range.end {
        RangeEnd::Before(end) => base.index.range((from, 0)..(&end[..], 0)),
        RangeEnd::Single | RangeEnd::Open => base.index.range((from, 0)..),
    }
    .map_err(MemberError::engine(what))
}
