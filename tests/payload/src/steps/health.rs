//! Steps on the devices that tell how the guest's kernel is: panic device and watchdog.

use super::Machine;
use crate::arguments::Arguments;
use crate::clock::Deadline;
use crate::console::say;
use crate::error::Error;
use crate::interrupts;
use crate::pci::Function;

/// Tells the panic device (QEMU, docs/specs/pvpanic.rst) of a panic.
pub fn panic(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    const PANICKED: u8 = 1;
    arguments.allow(&["times"])?;
    let function = find(machine, (0x1b36, 0x0011))?;
    let register = function.window(0, 0, 1)?;
    let events = register.read8(0)?;
    for _ in 0..arguments.number("times", 1)? {
        register.write8(0, PANICKED)?;
    }
    say!("panic ok events={events:#x}");
    Ok(())
}

/// Starts the watchdog (Intel 6300ESB) for about `ms` milliseconds, feeds it `feeds` times, then no
/// more.
pub fn watchdog(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    const CONFIG: u64 = 0x60;
    const LOCK: u64 = 0x68;
    const ENABLED: u8 = 2;
    const RELOAD: u64 = 0x0c;
    const BEGIN: u16 = 1 << 8;
    const ENDED: u16 = 1 << 9;
    arguments.allow(&["ms", "feeds"])?;
    let preload = arguments.ranged("ms", 1000, 2, 600_000)? as u32 / 2;
    let function = find(machine, (0x8086, 0x25ab))?;
    let registers = function.window(0, 0, 0x10)?;
    let unlock = || {
        registers.write16(RELOAD, 0x80)?;
        registers.write16(RELOAD, 0x86)
    };
    let configuration = function.configuration();
    configuration.write16(CONFIG, 3)?;
    for timer in [0, 4] {
        unlock()?;
        registers.write32(timer, preload)?;
    }
    unlock()?;
    registers.write16(RELOAD, BEGIN | ENDED)?;
    configuration.write8(LOCK, ENABLED)?;
    say!("watchdog ready");
    for _ in 0..arguments.number("feeds", 0)? {
        let half = Deadline::after_milliseconds(u64::from(preload));
        while !half.passed() {
            half.wait(interrupts::total())?;
        }
        unlock()?;
        registers.write16(RELOAD, BEGIN)?;
    }
    say!("watchdog starves");
    Ok(())
}

fn find(machine: &Machine<'_>, identity: (u16, u16)) -> Result<Function, Error> {
    for function in machine.functions()? {
        if function.identity()? == identity {
            function.enable()?;
            return Ok(function);
        }
    }
    Err(Error::NoDevice {
        kind: identity.1,
        index: 0,
    })
}
