//! A function's configuration registers (PCI Local Bus 3.0, chapter 6; type 0 header).

use super::BarWindow;

/// Bytes of the conventional configuration space; the extended space reads as zero.
const SIZE: usize = 256;

const VENDOR: usize = 0x00;
const DEVICE: usize = 0x02;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const BAR0: usize = 0x10;
const SUBSYSTEM_VENDOR: usize = 0x2c;
const SUBSYSTEM: usize = 0x2e;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;

const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_INTERRUPT_DISABLE: u16 = 1 << 10;
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// What a function says it is.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// Vendor id, of the subsystem as well.
    pub vendor: u16,
    /// Device id, of the subsystem as well.
    pub device: u16,
    /// Revision id.
    pub revision: u8,
    /// Base class, subclass and programming interface: `0xbbsspp`.
    pub class: u32,
}

/// The registers of one function, each bit either writable or not.
#[derive(Debug)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    next_capability: usize,
    last_pointer: usize,
    bar0_mask: u32,
}

impl ConfigSpace {
    /// Registers without BARs and capabilities.
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            next_capability: FIRST_CAPABILITY,
            last_pointer: CAPABILITIES,
            bar0_mask: 0,
        };
        space.set_u16(VENDOR, identity.vendor);
        space.set_u16(DEVICE, identity.device);
        space.set_u16(SUBSYSTEM_VENDOR, identity.vendor);
        space.set_u16(SUBSYSTEM, identity.device);
        let revision_and_class = u32::from(identity.revision) | (identity.class << 8);
        space.bytes[REVISION..REVISION + 4].copy_from_slice(&revision_and_class.to_le_bytes());
        let command = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTERRUPT_DISABLE;
        space.writable[COMMAND..COMMAND + 2].copy_from_slice(&command.to_le_bytes());
        space
    }

    /// Gives the function a 32-bit, non-prefetchable memory BAR 0 of `size` bytes, a power of two
    /// of at least 16, at `base`.
    pub fn set_bar0(&mut self, base: u32, size: u32) {
        debug_assert!(size.is_power_of_two() && size >= 16 && base.is_multiple_of(size));
        self.bar0_mask = !(size - 1);
        self.bytes[BAR0..BAR0 + 4].copy_from_slice(&base.to_le_bytes());
        self.writable[BAR0..BAR0 + 4].copy_from_slice(&self.bar0_mask.to_le_bytes());
    }

    /// Where BAR 0 is decoded now, if it is.
    pub fn bar0(&self) -> Option<u32> {
        let command = u16::from_le_bytes([self.bytes[COMMAND], self.bytes[COMMAND + 1]]);
        let base = u32::from_le_bytes([
            self.bytes[BAR0],
            self.bytes[BAR0 + 1],
            self.bytes[BAR0 + 2],
            self.bytes[BAR0 + 3],
        ]) & self.bar0_mask;
        // While a guest sizes a BAR its address is all ones.
        let decoded = self.bar0_mask != 0 && command & COMMAND_MEMORY != 0;
        (decoded && base != 0 && base != self.bar0_mask).then_some(base)
    }

    /// All that BAR 0 decodes now.
    pub fn bar0_window(&self) -> Option<BarWindow> {
        Some(BarWindow {
            base: u64::from(self.bar0()?),
            size: u64::from(!self.bar0_mask) + 1,
        })
    }

    /// Appends a capability whose bytes after the header are `body`, with the writable bits of
    /// `writable`; returns its offset, or `None` if it doesn't fit.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Option<u16> {
        let offset = self.next_capability;
        let end = offset + 2 + body.len();
        if end > SIZE {
            return None;
        }
        self.bytes[offset] = id;
        self.bytes[offset + 2..end].copy_from_slice(body);
        let masked = writable.len().min(body.len());
        self.writable[offset + 2..offset + 2 + masked].copy_from_slice(&writable[..masked]);
        let pointer = u8::try_from(offset).ok()?;
        self.bytes[self.last_pointer] = pointer;
        self.last_pointer = offset + 1;
        self.next_capability = end.next_multiple_of(4);
        self.set_u16(STATUS, STATUS_CAPABILITIES);
        Some(u16::from(pointer))
    }

    /// Reads `data.len()` bytes from `offset`; beyond the registers there are zeros.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (byte, index) in data.iter_mut().zip(usize::from(offset)..) {
            *byte = self.bytes.get(index).copied().unwrap_or(0);
        }
    }

    /// Writes the writable bits of `data.len()` bytes from `offset`.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (value, index) in data.iter().zip(usize::from(offset)..) {
            if let (Some(byte), Some(mask)) = (self.bytes.get_mut(index), self.writable.get(index))
            {
                *byte = (*byte & !mask) | (value & mask);
            }
        }
    }

    /// All registers.
    pub const fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The 16-bit register at `offset`.
    pub fn read_u16(&self, offset: u16) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// The 32-bit register at `offset`.
    pub fn read_u32(&self, offset: u16) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn set_u16(&mut self, offset: usize, value: u16) {
        self.bytes[offset..offset + 2].copy_from_slice(&value.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> ConfigSpace {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1041,
            revision: 1,
            class: 0x02_0000,
        };
        let mut space = ConfigSpace::new(identity);
        space.set_bar0(0xc000_0000, 0x8000);
        space.add_capability(9, &[1, 2, 3], &[0, 0xff]).unwrap();
        space
    }

    #[test]
    fn a_bar_is_sized_by_writing_ones() {
        let mut space = sample();
        space.write(0x04, &[0x02, 0]);
        assert_eq!(space.bar0(), Some(0xc000_0000));
        space.write(0x10, &[0xff; 4]);
        assert_eq!(space.read_u32(0x10), 0xffff_8000);
        assert_eq!(space.bar0(), None);
        space.write(0x10, &0xd000_0000u32.to_le_bytes());
        assert_eq!(space.bar0(), Some(0xd000_0000));
        space.write(0x04, &[0, 0]);
        assert_eq!(space.bar0(), None);
    }

    #[test]
    fn capabilities_are_linked_until_they_are_full() {
        let mut space = sample();
        let second = space.add_capability(0x11, &[0; 10], &[]).unwrap();
        assert_eq!(space.read_u16(0x34), 0x40);
        assert_eq!(space.read_u16(0x40), 9 | second << 8);
        assert_eq!(space.add_capability(9, &[0; 250], &[]), None);
    }

    proptest! {
        #[test]
        fn no_access_changes_what_is_read_only(
            writes in prop::collection::vec((0u16..0x1100, prop::collection::vec(any::<u8>(), 1..9)), 0..64)
        ) {
            let mut space = sample();
            let original = space.bytes;
            for (offset, data) in &writes {
                space.write(*offset, data);
                let mut read = vec![0; data.len()];
                space.read(*offset, &mut read);
                if *offset >= 256 {
                    prop_assert!(read.iter().all(|byte| *byte == 0));
                }
            }
            for ((now, before), mask) in space.bytes.iter().zip(original).zip(space.writable) {
                prop_assert_eq!(now & !mask, before & !mask);
            }
        }
    }
}
