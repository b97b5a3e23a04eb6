//! From a guest's request to those of the disk's layers.

use std::rc::Rc;
use std::sync::atomic::Ordering;

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};
use vm_memory::{Address, Bytes, GuestAddress};

use super::{Pending, RequestExecutor};
use crate::disk::SERIAL_SIZE;
use crate::guest_memory::append_iovecs;
use crate::image::SECTOR_SIZE;
use crate::layer::Operation as LayerOperation;
use crate::layer::{Buffers, IoRequest, RingOperations};
use crate::metrics::Completed;
use crate::request::{self, Operation, Range, Request};
use crate::virtqueue::QueueError;

impl RequestExecutor {
    pub(super) fn take_request(
        &mut self,
        head: u16,
        ring: &mut RingOperations,
    ) -> Result<(), QueueError> {
        let table = self.queue.table();
        self.chain.collect(self.queue.memory(), table, head)?;
        let request = request::parse(self.queue.memory(), &mut self.chain)?;
        match request.operation {
            Operation::Read { sector } => {
                self.transfer(head, request, sector, LayerOperation::Read, ring)
            }
            Operation::Write { sector } => {
                self.transfer(head, request, sector, LayerOperation::Write, ring)
            }
            Operation::Flush => {
                let request_of = IoRequest {
                    tag: 0,
                    operation: LayerOperation::Flush,
                    offset: 0,
                    len: 0,
                    durable: false,
                    buffers: Buffers::none(),
                };
                self.start(head, request.status, Completed::Flush, request_of, ring)
            }
            Operation::Discard | Operation::WriteZeroes => self.deallocate(head, request, ring),
            Operation::GetId => match self.write_serial() {
                Some(written) => self.finish(head, request.status, VIRTIO_BLK_S_OK, written),
                None => self.finish(head, request.status, VIRTIO_BLK_S_IOERR, 0),
            },
            Operation::Unsupported(_) => self.finish(head, request.status, VIRTIO_BLK_S_UNSUPP, 0),
        }
    }

    fn transfer(
        &mut self,
        head: u16,
        request: Request,
        sector: u64,
        operation: LayerOperation,
        ring: &mut RingOperations,
    ) -> Result<(), QueueError> {
        let write = operation == LayerOperation::Write;
        let properties = self.disk.properties();
        // Reads of less than a block go through a larger buffer; such writes can't be done
        // without racing with their neighbours.
        let block = if write {
            u64::from(properties.block_sizes.logical)
        } else {
            SECTOR_SIZE
        };
        let capacity = self.disk.capacity_sectors();
        let offset = request::transfer_offset(sector, request.data_len, capacity, block);
        let (segments, completed) = if write {
            (&self.chain.readable, Completed::Write(request.data_len))
        } else {
            (&self.chain.writable, Completed::Read(request.data_len))
        };
        let mut iovecs = self.spare_iovecs.pop().unwrap_or_default();
        let memory = self.queue.memory();
        let mapped = segments
            .iter()
            .all(|segment| append_iovecs(memory, *segment, &mut iovecs));
        let allowed = !(write && properties.read_only);
        let Some(offset) = offset.filter(|_| mapped && allowed) else {
            self.recycle(iovecs);
            self.metrics.count(completed, false);
            return self.answer(head, request.status, VIRTIO_BLK_S_IOERR, 0);
        };
        let fixed = self.pinned.find(&iovecs);
        // SAFETY: `append_iovecs` made them from the memory that the lease keeps mapped.
        let buffers = unsafe { Buffers::guest(iovecs, Rc::clone(&self.lease), fixed) };
        if !buffers.is_aligned(properties.alignment, 1) {
            self.metrics.count_bounce();
        }
        let transfer = IoRequest {
            tag: 0,
            operation,
            offset,
            len: buffers.len(),
            durable: write && self.disk.write_through.load(Ordering::Acquire),
            buffers,
        };
        self.start(head, request.status, completed, transfer, ring)
    }

    // Virtio 1.2, 5.2.6: all ranges are checked before the first is touched.
    fn deallocate(
        &mut self,
        head: u16,
        request: Request,
        ring: &mut RingOperations,
    ) -> Result<(), QueueError> {
        let zeroes = request.operation == Operation::WriteZeroes;
        let properties = *self.disk.properties();
        if !properties.discard {
            return self.finish(head, request.status, VIRTIO_BLK_S_UNSUPP, 0);
        }
        let (memory, capacity) = (self.queue.memory(), self.disk.capacity_sectors());
        let block = u64::from(properties.block_sizes.logical);
        let mut ranges = std::mem::take(&mut self.ranges);
        let parsed = request::ranges(memory, &self.chain.readable, zeroes, capacity, &mut ranges)
            .map_err(request::RangeError::status);
        // A discard is a hint: blocks that are covered in part stay. Zeroes have to be written.
        let aligned = ranges
            .iter()
            .all(|range| range.offset.is_multiple_of(block) && range.len.is_multiple_of(block));
        let outcome = match parsed {
            Ok(()) if aligned || !zeroes => self.start_ranges(head, request, &ranges, ring),
            Ok(()) => self.finish(head, request.status, VIRTIO_BLK_S_IOERR, 0),
            Err(status) => self.finish(head, request.status, status, 0),
        };
        self.ranges = ranges;
        outcome
    }

    fn start_ranges(
        &mut self,
        head: u16,
        request: Request,
        ranges: &[Range],
        ring: &mut RingOperations,
    ) -> Result<(), QueueError> {
        let block = u64::from(self.disk.properties().block_sizes.logical);
        let durable = self.disk.write_through.load(Ordering::Acquire);
        let parts = ranges.iter().filter_map(|range| {
            let start = range.offset.next_multiple_of(block);
            let end = range.offset + range.len;
            let len = (end - end % block).checked_sub(start)?;
            Some(IoRequest {
                tag: 0,
                operation: if request.operation == Operation::WriteZeroes {
                    LayerOperation::WriteZeroes { unmap: range.unmap }
                } else {
                    LayerOperation::Discard
                },
                offset: start,
                len,
                durable,
                buffers: Buffers::none(),
            })
            .filter(|request| request.len > 0)
        });
        let parts: Vec<IoRequest> = parts.collect();
        let count = u32::try_from(parts.len()).unwrap_or(u32::MAX);
        if count == 0 {
            return self.finish(head, request.status, VIRTIO_BLK_S_OK, 0);
        }
        let completed = if request.operation == Operation::WriteZeroes {
            Completed::WriteZeroes
        } else {
            Completed::Discard
        };
        let Some(slot) = self.insert(head, request.status, completed, count) else {
            return self.finish(head, request.status, VIRTIO_BLK_S_IOERR, 0);
        };
        for mut part in parts {
            part.tag = slot as u64;
            self.channel.submit(part, ring);
        }
        Ok(())
    }

    fn start(
        &mut self,
        head: u16,
        status: GuestAddress,
        completed: Completed,
        mut request: IoRequest,
        ring: &mut RingOperations,
    ) -> Result<(), QueueError> {
        let Some(slot) = self.insert(head, status, completed, 1) else {
            return self.finish(head, status, VIRTIO_BLK_S_IOERR, 0);
        };
        if self.dirty_log.is_some()
            && request.operation == LayerOperation::Read
            && let Some(Some(pending)) = self.pending.get_mut(slot)
        {
            pending.written.clone_from(&self.chain.writable);
        }
        request.tag = slot as u64;
        self.channel.submit(request, ring);
        Ok(())
    }

    fn insert(
        &mut self,
        head: u16,
        status: GuestAddress,
        completed: Completed,
        parts: u32,
    ) -> Option<usize> {
        let slot = self.free.pop()?;
        *self.pending.get_mut(slot)? = Some(Pending {
            head,
            status,
            completed,
            begun: self.now,
            written: Vec::new(),
            parts,
            failed: false,
        });
        Some(slot)
    }

    fn write_serial(&mut self) -> Option<u32> {
        let mut rest = self.disk.serial.as_slice();
        let memory = self.queue.memory();
        for segment in &self.chain.writable {
            let (part, after) = rest.split_at(rest.len().min(segment.len as usize));
            memory.write_slice(part, segment.address).ok()?;
            if let Some((log, _)) = &self.dirty_log {
                log.mark(segment.address.raw_value(), part.len() as u64);
            }
            rest = after;
        }
        u32::try_from(SERIAL_SIZE - rest.len()).ok()
    }
}
