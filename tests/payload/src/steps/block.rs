//! Steps that move data to and from a disk.
//!
//! The pattern: sector `n` under seed `s` is 64 little-endian words, the first `n`, the second `s`, and
//! word `i` from the third on `splitmix64(s + n * 64 + i)`, all arithmetic modulo 2^64. So a sector in the
//! wrong place, an old one and a torn one are all found, and a host can compute it as easily.

use super::Machine;
use crate::arguments::Arguments;
use crate::clock::{self, Deadline};
use crate::console::say;
use crate::error::Error;
use crate::memory::Buffer;
use crate::virtio::block::{self, Block, DEPTH_LIMIT, Kind, SECTOR, STATUS_OK};

/// A request that takes longer has been lost.
pub const REQUEST_MILLISECONDS: u64 = 10_000;
/// Sectors of requests in turn if the size isn't given: odd ones, pages, and large ones.
const SIZES: [u64; 8] = [1, 8, 3, 64, 8, 17, 128, 8];
const LARGEST: u64 = 128;

/// Opens the disk that the arguments name.
pub fn open(
    machine: &Machine<'_>,
    arguments: &Arguments<'_>,
    depth: usize,
    request_size: usize,
) -> Result<Block, Error> {
    let index = arguments.number("disk", 0)?;
    Block::open(machine.device(block::KIND, index)?, depth, request_size)
}

pub fn identify(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    const SERIAL: usize = 20;
    arguments.allow(&["disk"])?;
    let mut disk = open(machine, arguments, 1, SECTOR)?;
    let deadline = Deadline::after_milliseconds(REQUEST_MILLISECONDS);
    let status = disk.request(Kind::Identify, 0, SERIAL, deadline)?;
    expect(status, STATUS_OK, 0)?;
    let mut serial = [0; SERIAL];
    disk.data(0)?.read(0, &mut serial);
    let length = serial.iter().position(|byte| *byte == 0).unwrap_or(SERIAL);
    say!(
        "blk-id ok serial={} sectors={} read_only={} flush={} queues={} features={:#x}",
        str::from_utf8(&serial[..length]).unwrap_or("?"),
        disk.capacity(),
        disk.read_only(),
        disk.can_flush(),
        disk.queue_count(),
        disk.device().features(),
    );
    Ok(())
}

pub fn flush(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&["disk"])?;
    let mut disk = open(machine, arguments, 1, SECTOR)?;
    flush_disk(&mut disk)?;
    say!("blk-flush ok");
    Ok(())
}

pub fn write(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    let (mut disk, transfer) = Transfer::parse(machine, arguments)?;
    let outcome = transfer.run(&mut disk, Kind::Write)?;
    if disk.can_flush() {
        flush_disk(&mut disk)?;
    }
    outcome.say("blk-write");
    Ok(())
}

pub fn verify(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    let (mut disk, transfer) = Transfer::parse(machine, arguments)?;
    transfer.run(&mut disk, Kind::Read)?.say("blk-verify");
    Ok(())
}

/// Checks a request's status byte.
pub fn expect(status: u8, expected: u8, sector: u64) -> Result<(), Error> {
    let wrong = Error::RequestStatus {
        sector,
        status,
        expected,
    };
    if status == expected {
        Ok(())
    } else {
        Err(wrong)
    }
}

fn flush_disk(disk: &mut Block) -> Result<(), Error> {
    let deadline = Deadline::after_milliseconds(REQUEST_MILLISECONDS);
    let status = disk.request(Kind::Flush, 0, 0, deadline)?;
    expect(status, STATUS_OK, 0)
}

/// A range of sectors, and how it is cut into requests.
struct Transfer {
    first: u64,
    sectors: u64,
    seed: u64,
    /// Sectors of each request, 0 for [`SIZES`] in turn.
    size: u64,
}

struct Outcome {
    sectors: u64,
    requests: u64,
    nanoseconds: u64,
}

impl Outcome {
    fn say(&self, step: &str) {
        let Self {
            sectors,
            requests,
            nanoseconds,
        } = self;
        say!(
            "{step} ok sectors={sectors} requests={requests} us={}",
            nanoseconds / 1000
        );
    }
}

impl Transfer {
    fn parse(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(Block, Self), Error> {
        arguments.allow(&["disk", "first", "sectors", "seed", "size", "depth"])?;
        let depth = arguments.ranged("depth", 8, 1, DEPTH_LIMIT as u64)?;
        let size = arguments.ranged("size", 0, 0, LARGEST * SECTOR as u64)?;
        if !size.is_multiple_of(SECTOR as u64) {
            return Err(Error::BadArgument);
        }
        let size = size / SECTOR as u64;
        let largest = if size == 0 { LARGEST } else { size };
        let disk = open(
            machine,
            arguments,
            depth as usize,
            largest as usize * SECTOR,
        )?;
        let first = arguments.ranged("first", 0, 0, disk.capacity())?;
        let rest = disk.capacity() - first;
        let sectors = arguments.ranged("sectors", rest, 0, rest)?;
        Ok((
            disk,
            Self {
                first,
                sectors,
                seed: arguments.number("seed", 1)?,
                size,
            },
        ))
    }

    /// Keeps all slots of the disk in flight until the range is done.
    fn run(&self, disk: &mut Block, kind: Kind) -> Result<Outcome, Error> {
        let start = clock::time_stamp();
        let end = self.first + self.sectors;
        let mut next = self.first;
        let mut requests = 0_u64;
        while next < end || disk.busy() {
            while let Some(slot) = disk.free_slot().filter(|_| next < end) {
                let size = if self.size == 0 {
                    SIZES[requests as usize % SIZES.len()]
                } else {
                    self.size
                };
                let sectors = size.min(end - next);
                if kind == Kind::Write {
                    fill(&disk.data(slot)?, next, sectors, self.seed);
                }
                match disk.submit(slot, kind, next, sectors as usize * SECTOR) {
                    Err(Error::QueueFull) if disk.busy() => break,
                    result => result?,
                }
                next += sectors;
                requests += 1;
            }
            disk.notify()?;
            let deadline = Deadline::after_milliseconds(REQUEST_MILLISECONDS);
            let answer = disk.complete(deadline)?;
            expect(answer.status, STATUS_OK, answer.sector)?;
            if kind == Kind::Read {
                let sectors = (answer.length / SECTOR) as u64;
                compare(&disk.data(answer.slot)?, answer.sector, sectors, self.seed)?;
            }
        }
        let nanoseconds = clock::nanoseconds(clock::time_stamp() - start);
        Ok(Outcome {
            sectors: self.sectors,
            requests,
            nanoseconds,
        })
    }
}

fn fill(data: &Buffer, first: u64, sectors: u64, seed: u64) {
    for sector in 0..sectors {
        let base = sector as usize * SECTOR;
        for word in 0..SECTOR / 8 {
            data.write64(base + word * 8, pattern(first + sector, seed, word));
        }
    }
}

fn compare(data: &Buffer, first: u64, sectors: u64, seed: u64) -> Result<(), Error> {
    for sector in 0..sectors {
        let base = sector as usize * SECTOR;
        for word in 0..SECTOR / 8 {
            if data.read64(base + word * 8) != pattern(first + sector, seed, word) {
                return Err(Error::WrongData {
                    sector: first + sector,
                    offset: word * 8,
                });
            }
        }
    }
    Ok(())
}

fn pattern(sector: u64, seed: u64, word: usize) -> u64 {
    match word {
        0 => sector,
        1 => seed,
        _ => mix(seed
            .wrapping_add(sector.wrapping_mul(64))
            .wrapping_add(word as u64)),
    }
}

/// The output function of splitmix64.
pub fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}
