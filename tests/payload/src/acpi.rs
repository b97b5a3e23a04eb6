//! The few facts that the payload needs from the ACPI tables (ACPI 6.5): where PCI's configuration space
//! is, how many processors there are, how the machine is powered off and reset, and which interrupt the
//! power button raises. AML isn't interpreted: the `_S5_` package and the event device's interrupt
//! descriptor are found by their encoding.

use crate::error::Error;
use crate::mmio::Window;
use crate::supervisor::{self, Width};
use core::slice;

const TABLE_HEADER: usize = 36;
/// A longer table is taken for a corrupt one.
const TABLE_LIMIT: usize = 1 << 20;

/// The tables, found from the root pointer.
#[derive(Clone, Copy)]
pub struct Tables {
    root: &'static [u8],
}

/// Where bus 0 of PCI's memory-mapped configuration space is.
#[derive(Clone, Copy, Debug)]
pub struct ConfigurationSpace {
    /// The address of its first function's registers.
    pub base: u64,
}

/// An interrupt line as an interrupt descriptor gives it.
#[derive(Clone, Copy, Debug)]
pub struct InterruptLine {
    /// The global system interrupt.
    pub number: u32,
    /// Edge-triggered, not level-triggered.
    pub edge: bool,
}

impl Tables {
    /// Finds the tables from the address of the root pointer, revision 2.
    pub fn find(root_pointer: u64) -> Result<Self, Error> {
        const RSDP_SIZE: usize = 36;
        let missing = Error::AcpiTable(*b"RSD ");
        if root_pointer == 0 || root_pointer >> 32 != 0 {
            return Err(missing);
        }
        // SAFETY: the zero page names this address, which is mapped; ACPI tables don't change.
        let pointer = unsafe { slice::from_raw_parts(root_pointer as *const u8, RSDP_SIZE) };
        if !pointer.starts_with(b"RSD PTR ") || checksum(pointer) != 0 {
            return Err(missing);
        }
        Ok(Self {
            root: table(u64_at(pointer, 24), *b"XSDT")?,
        })
    }

    /// The first segment of PCI's memory-mapped configuration space (PCI Firmware 3.3, 4.1.2).
    pub fn configuration_space(&self) -> Result<ConfigurationSpace, Error> {
        let mcfg = self.table(*b"MCFG")?;
        let entry = mcfg.get(44..60).ok_or(Error::AcpiTable(*b"MCFG"))?;
        Ok(ConfigurationSpace {
            base: u64_at(entry, 0),
        })
    }

    /// Processors that are enabled in the interrupt controller table.
    pub fn processors(&self) -> Result<usize, Error> {
        const LOCAL_APIC: u8 = 0;
        const LOCAL_X2APIC: u8 = 9;
        let mut entries = &self.table(*b"APIC")?[TABLE_HEADER + 8..];
        let mut count = 0;
        while let [kind, length, ..] = *entries {
            let length = usize::from(length);
            if length < 2 || length > entries.len() {
                return Err(Error::AcpiTable(*b"APIC"));
            }
            let enabled = match kind {
                LOCAL_APIC if length >= 8 => entries[4] & 1,
                LOCAL_X2APIC if length >= 12 => entries[8] & 1,
                _ => 0,
            };
            count += usize::from(enabled);
            entries = &entries[length..];
        }
        Ok(count)
    }

    /// Powers the machine off: state S5 through the sleep control register, or PM1a's.
    pub fn power_off(&self) -> Result<(), Error> {
        const PM1A_CONTROL: usize = 64;
        const PM1_SLEEP_ENABLE: u32 = 1 << 13;
        const SLEEP_CONTROL: usize = 244;
        const SLEEP_ENABLE: u8 = 1 << 5;
        let fadt = self.table(*b"FACP")?;
        let kind = self.soft_off_type()?;
        let register = Register::at(fadt, SLEEP_CONTROL);
        if let Some(register) = register.filter(|register| register.address != 0) {
            return register.write8(kind << 2 | SLEEP_ENABLE);
        }
        let port = u32_at(fadt, PM1A_CONTROL);
        let port = u16::try_from(port).ok().filter(|port| *port != 0);
        let port = port.ok_or(Error::AcpiTable(*b"FACP"))?;
        supervisor::port_out(port, u32::from(kind) << 10 | PM1_SLEEP_ENABLE, Width::Word);
        Ok(())
    }

    /// Resets the machine through the reset register.
    pub fn reset(&self) -> Result<(), Error> {
        const FLAGS: usize = 112;
        const RESET_SUPPORTED: u32 = 1 << 10;
        const RESET_REGISTER: usize = 116;
        const RESET_VALUE: usize = 128;
        let fadt = self.table(*b"FACP")?;
        let register = Register::at(fadt, RESET_REGISTER);
        match register {
            Some(register) if u32_at(fadt, FLAGS) & RESET_SUPPORTED != 0 => {
                register.write8(fadt[RESET_VALUE])
            }
            _ => Err(Error::AcpiTable(*b"FACP")),
        }
    }

    /// The generic event device's interrupt, by which a hardware-reduced machine tells of its power
    /// button: the extended interrupt descriptor (6.4.3.6) after the device's `_HID`.
    pub fn event_interrupt(&self) -> Result<InterruptLine, Error> {
        const EXTENDED_INTERRUPT: u8 = 0x89;
        let dsdt = self.dsdt()?;
        let device = find(dsdt, b"ACPI0013").ok_or(Error::AcpiTable(*b"DSDT"))?;
        let descriptor = dsdt[device..]
            .windows(9)
            .find(|bytes| bytes[0] == EXTENDED_INTERRUPT && u16_at(bytes, 1) == 6 && bytes[4] == 1)
            .ok_or(Error::AcpiTable(*b"DSDT"))?;
        Ok(InterruptLine {
            number: u32_at(descriptor, 5),
            edge: descriptor[3] & 0b10 != 0,
        })
    }

    /// The first port of an operation region in the I/O space (20.2.5.2).
    pub fn port_region(&self, name: [u8; 4]) -> Result<u16, Error> {
        const REGION: [u8; 2] = [0x5b, 0x80];
        const SYSTEM_IO: u8 = 1;
        const WORD: u8 = 0x0b;
        let [a, b, c, d] = name;
        let dsdt = self.dsdt()?;
        let start = find(dsdt, &[REGION[0], REGION[1], a, b, c, d, SYSTEM_IO, WORD]);
        let port = start.and_then(|start| dsdt.get(start + 8..start + 10));
        port.map(|port| u16_at(port, 0))
            .ok_or(Error::AcpiTable(*b"DSDT"))
    }

    /// Where the VM generation ID is: the package `ADDR` of the device `VGEN`, low half first.
    pub fn generation_id(&self) -> Result<u64, Error> {
        const PACKAGE: u8 = 0x12;
        const LONG: u8 = 0x0c;
        let missing = Error::AcpiTable(*b"DSDT");
        let dsdt = self.dsdt()?;
        let device = find(dsdt, b"VGEN").ok_or(missing)?;
        let name = find(&dsdt[device..], b"ADDR").ok_or(missing)?;
        match dsdt.get(device + name + 4..device + name + 12) {
            Some(package @ [PACKAGE, _, 2, LONG, ..]) => Ok(u64::from(u32_at(package, 4))),
            _ => Err(missing),
        }
    }

    /// The sleep type of `\_S5`, whose first element is a small integer.
    fn soft_off_type(&self) -> Result<u8, Error> {
        const PACKAGE: u8 = 0x12;
        const BYTE: u8 = 0x0a;
        let dsdt = self.dsdt()?;
        let start = find(dsdt, b"_S5_").ok_or(Error::AcpiTable(*b"DSDT"))? + 4;
        match dsdt.get(start..start + 5) {
            Some([PACKAGE, _, _, BYTE, kind] | [PACKAGE, _, _, kind @ (0 | 1), _]) => Ok(*kind),
            _ => Err(Error::AcpiTable(*b"DSDT")),
        }
    }

    fn dsdt(&self) -> Result<&'static [u8], Error> {
        const DSDT: usize = 40;
        const EXTENDED_DSDT: usize = 140;
        let fadt = self.table(*b"FACP")?;
        let address = match u64_at(fadt, EXTENDED_DSDT) {
            0 => u64::from(u32_at(fadt, DSDT)),
            address => address,
        };
        table(address, *b"DSDT")
    }

    fn table(&self, signature: [u8; 4]) -> Result<&'static [u8], Error> {
        self.root[TABLE_HEADER..]
            .chunks_exact(8)
            .find_map(|entry| table(u64_at(entry, 0), signature).ok())
            .ok_or(Error::AcpiTable(signature))
    }
}

/// A register in the generic address structure (5.2.3.2).
struct Register {
    port: bool,
    address: u64,
}

impl Register {
    fn at(table: &[u8], offset: usize) -> Option<Self> {
        let bytes = table.get(offset..offset + 12)?;
        match bytes[0] {
            0 => Some(Self {
                port: false,
                address: u64_at(bytes, 4),
            }),
            1 => Some(Self {
                port: true,
                address: u64_at(bytes, 4),
            }),
            _ => None,
        }
    }

    fn write8(&self, value: u8) -> Result<(), Error> {
        if self.port {
            let port = u16::try_from(self.address).map_err(|_| Error::AcpiTable(*b"FACP"))?;
            supervisor::port_out(port, u32::from(value), Width::Byte);
            return Ok(());
        }
        crate::address_space::map(self.address, 1)?;
        // SAFETY: the firmware says that a device register is there, and it was just mapped.
        unsafe { Window::new(self.address, 1) }.write8(0, value)
    }
}

/// The table at an address, if it has this signature and its checksum is right.
fn table(address: u64, signature: [u8; 4]) -> Result<&'static [u8], Error> {
    let wrong = Error::AcpiTable(signature);
    if address == 0 || address >> 32 != 0 {
        return Err(wrong);
    }
    let start = address as *const u8;
    // SAFETY: the firmware says that a table is there; the low 4 GiB are mapped.
    let header = unsafe { slice::from_raw_parts(start, TABLE_HEADER) };
    let length = u32_at(header, 4) as usize;
    if !header.starts_with(&signature) || !(TABLE_HEADER + 8..=TABLE_LIMIT).contains(&length) {
        return Err(wrong);
    }
    // SAFETY: as above, and the length is the table's own.
    let bytes = unsafe { slice::from_raw_parts(start, length) };
    if checksum(bytes) == 0 {
        Ok(bytes)
    } else {
        Err(wrong)
    }
}

fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn find(bytes: &[u8], pattern: &[u8]) -> Option<usize> {
    bytes
        .windows(pattern.len())
        .position(|window| window == pattern)
}

fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes([bytes[offset], bytes[offset + 1]])
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from(u16_at(bytes, offset)) | u32::from(u16_at(bytes, offset + 2)) << 16
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from(u32_at(bytes, offset)) | u64::from(u32_at(bytes, offset + 4)) << 32
}
