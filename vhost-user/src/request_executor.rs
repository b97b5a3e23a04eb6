//! From available descriptor chains to disk operations, and from their results to used chains.
//!
//! Does no I/O itself: operations are collected in a list for the queue's loop to submit, and
//! their results come back as numbers. So all of it runs in tests and fuzzers without a ring.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use io_uring::{opcode, squeue, types};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};
use vm_memory::{Bytes, GuestAddress};

use crate::bus_fault;
use crate::descriptor_chain::DescriptorChain;
use crate::disk::{Disk, SERIAL_SIZE};
use crate::error_log::ErrorLog;
use crate::guest_memory::append_iovecs;
use crate::image::{Image, SECTOR_SIZE};
use crate::in_flight::{InFlight, InFlightTable, Work};
use crate::metrics::{Completed, QueueMetrics};
use crate::request::{self, Operation, Request};
use crate::transfer::{IMAGE_FILE, Step, Transfer};
use crate::virtqueue::{QueueError, Virtqueue};

/// The requests of one virtqueue.
#[derive(Debug)]
pub struct RequestExecutor {
    in_flight: InFlightTable,
    queue: Virtqueue,
    chain: DescriptorChain,
    index: usize,
    disk: Arc<Disk>,
    metrics: Arc<QueueMetrics>,
    log: ErrorLog,
    operations: VecDeque<squeue::Entry>,
    lost_before: usize,
}

impl RequestExecutor {
    /// For a virtqueue that hasn't been touched yet.
    pub fn new(
        index: usize,
        queue: Virtqueue,
        disk: Arc<Disk>,
        metrics: Arc<QueueMetrics>,
    ) -> Self {
        let capacity = queue.table().size as usize;
        Self {
            in_flight: InFlightTable::new(Arc::clone(queue.memory()), capacity),
            queue,
            chain: DescriptorChain::default(),
            index,
            disk,
            metrics,
            log: ErrorLog::default(),
            operations: VecDeque::with_capacity(capacity),
            lost_before: bus_fault::lost_regions(),
        }
    }

    /// Whether nothing is with the kernel or on its way there.
    pub fn is_idle(&self) -> bool {
        self.in_flight.is_empty()
    }

    /// The available index from which a successor has to go on.
    pub fn next_available(&self) -> u16 {
        self.queue.next_available()
    }

    /// Whether the guest wants an interrupt for what was completed since the last call.
    pub fn take_notification(&mut self) -> Result<bool, QueueError> {
        let wanted = self.queue.take_notification()?;
        if wanted {
            self.metrics.count_notification();
        }
        Ok(wanted)
    }

    /// Operations to submit, each once. What they point to is owned by this executor until
    /// [`complete`](Self::complete) has been given their result.
    pub fn take_operation(&mut self) -> Option<squeue::Entry> {
        self.operations.pop_front()
    }

    /// Takes new requests. True if some may be left that no kick will announce.
    ///
    /// At most one queue's worth in a row, so that a guest that never stops asking can't keep
    /// completions and the order to stop from being seen.
    pub fn take_requests(&mut self) -> Result<bool, QueueError> {
        if bus_fault::lost_regions() != self.lost_before {
            return Err(QueueError::MemoryLost);
        }
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

    /// Takes the result of an operation: bytes, or a negated errno.
    pub fn complete(&mut self, token: u64, result: i32) -> Result<(), QueueError> {
        let Ok(slot) = usize::try_from(token) else {
            return Ok(());
        };
        let image = &self.disk.image;
        let step = match self.in_flight.get_mut(slot).map(|entry| &mut entry.work) {
            Some(Work::Transfer(transfer)) => transfer.complete(result, image),
            Some(Work::Flush) => settle_flush(image, result),
            None => return Ok(()),
        };
        self.follow(slot, step)
    }

    fn take_request(&mut self, head: u16) -> Result<(), QueueError> {
        let table = self.queue.table();
        self.chain.collect(self.queue.memory(), table, head)?;
        let request = request::parse(self.queue.memory(), &mut self.chain)?;
        match request.operation {
            Operation::Read { sector } => self.start_transfer(head, request, sector, false),
            Operation::Write { sector } => self.start_transfer(head, request, sector, true),
            Operation::Flush => self.start(head, request.status, Work::Flush),
            Operation::GetId => {
                let (status, written) = match self.write_serial() {
                    Some(written) => (VIRTIO_BLK_S_OK, written),
                    None => (VIRTIO_BLK_S_IOERR, 0),
                };
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
        // Reads of less than a block go through a larger buffer; such writes can't be done
        // without racing with their neighbours.
        let block = if write {
            u64::from(image.block_sizes().logical)
        } else {
            SECTOR_SIZE
        };
        let capacity = image.capacity_sectors();
        let offset = request::transfer_offset(sector, request.data_len, capacity, block);
        let (segments, completed) = if write {
            (&self.chain.readable, Completed::Write(request.data_len))
        } else {
            (&self.chain.writable, Completed::Read(request.data_len))
        };
        let memory = self.queue.memory();
        let mut iovecs = self.in_flight.take_iovecs();
        let mapped = segments
            .iter()
            .all(|segment| append_iovecs(memory, *segment, &mut iovecs));
        let allowed = !(write && image.read_only());
        let Some(offset) = offset.filter(|_| mapped && allowed) else {
            self.in_flight.recycle(iovecs);
            let status = VIRTIO_BLK_S_IOERR;
            return self.answer(head, request.status, status, completed, 0);
        };
        let durable = write && self.disk.write_through.load(Ordering::Acquire);
        let transfer = Transfer::new(write, durable, offset, iovecs, image);
        if transfer.is_bounced() {
            self.metrics.count_bounce();
        }
        self.start(head, request.status, Work::Transfer(transfer))
    }

    // The work goes into the table first: its operation points into its final place.
    fn start(&mut self, head: u16, status: GuestAddress, work: Work) -> Result<(), QueueError> {
        let request = InFlight { head, status, work };
        let Some(slot) = self.in_flight.insert(request) else {
            return self.answer(head, status, VIRTIO_BLK_S_IOERR, Completed::Other, 0);
        };
        let step = match self.in_flight.get_mut(slot).map(|entry| &mut entry.work) {
            Some(Work::Transfer(transfer)) => transfer.next(&self.disk.image),
            Some(Work::Flush) => Step::Submit(
                opcode::Fsync::new(IMAGE_FILE)
                    .flags(types::FsyncFlags::DATASYNC)
                    .build(),
            ),
            None => Step::Failed(libc::EIO),
        };
        self.follow(slot, step)
    }

    fn follow(&mut self, slot: usize, step: Step) -> Result<(), QueueError> {
        let errno = match step {
            Step::Submit(entry) => {
                self.operations.push_back(entry.user_data(slot as u64));
                return Ok(());
            }
            Step::Done => None,
            Step::Failed(errno) => Some(errno),
        };
        let Some(finished) = self.in_flight.finish(slot) else {
            return Ok(());
        };
        let (completed, bytes) = finished.outcome();
        let (status, written) = match errno {
            None => (VIRTIO_BLK_S_OK, u32::try_from(bytes).unwrap_or(u32::MAX)),
            Some(errno) => {
                self.log.disk_error(self.index, completed, errno);
                (VIRTIO_BLK_S_IOERR, 0)
            }
        };
        if let Work::Transfer(transfer) = finished.work {
            self.in_flight.recycle(transfer.into_iovecs());
        }
        self.answer(finished.head, finished.status, status, completed, written)
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
        let memory = self.queue.memory();
        for segment in &self.chain.writable {
            let (part, after) = rest.split_at(rest.len().min(segment.len as usize));
            memory.write_slice(part, segment.address).ok()?;
            rest = after;
        }
        u32::try_from(SERIAL_SIZE - rest.len()).ok()
    }
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
