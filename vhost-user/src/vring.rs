//! One virtqueue as the frontend describes it, message by message, and the worker that serves it.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use vm_memory::GuestMemoryMmap;

use crate::dirty_log::DirtyLog;
use crate::disk::Disk;
use crate::guest_memory::MemoryTable;
use crate::inflight_region::InflightMemory;
use crate::metrics::QueueMetrics;
use crate::virtqueue::VirtqueueSetup;
use crate::worker::{QueueHandle, QueueSetup, WorkerPool};

/// The eventfd that interrupts the guest. Frontends replace it while the queue runs, when the
/// guest masks an interrupt vector.
#[derive(Debug, Default)]
pub struct CallNotifier {
    file: Mutex<Option<File>>,
}

impl CallNotifier {
    /// Uses this eventfd from now on, and signals it once: an interrupt that went to the old
    /// one may have been lost.
    pub fn replace(&self, file: Option<File>) -> io::Result<()> {
        if let Some(file) = &file {
            // A frontend that fills the counter must not be able to block the queue.
            let flags = fcntl_getfl(file.as_fd())?;
            fcntl_setfl(file.as_fd(), flags | OFlags::NONBLOCK)?;
        }
        *self.file.lock().unwrap_or_else(PoisonError::into_inner) = file;
        self.signal();
        Ok(())
    }

    /// Interrupts the guest, if it has given a way to.
    pub fn signal(&self) {
        let file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = file.as_ref() {
            // Failing means that the counter is full, so the guest is already being told, or
            // that it isn't an eventfd, which harms nobody but the frontend.
            let _ = (&*file).write(&1_u64.to_ne_bytes());
        }
    }
}

/// Where the frontend put the rings, in its own address space.
#[derive(Clone, Copy, Debug)]
pub struct RingAddresses {
    /// The descriptor table.
    pub descriptor_table: u64,
    /// The available ring.
    pub available_ring: u64,
    /// The used ring.
    pub used_ring: u64,
    /// The guest physical address under which writes to the used ring are logged, if they are.
    pub used_log: Option<u64>,
}

/// What all queues of a device share while they run.
#[derive(Debug)]
pub struct Negotiated {
    /// The disk and how to treat its cache.
    pub disk: Arc<Disk>,
    /// Whether `VIRTIO_F_EVENT_IDX` was negotiated.
    pub event_idx: bool,
    /// Whether `VIRTIO_F_INDIRECT_DESC` was negotiated.
    pub indirect: bool,
    /// The memory that the frontend keeps for what is in flight.
    pub inflight: Option<Arc<InflightMemory>>,
    /// The log of written pages, while the guest migrates.
    pub dirty_log: Option<Arc<DirtyLog>>,
    /// The threads that serve the queues.
    pub workers: Arc<WorkerPool>,
}

/// One virtqueue.
#[derive(Debug)]
pub struct Vring {
    /// The queue's index, for logs.
    pub index: usize,
    /// Descriptors, or `None` until the frontend says.
    pub size: Option<u16>,
    /// The rings, or `None` until the frontend says.
    pub addresses: Option<RingAddresses>,
    /// The available index to start from.
    pub base: u16,
    /// The eventfd by which the guest announces requests.
    pub kick: Option<Arc<File>>,
    /// The eventfd by which a broken queue is announced to the frontend.
    pub error: Option<Arc<File>>,
    /// Whether the queue may run.
    pub enabled: bool,
    /// The guest's interrupt.
    pub call: Arc<CallNotifier>,
    /// The queue's counters.
    pub metrics: Arc<QueueMetrics>,
    running: Option<QueueHandle>,
}

impl Vring {
    /// A queue that the frontend hasn't said anything about.
    pub fn new(index: usize, metrics: Arc<QueueMetrics>) -> Self {
        Self {
            index,
            size: None,
            addresses: None,
            base: 0,
            kick: None,
            error: None,
            enabled: false,
            call: Arc::default(),
            metrics,
            running: None,
        }
    }

    /// Starts the queue if the frontend has given all it takes, and it doesn't run yet.
    pub fn start_if_ready(
        &mut self,
        table: &MemoryTable,
        memory: Option<&Arc<GuestMemoryMmap>>,
        negotiated: &Negotiated,
    ) -> io::Result<()> {
        let (Some(size), Some(addresses), Some(kick), Some(memory)) =
            (self.size, self.addresses, &self.kick, memory)
        else {
            return Ok(());
        };
        if !self.enabled || self.running.is_some() {
            return Ok(());
        }
        let translate = |name: &str, address: u64| {
            table.translate(address).ok_or_else(|| {
                io::Error::other(format!(
                    "the {name} of queue {} at {address:#x} is in no memory region",
                    self.index
                ))
            })
        };
        let inflight = negotiated.inflight.as_ref();
        let inflight = inflight.map(|memory| memory.region(self.index, size));
        let dirty_log = negotiated.dirty_log.clone();
        let setup = QueueSetup {
            index: self.index,
            virtqueue: VirtqueueSetup {
                size,
                descriptor_table: translate("descriptor table", addresses.descriptor_table)?,
                available_ring: translate("available ring", addresses.available_ring)?,
                used_ring: translate("used ring", addresses.used_ring)?,
                next_available: self.base,
                event_idx: negotiated.event_idx,
                indirect: negotiated.indirect,
            },
            memory: Arc::clone(memory),
            guards: table.guards(),
            disk: Arc::clone(&negotiated.disk),
            kick: Arc::clone(kick),
            call: Arc::clone(&self.call),
            error: self.error.clone(),
            metrics: Arc::clone(&self.metrics),
            inflight: inflight.transpose()?,
            dirty_log: dirty_log.map(|log| (log, addresses.used_log)),
        };
        self.running = Some(negotiated.workers.start(setup)?);
        Ok(())
    }

    /// Completes what is in flight and stops. The queue can be started again from there.
    pub fn pause(&mut self) {
        if let Some(running) = self.running.take() {
            self.base = running.stop();
        }
    }

    /// Stops, and forgets what the frontend has to give anew before the next start.
    pub fn stop(&mut self) -> u16 {
        self.pause();
        self.kick = None;
        // Can't fail without a file.
        let _ = self.call.replace(None);
        self.base
    }

    /// Whether the queue is being served.
    pub fn is_running(&self) -> bool {
        self.running.is_some()
    }
}
