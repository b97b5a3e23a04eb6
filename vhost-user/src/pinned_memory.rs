//! Guest memory that is registered with a worker's ring, so that the kernel doesn't look its pages
//! up for each operation. It stays in memory as long as that: the host can't swap it out.

use std::sync::Arc;

use io_uring::Submitter;
use libc::iovec;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Buffers that one ring can hold.
pub const MAX_BUFFERS: u32 = 256;

/// The kernel's limit for one buffer, in bytes.
const MAX_BUFFER_BYTES: usize = 1 << 30;

/// Buffers of one queue's guest memory, sorted by address.
#[derive(Clone, Debug, Default)]
pub struct PinnedMemory(Vec<Pinned>);

#[derive(Clone, Copy, Debug)]
struct Pinned {
    start: usize,
    end: usize,
    index: u16,
}

impl PinnedMemory {
    /// The buffer that has all of a request's memory in it, which has to be in one piece.
    pub fn find(&self, iovecs: &[iovec]) -> Option<u16> {
        let [only] = iovecs else { return None };
        let start = only.iov_base as usize;
        let holds = |pinned: &&Pinned| pinned.start <= start && start + only.iov_len <= pinned.end;
        self.0.iter().find(holds).map(|pinned| pinned.index)
    }
}

/// The buffers of one ring, shared by the queues that have the same guest's memory.
#[derive(Debug)]
pub struct PinnedTable {
    free: Vec<u16>,
    guests: Vec<(Arc<GuestMemoryMmap>, PinnedMemory, usize)>,
}

impl Default for PinnedTable {
    fn default() -> Self {
        let free = (0..MAX_BUFFERS)
            .rev()
            .map(|index| u16::try_from(index).unwrap_or(0));
        Self {
            free: free.collect(),
            guests: Vec::new(),
        }
    }
}

impl PinnedTable {
    /// Registers a guest's memory, or as much of it as the ring and the limit of locked memory
    /// have room for: what isn't registered works as well.
    pub fn add(&mut self, ring: &Submitter<'_>, memory: &Arc<GuestMemoryMmap>) -> PinnedMemory {
        for (known, pinned, users) in &mut self.guests {
            if Arc::ptr_eq(known, memory) {
                *users += 1;
                return pinned.clone();
            }
        }
        let mut pinned = PinnedMemory::default();
        for region in GuestMemoryBackend::iter(&**memory) {
            let Ok(slice) = region.as_volatile_slice() else {
                continue;
            };
            let start = slice.ptr_guard_mut().as_ptr() as usize;
            let end = start + slice.len();
            for start in (start..end).step_by(MAX_BUFFER_BYTES) {
                let end = end.min(start + MAX_BUFFER_BYTES);
                let Some(index) = self.free.pop() else { break };
                let buffer = iovec {
                    iov_base: start as *mut libc::c_void,
                    iov_len: end - start,
                };
                // SAFETY: mapped guest memory, taken out of the ring before it is unmapped.
                let registered =
                    unsafe { ring.register_buffers_update(u32::from(index), &[buffer], None) };
                if let Err(error) = registered {
                    tracing::warn!(%error, "can't pin guest memory; raise LimitMEMLOCK");
                    self.free.push(index);
                    break;
                }
                pinned.0.push(Pinned { start, end, index });
            }
        }
        self.guests.push((Arc::clone(memory), pinned.clone(), 1));
        pinned
    }

    /// Lets go of a guest's memory, once for each `add`.
    pub fn remove(&mut self, ring: &Submitter<'_>, memory: &Arc<GuestMemoryMmap>) {
        let known = self
            .guests
            .iter()
            .position(|(known, _, _)| Arc::ptr_eq(known, memory));
        let Some(place) = known else { return };
        if let Some((_, _, users)) = self.guests.get_mut(place) {
            *users -= 1;
            if *users > 0 {
                return;
            }
        }
        let (_memory, pinned, _) = self.guests.swap_remove(place);
        for Pinned { index, .. } in pinned.0 {
            let nothing = iovec {
                iov_base: std::ptr::null_mut(),
                iov_len: 0,
            };
            // SAFETY: an empty entry.
            let removed =
                unsafe { ring.register_buffers_update(u32::from(index), &[nothing], None) };
            if removed.is_ok() {
                self.free.push(index);
            }
        }
    }
}
