//! The disk with a clock: how long syncs take, which says more about a store than anything else.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use keelson_member::disk::{Disk, DiskFile};
use prometheus::Histogram;

/// A disk whose syncs are measured.
#[derive(Debug)]
pub struct TimedDisk {
    disk: Arc<dyn Disk>,
    log: Histogram,
    engine: Histogram,
}

impl TimedDisk {
    /// Syncs of files written in blocks, the log's, go to `log`; those of others to `engine`.
    pub fn new(disk: Arc<dyn Disk>, log: Histogram, engine: Histogram) -> Self {
        Self { disk, log, engine }
    }
}

impl Disk for TimedDisk {
    fn open(&self, name: &str, create: bool) -> io::Result<Arc<dyn DiskFile>> {
        let file = self.disk.open(name, create)?;
        let syncs = self.engine.clone();
        Ok(Arc::new(TimedFile { file, syncs }))
    }

    fn open_for_blocks(&self, name: &str, create: bool) -> io::Result<Arc<dyn DiskFile>> {
        let file = self.disk.open_for_blocks(name, create)?;
        let syncs = self.log.clone();
        Ok(Arc::new(TimedFile { file, syncs }))
    }

    fn list(&self) -> io::Result<Vec<String>> {
        self.disk.list()
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.disk.rename(from, to)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.disk.remove(name)
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.sync()
    }
}

#[derive(Debug)]
struct TimedFile {
    file: Arc<dyn DiskFile>,
    syncs: Histogram,
}

impl DiskFile for TimedFile {
    fn length(&self) -> io::Result<u64> {
        self.file.length()
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_at(bytes, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_at(bytes, offset)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.file.set_length(length)
    }

    fn sync_data(&self) -> io::Result<()> {
        let started = Instant::now();
        let outcome = self.file.sync_data();
        self.syncs.observe(started.elapsed().as_secs_f64());
        outcome
    }
}
