//! Guest memory: one shared memfd, so that vhost-user backends can map it.

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion,
};

use crate::boot::layout;
use crate::config::{HugepageSize, MemoryConfig};

/// The guest's physical address space as mapped into this process.
pub type GuestMemory = Arc<GuestMemoryMmap>;

/// Why guest memory can't be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The memfd can't be created or sized.
    #[error("can't create {size_mib} MiB of guest memory: {source}")]
    Create {
        /// The guest's memory in MiB.
        size_mib: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// The host's pool of hugepages is too small.
    #[error(
        "the host has too few free {page} hugepages for {size_mib} MiB of guest memory: raise \
         /sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages, or set memory.hugepages to null",
        kib = page.mib() * 1024
    )]
    Hugepages {
        /// The guest's memory in MiB.
        size_mib: u64,
        /// The page size asked for.
        page: HugepageSize,
    },
    /// The memory can't be mapped.
    #[error("can't map {size_mib} MiB of guest memory: {message}")]
    Map {
        /// The guest's memory in MiB.
        size_mib: u64,
        /// What the kernel said.
        message: String,
    },
    /// KVM refused the memory.
    #[error("KVM refused {length:#x} bytes of memory at {address:#x}: {source}")]
    Slot {
        /// The guest-physical address.
        address: u64,
        /// Bytes.
        length: u64,
        /// What the kernel said.
        source: kvm_ioctls::Error,
    },
}

/// Allocates the guest's memory, all zero.
pub fn allocate(config: &MemoryConfig) -> Result<GuestMemory, MemoryError> {
    let size_mib = config.size_mib;
    let size = size_mib << 20;
    let file = Arc::new(create_memfd(config)?);
    let map = |message: String| match config.hugepages {
        Some(page) => MemoryError::Hugepages { size_mib, page },
        None => MemoryError::Map { size_mib, message },
    };
    let mut regions = Vec::new();
    let mut offset = 0;
    for (base, length) in layout::ram_ranges(size) {
        let length_usize = usize::try_from(length).map_err(|e| map(e.to_string()))?;
        // Without MAP_NORESERVE, so that a mapping of hugepages fails here and not by SIGBUS when
        // the guest touches a page that the pool doesn't have.
        let mapping = MmapRegion::build(
            Some(FileOffset::from_arc(Arc::clone(&file), offset)),
            length_usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
        )
        .map_err(|e| map(e.to_string()))?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(base))
            .ok_or_else(|| map("the range leaves the address space".to_owned()))?;
        regions.push(region);
        offset += length;
    }
    GuestMemoryMmap::from_regions(regions)
        .map(Arc::new)
        .map_err(|e| map(e.to_string()))
}

/// Gives the memory to the virtual machine, one slot a region.
pub fn register(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), MemoryError> {
    for (slot, region) in (0u32..).zip(memory.iter()) {
        let address = region.start_addr().0;
        let length = region.len();
        let slot = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: address,
            memory_size: length,
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the range is a mapping of this process that `memory` owns, and the machine drops
        // its VmFd and vCPUs before its memory.
        unsafe { vm.set_user_memory_region(slot) }.map_err(|source| MemoryError::Slot {
            address,
            length,
            source,
        })?;
    }
    Ok(())
}

fn create_memfd(config: &MemoryConfig) -> Result<File, MemoryError> {
    let size_mib = config.size_mib;
    let flags = libc::MFD_CLOEXEC
        | match config.hugepages {
            None => 0,
            Some(HugepageSize::Size2MiB) => libc::MFD_HUGETLB | libc::MFD_HUGE_2MB,
            Some(HugepageSize::Size1GiB) => libc::MFD_HUGETLB | libc::MFD_HUGE_1GB,
        };
    // SAFETY: the name is a NUL-terminated string.
    let fd = unsafe { libc::memfd_create(c"keelson-guest-memory".as_ptr(), flags) };
    if fd < 0 {
        let source = io::Error::last_os_error();
        return Err(match config.hugepages {
            // ENODEV: the kernel has no pool of this size at all.
            Some(page) if source.raw_os_error() == Some(libc::ENODEV) => {
                MemoryError::Hugepages { size_mib, page }
            }
            _ => MemoryError::Create { size_mib, source },
        });
    }
    // SAFETY: memfd_create returned this descriptor, which nothing else owns.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size_mib << 20)
        .map_err(|source| MemoryError::Create { size_mib, source })?;
    Ok(file)
}
