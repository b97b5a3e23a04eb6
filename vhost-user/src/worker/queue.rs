//! One virtqueue in a worker.

use std::fs::File;
use std::ops::BitOrAssign;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, mpsc};

use crate::layer::{FileSlot, RingOperations, Waker};
use crate::request_executor::RequestExecutor;
use crate::virtqueue::QueueError;
use crate::vring::CallNotifier;
use vm_memory::GuestMemoryMmap;

/// A queue that a worker serves.
#[derive(Debug)]
#[allow(clippy::struct_excessive_bools, reason = "they are independent")]
pub(super) struct Queue {
    pub executor: RequestExecutor,
    pub operations: RingOperations,
    pub index: usize,
    pub kick: Arc<File>,
    pub call: Arc<CallNotifier>,
    pub error: Option<Arc<File>>,
    pub waker: Waker,
    pub files: Vec<FileSlot>,
    pub memory: Arc<GuestMemoryMmap>,
    /// Whether the poll on the kick is in the ring.
    pub kick_armed: bool,
    /// Whether the worker looks at it without being kicked.
    pub hot: bool,
    /// Whether it may have more requests than were taken in one go.
    pub more: bool,
    pub broken: bool,
    pub stopping: Option<mpsc::Sender<u16>>,
}

/// What a look at a queue came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Outcome {
    /// Whether there were requests.
    pub taken: bool,
    /// Whether requests were answered.
    pub answered: bool,
}

impl BitOrAssign for Outcome {
    fn bitor_assign(&mut self, other: Self) {
        self.taken |= other.taken;
        self.answered |= other.answered;
    }
}

impl Queue {
    pub fn kick_descriptor(&self) -> RawFd {
        self.kick.as_raw_fd()
    }

    /// Whether it takes requests.
    pub fn is_serving(&self) -> bool {
        !self.broken && self.stopping.is_none()
    }

    /// Takes new requests and answers the completed ones.
    pub fn run(&mut self) -> Outcome {
        let mut taken = false;
        self.more = false;
        // Lost memory looks like an empty ring; taking from it says what it is.
        let executor = &self.executor;
        let asked = executor.has_available() || executor.is_replaying();
        if self.is_serving() && (asked || executor.has_lost_memory()) {
            taken = true;
            let outcome = self.executor.take_requests(&mut self.operations);
            self.more = self.mind(outcome).unwrap_or(false);
        }
        let answered = self.answer();
        Outcome { taken, answered }
    }

    // Answers the completed requests and interrupts the guest if it wants that.
    fn answer(&mut self) -> bool {
        let outcome = self.executor.answer_completed();
        let any = self.mind(outcome).unwrap_or(false);
        if self.executor.publish() {
            self.call.signal();
        }
        any
    }

    /// Lets the driver save its kicks no longer. True if requests came in meanwhile.
    pub fn cool(&mut self) -> bool {
        self.hot = self.is_serving() && self.executor.enable_kicks();
        self.hot
    }

    // What the guest did wrong ends its queue, and nothing else.
    fn mind<T>(&mut self, outcome: Result<T, QueueError>) -> Option<T> {
        outcome
            .inspect_err(|error| {
                tracing::error!(queue = self.index, %error, "the guest broke its queue; it stops");
                self.announce_broken();
            })
            .ok()
    }

    /// Stops taking requests and tells the frontend.
    pub fn announce_broken(&mut self) {
        let already = std::mem::replace(&mut self.broken, true);
        if let Some(error) = self.error.as_ref().filter(|_| !already) {
            // Nobody is left to tell if this fails.
            let _ = rustix::io::write(error, &1_u64.to_ne_bytes());
        }
    }
}
