//! The tables of the database file and what is in their single-value entries.

use redb::{ReadableTable, Table, TableDefinition, WriteTransaction};

use super::errors::Engine;
use super::record::{seal, unseal};
use crate::{Revision, StateError};

/// Format version of the tables below. A file with a higher one is refused.
pub(super) const FORMAT: i64 = 1;

pub(super) type Key = (Revision, u32);
pub(super) type IndexKey = (&'static [u8], Revision, u32);

/// Name to sealed 8-byte number: [`Number`].
pub(super) const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
/// Key to its current record. Deleted keys are absent.
pub(super) const CURRENT: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("current");
/// Position to the record of that change, from the compacted revision on.
pub(super) const HISTORY: TableDefinition<'_, Key, &[u8]> = TableDefinition::new("history");
/// Key and position of each of its records in history.
pub(super) const INDEX: TableDefinition<'_, IndexKey, ()> = TableDefinition::new("index");
/// Lease to its sealed granted and remaining time.
pub(super) const LEASES: TableDefinition<'_, i64, &[u8]> = TableDefinition::new("leases");
/// Lease and key attached to it.
pub(super) const LEASE_KEYS: TableDefinition<'_, (i64, &[u8]), ()> =
    TableDefinition::new("lease-keys");

/// A number in [`META`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Number {
    /// [`FORMAT`] of the file.
    Format,
    /// The current revision.
    Revision,
    /// Revisions before this can't be read.
    CompactRevision,
    /// History has been cleared up to this one; behind the former after a crash.
    Cleared,
}

impl Number {
    fn name(self) -> &'static str {
        match self {
            Self::Format => "format",
            Self::Revision => "revision",
            Self::CompactRevision => "compact-revision",
            Self::Cleared => "cleared",
        }
    }

    /// The number in `meta`, or `None` if it was never set.
    pub(super) fn read(
        self,
        meta: &impl ReadableTable<&'static str, &'static [u8]>,
    ) -> Result<Option<i64>, StateError> {
        let Some(bytes) = meta.get(self.name()).engine("read a number")? else {
            return Ok(None);
        };
        let number = unseal(self.name().as_bytes(), bytes.value())
            .and_then(|body| <[u8; 8]>::try_from(body).ok())
            .map(i64::from_le_bytes);
        match number {
            Some(number) => Ok(Some(number)),
            None => Err(StateError::Corrupt(format!(
                "{} fails its checksum",
                self.name()
            ))),
        }
    }

    /// The number in `meta`, which must be there.
    pub(super) fn require(
        self,
        meta: &impl ReadableTable<&'static str, &'static [u8]>,
    ) -> Result<i64, StateError> {
        self.read(meta)?
            .ok_or_else(|| StateError::Corrupt(format!("{} is missing", self.name())))
    }

    pub(super) fn write(
        self,
        meta: &mut Table<'_, &'static str, &'static [u8]>,
        number: i64,
    ) -> Result<(), StateError> {
        let bytes = seal(self.name().as_bytes(), &number.to_le_bytes());
        meta.insert(self.name(), bytes.as_slice())
            .engine("write a number")?;
        Ok(())
    }
}

/// Every table, open for writing in one engine transaction.
pub(super) struct WriteTables<'txn> {
    pub(super) meta: Table<'txn, &'static str, &'static [u8]>,
    pub(super) current: Table<'txn, &'static [u8], &'static [u8]>,
    pub(super) history: Table<'txn, Key, &'static [u8]>,
    pub(super) index: Table<'txn, IndexKey, ()>,
    pub(super) leases: Table<'txn, i64, &'static [u8]>,
    pub(super) lease_keys: Table<'txn, (i64, &'static [u8]), ()>,
}

impl<'txn> WriteTables<'txn> {
    pub(super) fn open(txn: &'txn WriteTransaction) -> Result<Self, StateError> {
        let what = "open a table";
        Ok(Self {
            meta: txn.open_table(META).engine(what)?,
            current: txn.open_table(CURRENT).engine(what)?,
            history: txn.open_table(HISTORY).engine(what)?,
            index: txn.open_table(INDEX).engine(what)?,
            leases: txn.open_table(LEASES).engine(what)?,
            lease_keys: txn.open_table(LEASE_KEYS).engine(what)?,
        })
    }
}
