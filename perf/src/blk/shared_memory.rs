//! Memory for the data of operations, which can be shared with a backend.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Mapped memory, page-aligned.
#[derive(Debug)]
pub struct SharedMemory {
    file: OwnedFd,
    start: NonNull<u8>,
    bytes: usize,
}

impl SharedMemory {
    /// Fresh memory; every page of it is there.
    pub fn new(bytes: usize) -> anyhow::Result<Self> {
        let file = memfd_create("data", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, bytes as u64)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe { mmap(std::ptr::null_mut(), bytes, protection, flags, &file, 0) }?;
        let start = NonNull::new(start.cast());
        Ok(Self {
            file,
            start: start.ok_or_else(|| anyhow::anyhow!("no mapping"))?,
            bytes,
        })
    }

    pub fn descriptor(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    pub fn len(&self) -> usize {
        self.bytes
    }

    /// The byte at a place inside.
    pub fn at(&self, place: usize) -> *mut u8 {
        assert!(place < self.bytes);
        self.start.as_ptr().wrapping_add(place)
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length; who used it is gone before.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}
