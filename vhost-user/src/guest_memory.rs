//! The guest's memory as the frontend shares it.

use std::fs::File;
use std::io;
use std::sync::Arc;

use libc::iovec;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion, Permissions,
};

use crate::bus_fault::Guard;
use crate::descriptor_chain::Segment;

/// Most regions that a frontend may share: QEMU's memory slots with hotplug, with a margin.
pub const MAX_REGIONS: usize = 256;

/// Why a memory table was refused.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// More regions than the limit.
    #[error("more than {MAX_REGIONS} memory regions")]
    TooManyRegions,
    /// A region whose numbers don't make sense.
    #[error("memory region at {guest_address:#x} of {size:#x} bytes is empty or wraps around")]
    InvalidRegion {
        /// Guest physical address of the first byte.
        guest_address: u64,
        /// Bytes.
        size: u64,
    },
    /// The file ends before the region: touching it would kill this process with SIGBUS.
    #[error("the file of the memory region at {guest_address:#x} is {len:#x} bytes, too short")]
    FileTooShort {
        /// Guest physical address of the first byte.
        guest_address: u64,
        /// The file's length in bytes.
        len: u64,
    },
    /// The descriptor can't be examined.
    #[error("can't examine the memory region's file: {0}")]
    Examine(#[source] io::Error),
    /// The descriptor can't be mapped.
    #[error("can't map a memory region: {0}")]
    Map(#[source] MmapRegionError),
    /// Two regions share addresses.
    #[error("memory regions overlap")]
    Overlap,
    /// A region to remove that isn't there.
    #[error("no memory region at {guest_address:#x} of {size:#x} bytes")]
    NoSuchRegion {
        /// Guest physical address of the first byte.
        guest_address: u64,
        /// Bytes.
        size: u64,
    },
}

/// One region as the vhost-user messages describe it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionDescription {
    /// Guest physical address of the first byte.
    pub guest_address: u64,
    /// Bytes.
    pub size: u64,
    /// Address of the first byte in the frontend's own address space.
    pub frontend_address: u64,
    /// Where the region starts in its file.
    pub file_offset: u64,
}

#[derive(Clone, Debug)]
struct Region {
    description: RegionDescription,
    // Before the mapping, which it must not outlive.
    guard: Arc<Guard>,
    mapping: Arc<GuestRegionMmap>,
}

/// All regions that are shared now. Cheap to clone; a clone keeps the mappings alive.
#[derive(Clone, Debug, Default)]
pub struct MemoryTable {
    regions: Vec<Region>,
}

impl MemoryTable {
    /// Maps one more region.
    pub fn add(&mut self, description: RegionDescription, file: File) -> Result<(), MemoryError> {
        if self.regions.len() >= MAX_REGIONS {
            return Err(MemoryError::TooManyRegions);
        }
        let mapping = map(description, file)?;
        let start = description.guest_address;
        let end = start + (description.size - 1);
        let overlaps = self.regions.iter().any(|region| {
            let other = region.description;
            start <= other.guest_address + (other.size - 1) && other.guest_address <= end
        });
        if overlaps {
            return Err(MemoryError::Overlap);
        }
        let size = usize::try_from(mapping.len()).unwrap_or(0);
        self.regions.push(Region {
            description,
            guard: Arc::new(Guard::new(mapping.as_ptr() as usize, size)),
            mapping: Arc::new(mapping),
        });
        self.regions
            .sort_by_key(|region| region.description.guest_address);
        Ok(())
    }

    /// Forgets one region. Its mapping goes with the last user of it.
    pub fn remove(&mut self, description: RegionDescription) -> Result<(), MemoryError> {
        let position = self.regions.iter().position(|region| {
            let known = region.description;
            known.guest_address == description.guest_address
                && known.size == description.size
                && known.frontend_address == description.frontend_address
        });
        match position {
            Some(position) => {
                self.regions.remove(position);
                Ok(())
            }
            None => Err(MemoryError::NoSuchRegion {
                guest_address: description.guest_address,
                size: description.size,
            }),
        }
    }

    /// The guest's memory for a queue to work on, or `None` while nothing is shared.
    pub fn guest_memory(&self) -> Option<Arc<GuestMemoryMmap>> {
        let regions = self
            .regions
            .iter()
            .map(|region| Arc::clone(&region.mapping));
        GuestMemoryMmap::from_arc_regions(regions.collect())
            .ok()
            .map(Arc::new)
    }

    /// By which a queue finds out that the frontend has taken memory away.
    pub fn guards(&self) -> Vec<Arc<Guard>> {
        let guards = self.regions.iter().map(|region| Arc::clone(&region.guard));
        guards.collect()
    }

    /// The guest physical address behind an address in the frontend's address space, in which
    /// vhost-user names the rings.
    pub fn translate(&self, frontend_address: u64) -> Option<GuestAddress> {
        self.regions.iter().find_map(|region| {
            let region = region.description;
            let offset = frontend_address.checked_sub(region.frontend_address)?;
            (offset < region.size).then(|| GuestAddress(region.guest_address + offset))
        })
    }
}

fn map(description: RegionDescription, file: File) -> Result<GuestRegionMmap, MemoryError> {
    let RegionDescription {
        guest_address,
        size,
        frontend_address,
        file_offset,
    } = description;
    let invalid = MemoryError::InvalidRegion {
        guest_address,
        size,
    };
    let bounded = size != 0
        && guest_address.checked_add(size).is_some()
        && frontend_address.checked_add(size).is_some();
    let Some(end) = file_offset.checked_add(size).filter(|_| bounded) else {
        return Err(invalid);
    };
    let Ok(length) = usize::try_from(size) else {
        return Err(invalid);
    };
    let len = file.metadata().map_err(MemoryError::Examine)?.len();
    if len < end {
        return Err(MemoryError::FileTooShort { guest_address, len });
    }
    let mapping = MmapRegion::from_file(FileOffset::new(file, file_offset), length)
        .map_err(MemoryError::Map)?;
    GuestRegionMmap::new(mapping, GuestAddress(guest_address)).ok_or(invalid)
}

/// Appends the host's view of a guest buffer, one entry for each region that it touches, joined
/// with the last one if it goes on there.
///
/// Returns false, with nothing promised about `iovecs`, if any byte lies outside guest memory.
pub fn append_iovecs(memory: &GuestMemoryMmap, segment: Segment, iovecs: &mut Vec<iovec>) -> bool {
    let Ok(length) = usize::try_from(segment.len) else {
        return false;
    };
    let access = Permissions::ReadWrite;
    let Ok(slices) = GuestMemory::get_slices(memory, segment.address, length, access) else {
        return false;
    };
    for slice in slices {
        let Ok(slice) = slice else { return false };
        let start = slice.ptr_guard_mut().as_ptr();
        match iovecs.last_mut() {
            // Drivers give one buffer for each page, and pages are often neighbours.
            Some(last) if last.iov_base.wrapping_byte_add(last.iov_len) == start.cast() => {
                last.iov_len += slice.len();
            }
            _ => iovecs.push(iovec {
                iov_base: start.cast(),
                iov_len: slice.len(),
            }),
        }
    }
    true
}

/// The bytes of guest memory, for logs.
pub fn total_bytes(memory: &GuestMemoryMmap) -> u64 {
    GuestMemoryBackend::iter(memory)
        .map(GuestMemoryRegion::len)
        .sum()
}
