//! The storage engine below the overlays: tables, flushes, and removal of compacted versions.
//!
//! Applied index, membership and data are in one engine transaction: after a crash, they are of
//! the same moment, and the log goes on from there.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use redb::{
    Builder, Database, Durability, ReadOnlyTable, ReadableDatabase, ReadableTable, StorageBackend,
    TableDefinition, WriteTransaction,
};

use super::lease::{Lease, LeaseRecord, Leases};
use super::metadata::Metadata;
use super::overlay::{Change, Overlay};
use super::version::Version;
use crate::MemberError;
use crate::disk::{Disk, DiskFile};

/// Key and revision (bits inverted, so that the newest is first) to [`Version`].
pub(super) type VersionKey = (&'static [u8], u64);
/// Revision and position in it to kind and key: [`encode_change`].
type ChangeKey = (i64, u32);

pub(super) const VERSIONS: TableDefinition<'_, VersionKey, &[u8]> =
    TableDefinition::new("versions");
pub(super) const CHANGES: TableDefinition<'_, ChangeKey, &[u8]> = TableDefinition::new("changes");
pub(super) const LEASES: TableDefinition<'_, i64, (i64, i64)> = TableDefinition::new("leases");
pub(super) const ATTACHMENTS: TableDefinition<'_, (i64, &[u8]), ()> =
    TableDefinition::new("attachments");
pub(super) const METADATA: TableDefinition<'_, (), &[u8]> = TableDefinition::new("metadata");

/// Name of the engine's file.
pub const ENGINE_FILE: &str = "keyspace.redb";
/// Removals of one engine transaction, while compacting.
const COMPACTION_BATCH: usize = 2000;
const WRITE: &str = "write a flush";

/// The open engine.
#[derive(Debug)]
pub(super) struct Engine {
    pub(super) database: Database,
    file: Arc<dyn DiskFile>,
}

/// The tables as of the last flush, for reading.
pub(super) struct Base {
    pub(super) versions: ReadOnlyTable<VersionKey, &'static [u8]>,
    changes: ReadOnlyTable<ChangeKey, &'static [u8]>,
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
        let file = disk
            .open(name, true)
            .map_err(MemberError::disk(format!("open {name}")))?;
        disk.sync()
            .map_err(MemberError::disk("sync the data folder"))?;
        let database = Builder::new()
            .set_cache_size(cache_bytes)
            .create_with_backend(Backend(Arc::clone(&file)))
            .map_err(MemberError::engine("open its file"))?;
        let txn = database
            .begin_write()
            .map_err(MemberError::engine("begin a transaction"))?;
        open_tables(&txn).map_err(MemberError::engine("create its tables"))?;
        txn.commit()
            .map_err(MemberError::engine("create its tables"))?;
        Ok(Self { database, file })
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
                record: LeaseRecord { granted, remaining },
                keys: std::collections::BTreeSet::new(),
            };
            leases.insert(id.value(), lease);
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
            versions: txn
                .open_table(VERSIONS)
                .map_err(MemberError::engine(what))?,
            changes: txn.open_table(CHANGES).map_err(MemberError::engine(what))?,
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

    /// Removes up to [`COMPACTION_BATCH`] changes up to `revision`, with the versions that they
    /// superseded. Returns whether there may be more.
    pub(super) fn compact(&self, base: &Base, revision: i64) -> Result<bool, MemberError> {
        let what = "compact";
        let mut changes = Vec::new();
        let range = base
            .changes
            .range(..(revision, 0))
            .map_err(MemberError::engine(what))?;
        for entry in range.take(COMPACTION_BATCH) {
            let (at, value) = entry.map_err(MemberError::engine(what))?;
            let (at, value) = (at.value(), value.value());
            changes.push(decode_change(at, value)?);
        }
        // The changes at the revision itself stay for watches that start there, but what they
        // superseded goes.
        let more = changes.len() == COMPACTION_BATCH;
        if !more {
            let range = base
                .changes
                .range((revision, 0)..=(revision, u32::MAX))
                .map_err(MemberError::engine(what))?;
            for entry in range {
                let (at, value) = entry.map_err(MemberError::engine(what))?;
                let (at, value) = (at.value(), value.value());
                changes.push(decode_change(at, value)?);
            }
        }
        let txn = self.begin()?;
        remove_superseded(&txn, &changes, revision).map_err(MemberError::engine(what))?;
        txn.commit().map_err(MemberError::engine(what))?;
        Ok(more)
    }

    /// The engine's file.
    pub(super) fn file(&self) -> Arc<dyn DiskFile> {
        Arc::clone(&self.file)
    }

    pub(super) fn begin(&self) -> Result<WriteTransaction, MemberError> {
        let what = "begin a transaction";
        let mut txn = self
            .database
            .begin_write()
            .map_err(MemberError::engine(what))?;
        txn.set_durability(Durability::Immediate)
            .map_err(MemberError::engine(what))?;
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
            .versions
            .range((key, invert(revision))..=(key, u64::MAX))
            .map_err(MemberError::engine(what))?;
        let Some(entry) = range.next() else {
            return Ok(None);
        };
        let (at, bytes) = entry.map_err(MemberError::engine(what))?;
        let revision = revert(at.value().1);
        Ok(Some((
            revision,
            Version::decode(key, revision, bytes.value())?,
        )))
    }

    /// Changes from `revision` on, up to `limit`, in order.
    pub(super) fn changes(&self, revision: i64, limit: usize) -> Result<Vec<Change>, MemberError> {
        let what = "read changes";
        let mut changes = Vec::new();
        let range = self
            .changes
            .range((revision, 0)..)
            .map_err(MemberError::engine(what))?;
        for entry in range.take(limit) {
            let (at, value) = entry.map_err(MemberError::engine(what))?;
            let (at, value) = (at.value(), value.value());
            changes.push(decode_change(at, value)?);
        }
        Ok(changes)
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
    txn.open_table(VERSIONS)?;
    txn.open_table(CHANGES)?;
    txn.open_table(LEASES)?;
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
    let mut versions = txn.open_table(VERSIONS)?;
    for (key, history) in &overlay.keys {
        for (revision, version) in history {
            version.encode(key, *revision, &mut buffer);
            versions.insert((&key[..], invert(*revision)), &buffer[..])?;
        }
    }
    let mut changes = txn.open_table(CHANGES)?;
    for change in &overlay.changes {
        encode_change(change, &mut buffer);
        changes.insert((change.revision, change.sub), &buffer[..])?;
    }
    let mut leases = txn.open_table(LEASES)?;
    for (id, record) in &overlay.leases {
        match record {
            Some(record) => leases.insert(id, (record.granted, record.remaining))?,
            None => leases.remove(id)?,
        };
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

fn remove_superseded(
    txn: &WriteTransaction,
    changes: &[Change],
    revision: i64,
) -> Result<(), redb::Error> {
    // Only the newest change of each key matters: all older versions of the key go at once.
    let mut keys = BTreeMap::new();
    for change in changes {
        keys.insert(&change.key, change);
    }
    let mut versions = txn.open_table(VERSIONS)?;
    for (key, _) in keys {
        let mut gone = Vec::new();
        let history = (&key[..], invert(revision))..=(&key[..], u64::MAX);
        for (index, entry) in versions.range(history)?.enumerate() {
            let (at, value) = entry?;
            let at = at.value().1;
            // The newest at `revision` is still visible, unless it is a deletion.
            let deletion = Version::decode(key, revert(at), value.value())
                .is_ok_and(|version| version.is_deletion());
            if index > 0 || deletion {
                gone.push(at);
            }
        }
        for at in gone {
            versions.remove((&key[..], at))?;
        }
    }
    let mut table = txn.open_table(CHANGES)?;
    for change in changes.iter().filter(|change| change.revision < revision) {
        table.remove((change.revision, change.sub))?;
    }
    Ok(())
}

fn encode_change(change: &Change, into: &mut Vec<u8>) {
    into.clear();
    into.push(u8::from(change.deletion));
    into.extend_from_slice(&change.key);
}

fn decode_change((revision, sub): ChangeKey, bytes: &[u8]) -> Result<Change, MemberError> {
    match bytes.split_first() {
        Some((kind @ (0 | 1), key)) => Ok(Change {
            revision,
            sub,
            key: Bytes::copy_from_slice(key),
            deletion: *kind == 1,
        }),
        _ => Err(MemberError::Corrupt(format!(
            "the list of changes is unreadable at revision {revision}"
        ))),
    }
}

/// Lets the engine use a [`DiskFile`].
#[derive(Debug)]
struct Backend(Arc<dyn DiskFile>);

impl StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        self.0.length()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read_at(out, offset)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.0.set_length(length)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_at(data, offset)
    }
}
