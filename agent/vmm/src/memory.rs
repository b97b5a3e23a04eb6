//! Guest memory: one shared memfd, so that vhost-user backends can map it. Without such backends it is
//! this process's own: anonymous, so that the host may back it by transparent huge pages, or, for a
//! restored guest, a private mapping of the snapshot's file, of which only what is touched is read.

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::sync::Arc;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MemoryRegionAddress, MmapRegion,
};

use crate::boot::layout;
use crate::config::{HugepageSize, MemoryConfig};

/// The guest's physical address space as mapped into this process. Its bitmap has the pages that
/// this process wrote, which KVM's dirty log lacks.
pub type Ram = GuestMemoryMmap<AtomicBitmap>;
/// The address space as devices share it.
pub type GuestMemory = Arc<Ram>;
/// Bytes of a page of the dirty log.
pub const PAGE: u64 = 4096;

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
    /// The memory can't be bound to a NUMA node.
    #[error("memory.numa_node: can't take memory from the host's NUMA node {node}: {source}")]
    Node {
        /// The node.
        node: u16,
        /// What the kernel said.
        source: io::Error,
    },
    /// The host hasn't so much memory.
    #[error("memory.prefault: can't take {size_mib} MiB from the host: {source}")]
    Prefault {
        /// The guest's memory in MiB.
        size_mib: u64,
        /// What the kernel said.
        source: io::Error,
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

/// Allocates the guest's memory, all zero: shared, so that other processes can map it, or this process's
/// own.
pub fn allocate(config: &MemoryConfig, shared: bool) -> Result<GuestMemory, MemoryError> {
    if shared || config.hugepages.is_some() {
        // Without MAP_NORESERVE, so that a mapping of hugepages fails here and not by SIGBUS when the
        // guest touches a page that the pool doesn't have.
        return map(config, Some(create_memfd(config)?), libc::MAP_SHARED);
    }
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    map(config, None, flags)
}

/// Maps a file of the memory's size so that writes stay this process's own, and pages are read
/// when they are touched.
pub fn map_private(config: &MemoryConfig, file: File) -> Result<GuestMemory, MemoryError> {
    map(config, Some(file), libc::MAP_PRIVATE | libc::MAP_NORESERVE)
}

fn map(config: &MemoryConfig, file: Option<File>, flags: i32) -> Result<GuestMemory, MemoryError> {
    let size_mib = config.size_mib;
    let file = file.map(Arc::new);
    let failed = |message: String| match config.hugepages {
        Some(page) => MemoryError::Hugepages { size_mib, page },
        None => MemoryError::Map { size_mib, message },
    };
    let mut regions = Vec::new();
    let mut offset = 0;
    for (base, length) in layout::ram_ranges(size_mib << 20) {
        let length_usize = usize::try_from(length).map_err(|e| failed(e.to_string()))?;
        let mapping = MmapRegion::build(
            file.as_ref()
                .map(|file| FileOffset::from_arc(Arc::clone(file), offset)),
            length_usize,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
        )
        .map_err(|e| failed(e.to_string()))?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(base))
            .ok_or_else(|| failed("the range leaves the address space".to_owned()))?;
        regions.push(region);
        offset += length;
    }
    let memory = GuestMemoryMmap::from_regions(regions)
        .map(Arc::new)
        .map_err(|e| failed(e.to_string()))?;
    place(config, &memory)?;
    Ok(memory)
}

/// Asks for transparent huge pages, binds the memory to its NUMA node, and takes it from the host, as
/// configured.
fn place(config: &MemoryConfig, memory: &Ram) -> Result<(), MemoryError> {
    const MPOL_BIND: libc::c_ulong = 2;
    for region in memory.iter() {
        let (address, length) = (region.as_ptr(), region.size());
        // Of a snapshot's file only what is touched is to be read, not huge pages around it.
        if region.flags() & (libc::MAP_SHARED | libc::MAP_ANONYMOUS) != 0 {
            // SAFETY: the range is the region's; its content stays. A host that has no transparent huge
            // pages refuses, which is no harm.
            unsafe { libc::madvise(address.cast(), length, libc::MADV_HUGEPAGE) };
        }
        if let Some(node) = config.numa_node {
            let mut nodes = [0u64; 17];
            nodes[usize::from(node) / 64] |= 1 << (node % 64);
            // SAFETY: the range is the region's, and the mask has as many bits as is said.
            let bound = unsafe {
                libc::syscall(
                    libc::SYS_mbind,
                    address,
                    length,
                    MPOL_BIND,
                    nodes.as_ptr(),
                    1025,
                    0,
                )
            };
            if bound != 0 {
                let source = io::Error::last_os_error();
                return Err(MemoryError::Node { node, source });
            }
        }
        if config.prefault {
            // SAFETY: the range is the region's; its content stays.
            let filled =
                unsafe { libc::madvise(address.cast(), length, libc::MADV_POPULATE_WRITE) };
            if filled != 0 {
                let (size_mib, source) = (config.size_mib, io::Error::last_os_error());
                return Err(MemoryError::Prefault { size_mib, source });
            }
        }
    }
    Ok(())
}

/// Gives the memory to the virtual machine, one slot a region; with `log`, KVM notes which pages
/// the guest writes. May be called again to change that.
pub fn register(vm: &VmFd, memory: &Ram, log: bool) -> Result<(), MemoryError> {
    for (slot, region) in (0u32..).zip(memory.iter()) {
        let address = region.start_addr().0;
        let length = region.len();
        let slot = kvm_userspace_memory_region {
            slot,
            flags: if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
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

/// Takes and clears what the guest and this process wrote: a bitmap of pages for each region.
/// The memory must be registered with its log.
pub fn take_dirty(vm: &VmFd, memory: &Ram) -> Result<Vec<Vec<u64>>, kvm_ioctls::Error> {
    let mut bitmaps = Vec::new();
    for (slot, region) in (0u32..).zip(memory.iter()) {
        let mapping: &MmapRegion<AtomicBitmap> = region;
        let mut pages = vm.get_dirty_log(slot, mapping.size())?;
        let own = mapping.bitmap().get_and_reset();
        pages.resize(pages.len().max(own.len()), 0);
        for (word, own) in pages.iter_mut().zip(own) {
            *word |= own;
        }
        bitmaps.push(pages);
    }
    Ok(bitmaps)
}

/// Gives whole pages of a region back to the host. They are zero when they are touched again, or, of
/// a restored guest, what the snapshot has there: the guest expects nothing of them.
pub fn discard(
    region: &GuestRegionMmap<AtomicBitmap>,
    start: MemoryRegionAddress,
    length: u64,
) -> io::Result<()> {
    let inside = region.checked_offset(start, 0).is_some() && length <= region.len() - start.0;
    let (Ok(length), Ok(address), true) = (
        usize::try_from(length),
        region.get_host_address(start),
        inside,
    ) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    // In a shared mapping the pages are the file's.
    let advice = if region.flags() & libc::MAP_SHARED != 0 {
        libc::MADV_REMOVE
    } else {
        libc::MADV_DONTNEED
    };
    // SAFETY: the range is the region's, checked; guest memory may change at any time, and nothing in
    // this process refers to its content.
    match unsafe { libc::madvise(address.cast(), length, advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
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
