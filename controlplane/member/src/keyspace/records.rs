//! Records of the engine's tables as a snapshot carries them.

use redb::{ReadableDatabase as _, WriteTransaction};

use super::engine::{ATTACHMENTS, Engine, GRANTS, INDEX, IndexKey, LEASES, METADATA, RECORDS};
use super::metadata::Metadata;
use crate::MemberError;

const READ: &str = "read a snapshot";
const LOAD: &str = "load a snapshot";

/// Tables whose records are in a snapshot; the numbers are in its format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Table {
    /// Key to inverted revision and version without value.
    Index = 1,
    /// Revision and position to key and version.
    Records = 2,
    /// Id to granted and remaining seconds.
    Leases = 3,
    /// Id and key to nothing.
    Attachments = 4,
    /// Id to the log index of its grant.
    Grants = 5,
}

/// A table, a key and a value.
pub(super) type Record = (Table, Vec<u8>, Vec<u8>);

impl Table {
    pub(super) fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Index),
            2 => Some(Self::Records),
            3 => Some(Self::Leases),
            4 => Some(Self::Attachments),
            5 => Some(Self::Grants),
            _ => None,
        }
    }
}

/// Reads every record, table after table, of one moment.
pub(super) struct RecordReader {
    index: redb::Range<'static, IndexKey, &'static [u8]>,
    records: redb::Range<'static, (i64, u32), &'static [u8]>,
    leases: redb::Range<'static, i64, (i64, i64)>,
    attachments: redb::Range<'static, (i64, &'static [u8]), ()>,
    grants: redb::Range<'static, i64, u64>,
}

impl RecordReader {
    /// The next record, `None` after the last.
    pub(super) fn next(&mut self) -> Result<Option<Record>, MemberError> {
        if let Some(entry) = self.index.next() {
            let (key, version) = entry.map_err(MemberError::engine(READ))?;
            let (key, revision) = key.value();
            let mut value = revision.to_le_bytes().to_vec();
            value.extend_from_slice(version.value());
            return Ok(Some((Table::Index, key.to_vec(), value)));
        }
        if let Some(entry) = self.records.next() {
            let (at, change) = entry.map_err(MemberError::engine(READ))?;
            let (revision, sub) = at.value();
            let mut key = revision.to_le_bytes().to_vec();
            key.extend_from_slice(&sub.to_le_bytes());
            return Ok(Some((Table::Records, key, change.value().to_vec())));
        }
        if let Some(entry) = self.leases.next() {
            let (id, record) = entry.map_err(MemberError::engine(READ))?;
            let (granted, remaining) = record.value();
            let mut value = granted.to_le_bytes().to_vec();
            value.extend_from_slice(&remaining.to_le_bytes());
            return Ok(Some((
                Table::Leases,
                id.value().to_le_bytes().to_vec(),
                value,
            )));
        }
        if let Some(entry) = self.attachments.next() {
            let (attachment, _) = entry.map_err(MemberError::engine(READ))?;
            let (id, attached) = attachment.value();
            let mut key = id.to_le_bytes().to_vec();
            key.extend_from_slice(attached);
            return Ok(Some((Table::Attachments, key, Vec::new())));
        }
        if let Some(entry) = self.grants.next() {
            let (id, index) = entry.map_err(MemberError::engine(READ))?;
            let key = id.value().to_le_bytes().to_vec();
            let value = index.value().to_le_bytes().to_vec();
            return Ok(Some((Table::Grants, key, value)));
        }
        Ok(None)
    }
}

impl Engine {
    /// What was last flushed: metadata, and a reader of every record.
    pub(super) fn records(&self) -> Result<(Metadata, RecordReader), MemberError> {
        let txn = self
            .database
            .begin_read()
            .map_err(MemberError::engine(READ))?;
        let table = txn
            .open_table(METADATA)
            .map_err(MemberError::engine(READ))?;
        let metadata = table
            .get(())
            .map_err(MemberError::engine(READ))?
            .ok_or_else(|| MemberError::Corrupt("the keyspace has no metadata".into()))?;
        let metadata = Metadata::decode(metadata.value())?;
        let open = || -> Result<RecordReader, redb::Error> {
            Ok(RecordReader {
                index: txn.open_table(INDEX)?.range::<(&[u8], u64)>(..)?,
                records: txn.open_table(RECORDS)?.range::<(i64, u32)>(..)?,
                leases: txn.open_table(LEASES)?.range::<i64>(..)?,
                attachments: txn.open_table(ATTACHMENTS)?.range::<(i64, &[u8])>(..)?,
                grants: txn.open_table(GRANTS)?.range::<i64>(..)?,
            })
        };
        Ok((metadata, open().map_err(MemberError::engine(READ))?))
    }

    /// Adds records, durably.
    pub(super) fn load_records(&self, records: Vec<Record>) -> Result<(), MemberError> {
        let txn = self.begin()?;
        for (table, key, value) in records {
            if !insert(&txn, table, &key, &value).map_err(MemberError::engine(LOAD))? {
                return Err(MemberError::DamagedSnapshot(
                    "a record has a wrong size".into(),
                ));
            }
        }
        txn.commit().map_err(MemberError::engine(LOAD))
    }
}

/// Inserts a record; `false` if it makes no sense.
fn insert(
    txn: &WriteTransaction,
    table: Table,
    key: &[u8],
    value: &[u8],
) -> Result<bool, redb::Error> {
    match table {
        Table::Index => {
            let Some((revision, version)) = value.split_first_chunk() else {
                return Ok(false);
            };
            txn.open_table(INDEX)?
                .insert((key, u64::from_le_bytes(*revision)), version)?;
        }
        Table::Records => {
            let Some((revision, sub)) = key.split_first_chunk() else {
                return Ok(false);
            };
            let Ok(sub) = sub.try_into() else {
                return Ok(false);
            };
            let at = (i64::from_le_bytes(*revision), u32::from_le_bytes(sub));
            txn.open_table(RECORDS)?.insert(at, value)?;
        }
        Table::Leases => {
            let (Ok(id), Some((granted, remaining))) = (key.try_into(), value.split_first_chunk())
            else {
                return Ok(false);
            };
            let Ok(remaining) = remaining.try_into() else {
                return Ok(false);
            };
            let record = (i64::from_le_bytes(*granted), i64::from_le_bytes(remaining));
            txn.open_table(LEASES)?
                .insert(i64::from_le_bytes(id), record)?;
        }
        Table::Attachments => {
            let Some((id, attached)) = key.split_first_chunk() else {
                return Ok(false);
            };
            txn.open_table(ATTACHMENTS)?
                .insert((i64::from_le_bytes(*id), attached), ())?;
        }
        Table::Grants => {
            let (Ok(id), Ok(index)) = (key.try_into(), value.try_into()) else {
                return Ok(false);
            };
            txn.open_table(GRANTS)?
                .insert(i64::from_le_bytes(id), u64::from_le_bytes(index))?;
        }
    }
    Ok(true)
}
