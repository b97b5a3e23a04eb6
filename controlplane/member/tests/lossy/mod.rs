//! A disk in memory that knows what it would keep.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use keelson_member::disk::{Disk, DiskFile};

/// A disk whose power can be lost: what was not synced is gone then. Names are durable at once.
#[derive(Debug, Clone, Default)]
pub struct LossyDisk {
    files: Arc<Mutex<BTreeMap<String, LossyFile>>>,
}

#[derive(Debug, Clone, Default)]
struct LossyFile(Arc<Mutex<Contents>>);

#[derive(Debug, Clone, Default)]
struct Contents {
    written: Vec<u8>,
    synced: Vec<u8>,
}

impl LossyDisk {
    /// Another disk, with what this one would keep if its power was lost now.
    pub fn after_power_loss(&self) -> Self {
        let files = self.files.lock().unwrap();
        let kept = files.iter().map(|(name, file)| {
            let synced = file.contents().synced.clone();
            let contents = Contents {
                written: synced.clone(),
                synced,
            };
            (name.clone(), LossyFile(Arc::new(Mutex::new(contents))))
        });
        Self {
            files: Arc::new(Mutex::new(kept.collect())),
        }
    }
}

impl LossyFile {
    fn contents(&self) -> MutexGuard<'_, Contents> {
        self.0.lock().unwrap()
    }
}

impl Disk for LossyDisk {
    fn open(&self, name: &str, create: bool) -> io::Result<Arc<dyn DiskFile>> {
        let mut files = self.files.lock().unwrap();
        if !create && !files.contains_key(name) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let file = files.entry(name.to_owned()).or_default();
        Ok(Arc::new(file.clone()))
    }

    fn open_for_blocks(&self, name: &str, create: bool) -> io::Result<Arc<dyn DiskFile>> {
        self.open(name, create)
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.files.lock().unwrap().keys().cloned().collect())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut files = self.files.lock().unwrap();
        let file = files.remove(from).ok_or(io::ErrorKind::NotFound)?;
        files.insert(to.to_owned(), file);
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let removed = self.files.lock().unwrap().remove(name);
        removed.map(drop).ok_or(io::ErrorKind::NotFound.into())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

impl DiskFile for LossyFile {
    fn length(&self) -> io::Result<u64> {
        Ok(self.contents().written.len() as u64)
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let contents = self.contents();
        let from = usize::try_from(offset).unwrap();
        let found = contents.written.get(from..from + bytes.len());
        bytes.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut contents = self.contents();
        let from = usize::try_from(offset).unwrap();
        let end = from + bytes.len();
        if contents.written.len() < end {
            contents.written.resize(end, 0);
        }
        contents.written[from..end].copy_from_slice(bytes);
        Ok(())
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        let length = usize::try_from(length).unwrap();
        self.contents().written.resize(length, 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut contents = self.contents();
        let contents = &mut *contents;
        contents.synced.clone_from(&contents.written);
        Ok(())
    }
}
