//! Buffers in guest memory, as `readv` and `writev` take them.

use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::memory::GuestMemory;

/// `UIO_MAXIOV` of Linux: the most buffers of one call.
pub const MAX_VECTORS: usize = 1024;

/// Why a buffer can't be used.
#[derive(Debug, thiserror::Error)]
pub enum BufferError {
    /// The driver gave an address that is no RAM.
    #[error("a buffer of {length} bytes at {address:#x} is not in RAM")]
    NotRam {
        /// Guest-physical address.
        address: u64,
        /// Bytes.
        length: u32,
    },
    /// The driver gave more buffers than one packet may have.
    #[error("a packet has more than {MAX_VECTORS} buffers")]
    TooMany,
}

/// Pieces of guest memory, in order, which stay mapped as long as this value lives.
///
/// The guest can change them at any time; only the kernel reads and writes them.
pub struct GuestBuffers {
    memory: GuestMemory,
    vectors: Vec<libc::iovec>,
    addresses: Vec<GuestAddress>,
    bytes: usize,
}

impl GuestBuffers {
    /// No buffers.
    pub fn new(memory: GuestMemory) -> Self {
        Self {
            memory,
            vectors: Vec::new(),
            addresses: Vec::new(),
            bytes: 0,
        }
    }

    /// Appends a buffer.
    pub fn push(&mut self, address: GuestAddress, length: u32) -> Result<(), BufferError> {
        if self.vectors.len() >= MAX_VECTORS {
            return Err(BufferError::TooMany);
        }
        let bytes = length as usize;
        let slice = self
            .memory
            .get_slice(address, bytes)
            .map_err(|_| BufferError::NotRam {
                address: address.0,
                length,
            })?;
        let iov_base = slice.ptr_guard_mut().as_ptr().cast();
        self.vectors.push(libc::iovec {
            iov_base,
            iov_len: bytes,
        });
        self.addresses.push(address);
        self.bytes += bytes;
        Ok(())
    }

    /// Removes the first `count` buffers.
    pub fn remove_first(&mut self, count: usize) {
        self.addresses.drain(..count.min(self.addresses.len()));
        let count = count.min(self.vectors.len());
        self.bytes -= self
            .vectors
            .drain(..count)
            .map(|vector| vector.iov_len)
            .sum::<usize>();
    }

    /// Removes all.
    pub fn clear(&mut self) {
        self.remove_first(usize::MAX);
    }

    /// Bytes of all buffers together.
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// The number of buffers.
    pub const fn len(&self) -> usize {
        self.vectors.len()
    }

    /// For the system calls.
    pub fn vectors(&self) -> &[libc::iovec] {
        &self.vectors
    }

    /// Notes that the kernel wrote the first `bytes` bytes.
    pub fn mark_written(&self, mut bytes: usize) {
        for (vector, address) in self.vectors.iter().zip(&self.addresses) {
            let length = bytes.min(vector.iov_len);
            if length == 0 {
                return;
            }
            if let Ok(slice) = self.memory.get_slice(*address, length) {
                slice.bitmap().mark_dirty(0, length);
            }
            bytes -= length;
        }
    }

    /// Writes `data` at `offset` bytes from the start; what is beyond the end is not written.
    pub fn write_at(
        &self,
        mut offset: usize,
        mut data: &[u8],
    ) -> Result<(), vm_memory::GuestMemoryError> {
        for (vector, address) in self.vectors.iter().zip(&self.addresses) {
            if offset < vector.iov_len && !data.is_empty() {
                let length = data.len().min(vector.iov_len - offset);
                let (now, later) = data.split_at(length);
                self.memory
                    .write_slice(now, GuestAddress(address.0 + offset as u64))?;
                data = later;
                offset = 0;
            } else {
                offset = offset.saturating_sub(vector.iov_len);
            }
        }
        Ok(())
    }
}
