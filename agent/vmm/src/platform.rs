//! The guest's I/O and memory map: sends each vCPU exit to its device.

use std::sync::{Arc, Mutex, PoisonError};

use crate::boot::layout;
use crate::devices::hotplug::HotplugRegisters;
use crate::devices::legacy::Clock;
use crate::devices::power::Power;
use crate::devices::serial::SerialPort;
use crate::pci::PciBus;
use crate::vcpu::{ExitHandler, VcpuEnd};

const PORT_COM1_LAST: u16 = layout::PORT_COM1 + 7;
const PORT_KEYBOARD_COMMAND: u16 = 0x64;
const PORT_CLOCK_INDEX: u16 = 0x70;
const PORT_CLOCK_DATA: u16 = 0x71;
const PORT_PCI_FIRST: u16 = 0xcf8;
const PORT_PCI_LAST: u16 = 0xcff;
const ECAM_END: u64 = layout::ECAM + layout::ECAM_SIZE;

/// Where the slots go that a guest has let go of.
pub type EjectReporter = Arc<dyn Fn(u8) + Send + Sync>;

/// All devices of one boot of the guest.
pub struct Platform {
    /// COM1.
    pub serial: SerialPort,
    /// Power button, soft-off and resets.
    pub power: Power,
    /// The PCI bus.
    pub pci: PciBus,
    /// The CMOS clock.
    pub clock: Mutex<Clock>,
    /// The registers of PCI hot plug.
    pub hotplug: HotplugRegisters,
    /// Is told of each slot that the guest has let go of, and that is empty now.
    pub ejected: EjectReporter,
}

impl Platform {
    fn read_byte(&self, port: u16) -> u8 {
        match port {
            layout::PORT_COM1..=PORT_COM1_LAST => {
                self.serial.read(low_byte(port - layout::PORT_COM1))
            }
            PORT_CLOCK_DATA => self
                .clock
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .read(),
            layout::PORT_SLEEP_CONTROL | layout::PORT_SLEEP_STATUS => 0,
            layout::PORT_EVENTS => self.power.take_events(),
            // All ones: nothing is there. At port 0x64 that means "no controller".
            _ => 0xff,
        }
    }

    fn write_byte(&self, port: u16, value: u8) -> Option<VcpuEnd> {
        match port {
            layout::PORT_COM1..=PORT_COM1_LAST => {
                self.serial.write(low_byte(port - layout::PORT_COM1), value);
                None
            }
            PORT_CLOCK_INDEX => {
                self.clock
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .select(value);
                None
            }
            PORT_KEYBOARD_COMMAND => Power::keyboard_command(value),
            layout::PORT_SLEEP_CONTROL => Power::sleep(value),
            layout::PORT_RESET => Power::reset_control(value),
            _ => None,
        }
    }
}

impl ExitHandler for Platform {
    fn io_read(&self, port: u16, data: &mut [u8]) {
        if (PORT_PCI_FIRST..=PORT_PCI_LAST).contains(&port) {
            return self.pci.port_read(port - PORT_PCI_FIRST, data);
        }
        if HotplugRegisters::covers(port) {
            return self.hotplug.read(port, data);
        }
        // A device of bytes: the other bytes of a wider access are nobody's. String input comes
        // as one exit of many bytes, all from the same port.
        let byte_port = (layout::PORT_COM1..=PORT_COM1_LAST).contains(&port);
        match data {
            [byte] => *byte = self.read_byte(port),
            bytes if byte_port => bytes
                .iter_mut()
                .for_each(|byte| *byte = self.read_byte(port)),
            bytes => bytes.fill(0xff),
        }
    }

    fn io_write(&self, port: u16, data: &[u8]) -> Option<VcpuEnd> {
        let reset = port == layout::PORT_RESET && data.len() == 1;
        if (PORT_PCI_FIRST..=PORT_PCI_LAST).contains(&port) && !reset {
            self.pci.port_write(port - PORT_PCI_FIRST, data);
            return None;
        }
        if HotplugRegisters::covers(port) {
            for slot in self.hotplug.write(port, data) {
                self.pci.remove(slot.into());
                (self.ejected)(slot);
            }
            return None;
        }
        data.iter().find_map(|byte| self.write_byte(port, *byte))
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match address {
            layout::ECAM..ECAM_END => self.pci.ecam_read(address - layout::ECAM, data),
            _ => self.pci.memory_read(address, data),
        }
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        match address {
            layout::ECAM..ECAM_END => self.pci.ecam_write(address - layout::ECAM, data),
            _ => self.pci.memory_write(address, data),
        }
    }
}

fn low_byte(offset: u16) -> u8 {
    (offset & 0xff) as u8
}
