//! Steps about single requests to a disk: those that must fail, and those around reboots and outages.

use super::Machine;
use super::block::{REQUEST_MILLISECONDS, expect, open};
use crate::arguments::Arguments;
use crate::clock::Deadline;
use crate::console::say;
use crate::error::Error;
use crate::virtio::block::{Block, Kind, SECTOR, STATUS_IO_ERROR, STATUS_OK, STATUS_UNSUPPORTED};
use crate::virtio::device::wait_for;
use crate::{interrupts, memory, supervisor};

pub fn write_read_only(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&["disk"])?;
    let mut disk = open(machine, arguments, 1, SECTOR)?;
    if !disk.read_only() {
        let value = disk.device().features();
        return Err(Error::Unexpected {
            what: "features of a read-only disk",
            value,
        });
    }
    answer(&mut disk, Kind::Write, 0, SECTOR, STATUS_IO_ERROR)?;
    answer(&mut disk, Kind::Read, 0, SECTOR, STATUS_OK)?;
    say!("blk-readonly-write ok");
    Ok(())
}

pub fn out_of_range(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&["disk"])?;
    let mut disk = open(machine, arguments, 1, 8 * SECTOR)?;
    let end = disk.capacity();
    let last = end - 1;
    // Sectors whose byte number wraps around, and whose end does.
    let wraps = 1 << 55;
    for sector in [end, last, wraps, wraps - 1, u64::MAX] {
        answer(&mut disk, Kind::Read, sector, 2 * SECTOR, STATUS_IO_ERROR)?;
        answer(&mut disk, Kind::Write, sector, 2 * SECTOR, STATUS_IO_ERROR)?;
    }
    answer(&mut disk, Kind::Read, last, SECTOR, STATUS_OK)?;
    answer(&mut disk, Kind::Unknown, 0, SECTOR, STATUS_UNSUPPORTED)?;
    answer(&mut disk, Kind::Read, 0, SECTOR, STATUS_OK)?;
    say!("blk-out-of-range ok");
    Ok(())
}

pub fn count_boots(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    const MARK: u64 = u64::from_le_bytes(*b"keelboot");
    arguments.allow(&["disk", "until"])?;
    let until = arguments.number("until", 3)?;
    let mut disk = open(machine, arguments, 1, SECTOR)?;
    let last = disk.capacity() - 1;
    answer(&mut disk, Kind::Read, last, SECTOR, STATUS_OK)?;
    let data = disk.data(0)?;
    let boots = if data.read64(0) == MARK {
        data.read64(8) + 1
    } else {
        1
    };
    data.write64(0, MARK);
    data.write64(8, boots);
    answer(&mut disk, Kind::Write, last, SECTOR, STATUS_OK)?;
    answer(&mut disk, Kind::Flush, 0, 0, STATUS_OK)?;
    say!("blk-boot-count ok boots={boots}");
    if boots < until {
        machine.tables()?.reset()?;
        supervisor::stop();
    }
    Ok(())
}

pub fn wait_for_growth(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&["disk", "ms"])?;
    let deadline = Deadline::after_milliseconds(arguments.number("ms", 20_000)?);
    let mut disk = open(machine, arguments, 1, SECTOR)?;
    let changes = disk.device().configuration_changes()?;
    let before = disk.capacity();
    answer(&mut disk, Kind::Read, before, SECTOR, STATUS_IO_ERROR)?;
    say!("blk-grow ready sectors={before}");
    wait_for(deadline, "interrupt of a changed configuration", || {
        Ok((changes.count() > 0).then_some(()))
    })?;
    let now = disk.current_capacity()?;
    if now <= before {
        return Err(Error::Unexpected {
            what: "sectors after a change",
            value: now,
        });
    }
    answer(&mut disk, Kind::Write, now - 1, SECTOR, STATUS_OK)?;
    answer(&mut disk, Kind::Read, before, SECTOR, STATUS_OK)?;
    answer(&mut disk, Kind::Read, now, SECTOR, STATUS_IO_ERROR)?;
    say!("blk-grow ok sectors={now}");
    Ok(())
}

/// An outage is a request that isn't answered in this time.
const PATIENCE_MILLISECONDS: u64 = 500;
const PAUSE_MILLISECONDS: u64 = 20;

pub fn watch(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&["disk", "outages", "ms"])?;
    let deadline = Deadline::after_milliseconds(arguments.number("ms", 20_000)?);
    let mut left = arguments.number("outages", 1)?;
    let mut was_up = true;
    let mut first = true;
    loop {
        let mut reads = 0_u64;
        let ended = read_until_failure(machine, arguments, deadline, |count| {
            reads = count;
            if first || !was_up {
                say!("blk-watch up");
            }
            first = false;
            left -= u64::from(!was_up);
            was_up = true;
            left > 0
        });
        match ended {
            Ok(()) => {
                say!("blk-watch ok");
                return Ok(());
            }
            Err(error) if deadline.passed() => return Err(error),
            Err(error) => {
                if was_up && !first {
                    say!("blk-watch down reads={reads} reason={error}");
                    was_up = false;
                }
            }
        }
        memory::release_all();
        interrupts::release_vectors();
        pause()?;
    }
}

/// Opens the disk and reads while `go_on` of the count says so.
fn read_until_failure(
    machine: &Machine<'_>,
    arguments: &Arguments<'_>,
    deadline: Deadline,
    mut go_on: impl FnMut(u64) -> bool,
) -> Result<(), Error> {
    let mut disk = open(machine, arguments, 1, SECTOR)?;
    let mut count = 0;
    loop {
        let patience = deadline.earlier(Deadline::after_milliseconds(PATIENCE_MILLISECONDS));
        let status = disk.request(Kind::Read, 0, SECTOR, patience)?;
        expect(status, STATUS_OK, 0)?;
        count += 1;
        if !go_on(count) {
            return Ok(());
        }
        pause()?;
    }
}

fn pause() -> Result<(), Error> {
    let end = Deadline::after_milliseconds(PAUSE_MILLISECONDS);
    while !end.passed() {
        end.wait(interrupts::total())?;
    }
    Ok(())
}

fn answer(
    disk: &mut Block,
    kind: Kind,
    sector: u64,
    length: usize,
    expected: u8,
) -> Result<(), Error> {
    let deadline = Deadline::after_milliseconds(REQUEST_MILLISECONDS);
    expect(
        disk.request(kind, sector, length, deadline)?,
        expected,
        sector,
    )
}
