//! The data path: one thread and one io_uring for each virtqueue.
//!
//! The thread has a single place to wait, the ring: the guest's kicks and the order to stop
//! arrive there as completions of polls on eventfds, next to the disk's completions.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use libc::iovec;
use rustix::event::{EventfdFlags, eventfd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};

use crate::descriptor_chain::{DescriptorChain, Segment};
use crate::error_log::ErrorLog;
use crate::guest_memory::append_iovecs;
use crate::image::Image;
use crate::in_flight::{InFlight, InFlightTable, Work};
use crate::metrics::{Completed, QueueMetrics};
use crate::request::{self, Operation, Request};
use crate::transfer::{IMAGE_FILE, Step, Transfer};
use crate::uring;
use crate::virtqueue::{QueueError, Virtqueue, VirtqueueSetup};
use crate::vring::CallNotifier;

/// Bytes of a `VIRTIO_BLK_T_GET_ID` answer (virtio 1.2, 5.2.6).
pub const SERIAL_SIZE: usize = 20;

// Completions that don't belong to a request; slots are far below.
const KICK: u64 = u64::MAX;
const CONTROL: u64 = u64::MAX - 1;

/// The disk as all its queues see it.
#[derive(Debug)]
pub struct Disk {
    /// The open image.
    pub image: Image,
    /// The serial number, padded with zeroes.
    pub serial: [u8; SERIAL_SIZE],
    /// Whether each write has to be durable before it completes, because the driver can't
    /// flush or has switched the write cache off.
    pub write_through: AtomicBool,
}

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
    // Before `in_flight`, so that the ring is gone when that is dropped.
    ring: IoUring,
    in_flight: InFlightTable,
    queue: Virtqueue,
    chain: DescriptorChain,
    index: usize,
    disk: Arc<Disk>,
    kick: Arc<File>,
    control: OwnedFd,
    call: Arc<CallNotifier>,
    error: Option<Arc<File>>,
    metrics: Arc<QueueMetrics>,
    log: ErrorLog,
    stopping: bool,
    broken: bool,
}

impl Worker {
    fn new(setup: WorkerSetup, control: OwnedFd) -> io::Result<Self> {
        let size = setup.virtqueue.size;
        let queue =
            Virtqueue::new(setup.virtqueue, Arc::clone(&setup.memory)).map_err(io::Error::other)?;
        // Each request has at most one operation submitted, and there are two polls.
        let ring = uring::create(u32::from(size) + 2)?;
        ring.submitter()
            .register_files(&[setup.disk.image.file().as_raw_fd()])?;
        Ok(Self {
            ring,
            in_flight: InFlightTable::new(setup.memory, usize::from(size)),
            queue,
            chain: DescriptorChain::default(),
            index: setup.index,
            disk: setup.disk,
            kick: setup.kick,
            control,
            call: setup.call,
            error: setup.error,
            metrics: setup.metrics,
            log: ErrorLog::default(),
            stopping: false,
            broken: false,
        })
    }

    fn run(mut self) -> u16 {
        tracing::debug!(queue = self.index, "queue started");
        let kick = self.kick.as_raw_fd();
        let control = self.control.as_raw_fd();
        self.arm_poll(kick, KICK);
        self.arm_poll(control, CONTROL);
        let mut completions = Vec::new();
        loop {
            let more_to_take = !self.stopping && !self.broken && self.take_requests();
            self.announce();
            if self.stopping && self.in_flight.is_empty() {
                break;
            }
            if let Err(error) = self.wait(usize::from(!more_to_take)) {
                tracing::error!(queue = self.index, %error, "the queue's io_uring failed");
                self.announce_broken();
                break;
            }
            completions.extend(self.ring.completion().map(|entry: cqueue::Entry| {
                (
                    entry.user_data(),
                    entry.result(),
                    cqueue::more(entry.flags()),
                )
            }));
            for (token, result, more) in completions.drain(..) {
                match token {
                    KICK => self.kicked(kick, result, more),
                    CONTROL => self.stopping = true,
                    token => self.complete_operation(token, result),
                }
            }
        }
        tracing::debug!(queue = self.index, "queue stopped");
        self.queue.next_available()
    }

    fn wait(&mut self, completions: usize) -> io::Result<()> {
        match self.ring.submit_and_wait(completions) {
            Ok(_) => Ok(()),
            // Interrupted, or out of memory or room for now: reap what is there and try again.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    // A multishot poll reports every write to the eventfd, so its counter is never read: that
    // saves a system call for each kick, and a leftover count only means one look too many.
    fn arm_poll(&mut self, descriptor: i32, token: u64) {
        let events = u32::from(libc::POLLIN.unsigned_abs());
        let entry = opcode::PollAdd::new(types::Fd(descriptor), events)
            .multi(true)
            .build()
            .user_data(token);
        self.submit(&entry);
    }

    fn kicked(&mut self, descriptor: i32, result: i32, more: bool) {
        if result < 0 {
            let error = io::Error::from_raw_os_error(-result);
            tracing::error!(queue = self.index, %error, "can't wait for the guest's kicks");
            self.announce_broken();
        } else if !more && !self.stopping {
            self.arm_poll(descriptor, KICK);
        }
    }

    // True if requests may be left that no event will announce.
    fn take_requests(&mut self) -> bool {
        self.try_take_requests().unwrap_or_else(|error| {
            tracing::error!(queue = self.index, %error, "the guest broke its queue; it stops");
            self.announce_broken();
            false
        })
    }

    // At most one queue's worth in a row, so that a guest that never stops asking can't keep
    // completions and the order to stop from being seen.
    fn try_take_requests(&mut self) -> Result<bool, QueueError> {
        let mut budget = self.queue.table().size;
        self.queue.disable_kicks()?;
        loop {
            if !self.in_flight.has_room() {
                // The next completion leads back here.
                return Ok(false);
            }
            if budget == 0 {
                return Ok(true);
            }
            budget -= 1;
            match self.queue.pop()? {
                Some(head) => self.take_request(head)?,
                None if self.queue.enable_kicks()? => self.queue.disable_kicks()?,
                None => return Ok(false),
            }
        }
    }

    fn take_request(&mut self, head: u16) -> Result<(), QueueError> {
        let table = self.queue.table();
        self.chain.collect(self.queue.memory(), table, head)?;
        let request = request::parse(self.queue.memory(), &mut self.chain)?;
        match request.operation {
            Operation::Read { sector } => self.start_transfer(head, request, sector, false),
            Operation::Write { sector } => self.start_transfer(head, request, sector, true),
            Operation::Flush => {
                let entry = opcode::Fsync::new(IMAGE_FILE)
                    .flags(types::FsyncFlags::DATASYNC)
                    .build();
                self.start(head, request.status, Work::Flush, Some(entry))
            }
            Operation::GetId => {
                let written = self.write_serial();
                let status = if written.is_some() {
                    VIRTIO_BLK_S_OK
                } else {
                    VIRTIO_BLK_S_IOERR
                };
                let written = written.unwrap_or(0);
                self.answer(head, request.status, status, Completed::Other, written)
            }
            Operation::Unsupported(_) => {
                let status = VIRTIO_BLK_S_UNSUPP;
                self.answer(head, request.status, status, Completed::Other, 0)
            }
        }
    }

    fn start_transfer(
        &mut self,
        head: u16,
        request: Request,
        sector: u64,
        write: bool,
    ) -> Result<(), QueueError> {
        let image = &self.disk.image;
        let offset = request::transfer_offset(sector, request.data_len, image.capacity_sectors());
        let mut iovecs = self.in_flight.take_iovecs();
        let segments = if write {
            &self.chain.readable
        } else {
            &self.chain.writable
        };
        let mapped = map_all(self.queue.memory(), segments, &mut iovecs);
        let allowed = !(write && image.read_only());
        let Some(offset) = offset.filter(|_| mapped && allowed) else {
            self.in_flight.recycle(iovecs);
            let completed = if write {
                Completed::Write(request.data_len)
            } else {
                Completed::Read(request.data_len)
            };
            let status = VIRTIO_BLK_S_IOERR;
            return self.answer(head, request.status, status, completed, 0);
        };
        let durable = write && self.disk.write_through.load(Ordering::Acquire);
        let transfer = Transfer::new(write, durable, offset, iovecs, image);
        if transfer.is_bounced() {
            self.metrics.count_bounce();
        }
        self.start(head, request.status, Work::Transfer(transfer), None)
    }

    // Puts the work into the table first: the operation points into its final place.
    fn start(
        &mut self,
        head: u16,
        status: GuestAddress,
        work: Work,
        entry: Option<squeue::Entry>,
    ) -> Result<(), QueueError> {
        let in_flight = InFlight { head, status, work };
        let Ok(slot) = self.in_flight.insert(in_flight) else {
            let status_value = VIRTIO_BLK_S_IOERR;
            return self.answer(head, status, status_value, Completed::Other, 0);
        };
        let step = match (
            entry,
            self.in_flight.get_mut(slot).map(|entry| &mut entry.work),
        ) {
            (Some(entry), _) => Step::Submit(entry),
            (None, Some(Work::Transfer(transfer))) => transfer.next(&self.disk.image),
            (None, _) => Step::Failed(libc::EIO),
        };
        self.follow(slot, step)
    }

    fn complete_operation(&mut self, token: u64, result: i32) {
        let Ok(slot) = usize::try_from(token) else {
            return;
        };
        let image = &self.disk.image;
        let step = match self.in_flight.get_mut(slot).map(|entry| &mut entry.work) {
            Some(Work::Transfer(transfer)) => transfer.complete(result, image),
            Some(Work::Flush) => settle_flush(image, result),
            None => return,
        };
        if let Err(error) = self.follow(slot, step) {
            tracing::error!(queue = self.index, %error, "can't hand a request back");
            self.announce_broken();
        }
    }

    fn follow(&mut self, slot: usize, step: Step) -> Result<(), QueueError> {
        let errno = match step {
            Step::Submit(entry) => {
                self.submit(&entry.user_data(slot as u64));
                return Ok(());
            }
            Step::Done => None,
            Step::Failed(errno) => Some(errno),
        };
        let Some(finished) = self.in_flight.finish(slot) else {
            return Ok(());
        };
        let (completed, bytes) = finished.outcome();
        if let Some(errno) = errno {
            self.log.disk_error(self.index, completed, errno);
        }
        let (status, written) = match errno {
            None => (VIRTIO_BLK_S_OK, bytes),
            Some(_) => (VIRTIO_BLK_S_IOERR, 0),
        };
        let InFlight {
            head,
            status: address,
            work,
        } = finished;
        if let Work::Transfer(transfer) = work {
            self.in_flight.recycle(transfer.into_iovecs());
        }
        let written = u32::try_from(written).unwrap_or(u32::MAX - 1);
        self.answer(head, address, status, completed, written)
    }

    // Writes the status byte and hands the chain back; `written` are the data bytes before it.
    fn answer(
        &mut self,
        head: u16,
        address: GuestAddress,
        status: u32,
        completed: Completed,
        written: u32,
    ) -> Result<(), QueueError> {
        let byte = u8::try_from(status).unwrap_or(1);
        self.queue
            .memory()
            .write_obj(byte, address)
            .map_err(virtio_queue::Error::GuestMemory)?;
        self.metrics.count(completed, status == VIRTIO_BLK_S_OK);
        self.queue.push_used(head, written.saturating_add(1))
    }

    fn write_serial(&mut self) -> Option<u32> {
        let mut rest = self.disk.serial.as_slice();
        for segment in &self.chain.writable {
            let (part, after) = rest.split_at(rest.len().min(segment.len as usize));
            self.queue
                .memory()
                .write_slice(part, segment.address)
                .ok()?;
            rest = after;
        }
        u32::try_from(SERIAL_SIZE - rest.len()).ok()
    }

    fn submit(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: what the entry points to is owned by the in-flight table until the
            // entry's completion, or is a descriptor that this worker keeps open.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return;
            }
            if let Err(error) = self.ring.submit() {
                tracing::warn!(queue = self.index, %error, "submitting early failed; retrying");
                thread::yield_now();
            }
        }
    }

    fn announce(&mut self) {
        match self.queue.take_notification() {
            Ok(true) => {
                self.metrics.count_notification();
                self.call.signal();
            }
            Ok(false) => {}
            Err(error) => {
                tracing::error!(queue = self.index, %error, "can't read the guest's ring");
                self.announce_broken();
            }
        }
    }

    fn announce_broken(&mut self) {
        if !std::mem::replace(&mut self.broken, true) {
            if let Some(error) = &self.error {
                let _ = rustix::io::write(error, &1_u64.to_ne_bytes());
            }
        }
    }
}

fn map_all(memory: &GuestMemoryMmap, segments: &[Segment], iovecs: &mut Vec<iovec>) -> bool {
    segments
        .iter()
        .all(|segment| append_iovecs(memory, *segment, iovecs))
}

fn settle_flush(image: &Image, result: i32) -> Step {
    let outcome = if result < 0 {
        Err(io::Error::from_raw_os_error(-result))
    } else {
        Ok(())
    };
    match image.settle_sync(outcome) {
        Ok(()) => Step::Done,
        Err(error) => Step::Failed(error.raw_os_error().unwrap_or(libc::EIO)),
    }
}
