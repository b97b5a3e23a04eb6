//! The database file, its lock and its witness: opening, checking, reading, committing, closing.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use redb::{ReadTransaction, ReadableDatabase};

use super::errors::Engine;
use super::lock::DirectoryLock;
use super::tables::{FORMAT, META, Number, WriteTables};
use super::witness::Witness;
use crate::{Revision, StateError};

const NAME: &str = "state.redb";

/// The files of one store. Reads run in parallel with each other and with the one writer.
pub(super) struct Database {
    directory: PathBuf,
    cache_bytes: usize,
    /// Closing waits for reads under way, which hold this.
    open: RwLock<Option<Files>>,
}

struct Files {
    // Dropped in this order: the lock last.
    engine: redb::Database,
    witness: Witness,
    _lock: DirectoryLock,
}

impl Database {
    pub(super) fn open(directory: &Path, cache_bytes: usize) -> Result<Self, StateError> {
        std::fs::create_dir_all(directory).map_err(|error| {
            StateError::Storage(format!("create directory {}: {error}", directory.display()))
        })?;
        let database = Self {
            directory: directory.to_path_buf(),
            cache_bytes,
            open: RwLock::new(None),
        };
        database.reopen()?;
        Ok(database)
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Opens the files, closing them first if need be: after a failed write, only what is read
    /// from the disk again is known to be there.
    pub(super) fn reopen(&self) -> Result<(), StateError> {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        // Closes before opening, since both would want the lock.
        *open = None;
        let lock = DirectoryLock::acquire(&self.directory)?;
        let witness = Witness::open(&self.directory)?;
        let engine = self.open_engine()?;
        prepare(&engine, &self.directory)?;
        let revision = revision(&engine)?;
        witness.check(revision)?;
        sync_directory(&self.directory)?;
        *open = Some(Files {
            engine,
            witness,
            _lock: lock,
        });
        Ok(())
    }

    fn open_engine(&self) -> Result<redb::Database, StateError> {
        let path = self.directory.join(NAME);
        let tried = format!("open {}", path.display());
        // The check reads the whole file, verifies every page's checksum and fails on a mismatch;
        // without it the engine trusts pages, and may panic on damaged ones.
        redb::Database::builder()
            .set_cache_size(self.cache_bytes)
            .set_check_integrity_on_open(true)
            .create(path)
            .engine(&tried)
    }

    /// Runs `read` on the newest committed state.
    pub(super) fn read<T>(
        &self,
        read: impl FnOnce(&ReadTransaction) -> Result<T, StateError>,
    ) -> Result<T, StateError> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        let files = open.as_ref().ok_or(StateError::Closed)?;
        read(&files.engine.begin_read().engine("begin a read")?)
    }

    /// Runs `write` in one engine transaction and makes it durable. On an error nothing is changed,
    /// except that after a failed commit it is unknown: [`reopen`](Self::reopen).
    pub(super) fn write<T>(
        &self,
        write: impl FnOnce(&mut WriteTables<'_>) -> Result<T, StateError>,
    ) -> Result<T, StateError> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        let files = open.as_ref().ok_or(StateError::Closed)?;
        let (result, revision) = commit(&files.engine, |tables| {
            let result = write(tables)?;
            Ok((result, Number::Revision.require(&tables.meta)?))
        })?;
        files.witness.write(revision)?;
        Ok(result)
    }

    pub(super) fn close(&self) -> Result<(), StateError> {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        let Some(files) = open.take() else {
            return Ok(());
        };
        let synced = files.witness.sync();
        files.engine.close().engine("close the database")?;
        synced
    }

    pub(super) fn size_bytes(&self) -> u64 {
        std::fs::metadata(self.directory.join(NAME)).map_or(0, |metadata| metadata.len())
    }
}

impl fmt::Debug for Database {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Database")
            .field("directory", &self.directory)
            .finish_non_exhaustive()
    }
}

fn commit<T>(
    engine: &redb::Database,
    write: impl FnOnce(&mut WriteTables<'_>) -> Result<T, StateError>,
) -> Result<T, StateError> {
    let mut txn = engine.begin_write().engine("begin a write")?;
    // One-phase commits save a sync, but if the newest pages are found damaged later, the engine
    // takes them for an unfinished commit and silently goes back to the one before.
    txn.set_two_phase_commit(true);
    let mut tables = WriteTables::open(&txn)?;
    let result = write(&mut tables);
    drop(tables);
    match result {
        Ok(result) => {
            txn.commit().engine("commit")?;
            Ok(result)
        }
        Err(error) => {
            txn.abort().engine("abort")?;
            Err(error)
        }
    }
}

/// Checks the format of a store that exists, and makes one that doesn't.
fn prepare(engine: &redb::Database, directory: &Path) -> Result<(), StateError> {
    match format(engine)? {
        Some(FORMAT) => Ok(()),
        Some(found) => Err(StateError::NewerFormat {
            path: directory.to_path_buf(),
            found,
            supported: FORMAT,
        }),
        None => commit(engine, |tables| {
            Number::Format.write(&mut tables.meta, FORMAT)?;
            Number::Revision.write(&mut tables.meta, 1)?;
            Number::CompactRevision.write(&mut tables.meta, 0)?;
            Number::Cleared.write(&mut tables.meta, 0)
        }),
    }
}

fn format(engine: &redb::Database) -> Result<Option<i64>, StateError> {
    let txn = engine.begin_read().engine("begin a read")?;
    let mut tables = txn.list_tables().engine("list tables")?;
    if tables.next().is_none() {
        return Ok(None);
    }
    let meta = txn.open_table(META).engine("open a table")?;
    Number::Format.require(&meta).map(Some)
}

fn revision(engine: &redb::Database) -> Result<Revision, StateError> {
    let txn = engine.begin_read().engine("begin a read")?;
    Number::Revision.require(&txn.open_table(META).engine("open a table")?)
}

/// Makes the names of new files survive a power failure.
fn sync_directory(directory: &Path) -> Result<(), StateError> {
    std::fs::File::open(directory)
        .and_then(|file| file.sync_all())
        .map_err(|error| StateError::Storage(format!("sync {}: {error}", directory.display())))
}
