//! Memory whose address suits O_DIRECT.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// A zeroed heap buffer that starts at a multiple of the asked alignment.
#[derive(Debug)]
pub struct AlignedBuffer {
    pointer: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the buffer is plain bytes owned by this value alone.
unsafe impl Send for AlignedBuffer {}

impl AlignedBuffer {
    /// Allocates `len` bytes (at least one) at a multiple of `alignment`, a power of two.
    /// Returns `None` for a layout that no allocator could serve.
    pub fn new(len: usize, alignment: usize) -> Option<Self> {
        let layout = Layout::from_size_align(len.max(1), alignment).ok()?;
        // SAFETY: the layout's size isn't zero.
        let pointer = unsafe { alloc_zeroed(layout) };
        match NonNull::new(pointer) {
            Some(pointer) => Some(Self { pointer, layout }),
            None => handle_alloc_error(layout),
        }
    }

    /// The first byte's address, for the kernel.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.pointer.as_ptr()
    }

    /// The bytes. Not to be called while the kernel writes into them.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: allocated with exactly this length, initialised to zero, owned by self.
        unsafe { std::slice::from_raw_parts(self.pointer.as_ptr(), self.layout.size()) }
    }

    /// The bytes, to change. Not to be called while the kernel uses them.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: allocated with exactly this length, initialised to zero, borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.as_ptr(), self.layout.size()) }
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated by `new` with this layout, freed once.
        unsafe { dealloc(self.pointer.as_ptr(), self.layout) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_at_the_alignment() {
        for alignment in [1, 512, 4096, 65536] {
            let mut buffer = AlignedBuffer::new(3 * 512, alignment).unwrap();
            assert_eq!(buffer.as_mut_ptr() as usize % alignment, 0);
            assert_eq!(buffer.as_mut_slice().len(), 1536);
            assert!(buffer.as_mut_slice().iter().all(|&byte| byte == 0));
        }
    }
}
