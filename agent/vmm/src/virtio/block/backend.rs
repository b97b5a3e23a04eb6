//! One connection to a vhost-user-blk backend (docs/interop/vhost-user.rst of QEMU).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_GEOMETRY, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::dirty_log::DirtyLog;
use crate::config::DiskConfig;
use crate::memory::Ram;
use crate::virtio::{ActiveQueue, FEATURE_EVENT_IDX, FEATURE_INDIRECT, FEATURE_VERSION_1};

/// `sizeof(struct virtio_blk_config)` up to the write-zeroes fields.
pub(super) const CONFIG_BYTES: usize = 60;
/// Offset of `writeback` in it, the one field that a driver may write.
pub(super) const CONFIG_WRITEBACK: usize = 32;
/// Offset of `num_queues` in it.
const CONFIG_NUM_QUEUES: usize = 34;
/// How long a backend that is being started may take to listen.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// How long the handshake may take: a backend that serves another frontend lets this one wait.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
const CONNECT_INTERVAL: Duration = Duration::from_millis(20);

/// What the driver may be offered of what the backend has: what this frontend can set up.
const PASSED_FEATURES: u64 = FEATURE_VERSION_1
    | FEATURE_EVENT_IDX
    | FEATURE_INDIRECT
    | 1 << VIRTIO_BLK_F_SIZE_MAX
    | 1 << VIRTIO_BLK_F_SEG_MAX
    | 1 << VIRTIO_BLK_F_GEOMETRY
    | 1 << VIRTIO_BLK_F_RO
    | 1 << VIRTIO_BLK_F_BLK_SIZE
    | 1 << VIRTIO_BLK_F_FLUSH
    | 1 << VIRTIO_BLK_F_TOPOLOGY
    | 1 << VIRTIO_BLK_F_CONFIG_WCE
    | 1 << VIRTIO_BLK_F_MQ
    | 1 << VIRTIO_BLK_F_DISCARD
    | 1 << VIRTIO_BLK_F_WRITE_ZEROES;

/// Why a disk's backend can't be used.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// Nothing listens.
    #[error("the disk {disk} has no backend at {path}: {source}; start keelson-blk first")]
    Connect {
        /// The disk's id.
        disk: String,
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The backend doesn't speak the protocol as it should, or died.
    #[error("the backend of the disk {disk} at {path} failed to {step}: {source}")]
    Protocol {
        /// The disk's id.
        disk: String,
        /// The socket.
        path: PathBuf,
        /// What was asked of it.
        step: &'static str,
        /// What went wrong.
        source: vhost::Error,
    },
    /// The backend takes connections, but says nothing.
    #[error(
        "the backend of the disk {disk} at {path} didn't answer within {} s: does it serve \
         another guest?",
        HANDSHAKE_LIMIT.as_secs()
    )]
    Silent {
        /// The disk's id.
        disk: String,
        /// The socket.
        path: PathBuf,
    },
    /// The backend can't do what the configuration asks for.
    #[error("the disk {disk} doesn't fit its backend at {path}: {reason}")]
    Mismatch {
        /// The disk's id.
        disk: String,
        /// The socket.
        path: PathBuf,
        /// What doesn't fit.
        reason: String,
    },
}

impl BackendError {
    /// Whether a backend is only being started, or was just ending.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Self::Connect { source, .. } => may_come(source),
            Self::Protocol { source, .. } => {
                matches!(source, vhost::Error::VhostUserProtocol(e) if e.should_reconnect())
            }
            Self::Silent { .. } | Self::Mismatch { .. } => false,
        }
    }
}

/// A backend after its handshake.
pub(super) struct Backend {
    disk: String,
    path: PathBuf,
    frontend: Frontend,
    /// All features of the backend, with the bit that says that it has protocol features.
    available: u64,
    protocol: VhostUserProtocolFeatures,
    /// What the driver may be offered.
    pub(super) features: u64,
    /// `struct virtio_blk_config`.
    pub(super) config_space: [u8; CONFIG_BYTES],
    /// The connection's other handle: to see its end, and to end it.
    pub(super) monitor: UnixStream,
    notices: Option<UnixStream>,
}

/// The memory in which a backend notes the requests that it works on, so that after its crash the
/// next one can finish them.
pub(super) struct Inflight {
    description: VhostUserInflight,
    file: File,
}

impl Backend {
    /// Connects, waiting a little for a backend that is just starting, and shakes hands.
    pub(super) fn connect(config: &DiskConfig) -> Result<Self, BackendError> {
        let deadline = Instant::now() + CONNECT_LIMIT;
        loop {
            match UnixStream::connect(&config.socket) {
                Ok(stream) => return Self::shake_hands_in_time(config, stream),
                Err(e) if may_come(&e) && Instant::now() < deadline => {
                    std::thread::sleep(CONNECT_INTERVAL);
                }
                Err(source) => return Err(connect_error(config, source)),
            }
        }
    }

    /// Connects only if a backend listens already.
    pub(super) fn try_connect(config: &DiskConfig) -> Result<Self, BackendError> {
        let stream =
            UnixStream::connect(&config.socket).map_err(|source| connect_error(config, source))?;
        Self::shake_hands_in_time(config, stream)
    }

    /// The handshake's calls block without a limit, and repeat what a socket's own time limit
    /// interrupts; closing the connection ends them.
    fn shake_hands_in_time(config: &DiskConfig, stream: UnixStream) -> Result<Self, BackendError> {
        let breaker = stream
            .try_clone()
            .map_err(|source| connect_error(config, source))?;
        let (done, wait) = mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let limit = scope.spawn(move || {
                let late = wait.recv_timeout(HANDSHAKE_LIMIT) == Err(RecvTimeoutError::Timeout);
                if late {
                    // Fails only if the backend closed it in the meantime.
                    let _ = breaker.shutdown(std::net::Shutdown::Both);
                }
                late
            });
            let backend = Self::shake_hands(config, stream);
            drop(done);
            match (backend, limit.join()) {
                (Err(_), Ok(true)) => {
                    let (disk, path) = (config.id.clone(), config.socket.clone());
                    Err(BackendError::Silent { disk, path })
                }
                (backend, _) => backend,
            }
        })
    }

    fn shake_hands(config: &DiskConfig, stream: UnixStream) -> Result<Self, BackendError> {
        let monitor = stream
            .try_clone()
            .map_err(|source| connect_error(config, source))?;
        let mut backend = Self {
            disk: config.id.clone(),
            path: config.socket.clone(),
            frontend: Frontend::from_stream(stream, u64::from(config.queues)),
            available: 0,
            protocol: VhostUserProtocolFeatures::empty(),
            features: 0,
            config_space: [0; CONFIG_BYTES],
            monitor,
            notices: None,
        };
        backend
            .frontend
            .set_owner()
            .map_err(backend.failed("accept its owner"))?;
        backend.available = backend
            .frontend
            .get_features()
            .map_err(backend.failed("tell its features"))?;
        backend.negotiate_protocol(config)?;
        backend.read_config_space(config)?;
        backend.open_notices()?;
        backend.check_features(config)?;
        Ok(backend)
    }

    fn negotiate_protocol(&mut self, config: &DiskConfig) -> Result<(), BackendError> {
        if self.available & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            return Err(self.mismatch("it has no protocol features, so it can't tell its capacity"));
        }
        let offered = self.frontend.get_protocol_features();
        let offered = offered.map_err(self.failed("tell its protocol features"))?;
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::LOG_SHMFD;
        self.protocol = offered & wanted;
        let set = self.frontend.set_protocol_features(self.protocol);
        set.map_err(self.failed("take its protocol features"))?;
        if !self.protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            return Err(self.mismatch("it can't tell its capacity (protocol feature CONFIG)"));
        }
        if self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        let queues = if self.protocol.contains(VhostUserProtocolFeatures::MQ) {
            let queues = self.frontend.get_queue_num();
            queues.map_err(self.failed("tell how many queues it has"))?
        } else {
            1
        };
        if u64::from(config.queues) > queues {
            let wanted = config.queues;
            return Err(self.mismatch(&format!("it has {queues} queues, not {wanted}")));
        }
        Ok(())
    }

    fn read_config_space(&mut self, config: &DiskConfig) -> Result<(), BackendError> {
        let blank = [0; CONFIG_BYTES];
        let size = u32::try_from(CONFIG_BYTES).unwrap_or(0);
        let answer = self
            .frontend
            .get_config(0, size, VhostUserConfigFlags::empty(), &blank);
        let (_, bytes) = answer.map_err(self.failed("tell its configuration"))?;
        for (target, byte) in self.config_space.iter_mut().zip(bytes) {
            *target = byte;
        }
        let queues = config.queues.to_le_bytes();
        self.config_space[CONFIG_NUM_QUEUES..CONFIG_NUM_QUEUES + 2].copy_from_slice(&queues);
        Ok(())
    }

    fn check_features(&mut self, config: &DiskConfig) -> Result<(), BackendError> {
        if self.available & FEATURE_VERSION_1 == 0 {
            return Err(self.mismatch("it is a legacy device (no VIRTIO_F_VERSION_1)"));
        }
        let read_only = self.available & (1 << VIRTIO_BLK_F_RO) != 0;
        if read_only != config.read_only {
            let is = if read_only { "read-only" } else { "writable" };
            return Err(self.mismatch(&format!(
                "it is {is}, but the configuration has read_only = {}",
                config.read_only
            )));
        }
        self.features = self.available & PASSED_FEATURES;
        if config.queues == 1 {
            self.features &= !(1 << VIRTIO_BLK_F_MQ);
        }
        Ok(())
    }

    /// Hands over the driver's features and the guest's memory.
    pub(super) fn set_up(
        &self,
        memory: &Ram,
        features: u64,
        log: Option<&DirtyLog>,
    ) -> Result<(), BackendError> {
        if let Some(log) = log {
            self.share_log(log)?;
        }
        self.accept_features(features, log)?;
        let regions = memory
            .iter()
            .map(VhostUserMemoryRegionInfo::from_guest_region)
            .collect::<Result<Vec<_>, _>>()
            .map_err(self.failed("take the guest's memory"))?;
        self.frontend
            .set_mem_table(&regions)
            .map_err(self.failed("map the guest's memory"))?;
        Ok(())
    }

    /// Tells the driver's features; with a log, that it is to be used.
    pub(super) fn accept_features(
        &self,
        features: u64,
        log: Option<&DirtyLog>,
    ) -> Result<(), BackendError> {
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let logging = log.map_or(0, |_| VhostUserVirtioFeatures::LOG_ALL.bits());
        self.frontend
            .set_features(features | protocol | logging)
            .map_err(self.failed("take the driver's features"))
    }

    /// Shares the bitmap in which the backend marks what it writes.
    pub(super) fn share_log(&self, log: &DirtyLog) -> Result<(), BackendError> {
        let logs = self.available & VhostUserVirtioFeatures::LOG_ALL.bits() != 0
            && self.protocol.contains(VhostUserProtocolFeatures::LOG_SHMFD);
        if !logs {
            return Err(self.mismatch(
                "it can't note which memory it writes (VHOST_F_LOG_ALL and LOG_SHMFD), so its guest can't \
                 be moved while it runs",
            ));
        }
        self.frontend
            .set_log_base(0, Some(log.region()))
            .map_err(self.failed("note what it writes"))
    }

    /// Whether the backend notes its requests in memory that survives it.
    pub(super) fn tracks_inflight(&self) -> bool {
        self.protocol
            .contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    }

    /// Asks for memory to note requests in; `None` if the backend doesn't do that.
    pub(super) fn request_inflight(
        &mut self,
        config: &DiskConfig,
    ) -> Result<Option<Inflight>, BackendError> {
        if !self.tracks_inflight() {
            return Ok(None);
        }
        let wanted = VhostUserInflight::new(0, 0, config.queues, config.queue_size);
        let answer = self.frontend.get_inflight_fd(&wanted);
        let (description, file) = answer.map_err(self.failed("share its request table"))?;
        Ok(Some(Inflight { description, file }))
    }

    /// Hands the memory over in which requests are noted, perhaps some of an earlier backend.
    pub(super) fn share_inflight(&mut self, inflight: &Inflight) -> Result<(), BackendError> {
        let set = self
            .frontend
            .set_inflight_fd(&inflight.description, inflight.file.as_raw_fd());
        set.map_err(self.failed("take the request table"))
    }

    /// Writes to the configuration space.
    pub(super) fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), BackendError> {
        let flags = VhostUserConfigFlags::WRITABLE;
        let written = self.frontend.set_config(offset, flags, data);
        written.map_err(self.failed("change its configuration"))?;
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (known, byte) in self.config_space.iter_mut().skip(start).zip(data) {
            *known = *byte;
        }
        Ok(())
    }

    /// Reads the configuration space again, after the backend said that it has changed.
    pub(super) fn reread_config_space(&mut self, config: &DiskConfig) -> Result<(), BackendError> {
        self.read_config_space(config)
    }

    /// Where the backend's notices arrive, if it has any.
    pub(super) fn notices(&self) -> Option<&UnixStream> {
        self.notices.as_ref()
    }

    fn open_notices(&mut self) -> Result<(), BackendError> {
        if !self
            .protocol
            .contains(VhostUserProtocolFeatures::BACKEND_REQ)
        {
            return Ok(());
        }
        let (ours, theirs) =
            UnixStream::pair().map_err(|e| self.mismatch(&format!("no socket pair: {e}")))?;
        ours.set_nonblocking(true)
            .map_err(|e| self.mismatch(&format!("no socket pair: {e}")))?;
        self.frontend
            .set_backend_request_fd(&theirs)
            .map_err(self.failed("take a channel for its notices"))?;
        self.notices = Some(ours);
        Ok(())
    }

    /// Starts a queue at the available index `base`.
    pub(super) fn start_queue(
        &mut self,
        memory: &Ram,
        queue: &ActiveQueue,
        base: u16,
        logged: bool,
    ) -> Result<(), BackendError> {
        let index = usize::from(queue.index);
        let step = "start a queue";
        self.frontend
            .set_vring_num(index, queue.layout.size)
            .map_err(self.failed(step))?;
        self.place_queue(memory, queue, logged)?;
        self.frontend
            .set_vring_base(index, base)
            .map_err(self.failed(step))?;
        self.frontend
            .set_vring_call(index, &queue.call)
            .map_err(self.failed(step))?;
        // The kick starts the ring, so it is last; then enabling lets it move data.
        self.frontend
            .set_vring_kick(index, &queue.kick)
            .map_err(self.failed(step))?;
        let enabled = self.frontend.set_vring_enable(index, true);
        enabled.map_err(self.failed(step))
    }

    /// Says where a queue's rings are, and whether what is written to its used ring is noted.
    pub(super) fn place_queue(
        &self,
        memory: &Ram,
        queue: &ActiveQueue,
        logged: bool,
    ) -> Result<(), BackendError> {
        let layout = &queue.layout;
        let host = |address: u64| {
            memory
                .get_host_address(GuestAddress(address))
                .map(|pointer| pointer as u64)
                .map_err(|_| self.mismatch(&format!("a ring at {address:#x} is not in RAM")))
        };
        let addresses = VringConfigData {
            queue_max_size: layout.size,
            queue_size: layout.size,
            flags: u32::from(logged),
            desc_table_addr: host(layout.descriptors)?,
            used_ring_addr: host(layout.used)?,
            avail_ring_addr: host(layout.available)?,
            log_addr: logged.then_some(layout.used),
        };
        self.frontend
            .set_vring_addr(usize::from(queue.index), &addresses)
            .map_err(self.failed("place a queue"))
    }

    /// Stops a queue; its requests are finished when this returns.
    pub(super) fn stop_queue(&mut self, index: u16) -> Result<(), BackendError> {
        let index = usize::from(index);
        let disabled = self.frontend.set_vring_enable(index, false);
        disabled.map_err(self.failed("stop a queue"))?;
        self.frontend
            .get_vring_base(index)
            .map(drop)
            .map_err(self.failed("stop a queue"))
    }

    fn failed(&self, step: &'static str) -> impl FnOnce(vhost::Error) -> BackendError + use<> {
        let (disk, path) = (self.disk.clone(), self.path.clone());
        move |source| BackendError::Protocol {
            disk,
            path,
            step,
            source,
        }
    }

    fn mismatch(&self, reason: &str) -> BackendError {
        let (disk, path) = (self.disk.clone(), self.path.clone());
        BackendError::Mismatch {
            disk,
            path,
            reason: reason.to_owned(),
        }
    }
}

/// Whether a backend that is being started could still come.
fn may_come(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
    )
}

fn connect_error(config: &DiskConfig, source: io::Error) -> BackendError {
    BackendError::Connect {
        disk: config.id.clone(),
        path: config.socket.clone(),
        source,
    }
}
