//! Which pages disks' backends have written, while the guest migrates (QEMU's
//! docs/interop/vhost-user.rst, "Migration"): a bitmap that they share, one bit for each 4 KiB of the
//! guest's physical addresses.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::{AtomicU64, Ordering};

use vhost::VhostUserDirtyLogRegion;
use vm_memory::{FileOffset, GuestMemoryBackend, GuestMemoryRegion, MmapRegion};

use crate::memory::{PAGE, Ram};

/// Pages that a word of the bitmap has.
const WORD_PAGES: u64 = 64;
const WORD_BYTES: usize = 8;

/// The bitmap.
#[derive(Debug)]
pub struct DirtyLog {
    file: File,
    mapping: MmapRegion,
}

impl DirtyLog {
    /// One for all of `memory`, with no page marked.
    pub fn new(memory: &Ram) -> io::Result<Self> {
        let pages = (memory.last_addr().0 + 1).div_ceil(PAGE);
        let bytes = (pages.div_ceil(8)).next_multiple_of(PAGE);
        // SAFETY: the name is a NUL-terminated string.
        let fd = unsafe { libc::memfd_create(c"keelson-dirty-log".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: memfd_create returned this descriptor, which nothing else owns.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(bytes)?;
        let length = usize::try_from(bytes).map_err(io::Error::other)?;
        let mapping = MmapRegion::from_file(FileOffset::new(file.try_clone()?, 0), length)
            .map_err(io::Error::other)?;
        Ok(Self { file, mapping })
    }

    /// What a backend is told.
    pub(super) fn region(&self) -> VhostUserDirtyLogRegion {
        VhostUserDirtyLogRegion {
            mmap_size: self.mapping.size() as u64,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    /// Takes and clears the marks of each region of `memory`, and adds them to its bitmap.
    pub fn take_into(&self, memory: &Ram, bitmaps: &mut [Vec<u64>]) {
        for (region, bitmap) in memory.iter().zip(bitmaps) {
            let first = region.start_addr().0 / PAGE / WORD_PAGES;
            for (at, word) in (first..).zip(bitmap) {
                *word |= self
                    .word(at)
                    .map_or(0, |word| word.swap(0, Ordering::AcqRel));
            }
        }
    }

    /// Marks all pages: nobody knows which ones were written.
    pub fn mark_all(&self) {
        for at in 0..(self.mapping.size() / WORD_BYTES) as u64 {
            if let Some(word) = self.word(at) {
                word.store(u64::MAX, Ordering::Release);
            }
        }
    }

    fn word(&self, at: u64) -> Option<&AtomicU64> {
        let start = usize::try_from(at).ok()?.checked_mul(WORD_BYTES)?;
        if start.checked_add(WORD_BYTES)? > self.mapping.size() {
            return None;
        }
        // SAFETY: within the mapping, aligned as the mapping is by pages, and accessed atomically only,
        // here and by the backends.
        Some(unsafe { AtomicU64::from_ptr(self.mapping.as_ptr().add(start).cast()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;
    use vm_memory::GuestAddress;

    #[test]
    fn marks_of_backends_come_once_with_their_regions() {
        let ranges = [(GuestAddress(0), 1 << 20), (GuestAddress(4 << 30), 1 << 20)];
        let memory = Ram::from_ranges(&ranges).unwrap();
        let log = DirtyLog::new(&memory).unwrap();
        // Pages 3 and 9 of the first region, and page 1 of the second one.
        log.file.write_all_at(&[0b1000, 0b10], 0).unwrap();
        log.file
            .write_all_at(&[0b10], (4 << 30) / 4096 / 8)
            .unwrap();
        let mut bitmaps = vec![vec![1; 4], vec![0; 4]];
        log.take_into(&memory, &mut bitmaps);
        assert_eq!(bitmaps, [[0b10_0000_1001, 1, 1, 1], [0b10, 0, 0, 0]]);
        let mut bitmaps = vec![vec![0; 4], vec![0; 4]];
        log.take_into(&memory, &mut bitmaps);
        assert_eq!(bitmaps, [[0; 4], [0; 4]]);
        log.mark_all();
        log.take_into(&memory, &mut bitmaps);
        assert_eq!(bitmaps, [[u64::MAX; 4], [u64::MAX; 4]]);
    }
}
