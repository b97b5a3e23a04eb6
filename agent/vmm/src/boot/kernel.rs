//! The kernel image: a bzImage or an uncompressed ELF.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use linux_loader::bootparam::setup_header;
use linux_loader::elf::{EM_X86_64, Elf64_Ehdr};
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::Elf;
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{BootError, BootFile, layout};
use crate::memory::Ram;

/// `HdrS`, at offset 0x202 of a bzImage.
const SETUP_MAGIC: u32 = 0x5372_6448;
/// Offset of `struct setup_header` in a bzImage and in the zero page.
const SETUP_HEADER: u64 = 0x1f1;
/// Boot protocol 2.12, the first with `xloadflags` and so with the 64-bit entry point.
const PROTOCOL_64_BIT: u16 = 0x020c;
/// `XLF_KERNEL_64`: the 64-bit entry point is at offset 0x200 of the protected-mode code.
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64_OFFSET: u64 = 0x200;
const SECTOR: u64 = 512;
/// `ELFCLASS64`, in byte 4 of an ELF.
const ELF_CLASS_64: u8 = 2;
/// More than any kernel: the length is bounded before anything is read.
const MAX_KERNEL_BYTES: u64 = 1 << 30;

/// A kernel in guest memory.
pub(super) struct LoadedKernel {
    /// The guest-physical address of the 64-bit entry point.
    pub(super) entry: u64,
    /// The first address above what the kernel needs until it manages memory itself.
    pub(super) end: u64,
    /// The setup header for the zero page: a bzImage's own, or one made up for an ELF.
    pub(super) header: setup_header,
}

/// Loads the image.
pub(super) fn load(memory: &Ram, image: &BootFile) -> Result<LoadedKernel, BootError> {
    let path = &image.path;
    let (mut file, length) = image.rewound()?;
    if length > MAX_KERNEL_BYTES {
        let reason = format!("{length} bytes are more than the limit of {MAX_KERNEL_BYTES}");
        return Err(invalid(path, reason));
    }
    let mut magic = [0; 4];
    read_at(&mut file, 0, &mut magic)
        .map_err(|_| invalid(path, format!("it has only {length} bytes")))?;
    if &magic == b"\x7fELF" {
        load_elf(memory, path, file)
    } else {
        load_bzimage(memory, path, file, length)
    }
}

fn load_elf(memory: &Ram, path: &Path, mut file: File) -> Result<LoadedKernel, BootError> {
    let mut header = Elf64_Ehdr::default();
    read_at(&mut file, 0, header.as_mut_slice())
        .map_err(|_| invalid(path, "the ELF header is truncated"))?;
    if header.e_ident[4] != ELF_CLASS_64 || header.e_machine != EM_X86_64 {
        return Err(invalid(path, "it is an ELF, but not for x86-64"));
    }
    let result = Elf::load(
        memory,
        None,
        &mut file,
        Some(GuestAddress(layout::HIGH_RAM)),
    )
    .map_err(|e| load_error(memory, path, &e))?;
    let entry = result.kernel_load.0;
    let end = checked_end(memory, path, &result, result.kernel_end)?;
    if !(layout::HIGH_RAM..end).contains(&entry) {
        return Err(invalid(
            path,
            format!("its entry point {entry:#x} is outside of what it loads"),
        ));
    }
    let header = setup_header {
        boot_flag: 0xaa55,
        header: SETUP_MAGIC,
        version: PROTOCOL_64_BIT,
        kernel_alignment: 0x0100_0000,
        initrd_addr_max: 0x7fff_ffff,
        cmdline_size: 2047,
        ..setup_header::default()
    };
    Ok(LoadedKernel { entry, end, header })
}

fn load_bzimage(
    memory: &Ram,
    path: &Path,
    mut file: File,
    length: u64,
) -> Result<LoadedKernel, BootError> {
    let mut header = setup_header::default();
    read_at(&mut file, SETUP_HEADER, header.as_mut_slice())
        .map_err(|_| invalid(path, "it is neither a bzImage nor an ELF: too short"))?;
    if header.header != SETUP_MAGIC {
        return Err(invalid(
            path,
            "it is neither a bzImage nor an ELF (vmlinux)",
        ));
    }
    if header.version < PROTOCOL_64_BIT || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(invalid(
            path,
            "the bzImage has no 64-bit entry point: take an x86-64 kernel",
        ));
    }
    let setup_sectors = match header.setup_sects {
        0 => 4,
        sectors => u64::from(sectors),
    };
    // `syssize` counts the protected-mode code in 16-byte paragraphs; a signature may follow it.
    let needed = (setup_sectors + 1) * SECTOR + u64::from(header.syssize) * 16;
    if length < needed {
        let reason = format!("the bzImage is truncated: {length} of at least {needed} bytes");
        return Err(invalid(path, reason));
    }
    let start = layout::HIGH_RAM;
    let result = BzImage::load(memory, Some(GuestAddress(start)), &mut file, None)
        .map_err(|e| load_error(memory, path, &e))?;
    // The decompressor moves to `pref_address` and needs `init_size` bytes from there.
    let runtime = u64::from(header.init_size)
        .checked_add(header.pref_address.max(start))
        .ok_or_else(|| invalid(path, "its setup header is corrupt (pref_address)"))?;
    let end = checked_end(memory, path, &result, result.kernel_end.max(runtime))?;
    Ok(LoadedKernel {
        entry: start + ENTRY_64_OFFSET,
        end,
        header: result.setup_header.unwrap_or(header),
    })
}

/// Refuses a kernel that ends above the RAM that starts at 0.
fn checked_end(
    memory: &Ram,
    path: &Path,
    result: &KernelLoaderResult,
    end: u64,
) -> Result<u64, BootError> {
    let limit = first_region_end(memory);
    if end > limit || end < result.kernel_load.0 {
        let mib = end.div_ceil(1 << 20);
        return Err(invalid(
            path,
            format!(
                "it needs {mib} MiB of memory, the guest has {} MiB",
                limit >> 20
            ),
        ));
    }
    Ok(end)
}

/// The end of the RAM that starts at address 0.
pub(super) fn first_region_end(memory: &Ram) -> u64 {
    memory.iter().next().map_or(0, GuestMemoryRegion::len)
}

fn load_error(memory: &Ram, path: &Path, error: &linux_loader::loader::Error) -> BootError {
    let mib = first_region_end(memory) >> 20;
    invalid(
        path,
        format!("it is truncated, corrupt or larger than the guest's {mib} MiB ({error})"),
    )
}

fn invalid(path: &Path, reason: impl Into<String>) -> BootError {
    BootError::invalid("kernel", path, reason)
}

fn read_at(file: &mut File, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
    file.seek(SeekFrom::Start(offset))?;
    file.read_exact(buffer)
}
