//! What a driver must never do to a virtqueue. A device may answer or not, and may stop working; after a
//! reset it must work again, and the host's processes must survive.

use super::Machine;
use super::block::{REQUEST_MILLISECONDS, expect, open};
use crate::arguments::Arguments;
use crate::clock::Deadline;
use crate::console::say;
use crate::error::Error;
use crate::interrupts;
use crate::memory::{self, Buffer};
use crate::virtio::block::{Block, Kind, SECTOR, STATUS_OK};
use crate::virtio::device::wait_for;
use crate::virtio::queue::{Descriptor, INDIRECT, NEXT, WRITABLE};

/// How long an answer is waited for: most violations get none.
const PATIENCE_MILLISECONDS: u64 = 20;
/// Beyond any memory of a guest, and inside the hole for devices.
const NOWHERE: u64 = 0x7fff_ffff_f000;
const LOCAL_APIC: u64 = 0xfee0_0000;

/// Where a case finds what it breaks.
struct Setting {
    table: Buffer,
    /// A valid header of a read of sector 0, data and status.
    header: u64,
    data: u64,
    status: u64,
    /// Memory for an indirect table.
    indirect: Buffer,
    size: u16,
}

type Case = (&'static str, fn(&Setting) -> u16);

/// Each stores descriptors and says which head to publish.
const CASES: &[Case] = &[
    ("self-loop", |s| s.chain(&[at(s.header, 16, NEXT, 0)])),
    ("loop", |s| {
        s.chain(&[
            at(s.header, 16, NEXT, 1),
            at(s.data, 512, NEXT | WRITABLE, 0),
        ])
    }),
    ("head-out-of-range", |s| s.size),
    ("head-largest", |_| u16::MAX),
    ("next-out-of-range", |s| {
        s.chain(&[at(s.header, 16, NEXT, s.size)])
    }),
    ("next-largest", |s| {
        s.chain(&[at(s.header, 16, NEXT, u16::MAX)])
    }),
    ("header-nowhere", |s| {
        s.request(NOWHERE, 16, s.data, 512, s.status, 1)
    }),
    ("header-wraps", |s| {
        s.request(u64::MAX - 7, 16, s.data, 512, s.status, 1)
    }),
    ("header-short", |s| {
        s.request(s.header, 4, s.data, 512, s.status, 1)
    }),
    ("header-empty", |s| {
        s.request(s.header, 0, s.data, 512, s.status, 1)
    }),
    ("data-nowhere", |s| {
        s.request(s.header, 16, NOWHERE, 512, s.status, 1)
    }),
    ("data-in-device-hole", |s| {
        s.request(s.header, 16, LOCAL_APIC, 4096, s.status, 1)
    }),
    ("data-huge", |s| {
        s.request(s.header, 16, s.data, u32::MAX, s.status, 1)
    }),
    ("data-wraps", |s| {
        s.request(s.header, 16, u64::MAX - 511, 1024, s.status, 1)
    }),
    ("data-empty", |s| {
        s.request(s.header, 16, s.data, 0, s.status, 1)
    }),
    ("data-odd", |s| {
        s.request(s.header, 16, s.data, 513, s.status, 1)
    }),
    ("status-nowhere", |s| {
        s.request(s.header, 16, s.data, 512, NOWHERE, 1)
    }),
    ("status-empty", |s| {
        s.request(s.header, 16, s.data, 512, s.status, 0)
    }),
    ("header-alone", |s| s.chain(&[at(s.header, 16, 0, 0)])),
    ("status-alone", |s| s.chain(&[at(s.status, 1, WRITABLE, 0)])),
    ("nothing-writable", |s| {
        s.chain(&[at(s.header, 16, NEXT, 1), at(s.status, 1, 0, 0)])
    }),
    ("all-writable", |s| {
        s.chain(&[
            at(s.header, 16, NEXT | WRITABLE, 1),
            at(s.status, 1, WRITABLE, 0),
        ])
    }),
    ("readable-after-writable", |s| {
        s.chain(&[
            at(s.header, 16, NEXT, 1),
            at(s.data, 512, NEXT | WRITABLE, 2),
            at(s.data, 512, NEXT, 3),
            at(s.status, 1, WRITABLE, 0),
        ])
    }),
    ("longest-chain", |s| {
        for index in 0..s.size {
            let flags = if index == 0 { NEXT } else { NEXT | WRITABLE };
            at(s.data, 512, flags, (index + 1) % s.size).store(&s.table, index);
        }
        at(s.header, 16, NEXT, 1).store(&s.table, 0);
        at(s.status, 1, WRITABLE, 0).store(&s.table, s.size - 1);
        0
    }),
    ("indirect-in-indirect", |s| {
        at(s.indirect.address(), 16, INDIRECT, 0).store(&s.indirect, 0);
        s.chain(&[at(s.indirect.address(), 16, INDIRECT, 0)])
    }),
    ("indirect-loop", |s| {
        at(s.header, 16, NEXT, 0).store(&s.indirect, 0);
        s.chain(&[at(s.indirect.address(), 16, INDIRECT, 0)])
    }),
    ("indirect-next-out-of-range", |s| {
        at(s.header, 16, NEXT, 9).store(&s.indirect, 0);
        s.chain(&[at(s.indirect.address(), 16, INDIRECT, 0)])
    }),
    ("indirect-and-next", |s| {
        at(s.header, 16, 0, 0).store(&s.indirect, 0);
        s.chain(&[
            at(s.indirect.address(), 16, INDIRECT | NEXT, 1),
            at(s.status, 1, WRITABLE, 0),
        ])
    }),
    ("indirect-empty", |s| {
        s.chain(&[at(s.indirect.address(), 0, INDIRECT, 0)])
    }),
    ("indirect-odd", |s| {
        s.chain(&[at(s.indirect.address(), 17, INDIRECT, 0)])
    }),
    ("indirect-huge", |s| {
        s.chain(&[at(s.indirect.address(), 0xffff_fff0, INDIRECT, 0)])
    }),
    ("indirect-nowhere", |s| {
        s.chain(&[at(NOWHERE, 48, INDIRECT, 0)])
    }),
];

const fn at(address: u64, length: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor {
        address,
        length,
        flags,
        next,
    }
}

/// Queue addresses that no memory is at or that no queue may have: descriptors, driver's ring, device's.
const PLACES: &[(&str, [u64; 3])] = &[
    ("rings-at-zero", [0, 0, 0]),
    ("rings-nowhere", [NOWHERE, NOWHERE, NOWHERE]),
    ("rings-in-device-hole", [LOCAL_APIC, LOCAL_APIC, LOCAL_APIC]),
    ("rings-wrap", [u64::MAX - 15, u64::MAX - 1, u64::MAX - 3]),
    ("rings-unaligned", [0x10_0001, 0x10_1001, 0x10_2001]),
];

pub fn run(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&["disk"])?;
    let expected = reference(machine, arguments)?;
    let mut answered = 0;
    for (name, case) in CASES {
        let result = break_chain(machine, arguments, *case);
        answered += u32::from(still_works(name, result, machine, arguments, expected)?);
    }
    let result = break_index(machine, arguments);
    still_works(
        "available-index-jumps",
        result,
        machine,
        arguments,
        expected,
    )?;
    for (name, places) in PLACES {
        let result = break_rings(machine, arguments, *places);
        still_works(name, result, machine, arguments, expected)?;
    }
    let cases = CASES.len() + 1 + PLACES.len();
    say!("blk-hostile ok cases={cases} answered={answered}");
    Ok(())
}

impl Setting {
    fn chain(&self, descriptors: &[Descriptor]) -> u16 {
        for (index, descriptor) in (0..).zip(descriptors) {
            descriptor.store(&self.table, index);
        }
        0
    }

    fn request(
        &self,
        header: u64,
        header_length: u32,
        data: u64,
        data_length: u32,
        status: u64,
        status_length: u32,
    ) -> u16 {
        self.chain(&[
            at(header, header_length, NEXT, 1),
            at(data, data_length, NEXT | WRITABLE, 2),
            at(status, status_length, WRITABLE, 0),
        ])
    }
}

/// Publishes a broken chain, and says whether the device answered it.
/// Over and over: says that a queue has more than fits, and resets the device.
pub fn break_queue(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<(), Error> {
    arguments.allow(&["kind", "times"])?;
    let kind = arguments.number("kind", 4)? as u16;
    let times = arguments.number("times", 1000)?;
    for _ in 0..times {
        let mut device = machine.device(kind, 0)?;
        device.negotiate(0)?;
        let queue = device.queue(0, 16)?;
        device.start()?;
        queue.available().write16(2, 0x7000);
        queue.notify_always()?;
        drop(device);
        memory::release_all();
        interrupts::release_vectors();
    }
    say!("break-queue ok times={times}");
    Ok(())
}

fn break_chain(
    machine: &Machine<'_>,
    arguments: &Arguments<'_>,
    case: fn(&Setting) -> u16,
) -> Result<bool, Error> {
    let mut disk = open(machine, arguments, 1, SECTOR)?;
    let setting = setting(&mut disk)?;
    let head = case(&setting);
    disk.first_queue()?.publish(head);
    provoke(&mut disk)
}

/// Claims more chains than the queue has descriptors.
fn break_index(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<bool, Error> {
    const INDEX: usize = 2;
    let mut disk = open(machine, arguments, 1, SECTOR)?;
    let queue = disk.first_queue()?;
    let beyond = queue.size() + 7;
    queue.available().write16(INDEX, beyond);
    provoke(&mut disk)
}

/// Moves the first queue to where it can't be, and starts the device.
fn break_rings(
    machine: &Machine<'_>,
    arguments: &Arguments<'_>,
    places: [u64; 3],
) -> Result<bool, Error> {
    const STATUS: u64 = 0x14;
    const QUEUE_SELECT: u64 = 0x16;
    const QUEUE_ENABLE: u64 = 0x1c;
    const QUEUE_ADDRESSES: u64 = 0x20;
    const ALL_BUT_DRIVER_OK: u8 = 1 | 2 | 8;
    let disk = open(machine, arguments, 1, SECTOR)?;
    let device = disk.device();
    device.reset()?;
    let registers = device.common();
    registers.write8(STATUS, 1 | 2)?;
    registers.write8(STATUS, ALL_BUT_DRIVER_OK)?;
    registers.write16(QUEUE_SELECT, 0)?;
    for (register, place) in (QUEUE_ADDRESSES..).step_by(8).zip(places) {
        registers.write32(register, (place & 0xffff_ffff) as u32)?;
        registers.write32(register + 4, (place >> 32) as u32)?;
    }
    registers.write16(QUEUE_ENABLE, 1)?;
    registers.write8(STATUS, ALL_BUT_DRIVER_OK | 4)?;
    device.notify_first()?;
    Ok(false)
}

fn setting(disk: &mut Block) -> Result<Setting, Error> {
    const STATUS: usize = 16;
    const CONTROL: usize = 17;
    let control = Buffer::allocate(CONTROL, 16)?;
    let data = Buffer::allocate(SECTOR * 2, 4096)?;
    let indirect = Buffer::allocate(4096, 4096)?;
    let queue = disk.first_queue()?;
    Ok(Setting {
        table: *queue.descriptors(),
        header: control.address(),
        data: data.address(),
        status: control.address() + STATUS as u64,
        indirect,
        size: queue.size(),
    })
}

/// Notifies the device and waits a little for its used index to move.
fn provoke(disk: &mut Block) -> Result<bool, Error> {
    const INDEX: usize = 2;
    let queue = disk.first_queue()?;
    queue.notify_always()?;
    let used = *queue.used();
    let deadline = Deadline::after_milliseconds(PATIENCE_MILLISECONDS);
    let answer = wait_for(deadline, "answer", || {
        Ok((used.read16(INDEX) != 0).then_some(()))
    });
    Ok(answer.is_ok())
}

/// The checksum of what a good read gives.
fn reference(machine: &Machine<'_>, arguments: &Arguments<'_>) -> Result<u64, Error> {
    const READ: usize = 8 * SECTOR;
    let sum = {
        let mut disk = open(machine, arguments, 1, READ)?;
        let deadline = Deadline::after_milliseconds(REQUEST_MILLISECONDS);
        expect(disk.request(Kind::Read, 0, READ, deadline)?, STATUS_OK, 0)?;
        let data = disk.data(0)?;
        (0..READ / 8).fold(0, |sum: u64, word| {
            sum.rotate_left(1) ^ data.read64(word * 8)
        })
    };
    memory::release_all();
    interrupts::release_vectors();
    Ok(sum)
}

/// The device works after what was done to it, and the disk holds what it held.
fn still_works(
    name: &str,
    result: Result<bool, Error>,
    machine: &Machine<'_>,
    arguments: &Arguments<'_>,
    expected: u64,
) -> Result<bool, Error> {
    memory::release_all();
    interrupts::release_vectors();
    let seen = result.and_then(|answered| Ok((answered, reference(machine, arguments)?)));
    match seen {
        Ok((answered, sum)) if sum == expected => Ok(answered),
        Ok((_, sum)) => {
            say!("blk-hostile case={name} left other data");
            Err(Error::Unexpected {
                what: "checksum after a violation",
                value: sum,
            })
        }
        Err(error) => {
            say!("blk-hostile case={name} broke the disk");
            Err(error)
        }
    }
}
