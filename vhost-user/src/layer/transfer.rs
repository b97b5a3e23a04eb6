//! One request on a file as a sequence of io_uring operations.
//!
//! The usual case is one operation on the guest's own pages. A short one is continued until all
//! bytes have moved, and what O_DIRECT can't take goes through an aligned bounce buffer, piece by
//! piece.

use std::io;

use io_uring::{opcode, squeue, types};
use libc::iovec;

use super::{Buffers, FileSlot, IoCompletion, IoRequest, Operation};
use crate::image::Image;

/// Most iovecs in one operation (`UIO_MAXIOV`, linux/uio.h).
const MAX_IOVECS: usize = 1024;

/// Bounce memory of one request: 64 KiB, so that a whole queue of them stays small.
const BOUNCE_CHUNK: u64 = 64 * 1024;

/// How often in a row an operation may ask to be tried again.
const MAX_RETRIES: u8 = 16;

/// What to do next for a request.
#[derive(Debug)]
pub(super) enum Step {
    /// Submit this; it points into the transfer's memory.
    Submit(squeue::Entry),
    /// Nothing is left to do, with the request's result.
    Done(Result<(), i32>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Reads or writes on the request's own memory.
    Direct,
    /// Reads or writes through a buffer of ours.
    Bounced,
    /// A change of the file's allocation.
    Allocation,
    /// The fdatasync of a flush, or after a durable change of the allocation.
    Sync,
}

// A piece of a transfer in aligned memory of our own.
#[derive(Debug)]
struct Bounce {
    buffer: Buffers,
    /// The file offset of the buffer's first byte.
    start: u64,
    /// Where the request's bytes start in the buffer, and how many they are. Reads may have to
    /// start earlier and end later; writes are whole blocks.
    inner: (u64, u64),
    /// Bytes of the buffer that have moved.
    moved: u64,
}

/// A request under way.
#[derive(Debug)]
pub(super) struct Transfer {
    request: IoRequest,
    stage: Stage,
    done: u64,
    // The unmoved part of the buffers, after a short operation.
    rest: Option<Buffers>,
    bounce: Option<Bounce>,
    retries: u8,
}

impl Transfer {
    pub fn new(request: IoRequest, image: &Image) -> Self {
        let stage = match request.operation {
            Operation::Read | Operation::Write if needs_bounce(&request, image) => Stage::Bounced,
            Operation::Read | Operation::Write => Stage::Direct,
            Operation::Discard | Operation::WriteZeroes { .. } => Stage::Allocation,
            Operation::Flush => Stage::Sync,
        };
        Self {
            request,
            stage,
            done: 0,
            rest: None,
            bounce: None,
            retries: 0,
        }
    }

    pub fn finish(self, result: Result<(), i32>) -> IoCompletion {
        IoCompletion {
            tag: self.request.tag,
            result,
            buffers: self.request.buffers,
        }
    }

    /// The first operation, or the next one of what is under way.
    pub fn next(&mut self, file: FileSlot, image: &Image) -> Step {
        let file = file.fixed();
        match self.stage {
            Stage::Sync => Step::Submit(
                opcode::Fsync::new(file)
                    .flags(types::FsyncFlags::DATASYNC)
                    .build(),
            ),
            _ if self.done >= self.request.len => Step::Done(Ok(())),
            Stage::Direct => Step::Submit(self.direct_operation(file)),
            Stage::Allocation => Step::Submit(
                opcode::Fallocate::new(file, self.request.len)
                    .offset(self.request.offset)
                    .mode(allocation_mode(self.request.operation))
                    .build(),
            ),
            Stage::Bounced => match self.bounce_operation(file, image) {
                Some(entry) => Step::Submit(entry),
                None => Step::Done(Err(libc::ENOMEM)),
            },
        }
    }

    /// Takes an operation's result, bytes or a negated errno.
    pub fn complete(&mut self, result: i32, file: FileSlot, image: &Image) -> Step {
        if self.stage == Stage::Sync {
            return Step::Done(settle_sync(image, result));
        }
        let Ok(moved) = u64::try_from(result) else {
            return self.failed(result.saturating_neg(), file, image);
        };
        self.retries = 0;
        let accepted = match self.stage {
            Stage::Allocation => {
                if self.request.durable {
                    self.stage = Stage::Sync;
                    return self.next(file, image);
                }
                return Step::Done(Ok(()));
            }
            Stage::Bounced => self.complete_bounce(moved, image),
            _ => self.complete_direct(moved, image),
        };
        if accepted {
            self.next(file, image)
        } else {
            Step::Done(Err(libc::EIO))
        }
    }

    fn failed(&mut self, errno: i32, file: FileSlot, image: &Image) -> Step {
        if matches!(errno, libc::EINTR | libc::EAGAIN) && self.retries < MAX_RETRIES {
            self.retries += 1;
            return self.next(file, image);
        }
        if self.stage == Stage::Allocation && matches!(errno, libc::EOPNOTSUPP | libc::ENOSYS) {
            if self.request.operation == Operation::Discard {
                // A hint (virtio 1.2, 5.2.6.2): nothing has to happen.
                return Step::Done(Ok(()));
            }
            self.stage = Stage::Bounced;
            return self.next(file, image);
        }
        Step::Done(Err(errno))
    }

    fn flags(&self) -> i32 {
        if self.request.durable {
            libc::RWF_DSYNC
        } else {
            0
        }
    }

    fn direct_operation(&self, file: types::Fixed) -> squeue::Entry {
        let rest = self.rest.as_ref().unwrap_or(&self.request.buffers);
        let position = self.request.offset + self.done;
        let write = self.request.operation == Operation::Write;
        if let [only] = rest.iovecs() {
            return contiguous(file, *only, position, write, self.flags(), rest.fixed());
        }
        let count = u32::try_from(rest.iovecs().len().min(MAX_IOVECS)).unwrap_or(1);
        if write {
            opcode::Writev::new(file, rest.iovecs().as_ptr(), count)
                .offset(position)
                .rw_flags(self.flags())
                .build()
        } else {
            opcode::Readv::new(file, rest.iovecs().as_ptr(), count)
                .offset(position)
                .build()
        }
    }

    fn complete_direct(&mut self, moved: u64, image: &Image) -> bool {
        let left = self.request.len - self.done;
        if moved >= left {
            self.done = self.request.len;
            return true;
        }
        let read = self.request.operation == Operation::Read;
        if read && self.request.offset + self.done + moved >= image.bytes() {
            // The bytes that the image lacks to a whole last sector.
            let position = self.done + moved;
            self.request.buffers.zero(position, left - moved);
            self.done = self.request.len;
            return true;
        }
        // O_DIRECT can only go on from an aligned position; what is moved twice is the same.
        let block = image
            .direct()
            .map_or(1, |alignment| alignment.offset as u64);
        let usable = moved - moved % block;
        self.done += usable;
        let left = self.request.len - self.done;
        self.rest = Some(self.request.buffers.slice(self.done, left));
        usable > 0
    }

    fn bounce_operation(&mut self, file: types::Fixed, image: &Image) -> Option<squeue::Entry> {
        if self.bounce.is_none() {
            self.bounce = Some(self.begin_bounce(image)?);
        }
        let write = self.request.operation != Operation::Read;
        let flags = self.flags();
        let bounce = self.bounce.as_ref()?;
        let whole = *bounce.buffer.iovecs().first()?;
        let moved = usize::try_from(bounce.moved).ok()?;
        let rest = iovec {
            iov_base: whole.iov_base.wrapping_byte_add(moved),
            iov_len: whole.iov_len.checked_sub(moved)?,
        };
        let position = bounce.start + bounce.moved;
        Some(contiguous(file, rest, position, write, flags, None))
    }

    fn begin_bounce(&self, image: &Image) -> Option<Bounce> {
        let alignment = image.direct();
        let block = alignment.map_or(1, |alignment| alignment.offset as u64);
        let memory = alignment.map_or(1, |alignment| alignment.memory.max(alignment.offset));
        let position = self.request.offset + self.done;
        let chunk = (self.request.len - self.done).min(BOUNCE_CHUNK);
        let start = position - position % block;
        let end = (position + chunk).next_multiple_of(block);
        let span = usize::try_from(end - start).ok()?;
        let buffer = Buffers::zeroed(span, memory)?;
        if self.request.operation == Operation::Write {
            copy(&self.request.buffers, self.done, &buffer, 0, chunk);
        }
        Some(Bounce {
            buffer,
            start,
            inner: (position - start, chunk),
            moved: 0,
        })
    }

    fn complete_bounce(&mut self, moved: u64, image: &Image) -> bool {
        let block = image
            .direct()
            .map_or(1, |alignment| alignment.offset as u64);
        let read = self.request.operation == Operation::Read;
        let Some(bounce) = self.bounce.as_mut() else {
            return false;
        };
        let total = bounce.moved + moved;
        let (before, len) = bounce.inner;
        let needed = if read {
            before + len
        } else {
            bounce.buffer.len()
        };
        // What the image lacks to a whole last sector stays zero in the buffer.
        let at_end = read && bounce.start + total >= image.bytes();
        if total < needed && !at_end {
            let usable = total - total % block;
            let progress = usable > bounce.moved;
            bounce.moved = usable;
            return progress;
        }
        if read {
            copy(
                &bounce.buffer,
                before,
                &self.request.buffers,
                self.done,
                len,
            );
        }
        self.done += len;
        self.bounce = None;
        true
    }
}

fn contiguous(
    file: types::Fixed,
    memory: iovec,
    position: u64,
    write: bool,
    flags: i32,
    fixed: Option<u16>,
) -> squeue::Entry {
    let pointer = memory.iov_base.cast::<u8>();
    // Descriptors have 32-bit lengths; a merged one that is longer is continued as a short one.
    let len = u32::try_from(memory.iov_len).unwrap_or(1 << 30);
    match (write, fixed) {
        (false, None) => opcode::Read::new(file, pointer, len)
            .offset(position)
            .build(),
        (false, Some(index)) => opcode::ReadFixed::new(file, pointer, len, index)
            .offset(position)
            .build(),
        (true, None) => opcode::Write::new(file, pointer, len)
            .offset(position)
            .rw_flags(flags)
            .build(),
        (true, Some(index)) => opcode::WriteFixed::new(file, pointer, len, index)
            .offset(position)
            .rw_flags(flags)
            .build(),
    }
}

fn needs_bounce(request: &IoRequest, image: &Image) -> bool {
    image.direct().is_some_and(|alignment| {
        !request.offset.is_multiple_of(alignment.offset as u64)
            || !request
                .buffers
                .is_aligned(alignment.memory, alignment.offset)
    })
}

fn allocation_mode(operation: Operation) -> i32 {
    let mode = match operation {
        Operation::WriteZeroes { unmap: false } => libc::FALLOC_FL_ZERO_RANGE,
        _ => libc::FALLOC_FL_PUNCH_HOLE,
    };
    mode | libc::FALLOC_FL_KEEP_SIZE
}

fn copy(from: &Buffers, from_offset: u64, to: &Buffers, to_offset: u64, len: u64) {
    let mut bytes = [0; 4096];
    let mut place = 0;
    while place < len {
        let step = (len - place).min(bytes.len() as u64);
        let part = &mut bytes[..usize::try_from(step).unwrap_or(0)];
        from.copy_to(from_offset + place, part);
        to.copy_from(to_offset + place, part);
        place += step;
    }
}

fn settle_sync(image: &Image, result: i32) -> Result<(), i32> {
    let outcome = if result < 0 {
        Err(io::Error::from_raw_os_error(-result))
    } else {
        Ok(())
    };
    image
        .settle_sync(outcome)
        .map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))
}
