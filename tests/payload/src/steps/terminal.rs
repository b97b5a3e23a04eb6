//! Steps on a virtio console.

use super::Machine;
use crate::arguments::Arguments;
use crate::clock::Deadline;
use crate::console::say;
use crate::error::Error;
use crate::virtio::device::wait_for;
use crate::virtio::queue::Descriptor;
use crate::virtio::terminal::{INPUT, KIND, OUTPUT, Terminal};

/// What is printed for a line that was typed.
const ECHO: &[u8] = b"hvc: typed ";
const LINE: usize = 128;

/// Prints what is typed, line by line, and says when the terminal's size changes; ends with the line
/// `end`.
pub fn echo(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&["ms"])?;
    let deadline = Deadline::after_milliseconds(arguments.number("ms", 600_000)?);
    let mut terminal = open(machine)?;
    terminal.emergency_write(b"hvc: emergency\n")?;
    terminal.print(b"hvc: printed\n")?;
    let (columns, rows) = terminal.size()?;
    say!("hvc-echo ready columns={columns} rows={rows}");
    let mut changes = terminal.changes();
    let mut line = [0; LINE];
    let mut length = 0;
    loop {
        let mut input = [0; INPUT];
        let came = wait_for(deadline, "line", || {
            if terminal.changes() != changes {
                return Ok(Some(0));
            }
            terminal.take_input(&mut input)
        })?;
        if terminal.changes() != changes {
            changes = terminal.changes();
            let (columns, rows) = terminal.size()?;
            say!("hvc-echo size columns={columns} rows={rows}");
        }
        for byte in &input[..came] {
            let place = line.get_mut(length).ok_or(Error::QueueFull)?;
            *place = *byte;
            length += 1;
            if *byte == b'\n' {
                let mut printed = [0; ECHO.len() + LINE];
                printed[..ECHO.len()].copy_from_slice(ECHO);
                printed[ECHO.len()..][..length].copy_from_slice(&line[..length]);
                terminal.print(&printed[..ECHO.len() + length])?;
                if &line[..length] == b"end\n" {
                    say!("hvc-echo ok");
                    return Ok(());
                }
                length = 0;
            }
        }
    }
}

/// Prints so many buffers of 64 KiB, all that the queue holds with each notification; says so when
/// something has been typed, since before there may be no room for it.
pub fn flood(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&["buffers", "ms"])?;
    let deadline = Deadline::after_milliseconds(arguments.number("ms", 60_000)?);
    let mut left = arguments.number("buffers", 256)?;
    let mut terminal = open(machine)?;
    let sending = *terminal.sending();
    for offset in (0..OUTPUT).step_by(8) {
        sending.write64(offset, u64::from_le_bytes(*b"flooded\n"));
    }
    let buffer = Descriptor::readable(sending.address(), OUTPUT as u32);
    let (all, mut bytes) = ([buffer; 16], 0);
    while left > 0 {
        let count = left.min(16);
        terminal.send(&all[..count as usize])?;
        left -= count;
        bytes += count * OUTPUT as u64;
    }
    let mut input = [0; INPUT];
    wait_for(deadline, "input", || terminal.take_input(&mut input))?;
    say!("hvc-flood ok bytes={bytes}");
    Ok(())
}

/// Buffers that no driver gives, and then a broken ring, after which the device has to be reset.
pub fn hostile(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    const NEEDS_RESET: u8 = 0x40;
    const STATUS: u64 = 0x14;
    arguments.allow(&[])?;
    let mut terminal = open(machine)?;
    let at = terminal.sending().address();
    terminal.send(&[
        Descriptor::readable(1 << 40, 64),
        Descriptor::readable(u64::MAX - 15, 64),
        Descriptor::readable(at, u32::MAX),
        Descriptor::readable(at, 0),
        Descriptor::writable(at, 64),
    ])?;
    // More heads than the queue has.
    terminal.transmit.available().write16(2, 0x7000);
    terminal.transmit.notify_always()?;
    let status = terminal.device.common().read8(STATUS)?;
    if status & NEEDS_RESET == 0 {
        return Err(Error::Unexpected {
            what: "device status",
            value: u64::from(status),
        });
    }
    drop(terminal);
    open(machine)?.print(b"hvc: works again\n")?;
    say!("hvc-hostile ok");
    Ok(())
}

fn open(machine: &Machine<'_>) -> Result<Terminal, Error> {
    Terminal::open(machine.device(KIND, 0)?)
}
