//! The identity page tables: `ring0.s` maps the low 4 GiB, this the device windows above them.

use crate::error::Error;
use core::sync::atomic::{AtomicUsize, Ordering};

/// The smallest page.
pub const PAGE_SIZE: u64 = 4096;

const LARGE_PAGE: u64 = 2 << 20;
const ENTRIES: usize = 512;
/// Present, writable, usable from ring 3.
const TABLE: u64 = 0b111;
/// The same, not cached, and a large page.
const DEVICE_PAGE: u64 = 0b1001_1111;
const ADDRESS_MASK: u64 = 0x000f_ffff_ffff_f000;
/// Four levels reach this far one to one.
const LIMIT: u64 = 1 << 47;
/// Tables for windows above 4 GiB: each maps 1 GiB or leads to 512 others.
const SPARE_TABLES: usize = 16;

#[repr(C, align(4096))]
struct Table([u64; ENTRIES]);

unsafe extern "C" {
    static mut page_map: Table;
}

static mut SPARES: [Table; SPARE_TABLES] = [const { Table([0; ENTRIES]) }; SPARE_TABLES];
static SPARES_USED: AtomicUsize = AtomicUsize::new(0);

/// Maps the large pages that `length` bytes of device registers from `base` lie in, where they aren't yet.
/// Nothing is unmapped ever, so no translation has to be flushed.
pub fn map(base: u64, length: u64) -> Result<(), Error> {
    let end = base.checked_add(length).filter(|end| *end <= LIMIT);
    let end = end.ok_or(Error::Unmappable { base, length })?;
    let mut page = base & !(LARGE_PAGE - 1);
    while page < end {
        map_large_page(page)?;
        page += LARGE_PAGE;
    }
    Ok(())
}

fn map_large_page(address: u64) -> Result<(), Error> {
    let mut table = &raw mut page_map;
    for level in [39, 30] {
        let entry = entry(table, address, level);
        // SAFETY: `entry` is inside a table; only this function, on one processor, changes tables.
        unsafe {
            if *entry & 1 == 0 {
                *entry = new_table(address)? as u64 | TABLE;
            }
            table = (*entry & ADDRESS_MASK) as *mut Table;
        }
    }
    let entry = entry(table, address, 21);
    // SAFETY: as above.
    unsafe {
        if *entry & 1 == 0 {
            *entry = address | DEVICE_PAGE;
        }
    }
    Ok(())
}

fn entry(table: *mut Table, address: u64, shift: u32) -> *mut u64 {
    let index = (address >> shift) as usize % ENTRIES;
    table.cast::<u64>().wrapping_add(index)
}

fn new_table(address: u64) -> Result<*mut Table, Error> {
    let index = SPARES_USED.fetch_add(1, Ordering::Relaxed);
    if index >= SPARE_TABLES {
        return Err(Error::Unmappable {
            base: address,
            length: LARGE_PAGE,
        });
    }
    Ok((&raw mut SPARES).cast::<Table>().wrapping_add(index))
}
