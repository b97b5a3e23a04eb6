//! A disk's connection through the life of its backend: activated, lost, and made again.

use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::backend::{Backend, BackendError, CONFIG_BYTES, Inflight};
use crate::config::DiskConfig;
use crate::virtio::{Activation, ActivationError};

/// How long a backend may work on one call before it counts as dead. Stopping a queue waits for
/// its requests, and a disk can be slow.
const CALL_LIMIT: Duration = Duration::from_secs(30);

/// A disk's connection, shared by the vCPUs' threads and the watcher's.
pub struct DiskLink {
    config: DiskConfig,
    features: u64,
    config_space: [u8; CONFIG_BYTES],
    state: Mutex<State>,
    /// The connection's socket, reachable while a call holds `state`.
    monitor: Mutex<Option<UnixStream>>,
    calls: Calls,
}

struct State {
    backend: Option<Backend>,
    active: Option<Activation>,
    inflight: Option<Inflight>,
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
        let link = Self {
            config: config.clone(),
            features: backend.features,
            config_space: backend.config_space,
            state: Mutex::new(State {
                backend: None,
                active: None,
                inflight: None,
            }),
            monitor: Mutex::new(None),
            calls: Calls {
                epoch: Instant::now(),
                since: AtomicU64::new(0),
                watcher: Mutex::new(None),
            },
        };
        link.set_backend(&mut link.lock(), backend);
        Ok(link)
    }

    /// The disk's id.
    pub fn id(&self) -> &str {
        &self.config.id
    }

    pub(super) const fn features(&self) -> u64 {
        self.features
    }

    pub(super) const fn config_space(&self) -> &[u8; CONFIG_BYTES] {
        &self.config_space
    }

    /// Starts the queues of a driver that is ready, on a new connection if the old one is lost.
    pub(super) fn activate(&self, activation: Activation) -> Result<(), ActivationError> {
        let mut state = self.lock();
        let _call = self.calls.begin();
        if state.backend.is_none() {
            let backend =
                Backend::try_connect(&self.config).map_err(|e| ActivationError(e.to_string()))?;
            self.check_same(&backend).map_err(ActivationError)?;
            self.set_backend(&mut state, backend);
        }
        state.inflight = None;
        let started = self.start(&mut state, &activation, activation.resumed);
        if started.is_ok() {
            state.active = Some(activation);
        } else {
            self.drop_backend(&mut state);
        }
        started.map_err(|e| ActivationError(e.to_string()))
    }

    /// Stops the queues.
    pub(super) fn deactivate(&self) {
        let mut state = self.lock();
        let _call = self.calls.begin();
        let Some(active) = state.active.take() else {
            return;
        };
        state.inflight = None;
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

    /// The connection ended. Returns whether a new backend could go on where this one stopped.
    pub(super) fn lost(&self) -> bool {
        let mut state = self.lock();
        self.drop_backend(&mut state);
        let Some(active) = &state.active else {
            return false;
        };
        if state.inflight.is_none() {
            // Nobody knows which requests were done: only the driver can start over.
            active.health.needs_reset();
            return false;
        }
        true
    }

    /// Tries to go on with a new backend; returns whether there is nothing more to try.
    pub(super) fn resume(&self) -> bool {
        let mut state = self.lock();
        let _call = self.calls.begin();
        // A reset of the driver may have come first, and made a connection of its own.
        let Some(active) = state.active.take() else {
            return true;
        };
        if state.backend.is_some() {
            state.active = Some(active);
            return true;
        }
        let resumed = Backend::try_connect(&self.config)
            .map_err(|e| e.to_string())
            .and_then(|backend| {
                self.check_same(&backend)?;
                self.set_backend(&mut state, backend);
                self.start(&mut state, &active, true)
                    .map_err(|e| e.to_string())
            });
        if let Err(e) = &resumed {
            tracing::debug!("{e}");
            self.drop_backend(&mut state);
        }
        state.active = Some(active);
        resumed.is_ok()
    }

    fn start(
        &self,
        state: &mut State,
        activation: &Activation,
        resume: bool,
    ) -> Result<(), BackendError> {
        let Some(backend) = &mut state.backend else {
            return Ok(());
        };
        backend.set_up(&activation.memory, activation.features)?;
        let inflight = state.inflight.take();
        state.inflight = backend.share_inflight(inflight, &self.config)?;
        for queue in &activation.queues {
            // A new queue starts at 0. One that goes on starts at its used index: the backend adds
            // what its request table says is not done yet.
            let used = queue.layout.used_index(&activation.memory).unwrap_or(0);
            backend.start_queue(&activation.memory, queue, if resume { used } else { 0 })?;
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
        if known && backend.config_space == self.config_space {
            return Ok(());
        }
        Err(format!(
            "the new backend of the disk {} serves another disk",
            self.config.id
        ))
    }

    fn set_backend(&self, state: &mut State, backend: Backend) {
        let monitor = backend.monitor.try_clone();
        *self.monitor.lock().unwrap_or_else(PoisonError::into_inner) = monitor.ok();
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

    /// The connection's socket, to see its end.
    pub(super) fn monitor(&self) -> Option<RawFd> {
        self.monitor
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .map(AsRawFd::as_raw_fd)
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
            let _ = monitor.shutdown(std::net::Shutdown::Both);
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

/// The link is shared between threads.
const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<Arc<DiskLink>>();
};
