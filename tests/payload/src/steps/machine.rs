//! Steps that need no virtio device.

use super::Machine;
use crate::acpi::InterruptLine;
use crate::arguments::Arguments;
use crate::clock::{self, Deadline};
use crate::console::say;
use crate::error::Error;
use crate::interrupts::{self, Vector};
use crate::mmio::Window;
use crate::supervisor::{self, Width};
use crate::virtio::device::wait_for;

pub fn hello(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&[])?;
    let memory = machine.boot.memory_bytes();
    say!(
        "hello ok memory={memory} us={}",
        clock::nanoseconds(clock::since_start()) / 1000
    );
    Ok(())
}

pub fn processors(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&[])?;
    say!("cpus ok count={}", machine.tables()?.processors()?);
    Ok(())
}

pub fn functions(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&[])?;
    let mut count = 0;
    for function in machine.functions()? {
        let (vendor, device) = function.identity()?;
        say!(
            "pci function slot={} vendor={vendor:#06x} device={device:#06x}",
            function.slot()
        );
        count += 1;
    }
    say!("pci ok functions={count}");
    Ok(())
}

pub fn initrd(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
    const FNV_PRIME: u64 = 0x0100_0000_01b3;
    arguments.allow(&[])?;
    let initrd = machine.boot.initrd();
    let hash = initrd.iter().fold(FNV_OFFSET, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(FNV_PRIME)
    });
    say!("initrd ok bytes={} fnv1a={hash:016x}", initrd.len());
    Ok(())
}

pub fn idle(arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&["ms"])?;
    let deadline = Deadline::after_milliseconds(arguments.number("ms", 100)?);
    while !deadline.passed() {
        deadline.wait(interrupts::total())?;
    }
    say!("idle ok interrupts={}", interrupts::total());
    Ok(())
}

pub fn busy(arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&["ms"])?;
    let deadline = Deadline::after_milliseconds(arguments.number("ms", 100)?);
    let mut rounds = 0_u64;
    while !deadline.passed() {
        rounds += 1;
    }
    say!("busy ok rounds={rounds}");
    Ok(())
}

/// Reads a port that nothing answers, so often, and says how long that takes.
pub fn exits(arguments: &Arguments<'_>) -> Result<(), Error> {
    const NOBODYS: u16 = 0x80;
    arguments.allow(&["count"])?;
    let count = arguments.number("count", 10_000)?;
    let start = clock::time_stamp();
    for _ in 0..count {
        supervisor::port_in(NOBODYS, Width::Byte);
    }
    let us = clock::nanoseconds(clock::time_stamp() - start) / 1000;
    say!("exits ok count={count} us={us}");
    Ok(())
}

pub fn hang(arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&[])?;
    say!("hang ok");
    supervisor::stop()
}

/// Many numbered lines, to see what becomes of them.
pub fn lines(arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&["count"])?;
    let count = arguments.number("count", 1000)?;
    for number in 0..count {
        say!("lines number={number:08}");
    }
    say!("lines ok count={count}");
    Ok(())
}

/// Reads a line from COM1, as a driver that polls the line status, and says it.
pub fn read_line(arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&["ms"])?;
    let deadline = Deadline::after_milliseconds(arguments.number("ms", 10_000)?);
    let mut line = [0; 64];
    say!("console-read ready");
    say!("console-read ok line={}", next_line(&mut line, deadline)?);
    Ok(())
}

/// Whether something has come on COM1.
pub fn line_waits() -> bool {
    const LINE_STATUS: u16 = 0x3fd;
    const DATA_READY: u32 = 1;
    supervisor::port_in(LINE_STATUS, Width::Byte) & DATA_READY != 0
}

/// Reads a line from COM1 into `line`, polling; a longer one is cut.
pub fn next_line(line: &mut [u8; 64], deadline: Deadline) -> Result<&str, Error> {
    const DATA: u16 = 0x3f8;
    let mut length = 0;
    while length < line.len() {
        if line_waits() {
            let byte = supervisor::port_in(DATA, Width::Byte) as u8;
            if byte == b'\n' {
                break;
            }
            line[length] = byte;
            length += 1;
        } else if deadline.passed() {
            return Err(Error::Timeout("line on the console"));
        }
    }
    Ok(str::from_utf8(&line[..length]).unwrap_or("?"))
}

pub fn power_off(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&[])?;
    machine.tables()?.power_off()?;
    supervisor::stop()
}

pub fn reboot(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&[])?;
    say!("reboot ok");
    machine.tables()?.reset()?;
    supervisor::stop()
}

pub fn triple_fault(arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&[])?;
    say!("triple-fault ok");
    supervisor::triple_fault()
}

/// The interrupt alone says enough: the button is the only event that the machine has.
pub fn wait_for_power_button(
    machine: &Machine<'_>,
    arguments: &Arguments<'_>,
) -> Result<(), Error> {
    arguments.allow(&["ms"])?;
    let milliseconds = arguments.number("ms", 10_000)?;
    let line = machine.tables()?.event_interrupt()?;
    let vector = Vector::allocate()?;
    route(line, u64::from(vector.number()))?;
    say!("wait-power-button ready line={}", line.number);
    let deadline = Deadline::after_milliseconds(milliseconds);
    let events = machine.tables()?.port_region(*b"EVRG");
    wait_for(deadline, "power button", || {
        // Of another VMM's event device only the interrupt is known.
        let pressed = vector.count() > 0
            && events.map_or(true, |port| {
                supervisor::port_in(port, Width::Byte) & POWER_BUTTON != 0
            });
        Ok(pressed.then_some(()))
    })?;
    route(line, MASKED)?;
    say!("wait-power-button ok");
    Ok(())
}

/// The event device's bit for it.
const POWER_BUTTON: u32 = 1;

/// Held back.
pub const MASKED: u64 = 1 << 16;

/// Sends an interrupt line to a vector of this processor (82093AA, 3.2.4).
pub fn route(line: InterruptLine, entry: u64) -> Result<(), Error> {
    const IO_APIC: u64 = 0xfec0_0000;
    const SELECT: u64 = 0x00;
    const WINDOW: u64 = 0x10;
    const FIRST_ENTRY: u32 = 0x10;
    const LEVEL: u64 = 1 << 15;
    let trigger = if line.edge { 0 } else { LEVEL };
    let entry = entry | trigger;
    // SAFETY: the I/O APIC's registers, in the low 4 GiB, which are mapped.
    let registers = unsafe { Window::new(IO_APIC, 0x20) };
    let index = FIRST_ENTRY + 2 * line.number;
    registers.write32(SELECT, index + 1)?;
    registers.write32(WINDOW, (entry >> 32) as u32)?;
    registers.write32(SELECT, index)?;
    registers.write32(WINDOW, (entry & 0xffff_ffff) as u32)
}
