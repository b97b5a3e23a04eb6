//! The threads that serve virtqueues, each with one io_uring.
//!
//! A [`WorkerPool`] belongs to the process and is shared by all its disks. Each queue is served by
//! one worker from its start to its stop; a worker serves any number of queues, of any disks.

mod event_loop;
mod polling;
mod queue;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::thread::{CpuSet, sched_setaffinity};
use vm_memory::GuestMemoryMmap;

use crate::bus_fault::Guard;
use crate::dirty_log::DirtyLog;
use crate::disk::Disk;
use crate::inflight_region::InflightRegion;
use crate::isolation::{self, Role};
use crate::metrics::QueueMetrics;
use crate::virtqueue::VirtqueueSetup;
use crate::vring::CallNotifier;
use event_loop::EventLoop;

/// Bytes of a worker's stack: its loop is shallow, and layers above it may encrypt.
const STACK_BYTES: usize = 512 << 10;

/// How to run the workers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerOptions {
    /// Threads that serve all queues, or `None` for one thread for each running queue.
    pub threads: Option<usize>,
    /// Processors to run on, in the order in which workers get them, one each; empty for no
    /// pinning.
    pub cpus: Vec<usize>,
    /// The longest time that an idle worker looks for requests before it sleeps. It does so only
    /// as long as that pays off. 0 turns it off.
    pub poll: Duration,
    /// Whether guest memory is registered with the rings, which keeps all of it in memory.
    pub pin_memory: bool,
    /// Whether a kernel thread takes operations out of each ring (`IORING_SETUP_SQPOLL`), and the
    /// time after which it sleeps.
    pub submission_poll: Option<Duration>,
}

impl Default for WorkerOptions {
    fn default() -> Self {
        let cores = thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self {
            threads: Some(cores),
            cpus: Vec::new(),
            poll: Duration::from_micros(32),
            pin_memory: false,
            submission_poll: None,
        }
    }
}

/// All that a worker needs to serve a queue.
#[derive(Debug)]
pub struct QueueSetup {
    /// The queue's index, for logs.
    pub index: usize,
    /// Where the rings are.
    pub virtqueue: VirtqueueSetup,
    /// The guest's memory; kept mapped until the last request has completed.
    pub memory: Arc<GuestMemoryMmap>,
    /// By which the loss of guest memory is noticed.
    pub guards: Vec<Arc<Guard>>,
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
    /// Where to note what is in flight.
    pub inflight: Option<InflightRegion>,
    /// Where to note what was written, and the guest address under which the used ring is logged.
    pub dirty_log: Option<(Arc<DirtyLog>, Option<u64>)>,
}

enum Command {
    Start(Box<QueueSetup>, mpsc::Sender<io::Result<u16>>),
    Stop(u16, mpsc::Sender<u16>),
    Quit,
}

/// What other threads see of a worker.
#[derive(Debug)]
struct Mailbox {
    commands: Mutex<Vec<Command>>,
    pending: AtomicBool,
    event: Arc<OwnedFd>,
    queues: AtomicUsize,
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Start(..) => "Start",
            Self::Stop(..) => "Stop",
            Self::Quit => "Quit",
        })
    }
}

impl Mailbox {
    fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            commands: Mutex::default(),
            pending: AtomicBool::new(false),
            event: Arc::new(event),
            queues: AtomicUsize::new(0),
        })
    }

    fn send(&self, command: Command) {
        self.commands
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(command);
        self.pending.store(true, Ordering::Release);
        // Fails only if the counter is full, and then the worker is being woken already.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
    }

    fn take(&self) -> Vec<Command> {
        if !self.pending.swap(false, Ordering::AcqRel) {
            return Vec::new();
        }
        let mut commands = self.commands.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *commands)
    }
}

/// The process's workers. Threads start when they are first needed.
#[derive(Debug)]
pub struct WorkerPool {
    options: WorkerOptions,
    workers: Mutex<Vec<Arc<Mailbox>>>,
    started: AtomicUsize,
}

impl WorkerPool {
    /// A pool without threads yet.
    pub fn new(options: WorkerOptions) -> Arc<Self> {
        Arc::new(Self {
            options,
            workers: Mutex::default(),
            started: AtomicUsize::new(0),
        })
    }

    /// Serves a queue until the handle is told to stop. Fails if the virtqueue, the disk's
    /// channel or a new worker's ring can't be set up.
    pub fn start(&self, setup: QueueSetup) -> io::Result<QueueHandle> {
        let base = setup.virtqueue.next_available;
        let (worker, owned) = self.worker()?;
        worker.queues.fetch_add(1, Ordering::Relaxed);
        let (reply, started) = mpsc::channel();
        worker.send(Command::Start(Box::new(setup), reply));
        let outcome = started
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("the worker has ended")));
        let handle = |slot| QueueHandle {
            worker: Arc::clone(&worker),
            owned,
            slot,
            base,
        };
        outcome.map(handle).inspect_err(|_| {
            worker.queues.fetch_sub(1, Ordering::Relaxed);
            if owned {
                worker.send(Command::Quit);
            }
        })
    }

    // The worker with the fewest queues, or a new one while there may be more. True if it is the
    // queue's own, and ends with it.
    fn worker(&self) -> io::Result<(Arc<Mailbox>, bool)> {
        let Some(most) = self.options.threads else {
            return Ok((self.spawn()?, true));
        };
        let mut workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        let least = workers
            .iter()
            .min_by_key(|worker| worker.queues.load(Ordering::Relaxed));
        if let Some(least) = least
            && (workers.len() >= most || least.queues.load(Ordering::Relaxed) == 0)
        {
            return Ok((Arc::clone(least), false));
        }
        let worker = self.spawn()?;
        workers.push(Arc::clone(&worker));
        Ok((worker, false))
    }

    fn spawn(&self) -> io::Result<Arc<Mailbox>> {
        let number = self.started.fetch_add(1, Ordering::Relaxed);
        let mailbox = Arc::new(Mailbox::new()?);
        let (options, of_thread) = (self.options.clone(), Arc::clone(&mailbox));
        let (ready, started) = mpsc::channel();
        // The ring belongs to the thread that creates it (IORING_SETUP_SINGLE_ISSUER).
        isolation::spawn(format!("worker {number}"), STACK_BYTES, move || {
            pin(&options.cpus, number);
            let event_loop = EventLoop::new(&options, of_thread);
            // With its ring, for it can't make another one.
            let isolated = event_loop.and_then(|event_loop| {
                isolation::enter(Role::Worker)?;
                Ok(event_loop)
            });
            match isolated {
                Ok(event_loop) => {
                    let _ = ready.send(Ok(()));
                    event_loop.run();
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            }
        })?;
        let outcome = started.recv();
        outcome.unwrap_or_else(|_| Err(io::Error::other("the worker ended early")))?;
        Ok(mailbox)
    }
}

impl Drop for WorkerPool {
    fn drop(&mut self) {
        let workers = self.workers.get_mut();
        for worker in workers.unwrap_or_else(PoisonError::into_inner) {
            worker.send(Command::Quit);
        }
    }
}

fn pin(cpus: &[usize], number: usize) {
    if cpus.is_empty() {
        return;
    }
    let mut set = CpuSet::new();
    if let Some(cpu) = cpus.get(number % cpus.len()) {
        set.set(*cpu);
    }
    if let Err(error) = sched_setaffinity(None, &set) {
        tracing::warn!(%error, number, "can't pin a worker to its processor");
    }
}

/// A queue that is being served.
#[derive(Debug)]
pub struct QueueHandle {
    worker: Arc<Mailbox>,
    owned: bool,
    slot: u16,
    base: u16,
}

impl QueueHandle {
    /// Completes what is in flight, stops, and returns the available index from which a
    /// successor has to go on.
    pub fn stop(self) -> u16 {
        let (reply, stopped) = mpsc::channel();
        self.worker.send(Command::Stop(self.slot, reply));
        let base = stopped.recv().unwrap_or_else(|_| {
            tracing::error!("a queue's worker has ended before it");
            self.base
        });
        self.worker.queues.fetch_sub(1, Ordering::Relaxed);
        if self.owned {
            self.worker.send(Command::Quit);
        }
        base
    }
}
