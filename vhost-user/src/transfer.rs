//! One guest read or write as a sequence of io_uring operations.
//!
//! The usual case is one `readv` or `writev` on the guest's own pages. A short one is continued
//! until all bytes have moved, and what O_DIRECT can't take goes through an aligned bounce
//! buffer, piece by piece.

use io_uring::{opcode, squeue, types};
use libc::iovec;
use vm_memory::VolatileSlice;

use crate::aligned_buffer::AlignedBuffer;
use crate::image::Image;

/// The image's index among the ring's registered files.
pub(crate) const IMAGE_FILE: types::Fixed = types::Fixed(0);

/// Most iovecs in one operation (`UIO_MAXIOV`, linux/uio.h).
const MAX_IOVECS: usize = 1024;

/// Bounce memory of one request: 64 KiB, so that a whole queue of them stays small.
const BOUNCE_CHUNK: u64 = 64 * 1024;

/// How often in a row an operation may ask to be tried again.
const MAX_RETRIES: u8 = 16;

/// What to do next for a transfer.
#[derive(Debug)]
pub(crate) enum Step {
    /// Submit this; it points into the transfer, which has to stay where it is.
    Submit(squeue::Entry),
    /// All bytes have moved.
    Done,
    /// It can't be completed, with the errno.
    Failed(i32),
}

// A piece of a transfer in aligned memory of our own.
#[derive(Debug)]
struct Bounce {
    buffer: AlignedBuffer,
    /// The file offset of the buffer's first byte.
    start: u64,
    /// Bytes of the buffer to read or write.
    span: usize,
    /// Where the guest's bytes start in the buffer, and how many they are. Reads may have to
    /// start earlier and end later; writes are whole blocks.
    inner: (usize, usize),
    /// Bytes of the span that have moved.
    moved: usize,
}

/// A read or write under way.
#[derive(Debug)]
pub(crate) struct Transfer {
    write: bool,
    durable: bool,
    offset: u64,
    len: u64,
    done: u64,
    /// Unfinished guest buffers from `first` on; the first one shrinks as bytes move.
    iovecs: Vec<iovec>,
    first: usize,
    bounce: Option<Bounce>,
    bounced: bool,
    retries: u8,
}

impl Transfer {
    /// A transfer of all bytes of `iovecs`, whose memory must outlive it, at a file offset.
    ///
    /// `durable` makes each write reach stable storage before it completes.
    pub fn new(write: bool, durable: bool, offset: u64, iovecs: Vec<iovec>, image: &Image) -> Self {
        let bounced = image.direct().is_some_and(|alignment| {
            !offset.is_multiple_of(alignment.offset as u64)
                || iovecs.iter().any(|iovec| {
                    !(iovec.iov_base as usize).is_multiple_of(alignment.memory)
                        || !iovec.iov_len.is_multiple_of(alignment.offset)
                })
        });
        Self {
            write,
            durable,
            offset,
            len: iovecs.iter().map(|iovec| iovec.iov_len as u64).sum(),
            done: 0,
            iovecs,
            first: 0,
            bounce: None,
            bounced,
            retries: 0,
        }
    }

    /// Whether it goes from the guest to the disk.
    pub fn is_write(&self) -> bool {
        self.write
    }

    /// Whether it needs a bounce buffer.
    pub fn is_bounced(&self) -> bool {
        self.bounced
    }

    /// Bytes in all.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Takes the iovec array out for reuse.
    pub fn into_iovecs(self) -> Vec<iovec> {
        self.iovecs
    }

    /// The first operation, or the next one of the part that is under way.
    pub fn next(&mut self, image: &Image) -> Step {
        if self.done == self.len && self.bounce.is_none() {
            return Step::Done;
        }
        if !self.bounced {
            return Step::Submit(self.vectored_operation());
        }
        if self.bounce.is_none() && !self.begin_bounce(image) {
            return Step::Failed(libc::ENOMEM);
        }
        match self.bounce_operation() {
            Some(entry) => Step::Submit(entry),
            None => Step::Failed(libc::EIO),
        }
    }

    /// Takes an operation's result, bytes or a negated errno.
    pub fn complete(&mut self, result: i32, image: &Image) -> Step {
        let Ok(moved) = usize::try_from(result) else {
            let errno = result.saturating_neg();
            if matches!(errno, libc::EINTR | libc::EAGAIN) && self.retries < MAX_RETRIES {
                self.retries += 1;
                return self.next(image);
            }
            return Step::Failed(errno);
        };
        self.retries = 0;
        let accepted = if self.bounced {
            self.complete_bounce(moved, image)
        } else {
            self.complete_vectored(moved, image)
        };
        if accepted {
            self.next(image)
        } else {
            Step::Failed(libc::EIO)
        }
    }

    fn vectored_operation(&self) -> squeue::Entry {
        let rest = self.iovecs.get(self.first..).unwrap_or_default();
        let count = u32::try_from(rest.len().min(MAX_IOVECS)).unwrap_or(1);
        let position = self.offset + self.done;
        if self.write {
            opcode::Writev::new(IMAGE_FILE, rest.as_ptr(), count)
                .offset(position)
                .rw_flags(self.write_flags())
                .build()
        } else {
            opcode::Readv::new(IMAGE_FILE, rest.as_ptr(), count)
                .offset(position)
                .build()
        }
    }

    fn write_flags(&self) -> i32 {
        if self.durable { libc::RWF_DSYNC } else { 0 }
    }

    fn complete_vectored(&mut self, moved: usize, image: &Image) -> bool {
        let position = self.offset + self.done + moved as u64;
        if moved as u64 >= self.len - self.done {
            self.done = self.len;
            return true;
        }
        if !self.write && position >= image.bytes() {
            self.advance(moved, |_, _| {});
            return self.zero_rest();
        }
        // O_DIRECT can only go on from an aligned position; what is moved twice is the same.
        let usable = moved
            - image
                .direct()
                .map_or(0, |alignment| moved % alignment.offset);
        self.advance(usable, |_, _| {});
        usable > 0
    }

    // The bytes that the image lacks to a whole last sector.
    fn zero_rest(&mut self) -> bool {
        let rest = usize::try_from(self.len - self.done).unwrap_or(usize::MAX);
        self.advance(rest, |guest, _| {
            guest.copy_from(&vec![0_u8; guest.len()]);
        });
        true
    }

    /// Moves on by `bytes` and shows each stretch of guest memory passed, with its place.
    fn advance(&mut self, bytes: usize, mut visit: impl FnMut(&VolatileSlice<'_>, usize)) {
        let mut passed = 0;
        while passed < bytes {
            let Some(iovec) = self.iovecs.get_mut(self.first) else {
                break;
            };
            let step = iovec.iov_len.min(bytes - passed);
            // SAFETY: the iovec was made from mapped guest memory that the queue's in-flight
            // table keeps mapped, and `step` is within it.
            let guest = unsafe { VolatileSlice::new(iovec.iov_base.cast(), step) };
            visit(&guest, passed);
            iovec.iov_base = iovec.iov_base.wrapping_byte_add(step);
            iovec.iov_len -= step;
            passed += step;
            if iovec.iov_len == 0 {
                self.first += 1;
            }
        }
        self.done += passed as u64;
    }

    fn begin_bounce(&mut self, image: &Image) -> bool {
        let alignment = image.direct();
        let block = alignment.map_or(1, |alignment| alignment.offset as u64);
        let memory = alignment.map_or(1, |alignment| alignment.memory.max(alignment.offset));
        let position = self.offset + self.done;
        let chunk = (self.len - self.done).min(BOUNCE_CHUNK);
        let start = position - position % block;
        let end = (position + chunk).next_multiple_of(block);
        let (Ok(span), Ok(before), Ok(chunk)) = (
            usize::try_from(end - start),
            usize::try_from(position - start),
            usize::try_from(chunk),
        ) else {
            return false;
        };
        let Some(buffer) = AlignedBuffer::new(span, memory) else {
            return false;
        };
        self.bounce = Some(Bounce {
            buffer,
            start,
            span,
            inner: (before, chunk),
            moved: 0,
        });
        if self.write {
            self.copy_from_guest();
        }
        true
    }

    fn bounce_operation(&mut self) -> Option<squeue::Entry> {
        let flags = self.write_flags();
        let bounce = self.bounce.as_mut()?;
        let rest = u32::try_from(bounce.span - bounce.moved).ok()?;
        let pointer = bounce.buffer.as_mut_ptr().wrapping_add(bounce.moved);
        let position = bounce.start + bounce.moved as u64;
        Some(if self.write {
            opcode::Write::new(IMAGE_FILE, pointer, rest)
                .offset(position)
                .rw_flags(flags)
                .build()
        } else {
            opcode::Read::new(IMAGE_FILE, pointer, rest)
                .offset(position)
                .build()
        })
    }

    fn complete_bounce(&mut self, moved: usize, image: &Image) -> bool {
        let block = image.direct().map_or(1, |alignment| alignment.offset);
        let write = self.write;
        let Some(bounce) = self.bounce.as_mut() else {
            return false;
        };
        let total = bounce.moved + moved;
        let (before, len) = bounce.inner;
        let needed = if write { bounce.span } else { before + len };
        // What the image lacks to a whole last sector stays zero in the buffer.
        let at_end = !write && bounce.start + total as u64 >= image.bytes();
        if total < needed && !at_end {
            let usable = total - total % block;
            let progress = usable > bounce.moved;
            bounce.moved = usable;
            return progress;
        }
        if write {
            // Its bytes were counted when they were copied out of the guest's memory.
            self.bounce = None;
        } else {
            self.copy_to_guest();
        }
        true
    }

    fn copy_to_guest(&mut self) {
        let Some(bounce) = self.bounce.take() else {
            return;
        };
        let (start, len) = bounce.inner;
        let bytes = bounce.buffer.as_slice();
        self.advance(len, |guest, place| {
            if let Some(part) = bytes.get(start + place..) {
                guest.copy_from(part);
            }
        });
    }

    fn copy_from_guest(&mut self) {
        let Some(mut bounce) = self.bounce.take() else {
            return;
        };
        let (start, len) = bounce.inner;
        let bytes = bounce.buffer.as_mut_slice();
        self.advance(len, |guest, place| {
            if let Some(part) = bytes.get_mut(start + place..) {
                guest.copy_to(part);
            }
        });
        self.bounce = Some(bounce);
    }
}
