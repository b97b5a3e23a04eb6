//! A disk's connection through the life of its backend: activated, lost, and made again.

use std::io::Read;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::backend::{Backend, BackendError, CONFIG_BYTES, CONFIG_WRITEBACK, Inflight};
use super::dirty_log::DirtyLog;
use crate::config::DiskConfig;
use crate::virtio::{Activation, ActivationError};

/// Where the capacity is in the configuration space (virtio 1.2, 5.2.4).
const CAPACITY: Range<usize> = 0..8;
/// The offset of the write cache's switch.
const WRITEBACK_OFFSET: u32 = 32;

/// How long a backend may work on one call before it counts as dead. Stopping a queue waits for
/// its requests, and a disk can be slow.
const CALL_LIMIT: Duration = Duration::from_secs(30);

/// A disk's connection, shared by the vCPUs' threads and the watcher's.
pub struct DiskLink {
    config: DiskConfig,
    features: u64,
    config_space: Mutex<[u8; CONFIG_BYTES]>,
    config_generation: AtomicU8,
    state: Mutex<State>,
    /// The connection, reachable while a call holds `state`.
    monitor: Mutex<Option<Arc<Connection>>>,
    /// Whether a driver is ready, and there was no backend.
    awaited: AtomicBool,
    calls: Calls,
}

/// A connection's sockets, for who waits for something to happen on them.
pub(super) struct Connection {
    /// Of the messages to the backend: to see its end.
    pub(super) socket: UnixStream,
    /// Of the backend's notices.
    pub(super) notices: Option<UnixStream>,
}

/// What became of an attempt to go on with a new backend.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Resumed {
    /// It goes on.
    Yes,
    /// There is none yet, or it failed.
    NotYet,
    /// There is nothing to go on with: the driver has reset the device.
    Needless,
}

struct State {
    backend: Option<Backend>,
    active: Option<Activation>,
    inflight: Option<Inflight>,
    /// Where the backend notes what it writes, while the guest is moved.
    log: Option<Arc<DirtyLog>>,
}

/// Notes when a call began, for the watcher.
struct Calls {
    epoch: Instant,
    /// Milliseconds after `epoch`, 0 without a call.
    since: AtomicU64,
    watcher: Mutex<Option<EventFd>>,
}

impl DiskLink {
    /// Connects to the backend of `config`.
    pub(super) fn connect(config: &DiskConfig) -> Result<Self, BackendError> {
        let backend = Backend::connect(config)?;
        let link = Self::apart(config, backend.features, backend.config_space);
        link.set_backend(&mut link.lock(), backend);
        Ok(link)
    }

    /// Without a backend, which comes when the driver's queues are started: for a disk that the driver
    /// knows from elsewhere.
    pub(super) fn apart(
        config: &DiskConfig,
        features: u64,
        config_space: [u8; CONFIG_BYTES],
    ) -> Self {
        Self {
            config: config.clone(),
            features,
            config_space: Mutex::new(config_space),
            config_generation: AtomicU8::new(0),
            state: Mutex::new(State {
                backend: None,
                active: None,
                inflight: None,
                log: None,
            }),
            monitor: Mutex::new(None),
            awaited: AtomicBool::new(false),
            calls: Calls {
                epoch: Instant::now(),
                since: AtomicU64::new(0),
                watcher: Mutex::new(None),
            },
        }
    }

    /// Has the backend, and those that come after it, note what they write, or not any more.
    pub fn set_log(&self, log: Option<Arc<DirtyLog>>) -> Result<(), BackendError> {
        let mut state = self.lock();
        let _call = self.calls.begin();
        state.log = log;
        let result = Self::apply_log(&state);
        if result.is_err() {
            state.log = None;
        }
        result
    }

    fn apply_log(state: &State) -> Result<(), BackendError> {
        let (Some(backend), log) = (&state.backend, state.log.as_deref()) else {
            return Ok(());
        };
        if let Some(log) = log {
            backend.share_log(log)?;
        }
        let Some(active) = &state.active else {
            return Ok(());
        };
        for queue in &active.queues {
            backend.place_queue(&active.memory, queue, log.is_some())?;
        }
        backend.accept_features(active.features, log)
    }

    /// The disk's id.
    pub fn id(&self) -> &str {
        &self.config.id
    }

    /// What the driver was offered.
    pub const fn features(&self) -> u64 {
        self.features
    }

    /// `struct virtio_blk_config` as the driver sees it.
    pub fn config_space(&self) -> [u8; CONFIG_BYTES] {
        *self.known_config()
    }

    pub(super) fn config_generation(&self) -> u8 {
        self.config_generation.load(Ordering::Acquire)
    }

    fn known_config(&self) -> MutexGuard<'_, [u8; CONFIG_BYTES]> {
        self.config_space
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The driver switches the write cache, which the backend has to know before the driver goes
    /// on. While there is none, the next one is told.
    pub(super) fn set_writeback(&self, writeback: u8) {
        let mut state = self.lock();
        let _call = self.calls.begin();
        self.known_config()[CONFIG_WRITEBACK] = writeback;
        // Before the driver's features are accepted the backend takes no switch: `start` tells it.
        let active = state.active.is_some();
        if let Some(backend) = state.backend.as_mut().filter(|_| active)
            && let Err(e) = backend.write_config(WRITEBACK_OFFSET, &[writeback])
        {
            tracing::warn!("{e}");
            // Its successor is told when it is set up.
            let _ = backend.monitor.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Takes the backend's notices. Returns whether the configuration has changed.
    pub(super) fn take_notices(&self, connection: &Connection) -> bool {
        let mut bytes = [0; 256];
        let mut noticed = false;
        // There is one kind of notice that concerns a disk, and reading the configuration once
        // more than needed does no harm.
        while let Some(notices) = &connection.notices
            && matches!((&*notices).read(&mut bytes), Ok(1..))
        {
            noticed = true;
        }
        let mut state = self.lock();
        if !noticed || !self.is_current(connection) {
            return false;
        }
        let _call = self.calls.begin();
        let State {
            backend: Some(backend),
            active,
            ..
        } = &mut *state
        else {
            return false;
        };
        if let Err(e) = backend.reread_config_space(&self.config) {
            tracing::warn!("{e}");
            return false;
        }
        let mut known = self.known_config();
        let changed = *known != backend.config_space;
        *known = backend.config_space;
        self.config_generation.fetch_add(1, Ordering::AcqRel);
        if let Some(active) = active.as_ref().filter(|_| changed) {
            active.health.config_changed();
        }
        changed
    }

    fn is_current(&self, connection: &Connection) -> bool {
        let current = self.monitor.lock().unwrap_or_else(PoisonError::into_inner);
        current
            .as_ref()
            .is_some_and(|current| std::ptr::eq(Arc::as_ptr(current), connection))
    }

    /// Starts the queues of a driver that is ready, on a new connection if the old one is lost. If
    /// there is no backend now, the watcher starts them on the next one.
    pub(super) fn activate(&self, activation: Activation) -> Result<(), ActivationError> {
        let mut state = self.lock();
        let _call = self.calls.begin();
        let mut started = Ok(());
        if state.backend.is_some() {
            started = self.start_anew(&mut state, &activation);
        }
        // An old connection may be one to a backend that is gone.
        if state.backend.is_none() {
            match Backend::try_connect(&self.config) {
                Err(error) if error.may_pass() => {
                    tracing::warn!("{error}");
                    self.awaited.store(true, Ordering::Release);
                    self.calls.wake_watcher();
                    started = Ok(());
                }
                Err(error) => started = Err(error),
                Ok(backend) => {
                    self.check_same(&backend).map_err(ActivationError)?;
                    self.set_backend(&mut state, backend);
                    started = self.start_anew(&mut state, &activation);
                }
            }
        }
        started.map_err(|e| ActivationError(e.to_string()))?;
        state.active = Some(activation);
        Ok(())
    }

    fn start_anew(&self, state: &mut State, activation: &Activation) -> Result<(), BackendError> {
        state.inflight = None;
        let started = self.start(state, activation, activation.resumed);
        if started.is_err() {
            state.inflight = None;
            self.drop_backend(state);
        }
        started
    }

    /// Whether queues wait for a backend since the last call.
    pub(super) fn take_awaited(&self) -> bool {
        self.awaited.swap(false, Ordering::AcqRel)
    }

    /// Stops the queues.
    pub(super) fn deactivate(&self) {
        let mut state = self.lock();
        let _call = self.calls.begin();
        let Some(active) = state.active.take() else {
            return;
        };
        state.inflight = None;
        // The next driver finds it on, as the first one did.
        self.known_config()[CONFIG_WRITEBACK] = 1;
        let Some(backend) = &mut state.backend else {
            return;
        };
        for queue in &active.queues {
            if let Err(e) = backend.stop_queue(queue.index) {
                tracing::warn!("{e}");
                // Closing makes the backend let go of the guest's memory, or it is dead.
                self.drop_backend(&mut state);
                return;
            }
        }
    }

    /// Stops the queues as [`Self::deactivate`] does, but only if the backend can say that it has
    /// finished what it had.
    pub(super) fn pause(&self) -> Result<(), String> {
        let mut state = self.lock();
        let _call = self.calls.begin();
        let State {
            backend,
            active: Some(active),
            inflight,
            ..
        } = &mut *state
        else {
            return Ok(());
        };
        let Some(connected) = backend else {
            return Err("its backend is away, with requests that nobody has finished".to_owned());
        };
        let stopped = active
            .queues
            .iter()
            .try_for_each(|queue| connected.stop_queue(queue.index));
        if let Err(e) = stopped {
            // The watcher sees the end, and finds the next one, which finishes the requests.
            let _ = connected.monitor.shutdown(std::net::Shutdown::Both);
            return Err(e.to_string());
        }
        *inflight = None;
        state.active = None;
        Ok(())
    }

    /// This connection ended. Returns whether a new backend could go on where this one stopped,
    /// or `None` if another has taken its place meanwhile.
    pub(super) fn lost(&self, connection: &Connection) -> Option<bool> {
        let mut state = self.lock();
        if !self.is_current(connection) {
            return None;
        }
        self.drop_backend(&mut state);
        if let Some(log) = &state.log {
            // It may have written what it hadn't noted yet.
            log.mark_all();
        }
        let Some(active) = &state.active else {
            return Some(false);
        };
        if state.inflight.is_none() {
            // Nobody knows which requests were done: only the driver can start over.
            active.health.needs_reset();
            return Some(false);
        }
        Some(true)
    }

    /// Tries to go on with a new backend.
    pub(super) fn resume(&self) -> Resumed {
        let mut state = self.lock();
        let _call = self.calls.begin();
        // A reset of the driver may have come first, and made a connection of its own.
        let Some(active) = state.active.take() else {
            return Resumed::Needless;
        };
        if state.backend.is_some() {
            state.active = Some(active);
            return Resumed::Needless;
        }
        let resumed = Backend::try_connect(&self.config)
            .map_err(|e| e.to_string())
            .and_then(|backend| {
                self.check_same(&backend)?;
                if state.inflight.is_some() && !backend.tracks_inflight() {
                    return Err("the new backend can't go on with an old one's requests".into());
                }
                let resized = self.adopt_size(&backend);
                self.set_backend(&mut state, backend);
                self.start(&mut state, &active, true)
                    .map_err(|e| e.to_string())?;
                if resized {
                    active.health.config_changed();
                }
                Ok(())
            });
        if let Err(e) = &resumed {
            tracing::debug!("{e}");
            self.drop_backend(&mut state);
        }
        state.active = Some(active);
        if resumed.is_ok() {
            Resumed::Yes
        } else {
            Resumed::NotYet
        }
    }

    fn start(
        &self,
        state: &mut State,
        activation: &Activation,
        resume: bool,
    ) -> Result<(), BackendError> {
        let log = state.log.clone();
        let Some(backend) = &mut state.backend else {
            return Ok(());
        };
        backend.set_up(&activation.memory, activation.features, log.as_deref())?;
        let writeback = self.known_config()[CONFIG_WRITEBACK];
        if backend.config_space[CONFIG_WRITEBACK] != writeback {
            backend.write_config(WRITEBACK_OFFSET, &[writeback])?;
        }
        // Kept whatever fails from here on: it says what the next backend has to finish.
        if state.inflight.is_none() {
            state.inflight = backend.request_inflight(&self.config)?;
        }
        if let Some(inflight) = &state.inflight {
            backend.share_inflight(inflight)?;
        }
        for queue in &activation.queues {
            // A new queue starts at 0. One that goes on starts at its used index: the backend adds
            // what its request table says is not done yet.
            let used = queue.layout.used_index(&activation.memory).unwrap_or(0);
            let base = if resume { used } else { 0 };
            backend.start_queue(&activation.memory, queue, base, log.is_some())?;
        }
        if resume {
            for queue in &activation.queues {
                // A kick or a call may have been lost with the old backend.
                let _ = queue.kick.write(1);
                let _ = queue.call.write(1);
            }
        }
        Ok(())
    }

    /// A backend that comes back must serve the disk that the driver knows.
    fn check_same(&self, backend: &Backend) -> Result<(), String> {
        let known = self.features & !backend.features == 0;
        let mut expected = self.config_space();
        // The driver has its own idea of the write cache, and a disk may have grown.
        expected[CONFIG_WRITEBACK] = backend.config_space[CONFIG_WRITEBACK];
        let grown = capacity(&backend.config_space) >= capacity(&expected);
        expected[CAPACITY].copy_from_slice(&backend.config_space[CAPACITY]);
        if known && grown && backend.config_space == expected {
            return Ok(());
        }
        Err(format!(
            "the new backend of the disk {} serves another disk",
            self.config.id
        ))
    }

    /// Takes over the size of a disk that has grown while it had no backend.
    fn adopt_size(&self, backend: &Backend) -> bool {
        let mut known = self.known_config();
        let resized = capacity(&known) != capacity(&backend.config_space);
        known[CAPACITY].copy_from_slice(&backend.config_space[CAPACITY]);
        if resized {
            self.config_generation.fetch_add(1, Ordering::AcqRel);
        }
        resized
    }

    fn set_backend(&self, state: &mut State, backend: Backend) {
        let connection = backend.monitor.try_clone().map(|socket| Connection {
            socket,
            notices: backend
                .notices()
                .and_then(|notices| notices.try_clone().ok()),
        });
        *self.monitor.lock().unwrap_or_else(PoisonError::into_inner) =
            connection.ok().map(Arc::new);
        state.backend = Some(backend);
        self.calls.wake_watcher();
    }

    fn drop_backend(&self, state: &mut State) {
        state.backend = None;
        *self.monitor.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the watcher of calls and new connections by `wake`.
    pub(super) fn set_watcher(&self, wake: EventFd) {
        *self
            .calls
            .watcher
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(wake);
    }

    /// The connection, to see its end.
    pub(super) fn connection(&self) -> Option<Arc<Connection>> {
        self.monitor
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Ends the connection if a call takes too long; returns whether one is under way.
    pub(super) fn enforce_limit(&self) -> bool {
        let Some(elapsed) = self.calls.elapsed() else {
            return false;
        };
        if elapsed > CALL_LIMIT
            && let Some(monitor) = &*self.monitor.lock().unwrap_or_else(PoisonError::into_inner)
        {
            tracing::warn!(
                disk = self.id(),
                "the backend doesn't answer: disconnecting"
            );
            // Fails only if the backend closed it in the meantime.
            let _ = monitor.socket.shutdown(std::net::Shutdown::Both);
        }
        true
    }
}

impl Calls {
    fn begin(&self) -> Call<'_> {
        let now = u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.since.store(now.max(1), Ordering::Release);
        self.wake_watcher();
        Call(self)
    }

    fn elapsed(&self) -> Option<Duration> {
        match self.since.load(Ordering::Acquire) {
            0 => None,
            since => Some(
                self.epoch
                    .elapsed()
                    .saturating_sub(Duration::from_millis(since)),
            ),
        }
    }

    fn wake_watcher(&self) {
        if let Some(wake) = &*self.watcher.lock().unwrap_or_else(PoisonError::into_inner) {
            // Fails only with the event's counter at its maximum, when it is awake anyway.
            let _ = wake.write(1);
        }
    }
}

/// Ends the note of a call.
struct Call<'a>(&'a Calls);

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.0.since.store(0, Ordering::Release);
    }
}

fn capacity(config_space: &[u8; CONFIG_BYTES]) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&config_space[CAPACITY]);
    u64::from_le_bytes(bytes)
}

/// The link is shared between threads.
const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<Arc<DiskLink>>();
};
