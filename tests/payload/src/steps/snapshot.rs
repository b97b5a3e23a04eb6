//! Steps that are snapshotted in their middle.

use super::Machine;
use super::block::mix;
use super::machine::{MASKED, line_waits, next_line, route};
use crate::arguments::Arguments;
use crate::clock::Deadline;
use crate::console::say;
use crate::error::Error;
use crate::interrupts::Vector;
use crate::mmio::Window;
use crate::virtio::device::wait_for;

/// Above this program and its buffers.
const START: u64 = 32 << 20;
const PAGE: u64 = 4096;
/// Of the pages, every so manieth is written anew in each round.
const CHANGED: u64 = 16;

/// Fills memory with a pattern; for each line `next` on the console checks all of it and changes some
/// pages, and at a line `done` ends.
pub fn remember(arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&["mib", "ms"])?;
    let pages = arguments.ranged("mib", 16, 1, 1024)? << 20 >> 12;
    let deadline = Deadline::after_milliseconds(arguments.number("ms", 600_000)?);
    // SAFETY: memory that nothing else of this program uses; it is in the low 4 GiB, which are mapped.
    let memory = unsafe { Window::new(START, pages * PAGE) };
    let mut round = 0;
    for page in 0..pages {
        fill(&memory, page, round)?;
    }
    say!("remember ready");
    let mut line = [0; 64];
    loop {
        let command = next_line(&mut line, deadline)?;
        for page in 0..pages {
            check(&memory, page, if page % CHANGED == 0 { round } else { 0 })?;
        }
        if command == "done" {
            break;
        }
        round += 1;
        for page in (0..pages).step_by(CHANGED as usize) {
            fill(&memory, page, round)?;
        }
        say!("remember round={round}");
    }
    say!("remember ok rounds={round}");
    Ok(())
}

/// Writes each page anew, sweep for sweep, after it has checked that the sweep before is there, until a
/// line comes on the console: what of the guest's memory isn't moved with it is found missing.
pub fn scribble(arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&["mib", "ms"])?;
    let pages = arguments.ranged("mib", 8, 1, 1024)? << 20 >> 12;
    let deadline = Deadline::after_milliseconds(arguments.number("ms", 600_000)?);
    // SAFETY: memory that nothing else of this program uses; it is in the low 4 GiB, which are mapped.
    let memory = unsafe { Window::new(START, pages * PAGE) };
    for page in 0..pages {
        memory.write64(page * PAGE, mix(page))?;
    }
    say!("scribble ready");
    let mut sweep = 0;
    while !line_waits() {
        if deadline.passed() {
            return Err(Error::Timeout("line that ends the scribbling"));
        }
        for page in 0..pages {
            let found = memory.read64(page * PAGE)?;
            if found != mix(page) + sweep {
                return Err(Error::Unexpected {
                    what: "scribbled word",
                    value: page * PAGE,
                });
            }
            memory.write64(page * PAGE, found + 1)?;
        }
        sweep += 1;
        if sweep % 64 == 0 {
            say!("scribble sweep={sweep}");
        }
    }
    next_line(&mut [0; 64], deadline)?;
    say!("scribble ok sweeps={sweep}");
    Ok(())
}

/// Waits until the VM generation ID is another one, and this is told.
pub fn wait_generation(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&["ms"])?;
    let deadline = Deadline::after_milliseconds(arguments.number("ms", 600_000)?);
    let tables = machine.tables()?;
    let address = tables.generation_id()?;
    // SAFETY: the firmware says that the identifier is there, in the low 4 GiB, which are mapped.
    let window = unsafe { Window::new(address, 16) };
    let read = || Ok((window.read64(0)?, window.read64(8)?));
    let old = read()?;
    let line = tables.event_interrupt()?;
    let vector = Vector::allocate()?;
    route(line, u64::from(vector.number()))?;
    say!("wait-generation ready id={:016x}{:016x}", old.0, old.1);
    let new = wait_for(deadline, "new generation ID", || {
        let now = read()?;
        Ok((vector.count() > 0 && now != old).then_some(now))
    })?;
    route(line, MASKED)?;
    say!("wait-generation ok id={:016x}{:016x}", new.0, new.1);
    Ok(())
}

fn fill(memory: &Window, page: u64, round: u64) -> Result<(), Error> {
    for word in 0..PAGE / 8 {
        memory.write64(page * PAGE + word * 8, pattern(page, word, round))?;
    }
    Ok(())
}

fn check(memory: &Window, page: u64, round: u64) -> Result<(), Error> {
    for word in 0..PAGE / 8 {
        let found = memory.read64(page * PAGE + word * 8)?;
        if found != pattern(page, word, round) {
            return Err(Error::Unexpected {
                what: "remembered word",
                value: page * PAGE + word * 8,
            });
        }
    }
    Ok(())
}

fn pattern(page: u64, word: u64, round: u64) -> u64 {
    mix(page << 32 | word << 16 | round)
}
