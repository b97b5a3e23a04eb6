//! Reading: the state at a revision, and the changes since one.

use bytes::Bytes;
use redb::{ReadTransaction, ReadableTable};
use std::ops::Bound;

use super::errors::Engine;
use super::record::{Change, Position, Record};
use super::tables::{CURRENT, HISTORY, INDEX, IndexKey, Key, META, Number, WriteTables};
use crate::key::RangeEnd;
use crate::limits::MAX_RANGE_BYTES;
use crate::{
    Event, EventKind, KeyRange, KeyValue, RangeRequest, RangeResponse, Revision, StateError,
};

/// The tables that reads need, of a read transaction or of one that writes.
pub(super) struct View<'a, C, H, I> {
    pub(super) current: &'a C,
    pub(super) history: &'a H,
    pub(super) index: &'a I,
    /// Current revision.
    pub(super) revision: Revision,
    /// Oldest readable revision.
    pub(super) compact_revision: Revision,
}

/// What a scan of history found.
pub(super) struct Changes {
    /// Each revision's matching changes, in order; revisions without any are absent.
    pub(super) batches: Vec<(Revision, Vec<Event>)>,
    /// Every change up to this revision has been looked at.
    pub(super) through: Revision,
}

/// Changes after which a scan of history stops at the end of the revision.
const SCAN_CHANGES: usize = 1000;
/// Bytes after which it does.
const SCAN_BYTES: usize = 4 * 1024 * 1024;

/// Runs `read` on a consistent view of what is committed.
pub(super) fn with_view<T>(
    txn: &ReadTransaction,
    read: impl FnOnce(
        &View<
            '_,
            redb::ReadOnlyTable<&'static [u8], &'static [u8]>,
            redb::ReadOnlyTable<Key, &'static [u8]>,
            redb::ReadOnlyTable<IndexKey, ()>,
        >,
    ) -> Result<T, StateError>,
) -> Result<T, StateError> {
    let what = "open a table";
    let meta = txn.open_table(META).engine(what)?;
    let current = txn.open_table(CURRENT).engine(what)?;
    let history = txn.open_table(HISTORY).engine(what)?;
    let index = txn.open_table(INDEX).engine(what)?;
    read(&View {
        current: &current,
        history: &history,
        index: &index,
        revision: Number::Revision.require(&meta)?,
        compact_revision: Number::CompactRevision.require(&meta)?,
    })
}

impl<'txn> WriteTables<'txn> {
    // The tables' types are redb's; a name for the three would only hide them.
    #[allow(clippy::type_complexity)]
    pub(super) fn view(
        &self,
        revision: Revision,
        compact_revision: Revision,
    ) -> View<
        '_,
        redb::Table<'txn, &'static [u8], &'static [u8]>,
        redb::Table<'txn, Key, &'static [u8]>,
        redb::Table<'txn, IndexKey, ()>,
    > {
        View {
            current: &self.current,
            history: &self.history,
            index: &self.index,
            revision,
            compact_revision,
        }
    }
}

impl<C, H, I> View<'_, C, H, I>
where
    C: ReadableTable<&'static [u8], &'static [u8]>,
    H: ReadableTable<Key, &'static [u8]>,
    I: ReadableTable<IndexKey, ()>,
{
    /// Whether a read at `revision` is possible.
    pub(super) fn check_revision(&self, revision: Revision) -> Result<(), StateError> {
        if revision > self.revision {
            return Err(StateError::FutureRevision {
                requested: revision,
                current: self.revision,
            });
        }
        if revision < self.compact_revision {
            return Err(StateError::Compacted {
                requested: revision,
                compact_revision: self.compact_revision,
            });
        }
        Ok(())
    }

    pub(super) fn range(&self, request: &RangeRequest) -> Result<RangeResponse, StateError> {
        let mut answer = Answer::new(request, self.revision);
        match request.revision {
            Some(revision) => {
                self.check_revision(revision)?;
                self.scan_index(&request.range, revision, |kv| answer.add(kv))?;
            }
            None => self.scan_current(&request.range, |kv| answer.add(kv))?,
        }
        Ok(answer.response)
    }

    pub(super) fn get(&self, key: &[u8]) -> Result<Option<KeyValue>, StateError> {
        match self.current.get(key).engine("read a key")? {
            Some(bytes) => current_record(key, bytes.value()).map(Some),
            None => Ok(None),
        }
    }

    /// Gives every current pair of `range` to `found`, in order.
    pub(super) fn scan_current(
        &self,
        range: &KeyRange,
        mut found: impl FnMut(KeyValue) -> Result<(), StateError>,
    ) -> Result<(), StateError> {
        if range.is_single() {
            return match self.get(range.start())? {
                Some(kv) => found(kv),
                None => Ok(()),
            };
        }
        let Some(bounds) = bounds(range) else {
            return Ok(());
        };
        for entry in self.current.range::<&[u8]>(bounds).engine("scan keys")? {
            let (key, bytes) = entry.engine("scan keys")?;
            found(current_record(key.value(), bytes.value())?)?;
        }
        Ok(())
    }

    /// Gives every pair of `range` as it was at `revision` to `found`, in order.
    ///
    /// Two seeks for each key: to its last record at or before the revision, and to the next key.
    fn scan_index(
        &self,
        range: &KeyRange,
        revision: Revision,
        mut found: impl FnMut(KeyValue) -> Result<(), StateError>,
    ) -> Result<(), StateError> {
        let mut next = self.first_key_from(range.start())?;
        while let Some(key) = next {
            if !range.contains(&key) {
                break;
            }
            if let Some(record) = self.record_at(&key, revision)?
                && let Some(kv) = record.into_kv()
            {
                found(kv)?;
            }
            next = self.key_after(&key)?;
        }
        Ok(())
    }

    fn first_key_from(&self, start: &[u8]) -> Result<Option<Bytes>, StateError> {
        first_key(self.index.range((start, 0, 0)..).engine("seek a key")?)
    }

    fn key_after(&self, key: &[u8]) -> Result<Option<Bytes>, StateError> {
        let behind = (
            Bound::Excluded((key, Revision::MAX, u32::MAX)),
            Bound::Unbounded,
        );
        first_key(
            self.index
                .range::<(&[u8], Revision, u32)>(behind)
                .engine("seek a key")?,
        )
    }

    /// The last record of `key` at or before `revision`.
    fn record_at(&self, key: &[u8], revision: Revision) -> Result<Option<Record>, StateError> {
        self.record_before(key, (key, revision, u32::MAX))
    }

    fn record_before(
        &self,
        key: &[u8],
        last: (&[u8], Revision, u32),
    ) -> Result<Option<Record>, StateError> {
        let mut range = self
            .index
            .range((key, 0, 0)..=last)
            .engine("seek a revision")?;
        let Some(entry) = range.next_back() else {
            return Ok(None);
        };
        let (_, main, sub) = entry.engine("seek a revision")?.0.value();
        let position = Position { main, sub };
        let Some(bytes) = self.history.get((main, sub)).engine("read a revision")? else {
            return Err(damaged(position, "is missing from history"));
        };
        let record = history_record(position, bytes.value())?;
        if record.key() != key {
            return Err(damaged(position, "belongs to another key"));
        }
        Ok(Some(record))
    }

    /// Changes of `range` from revision `from` on; stops early, at the end of a revision, when it
    /// has looked at many.
    pub(super) fn changes(
        &self,
        range: &KeyRange,
        from: Revision,
        prev_kv: bool,
    ) -> Result<Changes, StateError> {
        if from < self.compact_revision {
            return Err(StateError::Compacted {
                requested: from,
                compact_revision: self.compact_revision,
            });
        }
        let mut changes = Changes {
            batches: Vec::new(),
            through: self.revision,
        };
        let (mut seen, mut bytes, mut last) = (0_usize, 0_usize, from);
        for entry in self.history.range((from, 0)..).engine("scan history")? {
            let (key, value) = entry.engine("scan history")?;
            let (main, sub) = key.value();
            if main != last && (seen >= SCAN_CHANGES || bytes >= SCAN_BYTES) {
                changes.through = main - 1;
                break;
            }
            last = main;
            seen += 1;
            let record = history_record(Position { main, sub }, value.value())?;
            if !range.contains(record.key()) {
                continue;
            }
            bytes += value.value().len();
            let event = self.event(record, prev_kv)?;
            match changes.batches.last_mut() {
                Some((revision, events)) if *revision == main => events.push(event),
                _ => changes.batches.push((main, vec![event])),
            }
        }
        Ok(changes)
    }

    fn event(&self, record: Record, prev_kv: bool) -> Result<Event, StateError> {
        let Position { main, sub } = record.position;
        let prev = if prev_kv {
            let key = record.key().clone();
            let last = match sub.checked_sub(1) {
                Some(sub) => (&key[..], main, sub),
                None => (&key[..], main - 1, u32::MAX),
            };
            self.record_before(&key, last)?.and_then(Record::into_kv)
        } else {
            None
        };
        Ok(event(record, prev))
    }
}

/// The event that `record` is.
pub(super) fn event(record: Record, prev_kv: Option<KeyValue>) -> Event {
    match record.change {
        Change::Put(kv) => Event {
            kind: EventKind::Put,
            kv,
            prev_kv,
        },
        Change::Delete(key) => Event {
            kind: EventKind::Delete,
            kv: KeyValue {
                key,
                value: Bytes::new(),
                create_revision: 0,
                mod_revision: record.position.main,
                version: 0,
                lease: crate::NO_LEASE,
            },
            prev_kv,
        },
    }
}

/// A range's bounds in a table by key, or `None` if it is empty.
#[allow(clippy::type_complexity)] // A pair of bounds is what redb's `range` takes.
fn bounds(range: &KeyRange) -> Option<(Bound<&[u8]>, Bound<&[u8]>)> {
    let start = range.start();
    match range.end() {
        RangeEnd::Single => Some((Bound::Included(start), Bound::Included(start))),
        RangeEnd::Before(end) if start >= &end[..] => None,
        RangeEnd::Before(end) => Some((Bound::Included(start), Bound::Excluded(end))),
        RangeEnd::Unbounded => Some((Bound::Included(start), Bound::Unbounded)),
    }
}

fn first_key(mut range: redb::Range<'_, IndexKey, ()>) -> Result<Option<Bytes>, StateError> {
    match range.next() {
        Some(entry) => {
            let (key, ()) = entry.map(|(key, _)| (key, ())).engine("seek a key")?;
            Ok(Some(Bytes::copy_from_slice(key.value().0)))
        }
        None => Ok(None),
    }
}

pub(super) fn history_record(position: Position, bytes: &[u8]) -> Result<Record, StateError> {
    let record = Record::decode(bytes)?;
    if record.position != position {
        return Err(damaged(position, "holds another revision"));
    }
    Ok(record)
}

fn current_record(key: &[u8], bytes: &[u8]) -> Result<KeyValue, StateError> {
    match Record::decode(bytes)?.into_kv() {
        Some(kv) if kv.key == key => Ok(kv),
        _ => Err(StateError::Corrupt(format!(
            "the record of key {:?} belongs to another key",
            String::from_utf8_lossy(key)
        ))),
    }
}

fn damaged(position: Position, what: &str) -> StateError {
    StateError::Corrupt(format!(
        "revision {}.{} {what}",
        position.main, position.sub
    ))
}

/// A range response being filled, within its limits.
struct Answer<'a> {
    request: &'a RangeRequest,
    response: RangeResponse,
    bytes: usize,
}

impl<'a> Answer<'a> {
    fn new(request: &'a RangeRequest, revision: Revision) -> Self {
        Self {
            request,
            response: RangeResponse {
                revision,
                ..Default::default()
            },
            bytes: 0,
        }
    }

    fn add(&mut self, mut kv: KeyValue) -> Result<(), StateError> {
        self.response.count += 1;
        if self.request.count_only {
            return Ok(());
        }
        let full =
            |limit| usize::try_from(limit).is_ok_and(|limit| self.response.kvs.len() >= limit);
        if self
            .request
            .limit
            .filter(|limit| *limit > 0)
            .is_some_and(full)
        {
            self.response.more = true;
            return Ok(());
        }
        if self.request.keys_only {
            kv.value = Bytes::new();
        }
        self.bytes += kv.key.len() + kv.value.len();
        if self.bytes > MAX_RANGE_BYTES {
            return Err(StateError::TooLarge {
                what: "range in bytes (ask for it in pages)",
                size: self.bytes,
                limit: MAX_RANGE_BYTES,
            });
        }
        self.response.kvs.push(kv);
        Ok(())
    }
}
