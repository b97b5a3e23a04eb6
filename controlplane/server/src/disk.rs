//! The disk that a server gives its member: how long syncs take is measured, and while there is no
//! room, who writes waits.
//!
//! A write that fails would leave the storage engine, or the log, unusable until the process starts
//! again, and that may be what there is no room for. So a write without room is tried again until
//! there is some. Only threads wait that write: reads go on, and requests that need more room are
//! refused before they come here (see [`room`](crate::room)). A member whose log waits is silent:
//! others lead.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use keelson_member::disk::{Disk, DiskFile};
use prometheus::Histogram;

use crate::stall::SlowSyncs;

/// How often a write without room is tried again.
const RETRY: Duration = Duration::from_millis(200);
/// Files that the log has in reserve: one that can't be made is no loss.
const SPARE: &str = "spare-";

/// A disk whose syncs are measured, and whose writes wait for room.
#[derive(Debug)]
pub struct ServerDisk {
    disk: Arc<dyn Disk>,
    log: Histogram,
    engine: Histogram,
    slow: SlowSyncs,
    waiting: Waiting,
}

/// Writes that wait for room now.
#[derive(Debug, Clone, Default)]
pub struct Waiting(Arc<AtomicUsize>);

impl Waiting {
    /// Whether there are any.
    pub fn any(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }

    /// Does something that needs room until it is done, or fails for another reason.
    fn until_done<T>(&self, name: &str, act: impl Fn() -> io::Result<T>) -> io::Result<T> {
        let outcome = act();
        if !outcome.as_ref().is_err_and(needs_room) {
            return outcome;
        }
        tracing::error!(file = name, "no room on the disk: a write waits for it");
        self.0.fetch_add(1, Ordering::Relaxed);
        let outcome = loop {
            std::thread::sleep(RETRY);
            let outcome = act();
            if !outcome.as_ref().is_err_and(needs_room) {
                break outcome;
            }
        };
        self.0.fetch_sub(1, Ordering::Relaxed);
        tracing::info!(file = name, "there is room again");
        outcome
    }
}

fn needs_room(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

impl ServerDisk {
    /// Syncs of files written in blocks, the log's, go to `log`; those of others to `engine`.
    pub fn new(
        disk: Arc<dyn Disk>,
        log: Histogram,
        engine: Histogram,
        slow: SlowSyncs,
        waiting: Waiting,
    ) -> Self {
        Self {
            disk,
            log,
            engine,
            slow,
            waiting,
        }
    }

    fn file(&self, name: &str, file: Arc<dyn DiskFile>, is_log: bool) -> Arc<dyn DiskFile> {
        let syncs = if is_log { &self.log } else { &self.engine };
        let is_spare = name.starts_with(SPARE);
        Arc::new(ServerFile {
            name: name.to_owned(),
            file,
            syncs: syncs.clone(),
            slow: (is_log && !is_spare).then(|| self.slow.clone()),
            writing: AtomicU64::new(0),
            waiting: (!is_spare).then(|| self.waiting.clone()),
        })
    }
}

impl Disk for ServerDisk {
    fn open(&self, name: &str, create: bool) -> io::Result<Arc<dyn DiskFile>> {
        let open = || self.disk.open(name, create);
        let file = self.waiting.until_done(name, open)?;
        Ok(self.file(name, file, false))
    }

    fn open_for_blocks(&self, name: &str, create: bool) -> io::Result<Arc<dyn DiskFile>> {
        let open = || self.disk.open_for_blocks(name, create);
        let file = if name.starts_with(SPARE) {
            open()?
        } else {
            self.waiting.until_done(name, open)?
        };
        Ok(self.file(name, file, true))
    }

    fn list(&self) -> io::Result<Vec<String>> {
        self.disk.list()
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.waiting.until_done(from, || self.disk.rename(from, to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.disk.remove(name)
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.sync()
    }
}

#[derive(Debug)]
struct ServerFile {
    name: String,
    file: Arc<dyn DiskFile>,
    syncs: Histogram,
    /// Of the log.
    slow: Option<SlowSyncs>,
    /// Nanoseconds that writes to the log took since the last sync. They go around the page cache: with
    /// them, most of the time that the disk needs is over before the sync begins.
    writing: AtomicU64,
    /// `None` if a write may fail.
    waiting: Option<Waiting>,
}

impl ServerFile {
    fn write(&self, act: impl Fn() -> io::Result<()>) -> io::Result<()> {
        match &self.waiting {
            Some(waiting) => waiting.until_done(&self.name, act),
            None => act(),
        }
    }
}

impl DiskFile for ServerFile {
    fn length(&self) -> io::Result<u64> {
        self.file.length()
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_at(bytes, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let started = Instant::now();
        let outcome = self.write(|| self.file.write_at(bytes, offset));
        if self.slow.is_some() {
            let took = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
            self.writing.fetch_add(took, Ordering::Relaxed);
        }
        outcome
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.write(|| self.file.set_length(length))
    }

    fn sync_data(&self) -> io::Result<()> {
        let started = Instant::now();
        let outcome = self.file.sync_data();
        let writing = Duration::from_nanos(self.writing.swap(0, Ordering::Relaxed));
        let took = started.elapsed() + writing;
        self.syncs.observe(took.as_secs_f64());
        if let Some(slow) = &self.slow {
            slow.note(took);
        }
        outcome
    }
}
