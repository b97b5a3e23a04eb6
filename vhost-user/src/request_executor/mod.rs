//! From available descriptor chains to requests of the disk's layers, and from their results to
//! used chains.
//!
//! Does no I/O itself: the layers collect operations in a list for the worker to submit, and their
//! results come back as numbers. So all of it runs in tests and fuzzers without a ring.

mod requests;

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use libc::iovec;
use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK};
use vm_memory::{Address, Bytes, GuestAddress};

use crate::bus_fault::Guard;
use crate::descriptor_chain::{DescriptorChain, Segment};
use crate::dirty_log::DirtyLog;
use crate::disk::Disk;
use crate::error_log::ErrorLog;
use crate::inflight_region::InflightRegion;
use crate::layer::{GuestLease, IoChannel, IoCompletion, RingOperations, Token};
use crate::metrics::{Completed, QueueMetrics};
use crate::pinned_memory::PinnedMemory;
use crate::request::Range;
use crate::virtqueue::{QueueError, Virtqueue};

/// Iovec arrays kept for later requests.
const SPARE_ARRAYS: usize = 256;

/// All that requests need beside the virtqueue.
#[derive(Debug)]
pub struct ExecutorSetup {
    /// The queue's index, for logs.
    pub index: usize,
    /// The disk.
    pub disk: Arc<Disk>,
    /// The queue's way to the disk's contents.
    pub channel: Box<dyn IoChannel>,
    /// The queue's counters.
    pub metrics: Arc<QueueMetrics>,
    /// By which the loss of guest memory is noticed.
    pub guards: Vec<Arc<Guard>>,
    /// Where to note what is in flight, if the frontend keeps such memory.
    pub inflight: Option<InflightRegion>,
    /// Where to note what was written, and the guest address under which the used ring is logged.
    pub dirty_log: Option<(Arc<DirtyLog>, Option<u64>)>,
    /// Guest memory that is registered with the worker's ring.
    pub pinned: PinnedMemory,
}

/// A request that the layers are working on.
#[derive(Clone, Debug)]
struct Pending {
    head: u16,
    status: GuestAddress,
    completed: Completed,
    /// When it was taken.
    begun: Instant,
    /// Guest memory that a read writes to; only kept for the dirty log.
    written: Vec<Segment>,
    /// Parts of a request of several ranges that are still to be done.
    parts: u32,
    failed: bool,
}

/// The requests of one virtqueue.
#[derive(Debug)]
pub struct RequestExecutor {
    channel: Box<dyn IoChannel>,
    pending: Vec<Option<Pending>>,
    free: Vec<usize>,
    taken: Vec<bool>,
    replay: VecDeque<u16>,
    inflight: Option<InflightRegion>,
    dirty_log: Option<(Arc<DirtyLog>, Option<u64>)>,
    guards: Vec<Arc<Guard>>,
    chain: DescriptorChain,
    ranges: Vec<Range>,
    index: usize,
    disk: Arc<Disk>,
    metrics: Arc<QueueMetrics>,
    log: ErrorLog,
    spare_iovecs: Vec<Vec<iovec>>,
    pinned: PinnedMemory,
    queue: Virtqueue,
    lease: GuestLease,
    /// The time as of the requests that are being taken: one reading of the clock for all of them.
    now: Instant,
}

impl RequestExecutor {
    /// For a virtqueue that this process hasn't touched yet. What an earlier one left in flight
    /// comes first.
    pub fn new(mut queue: Virtqueue, setup: ExecutorSetup) -> Self {
        let capacity = queue.table().size as usize;
        let mut inflight = setup.inflight;
        let replay: VecDeque<u16> = inflight
            .as_mut()
            .map(|region| region.recover(queue.used_index()))
            .unwrap_or_default()
            .into();
        if inflight.is_some() {
            // What is in flight was taken from the available ring, and nothing else.
            let count = u16::try_from(replay.len()).unwrap_or(u16::MAX);
            queue.go_on_from(queue.used_index().wrapping_add(count));
        }
        Self {
            channel: setup.channel,
            pending: (0..capacity).map(|_| None).collect(),
            free: (0..capacity).rev().collect(),
            taken: vec![false; capacity],
            replay,
            inflight,
            dirty_log: setup.dirty_log,
            guards: setup.guards,
            chain: DescriptorChain::default(),
            ranges: Vec::new(),
            index: setup.index,
            disk: setup.disk,
            metrics: setup.metrics,
            log: ErrorLog::default(),
            spare_iovecs: Vec::new(),
            pinned: setup.pinned,
            lease: Rc::new(Arc::clone(queue.memory())),
            now: Instant::now(),
            queue,
        }
    }

    /// Whether the layers have nothing to do.
    pub fn is_idle(&self) -> bool {
        self.free.len() == self.pending.len()
    }

    /// Whether the frontend took memory away that it had shared.
    pub fn has_lost_memory(&self) -> bool {
        self.guards.iter().any(|guard| guard.is_lost())
    }

    /// Requests left by an earlier backend that are still to be taken.
    pub fn is_replaying(&self) -> bool {
        !self.replay.is_empty()
    }

    /// The available index from which a successor has to go on.
    pub fn next_available(&self) -> u16 {
        self.queue.next_available()
    }

    /// Whether the guest has made requests available that were not taken yet.
    pub fn has_available(&self) -> bool {
        self.queue.has_available() && !self.free.is_empty()
    }

    /// Asks for kicks again. True if requests came in meanwhile.
    pub fn enable_kicks(&mut self) -> bool {
        // A full queue has nothing to be kicked for; the next completion leads back.
        self.queue.enable_kicks() && !self.free.is_empty()
    }

    /// Shows the guest what was completed. True if it wants an interrupt for that.
    pub fn publish(&mut self) -> bool {
        if !self.queue.publish() {
            return false;
        }
        if let Some(inflight) = &mut self.inflight {
            inflight.published(self.queue.used_index());
        }
        let wanted = self.queue.take_notification();
        if wanted {
            self.metrics.count_notification();
        }
        wanted
    }

    /// Takes new requests. True if some may be left that no kick will announce.
    ///
    /// At most one queue's worth in a row, so that a guest that never stops asking can't keep
    /// completions and the order to stop from being seen.
    pub fn take_requests(&mut self, ring: &mut RingOperations) -> Result<bool, QueueError> {
        if self.has_lost_memory() {
            return Err(QueueError::MemoryLost);
        }
        self.queue.disable_kicks();
        self.now = Instant::now();
        for _ in 0..self.pending.len() {
            if self.free.is_empty() {
                // The next completion leads back here.
                return Ok(false);
            }
            if let Some(head) = self.replay.pop_front() {
                self.claim(head)?;
                self.take_request(head, ring)?;
                continue;
            }
            let Some(head) = self.queue.pop()? else {
                return Ok(false);
            };
            self.claim(head)?;
            if let Some(inflight) = &mut self.inflight {
                inflight.take(head);
            }
            self.take_request(head, ring)?;
        }
        Ok(true)
    }

    /// Takes the result of a ring operation: bytes, or a negated errno.
    pub fn complete(&mut self, token: Token, result: i32, ring: &mut RingOperations) {
        self.channel.complete(token, result, ring);
    }

    /// Lets the layers go on after a wake-up or a deadline.
    pub fn wake(&mut self, now: Instant, ring: &mut RingOperations) {
        self.channel.wake(now, ring);
    }

    /// When the layers want to go on.
    pub fn deadline(&self) -> Option<Instant> {
        self.channel.deadline()
    }

    /// Answers the requests that the layers have completed. Returns whether there were any.
    pub fn answer_completed(&mut self) -> Result<bool, QueueError> {
        let mut now = None;
        while let Some(completion) = self.channel.take_completion() {
            let now = *now.get_or_insert_with(Instant::now);
            self.answer_completion(completion, now)?;
        }
        Ok(now.is_some())
    }

    // A chain is the device's from here on until it is handed back (virtio 1.2, 2.7.13).
    fn claim(&mut self, head: u16) -> Result<(), QueueError> {
        match self.taken.get_mut(usize::from(head)) {
            Some(taken @ false) => {
                *taken = true;
                Ok(())
            }
            Some(true) => Err(QueueError::InFlight { head }),
            None => Err(crate::descriptor_chain::ChainError::IndexOutOfRange {
                index: u32::from(head),
                size: self.queue.table().size,
            }
            .into()),
        }
    }

    fn answer_completion(
        &mut self,
        completion: IoCompletion,
        now: Instant,
    ) -> Result<(), QueueError> {
        self.recycle(completion.buffers.into_iovecs());
        let slot = usize::try_from(completion.tag).unwrap_or(usize::MAX);
        let Some(entry) = self.pending.get_mut(slot) else {
            return Ok(());
        };
        let Some(pending) = entry else {
            return Ok(());
        };
        if let Err(errno) = completion.result {
            pending.failed = true;
            self.log.disk_error(self.index, pending.completed, errno);
        }
        pending.parts -= 1;
        if pending.parts > 0 {
            return Ok(());
        }
        let Some(pending) = entry.take() else {
            return Ok(());
        };
        self.free.push(slot);
        self.metrics.count(pending.completed, !pending.failed);
        let time = now.saturating_duration_since(pending.begun);
        self.metrics.time(pending.completed, time);
        if let Some((log, _)) = &self.dirty_log {
            for segment in &pending.written {
                log.mark(segment.address.raw_value(), u64::from(segment.len));
            }
        }
        let written = match pending.completed {
            Completed::Read(bytes) if !pending.failed => u32::try_from(bytes).unwrap_or(u32::MAX),
            _ => 0,
        };
        let status = if pending.failed {
            VIRTIO_BLK_S_IOERR
        } else {
            VIRTIO_BLK_S_OK
        };
        self.answer(pending.head, pending.status, status, written)
    }

    fn recycle(&mut self, mut iovecs: Vec<iovec>) {
        if iovecs.capacity() > 0 && self.spare_iovecs.len() < SPARE_ARRAYS {
            iovecs.clear();
            self.spare_iovecs.push(iovecs);
        }
    }

    // Counts and answers a request that the layers were not asked for.
    fn finish(
        &mut self,
        head: u16,
        address: GuestAddress,
        status: u32,
        written: u32,
    ) -> Result<(), QueueError> {
        self.metrics
            .count(Completed::Other, status == VIRTIO_BLK_S_OK);
        self.answer(head, address, status, written)
    }

    // Writes the status byte and hands the chain back; `written` are the data bytes before it.
    fn answer(
        &mut self,
        head: u16,
        address: GuestAddress,
        status: u32,
        written: u32,
    ) -> Result<(), QueueError> {
        let byte = u8::try_from(status).unwrap_or(1);
        self.queue
            .memory()
            .write_obj(byte, address)
            .map_err(|_| QueueError::Status)?;
        if let Some((log, used_ring)) = &self.dirty_log {
            log.mark(address.raw_value(), 1);
            if let Some(used_ring) = used_ring {
                log.mark(*used_ring, self.queue.used_ring_bytes());
            }
        }
        if let Some(taken) = self.taken.get_mut(usize::from(head)) {
            *taken = false;
        }
        if let Some(inflight) = &mut self.inflight {
            inflight.give_back(head);
        }
        self.queue.push_used(head, written.saturating_add(1));
        Ok(())
    }
}
