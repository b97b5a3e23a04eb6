//! PCI Express configuration space, memory-mapped, and MSI-X (PCI Express 6.0, 7.5 and 7.7.2).

use crate::acpi::ConfigurationSpace;
use crate::address_space;
use crate::error::Error;
use crate::interrupts::{self, Vector};
use crate::mmio::Window;

const FUNCTION_SPACE: u64 = 4096;
const SLOTS: u64 = 32;
const NO_VENDOR: u16 = 0xffff;

const VENDOR: u64 = 0x00;
const DEVICE: u64 = 0x02;
const COMMAND: u64 = 0x04;
const STATUS: u64 = 0x06;
const FIRST_BAR: u64 = 0x10;
const CAPABILITIES: u64 = 0x34;

const MEMORY_SPACE: u16 = 1 << 1;
const BUS_MASTER: u16 = 1 << 2;
const CAPABILITY_LIST: u16 = 1 << 4;
/// A longer list of capabilities is a loop.
const CAPABILITY_LIMIT: usize = 48;
const MSI_X: u8 = 0x11;

/// One function of the bus.
#[derive(Clone, Copy, Debug)]
pub struct Function {
    configuration: Window,
    slot: u8,
}

/// The functions of bus 0, each device's first.
pub fn functions(space: ConfigurationSpace) -> Result<impl Iterator<Item = Function>, Error> {
    // One bus is enough: the VMMs in question have no bridges.
    address_space::map(space.base, SLOTS * 8 * FUNCTION_SPACE)?;
    Ok((0..SLOTS).filter_map(move |slot| {
        let address = space.base + slot * 8 * FUNCTION_SPACE;
        // SAFETY: just mapped, and ACPI says that configuration space is there.
        let configuration = unsafe { Window::new(address, FUNCTION_SPACE) };
        let present = configuration
            .read16(VENDOR)
            .is_ok_and(|vendor| vendor != NO_VENDOR);
        present.then_some(Function {
            configuration,
            slot: slot as u8,
        })
    }))
}

impl Function {
    /// Its slot on the bus.
    pub fn slot(&self) -> u8 {
        self.slot
    }

    /// Its vendor and device identifiers.
    pub fn identity(&self) -> Result<(u16, u16), Error> {
        Ok((
            self.configuration.read16(VENDOR)?,
            self.configuration.read16(DEVICE)?,
        ))
    }

    /// Its configuration space.
    pub fn configuration(&self) -> &Window {
        &self.configuration
    }

    /// Lets it answer at its BARs and access memory.
    pub fn enable(&self) -> Result<(), Error> {
        let command = self.configuration.read16(COMMAND)?;
        self.configuration
            .write16(COMMAND, command | MEMORY_SPACE | BUS_MASTER)
    }

    /// Offsets of the capabilities with this identifier, in order.
    pub fn capabilities(&self, identifier: u8) -> impl Iterator<Item = u64> {
        let configuration = self.configuration;
        let has_list = configuration
            .read16(STATUS)
            .is_ok_and(|status| status & CAPABILITY_LIST != 0);
        let first = if has_list {
            configuration.read8(CAPABILITIES).unwrap_or(0)
        } else {
            0
        };
        let next = move |offset: &u8| configuration.read8(u64::from(*offset) + 1).ok();
        core::iter::successors(Some(first), next)
            .take_while(|offset| *offset != 0)
            .take(CAPABILITY_LIMIT)
            .map(u64::from)
            .filter(move |offset| {
                configuration
                    .read8(*offset)
                    .is_ok_and(|id| id == identifier)
            })
    }

    /// `length` bytes at `offset` of a memory BAR, mapped.
    pub fn window(&self, bar: u8, offset: u64, length: u64) -> Result<Window, Error> {
        const MEMORY_64: u32 = 0b100;
        let register = FIRST_BAR + 4 * u64::from(bar);
        if bar > 5 {
            return Err(Error::Unexpected {
                what: "BAR number",
                value: u64::from(bar),
            });
        }
        let low = self.configuration.read32(register)?;
        let high = match low & 0b111 {
            MEMORY_64 if bar < 5 => self.configuration.read32(register + 4)?,
            0 => 0,
            _ => {
                return Err(Error::Unexpected {
                    what: "BAR",
                    value: u64::from(low),
                });
            }
        };
        let base = u64::from(high) << 32 | u64::from(low & !0xf);
        let start = base.checked_add(offset).filter(|_| base != 0);
        let start = start.ok_or(Error::Unexpected {
            what: "BAR address",
            value: base,
        })?;
        address_space::map(start, length)?;
        // SAFETY: just mapped, and the BAR says that this function's registers are there.
        Ok(unsafe { Window::new(start, length) })
    }

    /// Its MSI-X table, switched on with every entry masked.
    pub fn message_interrupts(&self) -> Result<MessageInterrupts, Error> {
        const ENABLE: u16 = 1 << 15;
        const FUNCTION_MASK: u16 = 1 << 14;
        let offset = self
            .capabilities(MSI_X)
            .next()
            .ok_or(Error::NoCapability("MSI-X"))?;
        let control = self.configuration.read16(offset + 2)?;
        let location = self.configuration.read32(offset + 4)?;
        let entries = (control & 0x7ff) + 1;
        let bar = (location & 0b111) as u8;
        let start = u64::from(location & !0b111);
        let table = self.window(
            bar,
            start,
            u64::from(entries) * MessageInterrupts::ENTRY_SIZE,
        )?;
        let interrupts = MessageInterrupts { table, entries };
        for entry in 0..entries {
            interrupts.mask(entry)?;
        }
        self.configuration
            .write16(offset + 2, (control | ENABLE) & !FUNCTION_MASK)?;
        Ok(interrupts)
    }
}

/// A function's MSI-X table.
#[derive(Clone, Copy, Debug)]
pub struct MessageInterrupts {
    table: Window,
    entries: u16,
}

impl MessageInterrupts {
    const ENTRY_SIZE: u64 = 16;
    const VECTOR_CONTROL: u64 = 12;
    const MASKED: u32 = 1;

    /// How many entries it has.
    pub fn entries(&self) -> u16 {
        self.entries
    }

    /// Makes an entry raise a vector on this processor.
    pub fn route(&self, entry: u16, vector: Vector) -> Result<(), Error> {
        let offset = u64::from(entry) * Self::ENTRY_SIZE;
        let address = interrupts::message_address()?;
        self.table.write32(offset, (address & 0xffff_ffff) as u32)?;
        self.table.write32(offset + 4, (address >> 32) as u32)?;
        self.table.write32(offset + 8, u32::from(vector.number()))?;
        self.table.write32(offset + Self::VECTOR_CONTROL, 0)
    }

    /// Holds an entry's interrupts back.
    pub fn mask(&self, entry: u16) -> Result<(), Error> {
        let offset = u64::from(entry) * Self::ENTRY_SIZE;
        self.table
            .write32(offset + Self::VECTOR_CONTROL, Self::MASKED)
    }
}
