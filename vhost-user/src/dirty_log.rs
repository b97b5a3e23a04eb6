//! Which pages of guest memory this device has written, while the guest migrates (vhost-user,
//! "Migration"): a bitmap that the frontend shares, one bit for each 4 KiB of guest memory.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU8, Ordering};

use vm_memory::{FileOffset, MmapRegion};

use crate::bus_fault::Guard;

const PAGE_BYTES: u64 = 4096;

/// A shared bitmap.
#[derive(Debug)]
pub struct DirtyLog {
    // Before the mapping, which it must not outlive.
    _guard: Guard,
    mapping: MmapRegion,
}

impl DirtyLog {
    /// Maps the bitmap at `offset` of a frontend's file.
    pub fn map(file: File, offset: u64, bytes: u64) -> io::Result<Self> {
        let end = offset.checked_add(bytes).filter(|_| bytes > 0);
        let lacks = |end| file.metadata().map_or(true, |data| data.len() < end);
        if end.is_none_or(lacks) {
            return Err(io::Error::other(format!(
                "the file of the dirty log is too short for {bytes} bytes at {offset}"
            )));
        }
        let length = usize::try_from(bytes).map_err(io::Error::other)?;
        let mapping = MmapRegion::from_file(FileOffset::new(file, offset), length)
            .map_err(io::Error::other)?;
        Ok(Self {
            _guard: Guard::new(mapping.as_ptr() as usize, length),
            mapping,
        })
    }

    /// Marks `len` bytes from a guest physical address on. What lies behind the bitmap's end is
    /// not the frontend's to ask for, and left out.
    pub fn mark(&self, address: u64, len: u64) {
        let Some(last) = address
            .checked_add(len.saturating_sub(1))
            .filter(|_| len > 0)
        else {
            return;
        };
        for page in address / PAGE_BYTES..=last / PAGE_BYTES {
            let byte = usize::try_from(page / 8).unwrap_or(usize::MAX);
            if byte >= self.mapping.size() {
                return;
            }
            // SAFETY: within the mapping, which is accessed atomically only.
            let byte = unsafe { AtomicU8::from_ptr(self.mapping.as_ptr().add(byte)) };
            byte.fetch_or(1 << (page % 8), Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn marks_each_page_touched_and_nothing_outside() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096 + 16).unwrap();
        let log = DirtyLog::map(file.try_clone().unwrap(), 4096, 4).unwrap();
        log.mark(4095, 2);
        log.mark(9 * 4096, 1);
        log.mark(31 * 4096, 3 * 4096);
        log.mark(5 * 4096, 0);
        log.mark(u64::MAX, 2);
        let mut bits = [0; 16];
        file.read_exact_at(&mut bits, 4096).unwrap();
        assert_eq!(bits[..5], [0b11, 0b10, 0, 0x80, 0]);
        assert!(DirtyLog::map(file, 4096, 100).is_err());
    }
}
