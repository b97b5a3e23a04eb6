//! Device registers. Every access is one plain integer `mov`: a KVM that emulates the access knows no
//! SSE move, which the compiler could choose for an ordinary volatile access.

use crate::error::Error;
use core::arch::asm;

/// A range of device registers, mapped one to one. Accesses outside it are refused.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    base: u64,
    length: u64,
}

macro_rules! accessors {
    ($read:ident, $write:ident, $type:ty, $load:literal, $store:literal, $class:ident) => {
        #[doc = concat!("Reads a `", stringify!($type), "` at a byte offset.")]
        pub fn $read(&self, offset: u64) -> Result<$type, Error> {
            let address = self.address(offset, size_of::<$type>() as u64)?;
            let value: $type;
            // SAFETY: inside the window, which `new`'s caller vouches for.
            unsafe {
                asm!($load, value = out($class) value, address = in(reg) address,
                     options(nostack, preserves_flags));
            }
            Ok(value)
        }

        #[doc = concat!("Writes a `", stringify!($type), "` at a byte offset.")]
        pub fn $write(&self, offset: u64, value: $type) -> Result<(), Error> {
            let address = self.address(offset, size_of::<$type>() as u64)?;
            // SAFETY: inside the window, which `new`'s caller vouches for.
            unsafe {
                asm!($store, value = in($class) value, address = in(reg) address,
                     options(nostack, preserves_flags));
            }
            Ok(())
        }
    };
}

impl Window {
    /// # Safety
    /// `base` must be mapped (see [`crate::address_space::map`]) for `length` bytes, and hold device
    /// registers or memory that this program doesn't use otherwise.
    pub const unsafe fn new(base: u64, length: u64) -> Self {
        Self { base, length }
    }

    /// The number of bytes.
    pub const fn length(&self) -> u64 {
        self.length
    }

    /// The part of this window from `offset` on, `length` bytes.
    pub fn slice(&self, offset: u64, length: u64) -> Result<Self, Error> {
        let base = self.address(offset, length)?;
        Ok(Self { base, length })
    }

    accessors!(
        read8,
        write8,
        u8,
        "mov {value}, byte ptr [{address}]",
        "mov byte ptr [{address}], {value}",
        reg_byte
    );
    accessors!(
        read16,
        write16,
        u16,
        "mov {value:x}, word ptr [{address}]",
        "mov word ptr [{address}], {value:x}",
        reg
    );
    accessors!(
        read32,
        write32,
        u32,
        "mov {value:e}, dword ptr [{address}]",
        "mov dword ptr [{address}], {value:e}",
        reg
    );
    accessors!(
        read64,
        write64,
        u64,
        "mov {value}, qword ptr [{address}]",
        "mov qword ptr [{address}], {value}",
        reg
    );

    fn address(&self, offset: u64, size: u64) -> Result<u64, Error> {
        match offset.checked_add(size) {
            Some(end) if end <= self.length => Ok(self.base + offset),
            _ => Err(Error::OutsideWindow {
                offset,
                size,
                length: self.length,
            }),
        }
    }
}
