//! The memory of a request, owned by it from submission to completion.

use std::rc::Rc;
use std::sync::Arc;

use libc::iovec;
use vm_memory::{GuestMemoryMmap, VolatileSlice};

use crate::aligned_buffer::AlignedBuffer;

/// Keeps guest memory mapped. Belongs to one worker, so that each request can hold it for free.
pub type GuestLease = Rc<Arc<GuestMemoryMmap>>;

#[derive(Clone, Debug)]
#[expect(dead_code, reason = "they are owned, not looked at")]
enum Owner {
    Nobody,
    Guest(GuestLease),
    Own(Rc<AlignedBuffer>),
}

/// Stretches of guest memory, or of a buffer of our own, in the order of their bytes.
///
/// What the guest may write at any time, and the kernel while a request is under way, is never a
/// Rust slice: bytes are copied in and out.
#[derive(Debug)]
pub struct Buffers {
    iovecs: Vec<iovec>,
    len: u64,
    fixed: Option<u16>,
    // After the iovecs, which point into it.
    owner: Owner,
}

impl Buffers {
    /// No memory: for requests without data.
    pub fn none() -> Self {
        Self {
            iovecs: Vec::new(),
            len: 0,
            fixed: None,
            owner: Owner::Nobody,
        }
    }

    /// Guest memory. `fixed` is the index under which the worker's ring has all of it registered.
    ///
    /// # Safety
    ///
    /// All iovecs have to lie in the leased memory.
    pub unsafe fn guest(iovecs: Vec<iovec>, lease: GuestLease, fixed: Option<u16>) -> Self {
        Self {
            len: iovecs.iter().map(|iovec| iovec.iov_len as u64).sum(),
            iovecs,
            fixed,
            owner: Owner::Guest(lease),
        }
    }

    /// A zeroed buffer of our own. `None` if no memory could be that large.
    pub fn zeroed(len: usize, alignment: usize) -> Option<Self> {
        let mut buffer = AlignedBuffer::new(len, alignment)?;
        let iovec = iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: len,
        };
        Some(Self {
            iovecs: if len == 0 { Vec::new() } else { vec![iovec] },
            len: len as u64,
            fixed: None,
            owner: Owner::Own(Rc::new(buffer)),
        })
    }

    /// Bytes in all.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The stretches, for the kernel.
    pub fn iovecs(&self) -> &[iovec] {
        &self.iovecs
    }

    /// The index under which all of it is registered with the worker's ring.
    pub fn fixed(&self) -> Option<u16> {
        self.fixed
    }

    /// Whether each stretch begins and ends at a multiple of the device's alignment.
    pub fn is_aligned(&self, memory: usize, length: usize) -> bool {
        self.iovecs.iter().all(|iovec| {
            (iovec.iov_base as usize).is_multiple_of(memory) && iovec.iov_len.is_multiple_of(length)
        })
    }

    /// Part of it, sharing the memory. Shorter if there is less.
    #[must_use]
    pub fn slice(&self, offset: u64, len: u64) -> Self {
        let mut iovecs = Vec::new();
        self.each(offset, len, |iovec, _| iovecs.push(iovec));
        Self {
            len: iovecs.iter().map(|iovec| iovec.iov_len as u64).sum(),
            iovecs,
            fixed: self.fixed,
            owner: self.owner.clone(),
        }
    }

    /// Copies bytes from `offset` on out of the memory. Copies less if there is less.
    pub fn copy_to(&self, offset: u64, target: &mut [u8]) {
        self.each(offset, target.len() as u64, |iovec, place| {
            if let Some(part) = target.get_mut(place..) {
                volatile(iovec).copy_to(part);
            }
        });
    }

    /// Copies bytes into the memory from `offset` on. Copies less if there is less room.
    pub fn copy_from(&self, offset: u64, source: &[u8]) {
        self.each(offset, source.len() as u64, |iovec, place| {
            if let Some(part) = source.get(place..) {
                volatile(iovec).copy_from(part);
            }
        });
    }

    /// Zeroes `len` bytes from `offset` on.
    pub fn zero(&self, offset: u64, len: u64) {
        const ZEROES: [u8; 4096] = [0; 4096];
        self.each(offset, len, |iovec, _| {
            let slice = volatile(iovec);
            let mut place = 0;
            while let Ok(rest) = slice.offset(place) {
                let step = rest.len().min(ZEROES.len());
                if step == 0 {
                    break;
                }
                rest.copy_from(&ZEROES[..step]);
                place += step;
            }
        });
    }

    /// Takes the iovec array out for reuse, and lets go of the memory.
    pub fn into_iovecs(self) -> Vec<iovec> {
        self.iovecs
    }

    // Shows each stretch in a range, with its place in the range.
    fn each(&self, offset: u64, len: u64, mut visit: impl FnMut(iovec, usize)) {
        let mut skip = usize::try_from(offset).unwrap_or(usize::MAX);
        let mut left = usize::try_from(len).unwrap_or(usize::MAX);
        let mut place = 0;
        for part in &self.iovecs {
            if skip >= part.iov_len {
                skip -= part.iov_len;
                continue;
            }
            let step = (part.iov_len - skip).min(left);
            if step == 0 {
                return;
            }
            visit(
                iovec {
                    iov_base: part.iov_base.wrapping_byte_add(skip),
                    iov_len: step,
                },
                place,
            );
            skip = 0;
            left -= step;
            place += step;
        }
    }
}

fn volatile<'a>(iovec: iovec) -> VolatileSlice<'a> {
    // SAFETY: called only for parts of a `Buffers`, whose owner keeps them mapped meanwhile.
    unsafe { VolatileSlice::new(iovec.iov_base.cast(), iovec.iov_len) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_share_the_memory_and_copies_stay_inside() {
        let whole = Buffers::zeroed(8192, 4096).unwrap();
        assert!(whole.is_aligned(4096, 4096));
        whole.slice(100, 50).copy_from(0, &[7; 60]);
        let mut bytes = [0; 52];
        whole.copy_to(99, &mut bytes);
        assert_eq!(bytes[0], 0);
        assert!(bytes[1..51].iter().all(|&byte| byte == 7));
        assert_eq!(bytes[51], 0);
        whole.zero(0, 8192);
        whole.copy_to(99, &mut bytes);
        assert_eq!(bytes, [0; 52]);
        assert_eq!(whole.slice(8000, 500).len(), 192);
        assert_eq!(whole.slice(9000, 500).len(), 0);
    }
}
