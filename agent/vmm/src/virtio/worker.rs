//! The thread that serves a device's queues.

use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{ActivationError, DeviceHealth};
use crate::isolation::seccomp::{self, Mode, Thread};

/// The threads' needs are small and known; the default of 8 MiB would only be address space.
const STACK_BYTES: usize = 128 << 10;

/// What such a thread is.
pub(super) struct ThreadKind {
    /// Its name, of which the kernel shows 15 bytes.
    pub(super) name: String,
    /// Its list of system calls, and what becomes of others.
    pub(super) calls: Thread,
    pub(super) seccomp: Mode,
}

/// The event by which a thread is told to stop, which it waits for beside its other events.
pub(super) fn stop_event() -> Result<EventFd, ActivationError> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(ActivationError::of("create an eventfd"))
}

/// A running thread, which ends with a `T`. Dropping stops and joins it.
pub(super) struct Worker<T> {
    stop: EventFd,
    name: String,
    thread: Option<JoinHandle<Option<T>>>,
}

impl<T: Send + 'static> Worker<T> {
    /// Starts a thread that does `serve` until `stop`, an event of [`stop_event`], is written. If its system
    /// calls can't be limited, it serves nothing and the device needs a reset.
    pub(super) fn start(
        kind: ThreadKind,
        stop: EventFd,
        health: DeviceHealth,
        serve: impl FnOnce(&DeviceHealth) -> T + Send + 'static,
    ) -> Result<Self, ActivationError> {
        let ThreadKind {
            name,
            calls,
            seccomp,
        } = kind;
        let thread = std::thread::Builder::new()
            .name(name.clone())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                if let Err(e) = seccomp::apply(calls, seccomp) {
                    tracing::error!("{e}");
                    health.needs_reset();
                    return None;
                }
                Some(serve(&health))
            })
            .map_err(ActivationError::of("start the device's thread"))?;
        Ok(Self {
            stop,
            name,
            thread: Some(thread),
        })
    }
}

impl<T> Worker<T> {
    /// Stops and joins the thread, and gives what it ended with.
    pub(super) fn stop(mut self) -> Option<T> {
        self.join()
    }

    fn join(&mut self) -> Option<T> {
        // Fails only with the event's counter at its maximum, when the thread is awake anyway.
        let _ = self.stop.write(1);
        let joined = self.thread.take()?.join();
        joined.unwrap_or_else(|_| {
            tracing::error!("the thread {} panicked", self.name);
            None
        })
    }
}

impl<T> Drop for Worker<T> {
    fn drop(&mut self) {
        self.join();
    }
}
