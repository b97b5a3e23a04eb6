//! The initial ramdisk.

use vm_memory::{Bytes, GuestAddress};

use super::kernel::{LoadedKernel, first_region_end};
use super::{BootError, BootFile};
use crate::memory::Ram;

const PAGE: u64 = 4096;

/// An initrd in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LoadedInitrd {
    /// The guest-physical address, page-aligned.
    pub(super) address: u32,
    /// Bytes.
    pub(super) size: u32,
}

/// Loads the initrd as high as the kernel takes it.
pub(super) fn load(
    memory: &Ram,
    initrd: &BootFile,
    kernel: &LoadedKernel,
) -> Result<LoadedInitrd, BootError> {
    let invalid = |reason: String| BootError::invalid("initrd", &initrd.path, reason);
    let (mut file, length) = initrd.rewound()?;
    if length == 0 {
        return Err(invalid("it is empty".to_owned()));
    }
    let limit = first_region_end(memory).min(u64::from(kernel.header.initrd_addr_max) + 1);
    let address = limit
        .checked_sub(length)
        .map(|address| address & !(PAGE - 1))
        .filter(|address| *address >= kernel.end)
        .ok_or_else(|| {
            let least = (kernel.end + length).div_ceil(1 << 20) + 1;
            invalid(format!(
                "its {length} bytes don't fit above the kernel: give the guest at least {least} MiB"
            ))
        })?;
    let too_big = || invalid(format!("{length} bytes are too many"));
    let size = u32::try_from(length).map_err(|_| too_big())?;
    let loaded = LoadedInitrd {
        address: u32::try_from(address).map_err(|_| too_big())?,
        size,
    };
    memory
        .read_exact_volatile_from(GuestAddress(address), &mut file, size as usize)
        .map_err(|e| invalid(format!("it can't be read whole: {e}")))?;
    Ok(loaded)
}
