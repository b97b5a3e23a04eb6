//! The console's host side: the log, the socket's clients, and input to the guest's device, which is the
//! serial port or a virtio console.
//!
//! A vCPU only appends to [`ConsoleOutput`]'s buffer; the API thread moves the bytes to the log
//! and to the clients, so that neither a slow disk nor a slow reader stops the guest.

mod log;
mod replay;
mod server;

use std::io;
use std::sync::{Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub use log::ConsoleLog;
pub use server::ConsoleServer;

/// What a guest may print before the API thread takes it; more is dropped, and the log says so.
const MAX_PENDING: usize = 1 << 20;

/// A device that the guest reads what is typed from.
pub trait ConsoleInput: Send {
    /// Offers input to the guest; returns how many bytes it took. There is none if the device only
    /// asked to be looked after ([`ConsoleOutput::input_wanted`]).
    fn send(&self, input: &[u8]) -> usize;
}

/// The guest's output on its way to the log and the clients.
#[derive(Debug)]
pub struct ConsoleOutput {
    pending: Mutex<Pending>,
    wake: EventFd,
}

#[derive(Debug, Default)]
struct Pending {
    bytes: Vec<u8>,
    dropped: u64,
}

impl ConsoleOutput {
    /// An empty buffer.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            pending: Mutex::default(),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    /// Appends what the guest printed. Never blocks on I/O.
    pub fn push(&self, bytes: &[u8]) {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        let was_empty = pending.bytes.is_empty();
        if pending.bytes.len() + bytes.len() > MAX_PENDING {
            pending.dropped += bytes.len() as u64;
        } else {
            pending.bytes.extend_from_slice(bytes);
        }
        drop(pending);
        if was_empty {
            self.notify();
        }
    }

    /// Counts what the guest printed, and nobody will see.
    pub fn count_dropped(&self, bytes: u64) {
        if bytes == 0 {
            return;
        }
        self.pending
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .dropped += bytes;
        self.notify();
    }

    /// The guest has room for input, or its device wants to be looked after.
    pub fn input_wanted(&self) {
        self.notify();
    }

    /// The event that says that there is something to take.
    pub const fn wake_event(&self) -> &EventFd {
        &self.wake
    }

    fn notify(&self) {
        // Fails only with the counter at its maximum, when the reader is awake anyway.
        let _ = self.wake.write(1);
    }

    /// Moves the pending output to `into`; returns how many bytes had been dropped before it.
    fn take(&self, into: &mut Vec<u8>) -> u64 {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        into.clear();
        std::mem::swap(&mut pending.bytes, into);
        std::mem::take(&mut pending.dropped)
    }
}
