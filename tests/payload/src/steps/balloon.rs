//! A step on a memory balloon (Virtio 1.3, 5.5).

use super::Machine;
use crate::arguments::Arguments;
use crate::clock::Deadline;
use crate::console::say;
use crate::error::Error;
use crate::interrupts::Vector;
use crate::memory::Buffer;
use crate::mmio::Window;
use crate::virtio::FEATURE_EVENT_INDEX;
use crate::virtio::device::{Device, wait_for};
use crate::virtio::queue::{Descriptor, Queue};

const KIND: u16 = 5;
const FEATURE_STATISTICS: u64 = 1 << 1;
const FEATURE_REPORTING: u64 = 1 << 5;
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const STATISTICS: u16 = 2;

/// Registers: the pages wanted, and those given.
const WANTED: u64 = 0;
const ACTUAL: u64 = 4;

/// Above this program and its buffers: what is reported, and behind it what is given.
const START: u64 = 32 << 20;
const REPORTED: u64 = 4 << 20;
const PAGE: u64 = 4096;
/// Numbers that one list has room for.
const LISTED: usize = 4096;
const MILLISECONDS: u64 = 20_000;

struct Balloon {
    device: Device,
    inflate: Queue,
    deflate: Queue,
    statistics: Queue,
    reporting: Queue,
    list: Buffer,
    counts: Buffer,
    changes: Vector,
    asked: u64,
}

/// Reports free memory; gives pages when the host wants some and takes them when it wants none any
/// more; answers for statistics meanwhile. `reporting` is the number of that queue, 4 as the
/// specification has it, or 3 as Linux had it.
pub fn run(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&["reporting", "ms"])?;
    let reporting = arguments.ranged("reporting", 4, 3, 4)? as u16;
    let deadline = Deadline::after_milliseconds(arguments.number("ms", 600_000)?);
    let mut balloon = open(machine, reporting)?;
    // SAFETY: memory that nothing else of this program uses; it is in the low 4 GiB, which are mapped.
    let memory = unsafe { Window::new(START, 2 * REPORTED) };
    for page in 0..2 * REPORTED / PAGE {
        memory.write64(page * PAGE, !page)?;
    }
    balloon.report(&memory)?;
    say!("balloon ready");
    let wanted = balloon.wait(deadline, |wanted| wanted > 0)?;
    let pages = u64::from(wanted).min(LISTED as u64).min(REPORTED / PAGE);
    balloon.list_pages(pages);
    pass(
        &mut balloon.inflate,
        Descriptor::readable(balloon.list.address(), (pages * 4) as u32),
    )?;
    expect_zero(&memory, REPORTED, pages)?;
    balloon.device.specific().write32(ACTUAL, pages as u32)?;
    say!("balloon inflated pages={pages}");
    balloon.wait(deadline, |wanted| wanted == 0)?;
    balloon.list_pages(pages);
    pass(
        &mut balloon.deflate,
        Descriptor::readable(balloon.list.address(), (pages * 4) as u32),
    )?;
    balloon.device.specific().write32(ACTUAL, 0)?;
    say!("balloon ok asked={}", balloon.asked);
    Ok(())
}

fn open(machine: &Machine<'_>, reporting: u16) -> Result<Balloon, Error> {
    let mut device = machine.device(KIND, 0)?;
    device.negotiate(FEATURE_STATISTICS | FEATURE_REPORTING | FEATURE_EVENT_INDEX)?;
    let changes = device.configuration_changes()?;
    let mut balloon = Balloon {
        inflate: device.queue(INFLATE, 16)?,
        deflate: device.queue(DEFLATE, 16)?,
        statistics: device.queue(STATISTICS, 2)?,
        reporting: device.queue(reporting, 16)?,
        list: Buffer::allocate(LISTED * 4, 4096)?,
        counts: Buffer::allocate(40, 16)?,
        changes,
        asked: 0,
        device,
    };
    balloon.device.start()?;
    balloon.tell_statistics()?;
    Ok(balloon)
}

impl Balloon {
    /// Gives the device the buffer with two entries: 64 MiB in all, and how often it was asked as
    /// what is free.
    fn tell_statistics(&mut self) -> Result<(), Error> {
        const FREE: u16 = 4;
        const TOTAL: u16 = 5;
        for (offset, tag, value) in [(0, TOTAL, 64 << 20), (10, FREE, self.asked)] {
            self.counts.write(offset, &tag.to_le_bytes());
            self.counts.write(offset + 2, &value.to_le_bytes());
        }
        self.statistics
            .add(&[Descriptor::readable(self.counts.address(), 20)])?;
        self.statistics.want_interrupt(true);
        self.statistics.notify_always()
    }

    /// Reports two buffers, which are gone then.
    fn report(&mut self, memory: &Window) -> Result<(), Error> {
        let half = REPORTED / 2;
        self.reporting.add(&[
            Descriptor::writable(START, half as u32),
            Descriptor::writable(START + half, half as u32),
        ])?;
        self.reporting.notify()?;
        let reporting = &mut self.reporting;
        wait_for(Deadline::after_milliseconds(MILLISECONDS), "report", || {
            reporting.want_interrupt(true);
            reporting.take_used()
        })?;
        expect_zero(memory, 0, REPORTED / PAGE)
    }

    fn list_pages(&self, pages: u64) {
        for index in 0..pages {
            let page = (START + REPORTED) / PAGE + index;
            self.list.write32(index as usize * 4, page as u32);
        }
    }

    /// Waits until the number of pages that the host wants is one for which `ready` holds.
    fn wait(&mut self, deadline: Deadline, ready: impl Fn(u32) -> bool) -> Result<u32, Error> {
        let seen = self.changes.count();
        loop {
            let wanted = self.device.specific().read32(WANTED)?;
            if ready(wanted) {
                // A change is told: it was there before, or there was an interrupt.
                let told = self.changes.count() > seen || wanted > 0;
                return if told {
                    Ok(wanted)
                } else {
                    Err(Error::Timeout("interrupt"))
                };
            }
            if self.statistics.take_used()?.is_some() {
                self.asked += 1;
                self.tell_statistics()?;
            }
            if deadline.passed() {
                return Err(Error::Timeout("another size of the balloon"));
            }
        }
    }
}

fn pass(queue: &mut Queue, list: Descriptor) -> Result<(), Error> {
    queue.add(&[list])?;
    queue.notify()?;
    wait_for(Deadline::after_milliseconds(MILLISECONDS), "answer", || {
        queue.want_interrupt(true);
        queue.take_used()
    })?;
    Ok(())
}

fn expect_zero(memory: &Window, first: u64, pages: u64) -> Result<(), Error> {
    for page in 0..pages {
        let found = memory.read64(first + page * PAGE)?;
        if found != 0 {
            return Err(Error::Unexpected {
                what: "page that was given back",
                value: found,
            });
        }
    }
    Ok(())
}
