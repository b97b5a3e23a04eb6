//! The disks of this process: what they are made of, and what can be done to them while they are
//! served.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::Error;
use crate::disk::{Disk, SERIAL_SIZE};
use crate::image::{DirectMode, Image, ImageOptions};
use crate::latency::Latencies;
use crate::layer::BlockDevice;
use crate::layer::crypt::CryptDevice;
use crate::layer::file::FileDevice;
use crate::layer::limit::LimitDevice;
use crate::layer::null::NullDevice;
use crate::layer::overlay::OverlayDevice;
use crate::metrics::{OPERATIONS, QueueCounters};
use crate::overlay::chain::SourceCounters;
use crate::overlay::files::OpenOptions;
use crate::rate_limit::{Limiter, Limits};
use crate::remote::{self, ClientOptions, FetchOptions};
use crate::sector_cipher::SectorCipher;
use crate::server::{DiskServer, ServerOptions};
use crate::worker::WorkerPool;

/// The most disks of one process.
const MAX_DISKS: usize = 1024;

/// What a disk is made of, and how it is served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// Its name in this process.
    pub id: String,
    /// The Unix socket to listen on.
    pub socket: PathBuf,
    /// What holds the data.
    pub contents: Contents,
    /// Whether writes are refused.
    #[serde(default)]
    pub read_only: bool,
    /// Virtqueues, 1 to 64.
    #[serde(default = "one")]
    pub queues: u16,
    /// Most descriptors in a virtqueue, a power of two from 4 to 1024.
    #[serde(default = "largest_queue")]
    pub queue_size: u16,
    /// The serial number that the guest sees, up to 20 bytes.
    #[serde(default)]
    pub serial: String,
    /// Whether to go around the page cache.
    #[serde(default)]
    pub direct: DirectMode,
    /// Its limits.
    #[serde(default, skip_serializing_if = "Limits::is_unlimited")]
    pub limits: Limits,
    /// The group with which it shares limits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// How a base on a server is fetched.
    #[serde(default, skip_serializing_if = "BaseSpec::is_default")]
    pub base: BaseSpec,
}

/// How an overlay's base on a server is fetched.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BaseSpec {
    /// Certificates (PEM) to trust instead of the system's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// Also fetch what the guest hasn't asked for, at this many bytes a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fill_bytes_per_second: Option<u64>,
    /// After how many seconds a request that waits for the server fails; 30 unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_seconds: Option<u64>,
}

impl BaseSpec {
    /// Whether nothing is given.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// The options that it stands for.
    pub fn fetch_options(&self) -> FetchOptions {
        let defaults = FetchOptions::default();
        let patience = self.timeout_seconds.map(Duration::from_secs);
        FetchOptions {
            client: ClientOptions {
                ca_file: self.ca_file.clone(),
            },
            patience: patience.unwrap_or(defaults.patience),
            fill: self.fill_bytes_per_second,
        }
    }
}

/// What holds a disk's data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Contents {
    /// A raw file or a block device.
    Raw(PathBuf),
    /// An overlay, made by `keelson-blk image create`.
    Overlay(PathBuf),
    /// Nothing, of this many bytes.
    Null(u64),
}

fn one() -> u16 {
    1
}

fn largest_queue() -> u16 {
    1024
}

/// What a disk looks like now.
#[derive(Clone, Debug, Serialize)]
pub struct DiskStatus {
    /// What it is made of.
    #[serde(flatten)]
    pub spec: DiskSpec,
    /// Its size in bytes, as the guest sees it.
    pub capacity_bytes: u64,
    /// Whether all of it goes around the page cache.
    pub uncached: bool,
    /// Whether its data is encrypted.
    pub encrypted: bool,
    /// Layers of an overlay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<usize>,
    /// What was fetched of a base on a server.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<SourceCounters>,
    /// The counters of each queue.
    pub counters: Vec<QueueCounters>,
    /// How long requests took, in the order of [`OPERATIONS`].
    #[serde(skip)]
    pub latencies: [Latencies; OPERATIONS.len()],
}

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

#[derive(Debug)]
struct ServedDisk {
    spec: DiskSpec,
    server: DiskServer,
    limiter: Arc<Limiter>,
    overlay: Option<Arc<OverlayDevice>>,
    image: Option<Arc<Image>>,
    uncached: bool,
    encrypted: bool,
    /// Serving it ends because somebody asked for it.
    removed: Arc<AtomicBool>,
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

impl ServedDisk {
    fn status(&self) -> DiskStatus {
        DiskStatus {
            spec: self.spec.clone(),
            capacity_bytes: self.server.disk().capacity_bytes(),
            uncached: self.uncached,
            encrypted: self.encrypted,
            layers: self
                .overlay
                .as_ref()
                .map(|overlay| overlay.chain().layers().len()),
            source: self
                .overlay
                .as_ref()
                .and_then(|overlay| overlay.source_counters()),
            counters: self.server.metrics(),
            latencies: self.server.latencies(),
        }
    }

    fn grow(&self, bytes: u64) -> Result<(), Error> {
        let id = &self.spec.id;
        if let Some(overlay) = &self.overlay {
            return Ok(overlay.chain().top().grow(bytes)?);
        }
        let image = self.image.as_ref();
        let image = image.ok_or_else(|| refuse(id, "it has no image that could grow"))?;
        if bytes < image.bytes() {
            return Err(refuse(
                id,
                "disks only grow: a guest would lose what is at the end",
            ));
        }
        let grown = image.file().set_len(bytes);
        grown.map_err(|error| Error::io(format!("can't grow the image of disk {id}"), error))
    }
}

// An open disk, before it is limited and served.
struct Opened {
    device: Arc<dyn BlockDevice>,
    overlay: Option<Arc<OverlayDevice>>,
    image: Option<Arc<Image>>,
    uncached: bool,
}

fn open(spec: &DiskSpec, cipher: Option<Arc<SectorCipher>>) -> Result<Opened, Error> {
    let (read_only, direct) = (spec.read_only, spec.direct);
    match &spec.contents {
        Contents::Null(_) if cipher.is_some() => {
            Err(refuse(&spec.id, "nothing can't be encrypted"))
        }
        Contents::Null(bytes) => Ok(Opened {
            device: Arc::new(NullDevice::new(*bytes)),
            overlay: None,
            image: None,
            uncached: true,
        }),
        Contents::Raw(path) => {
            let image = Arc::new(Image::open(&ImageOptions {
                path: path.clone(),
                read_only,
                direct,
            })?);
            let mut device: Arc<dyn BlockDevice> = Arc::new(FileDevice::new(Arc::clone(&image)));
            if let Some(cipher) = cipher {
                device = Arc::new(CryptDevice::new(device, cipher, 0));
            }
            Ok(Opened {
                device,
                overlay: None,
                uncached: image.direct().is_some(),
                image: Some(image),
            })
        }
        Contents::Overlay(path) => {
            let options = OpenOptions {
                read_only,
                direct,
                cipher,
            };
            let fetch = spec.base.fetch_options();
            let open = remote::files::open_overlay(path, &options, &fetch)?;
            let images = open.images.iter().chain(&open.raw);
            let uncached = images
                .map(|image| image.direct())
                .all(|direct| direct.is_some());
            let overlay = Arc::new(OverlayDevice::new(open));
            Ok(Opened {
                device: Arc::clone(&overlay) as Arc<dyn BlockDevice>,
                overlay: Some(overlay),
                image: None,
                uncached,
            })
        }
    }
}

fn check(spec: &DiskSpec) -> Result<[u8; SERIAL_SIZE], Error> {
    let id = &spec.id;
    if id.is_empty() || id.len() > 256 {
        return Err(refuse(id, "a disk's name has 1 to 256 bytes"));
    }
    if !(1..=64).contains(&spec.queues) {
        return Err(refuse(id, "a disk has 1 to 64 queues"));
    }
    if !spec.queue_size.is_power_of_two() || !(4..=1024).contains(&spec.queue_size) {
        return Err(refuse(
            id,
            "a queue's size is a power of two from 4 to 1024",
        ));
    }
    check_limits(id, spec.limits)?;
    if spec
        .base
        .timeout_seconds
        .is_some_and(|seconds| !(1..=3600).contains(&seconds))
    {
        return Err(refuse(id, "a request waits 1 to 3600 seconds for a server"));
    }
    let mut serial = [0; SERIAL_SIZE];
    let field = serial.get_mut(..spec.serial.len());
    let field = field.ok_or_else(|| refuse(id, "a serial number has at most 20 bytes"))?;
    field.copy_from_slice(spec.serial.as_bytes());
    Ok(serial)
}

fn check_limits(id: &str, limits: Limits) -> Result<(), Error> {
    let rates = [limits.bytes, limits.operations];
    if rates.into_iter().flatten().any(|rate| rate.per_second == 0) {
        return Err(refuse(
            id,
            "a limit is at least 1 a second; leave it out to lift it",
        ));
    }
    Ok(())
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
