//! The data path: one thread and one io_uring for each virtqueue.
//!
//! The thread has a single place to wait, the ring: the guest's kicks and the order to stop
//! arrive there as completions of polls on eventfds, next to the disk's completions.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use rustix::event::{EventfdFlags, eventfd};
use vm_memory::GuestMemoryMmap;

use crate::disk::Disk;
use crate::metrics::QueueMetrics;
use crate::request_executor::RequestExecutor;
use crate::uring;
use crate::virtqueue::{QueueError, Virtqueue, VirtqueueSetup};
use crate::vring::CallNotifier;

// Completions that don't belong to a request; the requests' tokens are slots, far below.
const KICK: u64 = u64::MAX;
const CONTROL: u64 = u64::MAX - 1;

/// All that a worker needs.
#[derive(Debug)]
pub struct WorkerSetup {
    /// The queue's index, for logs.
    pub index: usize,
    /// Where the rings are.
    pub virtqueue: VirtqueueSetup,
    /// The guest's memory; kept mapped until the last request has completed.
    pub memory: Arc<GuestMemoryMmap>,
    /// The disk.
    pub disk: Arc<Disk>,
    /// The eventfd by which the guest announces requests.
    pub kick: Arc<File>,
    /// The guest's interrupt.
    pub call: Arc<CallNotifier>,
    /// Where to announce that the queue is broken.
    pub error: Option<Arc<File>>,
    /// The queue's counters.
    pub metrics: Arc<QueueMetrics>,
}

/// A running worker.
#[derive(Debug)]
pub struct QueueWorker {
    thread: JoinHandle<u16>,
    control: OwnedFd,
    base: u16,
}

impl QueueWorker {
    /// Starts the thread. Fails if its ring or the virtqueue can't be set up.
    pub fn start(setup: WorkerSetup) -> io::Result<Self> {
        let control = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let thread_control = control.try_clone()?;
        let base = setup.virtqueue.next_available;
        let (ready, started) = mpsc::channel();
        // The ring belongs to the thread that creates it (IORING_SETUP_SINGLE_ISSUER).
        let thread = thread::Builder::new()
            .name(format!("queue {}", setup.index))
            .spawn(move || match Worker::new(setup, thread_control) {
                Ok(worker) => {
                    let _ = ready.send(Ok(()));
                    worker.run()
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                    base
                }
            })?;
        let outcome = started
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("the queue's thread ended early")));
        match outcome {
            Ok(()) => Ok(Self {
                thread,
                control,
                base,
            }),
            Err(error) => {
                let _ = thread.join();
                Err(error)
            }
        }
    }

    /// Completes what is in flight, ends the thread, and returns the available index from
    /// which a successor has to go on.
    pub fn stop(self) -> u16 {
        if let Err(error) = rustix::io::write(&self.control, &1_u64.to_ne_bytes()) {
            tracing::error!(%error, "can't tell a queue's thread to stop");
        }
        self.thread.join().unwrap_or_else(|_| {
            tracing::error!("a queue's thread panicked");
            self.base
        })
    }
}

struct Worker {
    // Before the executor, so that the ring is closed when its requests' memory goes.
    ring: IoUring,
    executor: RequestExecutor,
    index: usize,
    kick: Arc<File>,
    control: OwnedFd,
    call: Arc<CallNotifier>,
    error: Option<Arc<File>>,
    stopping: bool,
    broken: bool,
}

impl Worker {
    fn new(setup: WorkerSetup, control: OwnedFd) -> io::Result<Self> {
        // Each request has at most one operation submitted, and there are two polls.
        let entries = u32::from(setup.virtqueue.size) + 2;
        let queue = Virtqueue::new(setup.virtqueue, setup.memory).map_err(io::Error::other)?;
        let ring = uring::create(entries)?;
        let image = setup.disk.image.file().as_raw_fd();
        ring.submitter().register_files(&[image])?;
        Ok(Self {
            ring,
            executor: RequestExecutor::new(setup.index, queue, setup.disk, setup.metrics),
            index: setup.index,
            kick: setup.kick,
            control,
            call: setup.call,
            error: setup.error,
            stopping: false,
            broken: false,
        })
    }

    fn run(mut self) -> u16 {
        tracing::debug!(queue = self.index, "queue started");
        if let Err(error) = self.serve() {
            tracing::error!(queue = self.index, %error, "the queue's io_uring failed");
            self.announce_broken();
        }
        tracing::debug!(queue = self.index, "queue stopped");
        self.executor.next_available()
    }

    fn serve(&mut self) -> io::Result<()> {
        let kick = self.kick.as_raw_fd();
        self.arm_poll(kick, KICK)?;
        self.arm_poll(self.control.as_raw_fd(), CONTROL)?;
        let mut completions = Vec::new();
        loop {
            let more_requests = !self.stopping && !self.broken && self.take_requests();
            self.submit_operations()?;
            self.announce();
            if self.stopping && self.executor.is_idle() {
                return Ok(());
            }
            self.wait(usize::from(!more_requests))?;
            completions.extend(self.ring.completion().map(|entry: cqueue::Entry| {
                let more = cqueue::more(entry.flags());
                (entry.user_data(), entry.result(), more)
            }));
            for (token, result, more) in completions.drain(..) {
                match token {
                    KICK => self.kicked(kick, result, more)?,
                    CONTROL => self.stopping = true,
                    token => {
                        let outcome = self.executor.complete(token, result);
                        self.mind(outcome);
                    }
                }
            }
            self.announce();
        }
    }

    fn wait(&mut self, completions: usize) -> io::Result<()> {
        match self.ring.submit_and_wait(completions) {
            Ok(_) => Ok(()),
            // Interrupted, or out of memory or room for now: reap what is there and try again.
            Err(error) if is_passing(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }

    // A multishot poll reports every write to the eventfd, so its counter is never read: that
    // saves a system call for each kick, and a leftover count only means one look too many.
    fn arm_poll(&mut self, descriptor: RawFd, token: u64) -> io::Result<()> {
        let events = u32::from(libc::POLLIN.unsigned_abs());
        let entry = opcode::PollAdd::new(types::Fd(descriptor), events)
            .multi(true)
            .build()
            .user_data(token);
        self.submit(&entry)
    }

    fn kicked(&mut self, descriptor: RawFd, result: i32, more: bool) -> io::Result<()> {
        if result < 0 {
            let error = io::Error::from_raw_os_error(-result);
            tracing::error!(queue = self.index, %error, "can't wait for the guest's kicks");
            self.announce_broken();
        } else if !more && !self.stopping {
            self.arm_poll(descriptor, KICK)?;
        }
        Ok(())
    }

    fn take_requests(&mut self) -> bool {
        let outcome = self.executor.take_requests();
        self.mind(outcome).unwrap_or(false)
    }

    fn submit_operations(&mut self) -> io::Result<()> {
        while let Some(operation) = self.executor.take_operation() {
            self.submit(&operation)?;
        }
        Ok(())
    }

    fn submit(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: what the entry points to is owned by the executor until the entry's
            // completion, or is an eventfd that this worker keeps open.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) if is_passing(&error) => thread::yield_now(),
                Err(error) => return Err(error),
            }
        }
    }

    fn announce(&mut self) {
        let outcome = self.executor.take_notification();
        if self.mind(outcome).unwrap_or(false) {
            self.call.signal();
        }
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

    fn announce_broken(&mut self) {
        let already = std::mem::replace(&mut self.broken, true);
        if let Some(error) = self.error.as_ref().filter(|_| !already) {
            // Nobody is left to tell if this fails.
            let _ = rustix::io::write(error, &1_u64.to_ne_bytes());
        }
    }
}

fn is_passing(error: &io::Error) -> bool {
    let errno = error.raw_os_error();
    matches!(errno, Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
}
