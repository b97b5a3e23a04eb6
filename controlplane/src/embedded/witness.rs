//! Remembers the newest acknowledged revision outside of the database file.
//!
//! The engine's header says which of its two roots is the current one, in a byte without a
//! checksum: if that byte is damaged, an older root, valid in itself, is taken for the current one.
//! The witness tells. It is written after each commit and before anything is acknowledged, without
//! a sync of its own: it survives the process, and after a power failure it is older than the
//! database at worst, which proves nothing and accuses nobody.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::record::{seal, unseal};
use crate::{Revision, StateError};

const NAME: &str = "newest-revision";
const CONTEXT: &[u8] = b"keelson newest revision";

#[derive(Debug)]
pub(super) struct Witness {
    file: File,
}

impl Witness {
    pub(super) fn open(directory: &Path) -> Result<Self, StateError> {
        let path = directory.join(NAME);
        let options = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .clone();
        let file = options
            .open(&path)
            .map_err(|error| StateError::Storage(format!("open {}: {error}", path.display())))?;
        Ok(Self { file })
    }

    /// Refuses a database at `revision` if a newer one has been acknowledged.
    pub(super) fn check(&self, revision: Revision) -> Result<(), StateError> {
        match self.read() {
            Some(witnessed) if witnessed > revision => Err(StateError::Corrupt(format!(
                "it ends at revision {revision}, but revision {witnessed} had been acknowledged"
            ))),
            // A torn or missing witness is replaced by the next write.
            _ => Ok(()),
        }
    }

    pub(super) fn write(&self, revision: Revision) -> Result<(), StateError> {
        let bytes = seal(CONTEXT, &revision.to_le_bytes());
        self.file
            .write_all_at(&bytes, 0)
            .map_err(|error| StateError::Storage(format!("write {NAME}: {error}")))
    }

    pub(super) fn sync(&self) -> Result<(), StateError> {
        self.file
            .sync_data()
            .map_err(|error| StateError::Storage(format!("sync {NAME}: {error}")))
    }

    fn read(&self) -> Option<Revision> {
        let mut bytes = [0; 12];
        self.file.read_exact_at(&mut bytes, 0).ok()?;
        let body = unseal(CONTEXT, &bytes)?;
        Some(i64::from_le_bytes(<[u8; 8]>::try_from(body).ok()?))
    }
}
