//! Memory that devices read and write: an arena from which a step takes buffers and which is empty again
//! when the step ends.

use crate::error::Error;
use core::sync::atomic::{AtomicUsize, Ordering};

/// All buffers of a step together.
const ARENA_SIZE: usize = 8 << 20;
const ARENA_ALIGNMENT: usize = 4096;

#[repr(C, align(4096))]
struct Arena([u8; ARENA_SIZE]);

static mut ARENA: Arena = Arena([0; ARENA_SIZE]);
static USED: AtomicUsize = AtomicUsize::new(0);

/// Makes the arena empty again. No device may use a buffer any more: a step's devices are reset when
/// they are dropped, and buffers don't outlive the step.
pub fn release_all() {
    USED.store(0, Ordering::Relaxed);
}

/// A zeroed range of memory that a device may change at any time, hence volatile accesses only.
/// Addresses are physical and virtual ones at once.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    address: usize,
    length: usize,
}

macro_rules! accessors {
    ($read:ident, $write:ident, $type:ty) => {
        #[doc = concat!("Reads a little-endian `", stringify!($type), "` at an aligned offset.")]
        pub fn $read(&self, offset: usize) -> $type {
            let address = self.checked(offset, size_of::<$type>()) as *const $type;
            assert!(address.is_aligned());
            // SAFETY: inside this buffer and aligned, both checked; any bytes are a valid value.
            unsafe { address.read_volatile() }
        }

        #[doc = concat!("Writes a little-endian `", stringify!($type), "` at an aligned offset.")]
        pub fn $write(&self, offset: usize, value: $type) {
            let address = self.checked(offset, size_of::<$type>()) as *mut $type;
            assert!(address.is_aligned());
            // SAFETY: inside this buffer and aligned, both checked; no reference to it exists.
            unsafe { address.write_volatile(value) }
        }
    };
}

impl Buffer {
    /// Takes `length` zeroed bytes from the arena, aligned to `alignment`, a power of two up to 4096.
    pub fn allocate(length: usize, alignment: usize) -> Result<Self, Error> {
        let alignment = alignment.clamp(1, ARENA_ALIGNMENT);
        let start = USED.load(Ordering::Relaxed).next_multiple_of(alignment);
        let end = start.checked_add(length).filter(|end| *end <= ARENA_SIZE);
        let end = end.ok_or(Error::NoMemory { size: length })?;
        USED.store(end, Ordering::Relaxed);
        let address = (&raw mut ARENA).cast::<u8>().wrapping_add(start);
        // SAFETY: inside the arena, and handed out only once until the arena is released.
        unsafe { address.write_bytes(0, length) };
        Ok(Self {
            address: address as usize,
            length,
        })
    }

    /// Its physical address.
    pub fn address(&self) -> u64 {
        self.address as u64
    }

    /// The part from `offset` on, `length` bytes.
    pub fn slice(&self, offset: usize, length: usize) -> Self {
        Self {
            address: self.checked(offset, length),
            length,
        }
    }

    accessors!(read8, write8, u8);
    accessors!(read16, write16, u16);
    accessors!(read32, write32, u32);
    accessors!(read64, write64, u64);

    /// Copies bytes in.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        let address = self.checked(offset, bytes.len()) as *mut u8;
        // SAFETY: inside this buffer, and no reference to it exists.
        unsafe { address.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// Copies bytes out.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        let address = self.checked(offset, bytes.len()) as *const u8;
        // SAFETY: inside this buffer; `bytes` can't overlap it, as no reference to a buffer exists.
        unsafe { address.copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
    }

    /// An offset outside of the buffer is a defect of this program, not something a device can cause.
    fn checked(&self, offset: usize, size: usize) -> usize {
        let inside = offset
            .checked_add(size)
            .is_some_and(|end| end <= self.length);
        assert!(
            inside,
            "{size} bytes at {offset} of a buffer of {}",
            self.length
        );
        self.address + offset
    }
}
