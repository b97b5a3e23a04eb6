//! The storage engine below the overlays: tables, flushes, and removal of compacted versions.
//!
//! Applied index, membership and data are in one engine transaction: after a crash, they are of
//! the same moment, and the log goes on from there.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use redb::{
    Builder, Database, Durability, ReadOnlyTable, ReadableDatabase, ReadableTable, TableDefinition,
    WriteTransaction,
};

use super::blocks::{Backend, Blocks};
use super::lease::{Lease, LeaseRecord, Leases};
use super::metadata::Metadata;
use super::overlay::{Change, Overlay};
use super::state::Budget;
use super::version::Version;
use crate::MemberError;
use crate::disk::Disk;

/// Key and revision (bits inverted, so that the newest is first).
pub(super) type IndexKey = (&'static [u8], u64);
/// Revision and position in it.
type RecordKey = (i64, u32);

/// To [`Version`] without its value. Small, for its pages are written all over.
pub(super) const INDEX: TableDefinition<'_, IndexKey, &[u8]> = TableDefinition::new("index");
/// To key and [`Version`]. Only ever added to at its end, so that its pages fill up.
pub(super) const RECORDS: TableDefinition<'_, RecordKey, &[u8]> = TableDefinition::new("records");
/// To the record from which on the next compaction looks for what it makes superfluous.
const COMPACTED: TableDefinition<'_, (), RecordKey> = TableDefinition::new("compacted");
pub(super) const LEASES: TableDefinition<'_, i64, (i64, i64)> = TableDefinition::new("leases");
/// To the log index of its grant.
pub(super) const GRANTS: TableDefinition<'_, i64, u64> = TableDefinition::new("grants");
pub(super) const ATTACHMENTS: TableDefinition<'_, (i64, &[u8]), ()> =
    TableDefinition::new("attachments");
pub(super) const METADATA: TableDefinition<'_, (), &[u8]> = TableDefinition::new("metadata");

/// Name of the engine's file.
pub const ENGINE_FILE: &str = "keyspace.redb";
const WRITE: &str = "write a flush";

/// The open engine.
#[derive(Debug)]
pub(super) struct Engine {
    pub(super) database: Database,
    blocks: Arc<Blocks>,
}

/// The tables as of the last flush, for reading.
pub(super) struct Base {
    pub(super) index: ReadOnlyTable<IndexKey, &'static [u8]>,
    records: ReadOnlyTable<RecordKey, &'static [u8]>,
}

/// What the engine holds when it is opened.
pub(super) struct Loaded {
    pub(super) metadata: Metadata,
    pub(super) leases: Leases,
}

impl Engine {
    /// Opens the engine's file, or creates it.
    pub(super) fn open(disk: &dyn Disk, cache_bytes: usize) -> Result<Self, MemberError> {
        Self::open_named(disk, ENGINE_FILE, cache_bytes)
    }

    /// Opens an engine in a file of another name.
    pub(super) fn open_named(
        disk: &dyn Disk,
        name: &str,
        cache_bytes: usize,
    ) -> Result<Self, MemberError> {
        let blocks = Arc::new(Blocks::open(disk, name)?);
        let database = Builder::new()
            .set_cache_size(cache_bytes)
            .create_with_backend(Backend(Arc::clone(&blocks)))
            .map_err(MemberError::engine("open its file"))?;
        let engine = Self { database, blocks };
        if engine.has_tables()? {
            return Ok(engine);
        }
        let txn = engine.begin()?;
        open_tables(&txn).map_err(MemberError::engine("create its tables"))?;
        txn.commit()
            .map_err(MemberError::engine("create its tables"))?;
        Ok(engine)
    }

    fn has_tables(&self) -> Result<bool, MemberError> {
        let what = "look for its tables";
        let txn = self
            .database
            .begin_read()
            .map_err(MemberError::engine(what))?;
        match txn.open_table(METADATA) {
            Ok(_) => Ok(true),
            Err(redb::TableError::TableDoesNotExist(_)) => Ok(false),
            Err(error) => Err(MemberError::engine(what)(error)),
        }
    }

    /// Everything that is kept in memory; `None` if the engine is new.
    pub(super) fn load(&self) -> Result<Option<Loaded>, MemberError> {
        let what = "load leases and metadata";
        let txn = self
            .database
            .begin_read()
            .map_err(MemberError::engine(what))?;
        let table = txn
            .open_table(METADATA)
            .map_err(MemberError::engine(what))?;
        let Some(bytes) = table.get(()).map_err(MemberError::engine(what))? else {
            return Ok(None);
        };
        let metadata = Metadata::decode(bytes.value())?;
        let mut leases = Leases::new();
        let table = txn.open_table(LEASES).map_err(MemberError::engine(what))?;
        for entry in table.iter().map_err(MemberError::engine(what))? {
            let (id, record) = entry.map_err(MemberError::engine(what))?;
            let (granted, remaining) = record.value();
            let lease = Lease {
                record: LeaseRecord {
                    granted,
                    remaining,
                    granted_at: 0,
                },
                keys: BTreeSet::new(),
            };
            leases.insert(id.value(), lease);
        }
        let table = txn.open_table(GRANTS).map_err(MemberError::engine(what))?;
        for entry in table.iter().map_err(MemberError::engine(what))? {
            let (id, index) = entry.map_err(MemberError::engine(what))?;
            if let Some(lease) = leases.get_mut(&id.value()) {
                lease.record.granted_at = index.value();
            }
        }
        let table = txn
            .open_table(ATTACHMENTS)
            .map_err(MemberError::engine(what))?;
        for entry in table.iter().map_err(MemberError::engine(what))? {
            let (attachment, ()) = entry
                .map(|(key, _)| (key, ()))
                .map_err(MemberError::engine(what))?;
            let (id, key) = attachment.value();
            let lease = leases.get_mut(&id).ok_or_else(|| {
                MemberError::Corrupt(format!("a key is attached to lease {id}, which is missing"))
            })?;
            lease.keys.insert(Bytes::copy_from_slice(key));
        }
        Ok(Some(Loaded { metadata, leases }))
    }

    /// The tables as they are now.
    pub(super) fn base(&self) -> Result<Base, MemberError> {
        let what = "begin a read";
        let txn = self
            .database
            .begin_read()
            .map_err(MemberError::engine(what))?;
        Ok(Base {
            index: txn.open_table(INDEX).map_err(MemberError::engine(what))?,
            records: txn.open_table(RECORDS).map_err(MemberError::engine(what))?,
        })
    }

    /// Writes an overlay and the metadata of its end, durably.
    pub(super) fn flush(&self, overlay: &Overlay, metadata: &Metadata) -> Result<(), MemberError> {
        let txn = self.begin()?;
        write_overlay(&txn, overlay, metadata).map_err(MemberError::engine(WRITE))?;
        txn.commit().map_err(MemberError::engine("commit a flush"))
    }

    /// Writes metadata alone, durably.
    pub(super) fn replace_metadata(&self, metadata: &Metadata) -> Result<(), MemberError> {
        self.flush(&Overlay::default(), metadata)
    }

    /// Looks at up to `batch` records up to `revision`, and removes what they supersede.
    /// Returns whether there may be more.
    pub(super) fn compact(
        &self,
        base: &Base,
        revision: i64,
        batch: usize,
    ) -> Result<bool, MemberError> {
        let what = "compact";
        let txn = self.begin()?;
        let from = {
            let table = txn
                .open_table(COMPACTED)
                .map_err(MemberError::engine(what))?;
            let from = table.get(()).map_err(MemberError::engine(what))?;
            from.map_or((0, 0), |from| from.value())
        };
        if from.0 > revision {
            return Ok(false);
        }
        let records = base
            .records
            .range(from..=(revision, u32::MAX))
            .map_err(MemberError::engine(what))?;
        let mut changes = Vec::new();
        for entry in records.take(batch) {
            let (at, record) = entry.map_err(MemberError::engine(what))?;
            let (at, record) = (at.value(), record.value());
            changes.push(decode_change(at, record)?);
        }
        let more = changes.len() == batch;
        remove_superseded(&txn, &changes, revision)?;
        // Records at the revision itself are looked at again: watches may start there, so that its
        // deletions stay until then.
        let next = match changes.last() {
            Some(last) if more && last.revision < revision => (last.revision, last.version.sub + 1),
            _ => (revision, 0),
        };
        txn.open_table(COMPACTED)
            .map_err(MemberError::engine(what))?
            .insert((), next)
            .map_err(MemberError::engine(what))?;
        txn.commit().map_err(MemberError::engine(what))?;
        Ok(more && next.0 < revision)
    }

    /// The engine's file.
    pub(super) fn blocks(&self) -> &Arc<Blocks> {
        &self.blocks
    }

    pub(super) fn begin(&self) -> Result<WriteTransaction, MemberError> {
        let what = "begin a transaction";
        let mut txn = self
            .database
            .begin_write()
            .map_err(MemberError::engine(what))?;
        txn.set_durability(Durability::Immediate)
            .map_err(MemberError::engine(what))?;
        // Without it, opening after a crash reads everything.
        txn.set_quick_repair(true);
        Ok(txn)
    }
}

impl Base {
    /// The newest version of `key` at `revision`.
    pub(super) fn newest(
        &self,
        key: &[u8],
        revision: i64,
    ) -> Result<Option<(i64, Version)>, MemberError> {
        let what = "read a key";
        let mut range = self
            .index
            .range((key, invert(revision))..=(key, u64::MAX))
            .map_err(MemberError::engine(what))?;
        let Some(entry) = range.next() else {
            return Ok(None);
        };
        let (at, bytes) = entry.map_err(MemberError::engine(what))?;
        let revision = revert(at.value().1);
        let version = Version::decode_index(key, revision, bytes.value())?;
        Ok(Some((revision, self.with_value(key, revision, version)?)))
    }

    /// A version that the index has, with its value.
    pub(super) fn with_value(
        &self,
        key: &[u8],
        revision: i64,
        version: Version,
    ) -> Result<Version, MemberError> {
        if version.is_deletion() {
            return Ok(version);
        }
        let what = "read a record";
        let record = self
            .records
            .get((revision, version.sub))
            .map_err(MemberError::engine(what))?;
        let record = record.as_ref().map_or(&[][..], |record| record.value());
        let (recorded, whole) = Version::decode_record(revision, version.sub, record)?;
        if recorded != key {
            return Err(MemberError::Corrupt(format!(
                "the record of key \"{}\" at revision {revision} is another key's",
                key.escape_ascii()
            )));
        }
        Ok(whole)
    }

    /// Adds changes from `revision` on, in order, whole revisions until the budget is spent; whether
    /// these are all.
    pub(super) fn changes(
        &self,
        revision: i64,
        budget: &mut Budget,
        changes: &mut Vec<Change>,
    ) -> Result<bool, MemberError> {
        let what = "read changes";
        let range = self
            .records
            .range((revision, 0)..)
            .map_err(MemberError::engine(what))?;
        for entry in range {
            let (at, record) = entry.map_err(MemberError::engine(what))?;
            let change = decode_change(at.value(), record.value())?;
            if !budget.allows(changes, &change) {
                return Ok(false);
            }
            changes.push(change);
        }
        Ok(true)
    }
}

/// Gives a file the name of the engine that a member opens, durably.
pub(super) fn adopt(disk: &dyn Disk, name: &str) -> Result<(), MemberError> {
    disk.rename(name, ENGINE_FILE)
        .map_err(MemberError::disk(format!("rename {name} to {ENGINE_FILE}")))?;
    disk.sync()
        .map_err(MemberError::disk("sync the data folder"))
}

/// A revision as it is stored in a [`VersionKey`]. Revisions are not negative.
pub(super) fn invert(revision: i64) -> u64 {
    u64::MAX - revision.unsigned_abs()
}

/// The revision of a [`VersionKey`].
pub(super) fn revert(stored: u64) -> i64 {
    i64::try_from(u64::MAX - stored).unwrap_or(i64::MAX)
}

fn open_tables(txn: &WriteTransaction) -> Result<(), redb::Error> {
    txn.open_table(INDEX)?;
    txn.open_table(RECORDS)?;
    txn.open_table(COMPACTED)?;
    txn.open_table(LEASES)?;
    txn.open_table(GRANTS)?;
    txn.open_table(ATTACHMENTS)?;
    txn.open_table(METADATA)?;
    Ok(())
}

fn write_overlay(
    txn: &WriteTransaction,
    overlay: &Overlay,
    metadata: &Metadata,
) -> Result<(), redb::Error> {
    let mut buffer = Vec::new();
    let mut index = txn.open_table(INDEX)?;
    for (key, places) in &overlay.keys {
        for place in places {
            let change = &overlay.changes[*place as usize];
            change
                .version
                .encode_index(key, change.revision, &mut buffer);
            index.insert((&key[..], invert(change.revision)), &buffer[..])?;
        }
    }
    let mut records = txn.open_table(RECORDS)?;
    for change in &overlay.changes {
        change
            .version
            .encode_record(&change.key, change.revision, &mut buffer);
        records.insert((change.revision, change.version.sub), &buffer[..])?;
    }
    let mut leases = txn.open_table(LEASES)?;
    let mut grants = txn.open_table(GRANTS)?;
    for (id, record) in &overlay.leases {
        if let Some(record) = record {
            leases.insert(id, (record.granted, record.remaining))?;
            grants.insert(id, record.granted_at)?;
        } else {
            leases.remove(id)?;
            grants.remove(id)?;
        }
    }
    let mut attachments = txn.open_table(ATTACHMENTS)?;
    for ((id, key), attached) in &overlay.attachments {
        if *attached {
            attachments.insert((*id, &key[..]), ())?;
        } else {
            attachments.remove((*id, &key[..]))?;
        }
    }
    txn.open_table(METADATA)?
        .insert((), &metadata.encode()[..])?;
    Ok(())
}

/// Removes what is not visible at `revision` any more because of `changes`.
fn remove_superseded(
    txn: &WriteTransaction,
    changes: &[Change],
    revision: i64,
) -> Result<(), MemberError> {
    let what = "compact";
    let mut index = txn.open_table(INDEX).map_err(MemberError::engine(what))?;
    let mut records = txn.open_table(RECORDS).map_err(MemberError::engine(what))?;
    // All older versions of a key go at once, however many changes it had.
    let keys: BTreeSet<&Bytes> = changes.iter().map(|change| &change.key).collect();
    let mut gone = Vec::new();
    for key in keys {
        let history = (&key[..], invert(revision))..=(&key[..], u64::MAX);
        let history = index.range(history).map_err(MemberError::engine(what))?;
        for (place, entry) in history.enumerate() {
            let (at, bytes) = entry.map_err(MemberError::engine(what))?;
            let stored = at.value().1;
            let version = Version::decode_index(key, revert(stored), bytes.value())?;
            // The newest at `revision` is still visible, unless it is a deletion.
            if place > 0 || version.is_deletion() {
                gone.push((key, stored, version.sub));
            }
        }
    }
    for (key, stored, sub) in gone {
        index
            .remove((&key[..], stored))
            .map_err(MemberError::engine(what))?;
        if revert(stored) < revision {
            records
                .remove((revert(stored), sub))
                .map_err(MemberError::engine(what))?;
        }
    }
    // Deletions at the revision of an earlier compaction are in no index any more.
    let deletions = changes
        .iter()
        .filter(|change| change.version.is_deletion() && change.revision < revision);
    for change in deletions {
        records
            .remove((change.revision, change.version.sub))
            .map_err(MemberError::engine(what))?;
    }
    Ok(())
}

fn decode_change((revision, sub): RecordKey, record: &[u8]) -> Result<Change, MemberError> {
    let (key, version) = Version::decode_record(revision, sub, record)?;
    Ok(Change {
        revision,
        key,
        version,
    })
}
