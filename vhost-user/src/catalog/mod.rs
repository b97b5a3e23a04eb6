//! The disks of this process: what they are made of, and what can be done to them while they are
//! served.

mod served_disk;
mod spec;
mod status;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use self::served_disk::{ServedDisk, open};
pub use self::spec::{BaseSpec, Contents, DiskSpec};
use self::spec::{check, check_limits};
pub use self::status::DiskStatus;
use crate::Error;
use crate::disk::Disk;
use crate::layer::limit::LimitDevice;
use crate::rate_limit::{Limiter, Limits};
use crate::sector_cipher::SectorCipher;
use crate::server::{DiskServer, ServerOptions};
use crate::worker::WorkerPool;

/// The most disks of one process.
const MAX_DISKS: usize = 1024;

/// All disks of the process.
#[derive(Debug)]
pub struct Catalog {
    workers: Arc<WorkerPool>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    disks: BTreeMap<String, ServedDisk>,
    groups: BTreeMap<String, Arc<Limiter>>,
}

impl Catalog {
    /// An empty one, whose queues these workers serve.
    pub fn new(workers: Arc<WorkerPool>) -> Self {
        Self {
            workers,
            state: Mutex::default(),
        }
    }

    /// Opens a disk and serves it. `ended` is called when serving it has ended by itself.
    pub fn add(
        &self,
        spec: DiskSpec,
        cipher: Option<Arc<SectorCipher>>,
        ended: impl FnOnce() + Send + 'static,
    ) -> Result<DiskStatus, Error> {
        let mut state = self.state();
        if state.disks.contains_key(&spec.id) {
            return Err(refuse(&spec.id, "there is a disk of this name already"));
        }
        if state.disks.len() >= MAX_DISKS {
            return Err(refuse(
                &spec.id,
                "this process has 1024 disks, the most it serves",
            ));
        }
        let serial = check(&spec)?;
        let limiter = Arc::new(Limiter::new(spec.limits, Instant::now()));
        let mut limiters = vec![Arc::clone(&limiter)];
        if let Some(group) = &spec.group {
            let unlimited = || Arc::new(Limiter::new(Limits::default(), Instant::now()));
            let group = state.groups.entry(group.clone()).or_insert_with(unlimited);
            limiters.push(Arc::clone(group));
        }
        let encrypted = cipher.is_some();
        let opened = open(&spec, cipher)?;
        let device = Arc::new(LimitDevice::new(opened.device, limiters));
        let options = ServerOptions {
            socket: spec.socket.clone(),
            queues: spec.queues,
            queue_size: spec.queue_size,
        };
        let disk = Arc::new(Disk::new(device, serial));
        let removed = Arc::new(AtomicBool::new(false));
        let asked_for = Arc::clone(&removed);
        let ended = move || {
            if !asked_for.load(Ordering::Acquire) {
                ended();
            }
        };
        let server = DiskServer::start(options, disk, Arc::clone(&self.workers), ended)?;
        let id = spec.id.clone();
        let entry = ServedDisk {
            spec,
            server,
            limiter,
            overlay: opened.overlay,
            image: opened.image,
            uncached: opened.uncached,
            encrypted,
            removed,
        };
        let status = entry.status();
        state.disks.insert(id, entry);
        Ok(status)
    }

    /// Stops serving a disk: what is in flight is finished, and everything is made durable.
    pub fn remove(&self, id: &str) -> Result<(), Error> {
        let disk = self.state().disks.remove(id);
        let disk = disk.ok_or_else(|| unknown(id))?;
        disk.removed.store(true, Ordering::Release);
        disk.server.stop()
    }

    /// Stops serving all disks. The first failure counts.
    pub fn stop(&self) -> Result<(), Error> {
        let disks = std::mem::take(&mut self.state().disks);
        for disk in disks.values() {
            disk.server.begin_stop();
        }
        let mut outcome = Ok(());
        for disk in disks.into_values() {
            let stopped = disk.server.stop();
            if outcome.is_ok() {
                outcome = stopped;
            }
        }
        outcome
    }

    /// Makes a disk larger, or takes over the size that its raw image has by now, and tells the
    /// guest. Returns the size in bytes.
    pub fn resize(&self, id: &str, bytes: Option<u64>) -> Result<u64, Error> {
        self.with(id, |disk| {
            if let Some(bytes) = bytes {
                disk.grow(bytes)?;
            }
            if disk.server.resize()? {
                let bytes = disk.server.disk().capacity_bytes();
                tracing::info!(disk = id, bytes, "the disk was resized");
            }
            Ok(disk.server.disk().capacity_bytes())
        })
    }

    /// Takes over the size that the images have by now, and tells the guests.
    pub fn resize_all(&self) {
        let ids: Vec<String> = self.state().disks.keys().cloned().collect();
        for id in ids {
            if let Err(error) = self.resize(&id, None) {
                tracing::error!(disk = id, %error, "the disk can't be resized");
            }
        }
    }

    /// Makes a snapshot of an overlay between two requests, and goes on in a new layer. Returns
    /// the snapshot's path.
    pub fn snapshot(&self, id: &str, name: &str) -> Result<PathBuf, Error> {
        self.with(id, |disk| {
            let overlay = disk.overlay.clone();
            let overlay = overlay.ok_or_else(|| refuse(id, "only overlays have snapshots"))?;
            if disk.spec.read_only {
                return Err(refuse(id, "it is read-only"));
            }
            disk.server.while_paused(|| overlay.snapshot(name))?
        })
    }

    /// Changes a disk's limits at once.
    pub fn limit(&self, id: &str, limits: Limits) -> Result<(), Error> {
        check_limits(id, limits)?;
        self.with(id, |disk| {
            disk.spec.limits = limits;
            disk.limiter.set(limits, Instant::now());
            Ok(())
        })
    }

    /// Changes the limits of a group at once; it may have no disks yet.
    pub fn limit_group(&self, group: &str, limits: Limits) -> Result<(), Error> {
        check_limits(group, limits)?;
        let mut state = self.state();
        if state.groups.len() >= MAX_DISKS && !state.groups.contains_key(group) {
            return Err(refuse(
                group,
                "this process has 1024 groups, the most it knows",
            ));
        }
        let now = Instant::now();
        let limiter = state.groups.entry(group.into());
        limiter
            .or_insert_with(|| Arc::new(Limiter::new(limits, now)))
            .set(limits, now);
        Ok(())
    }

    /// All disks by their names.
    pub fn list(&self) -> Vec<DiskStatus> {
        let state = self.state();
        state.disks.values().map(ServedDisk::status).collect()
    }

    /// The groups and their limits.
    pub fn groups(&self) -> BTreeMap<String, Limits> {
        let state = self.state();
        let groups = state.groups.iter();
        groups
            .map(|(name, limiter)| (name.clone(), limiter.limits()))
            .collect()
    }

    fn with<T>(
        &self,
        id: &str,
        act: impl FnOnce(&mut ServedDisk) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut state = self.state();
        act(state.disks.get_mut(id).ok_or_else(|| unknown(id))?)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn refuse(id: &str, reason: &str) -> Error {
    Error::io(
        format!("disk {id}"),
        io::Error::new(io::ErrorKind::InvalidInput, reason),
    )
}

fn unknown(id: &str) -> Error {
    Error::io(
        format!("disk {id}"),
        io::Error::new(io::ErrorKind::NotFound, "there is none of this name"),
    )
}
