//! What the boot loader tells: the zero page of the 64-bit Linux boot protocol
//! (Documentation/arch/x86/zero-page.rst).

use core::slice;

const ACPI_RSDP_ADDRESS: u64 = 0x070;
const MEMORY_MAP_ENTRIES: u64 = 0x1e8;
const INITRD_ADDRESS: u64 = 0x218;
const INITRD_SIZE: u64 = 0x21c;
const COMMAND_LINE_ADDRESS: u64 = 0x228;
const MEMORY_MAP: u64 = 0x2d0;
const MEMORY_MAP_ENTRY_SIZE: u64 = 20;
const MEMORY_MAP_LIMIT: u64 = 128;
const MEMORY_MAP_RAM: u32 = 1;

/// A longer command line is cut.
const COMMAND_LINE_LIMIT: usize = 4096;

/// The zero page.
pub struct BootParameters {
    address: u64,
}

impl BootParameters {
    /// # Safety
    /// `address` must be that of the zero page that the VMM wrote; nothing may write to it or to what it
    /// points to as long as this exists.
    pub unsafe fn new(address: u64) -> Self {
        Self { address }
    }

    /// The kernel command line up to its NUL, or nothing if it isn't UTF-8.
    pub fn command_line(&self) -> &str {
        let start = u64::from(self.read32(COMMAND_LINE_ADDRESS)) as *const u8;
        if start.is_null() {
            return "";
        }
        let mut length = 0;
        // SAFETY: the protocol ends the command line by a NUL, and it is below 4 GiB, which is mapped.
        while length < COMMAND_LINE_LIMIT && unsafe { start.add(length).read() } != 0 {
            length += 1;
        }
        // SAFETY: these bytes were just read, and nothing writes to them.
        let bytes = unsafe { slice::from_raw_parts(start, length) };
        str::from_utf8(bytes).unwrap_or("")
    }

    /// The initial RAM disk, empty without one.
    pub fn initrd(&self) -> &[u8] {
        let address = u64::from(self.read32(INITRD_ADDRESS));
        let size = self.read32(INITRD_SIZE) as usize;
        if address == 0 || size == 0 {
            return &[];
        }
        // SAFETY: the VMM put the disk there, below 4 GiB, which is mapped; nothing writes to it.
        unsafe { slice::from_raw_parts(address as *const u8, size) }
    }

    /// The physical address of ACPI's root pointer, 0 if the VMM gives none.
    pub fn acpi_root_pointer(&self) -> u64 {
        u64::from(self.read32(ACPI_RSDP_ADDRESS))
            | u64::from(self.read32(ACPI_RSDP_ADDRESS + 4)) << 32
    }

    /// Bytes of RAM in the memory map.
    pub fn memory_bytes(&self) -> u64 {
        let entries = u64::from(self.read32(MEMORY_MAP_ENTRIES) & 0xff).min(MEMORY_MAP_LIMIT);
        (0..entries)
            .map(|index| MEMORY_MAP + index * MEMORY_MAP_ENTRY_SIZE)
            .filter(|entry| self.read32(entry + 16) == MEMORY_MAP_RAM)
            .map(|entry| {
                u64::from(self.read32(entry + 8)) | u64::from(self.read32(entry + 12)) << 32
            })
            .sum()
    }

    fn read32(&self, offset: u64) -> u32 {
        // SAFETY: all offsets here are inside the page that `new`'s caller vouches for; some of its
        // fields are not aligned.
        unsafe { ((self.address + offset) as *const u32).read_unaligned() }
    }
}
