//! The memory file: written from a guest's memory, and read into one.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::SnapshotError;
use super::state::{CHUNK, PageRange};
use crate::memory::{PAGE, Ram};

const PAGE_BYTES: usize = 4096;
/// What is read and written at once.
const BLOCK: u64 = 1 << 20;
const ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// A range of the file and where it is in the guest's memory.
#[derive(Debug, Clone, Copy)]
struct Extent {
    address: u64,
    offset: u64,
    length: u64,
}

/// Writes all pages that aren't zero to `file`, which is empty and has the memory's size. The guest
/// may run meanwhile; what it writes then must be written again. Returns the bytes written.
pub fn write_all(ram: &Ram, file: &File) -> io::Result<u64> {
    let mut written = 0;
    for extent in present(ram) {
        for block in blocks(extent) {
            written += write_block(ram, file, block, Zeros::Skip)?;
        }
    }
    Ok(written)
}

/// Writes `pages` to `file`, zero or not. Returns the bytes written.
pub fn write_pages(ram: &Ram, file: &File, pages: &[PageRange]) -> io::Result<u64> {
    let mut written = 0;
    for block in pages.iter().flat_map(|range| extents_of(ram, *range)) {
        for block in blocks(block) {
            written += write_block(ram, file, block, Zeros::Write)?;
        }
    }
    Ok(written)
}

/// The pages in which the memory differs from `file`.
pub fn differing(ram: &Ram, file: &File) -> io::Result<Vec<PageRange>> {
    let mut pages = PageList::default();
    let mut now = vec![0; usize_of(BLOCK)];
    let mut then = vec![0; usize_of(BLOCK)];
    // A page that isn't there was given back by the guest, or never used.
    for extent in present(ram) {
        for block in blocks(extent) {
            let (now, then) = (
                &mut now[..usize_of(block.length)],
                &mut then[..usize_of(block.length)],
            );
            read_ram(ram, block.address, now)?;
            file.read_exact_at(then, block.offset)?;
            if now == then {
                continue;
            }
            let both = now.chunks(PAGE_BYTES).zip(then.chunks(PAGE_BYTES));
            for (page, (now, then)) in (block.offset / PAGE..).zip(both) {
                if now != then {
                    pages.push(page);
                }
            }
        }
    }
    Ok(pages.0)
}

/// The pages of dirty bitmaps, one for each region.
pub fn pages_of(ram: &Ram, bitmaps: &[Vec<u64>]) -> Vec<PageRange> {
    let mut pages = PageList::default();
    for (extent, bitmap) in all(ram).zip(bitmaps) {
        let count = extent.length / PAGE;
        for (word, first) in bitmap.iter().zip((0..count).step_by(64)) {
            let mut left = *word;
            while left != 0 {
                let page = first + u64::from(left.trailing_zeros());
                left &= left - 1;
                if page < count {
                    pages.push(extent.offset / PAGE + page);
                }
            }
        }
    }
    pages.0
}

/// The pages that are there; all others are zero.
pub fn present_pages(ram: &Ram) -> Vec<PageRange> {
    let pages = present(ram).into_iter().map(|extent| PageRange {
        first: extent.offset / PAGE,
        count: extent.length / PAGE,
    });
    pages.collect()
}

/// Hands the contents of `pages` to `take` in pieces of at most `piece` bytes, with the first page
/// of each.
pub fn for_each_piece<E: From<SnapshotError>>(
    ram: &Ram,
    pages: &[PageRange],
    piece: usize,
    mut take: impl FnMut(u64, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut buffer = vec![0; piece];
    for extent in pages.iter().flat_map(|range| extents_of(ram, *range)) {
        for start in (0..extent.length).step_by(piece) {
            let length = (piece as u64).min(extent.length - start);
            let bytes = &mut buffer[..usize_of(length)];
            read_ram(ram, extent.address + start, bytes)
                .map_err(|e| SnapshotError::Host(format!("guest memory can't be read: {e}")))?;
            take((extent.offset + start) / PAGE, bytes)?;
        }
    }
    Ok(())
}

/// Writes whole pages from page `first` on.
pub fn put(ram: &Ram, first: u64, bytes: &[u8]) -> io::Result<()> {
    let range = PageRange {
        first,
        count: bytes.len() as u64 / PAGE,
    };
    let mut rest = bytes;
    for extent in whole_extents(ram, range)? {
        let (bytes, after) = rest.split_at(usize_of(extent.length));
        ram.write_slice(bytes, GuestAddress(extent.address))
            .map_err(io::Error::other)?;
        rest = after;
    }
    Ok(())
}

/// Writes zeros.
pub fn put_zeros(ram: &Ram, range: PageRange) -> io::Result<()> {
    for extent in whole_extents(ram, range)? {
        for start in (0..extent.length).step_by(PAGE_BYTES) {
            ram.write_slice(&ZEROS, GuestAddress(extent.address + start))
                .map_err(io::Error::other)?;
        }
    }
    Ok(())
}

/// Where a range is in memory; an error if not all of it is.
fn whole_extents(ram: &Ram, range: PageRange) -> io::Result<Vec<Extent>> {
    let pages: u64 = all(ram).map(|extent| extent.length / PAGE).sum();
    let end = range.first.checked_add(range.count);
    if end.is_none_or(|end| end > pages) {
        let message = format!("memory that the guest hasn't got: {range:?} of {pages} pages");
        return Err(io::Error::other(message));
    }
    Ok(extents_of(ram, range))
}

/// Both lists as one.
pub fn union(first: &[PageRange], second: &[PageRange]) -> Vec<PageRange> {
    let mut all: Vec<PageRange> = first.iter().chain(second).copied().collect();
    all.sort_by_key(|range| range.first);
    let mut merged: Vec<PageRange> = Vec::with_capacity(all.len());
    for range in all {
        match merged.last_mut() {
            Some(last) if range.first <= last.first + last.count => {
                let end = (range.first + range.count).max(last.first + last.count);
                last.count = end - last.first;
            }
            _ => merged.push(range),
        }
    }
    merged
}

/// Reads `pages` of `file` into the memory.
pub fn read_pages(ram: &Ram, file: &File, pages: &[PageRange]) -> io::Result<()> {
    let mut buffer = vec![0; usize_of(BLOCK)];
    for extent in pages.iter().flat_map(|range| extents_of(ram, *range)) {
        for block in blocks(extent) {
            let bytes = &mut buffer[..usize_of(block.length)];
            file.read_exact_at(bytes, block.offset)?;
            ram.write_slice(bytes, GuestAddress(block.address))
                .map_err(io::Error::other)?;
        }
    }
    Ok(())
}

/// Reads all of `file` that isn't a hole into the memory, which is zero.
pub fn read_all(ram: &Ram, file: &File) -> io::Result<()> {
    let length = all(ram).map(|extent| extent.length).sum();
    let pages: Vec<PageRange> = data_extents(file, 0, length)
        .into_iter()
        .map(|(start, length)| PageRange {
            first: start / PAGE,
            count: (start % PAGE + length).div_ceil(PAGE),
        })
        .collect();
    read_pages(ram, file, &union(&pages, &[]))
}

/// CRC-32 of each chunk of a memory file of `bytes` bytes.
pub fn checksums(file: &File, bytes: u64) -> io::Result<Vec<u32>> {
    let zeros = crc32fast::hash(&vec![0; usize_of(CHUNK)]);
    let mut buffer = vec![0; usize_of(CHUNK)];
    let mut checksums = Vec::new();
    let mut data = data_extents(file, 0, bytes).into_iter().peekable();
    for start in (0..bytes).step_by(usize_of(CHUNK)) {
        let length = CHUNK.min(bytes - start);
        while data.next_if(|(at, length)| at + length <= start).is_some() {}
        let hole = data.peek().is_none_or(|(at, _)| *at >= start + length);
        if hole && length == CHUNK {
            checksums.push(zeros);
            continue;
        }
        let chunk = &mut buffer[..usize_of(length)];
        file.read_exact_at(chunk, start)?;
        checksums.push(crc32fast::hash(chunk));
    }
    Ok(checksums)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Zeros {
    /// Leave a hole.
    Skip,
    /// What is in the file may not be zero.
    Write,
}

fn write_block(ram: &Ram, file: &File, block: Extent, zeros: Zeros) -> io::Result<u64> {
    let mut bytes = vec![0; usize_of(block.length)];
    read_ram(ram, block.address, &mut bytes)?;
    if zeros == Zeros::Write {
        file.write_all_at(&bytes, block.offset)?;
        return Ok(block.length);
    }
    let mut written = 0;
    let mut start = 0;
    while start < bytes.len() {
        let rest = &bytes[start..];
        let is_zero = |page: &&[u8]| **page == ZEROS[..page.len()];
        let skipped = rest.chunks(PAGE_BYTES).take_while(is_zero).count() * PAGE_BYTES;
        let rest = &rest[skipped.min(rest.len())..];
        let length = rest
            .chunks(PAGE_BYTES)
            .take_while(|page| !is_zero(page))
            .map(<[u8]>::len)
            .sum();
        file.write_all_at(&rest[..length], block.offset + (start + skipped) as u64)?;
        written += length as u64;
        start += skipped + length;
    }
    Ok(written)
}

fn read_ram(ram: &Ram, address: u64, bytes: &mut [u8]) -> io::Result<()> {
    ram.read_slice(bytes, GuestAddress(address))
        .map_err(io::Error::other)
}

/// The regions, with where they are in the file.
fn all(ram: &Ram) -> impl Iterator<Item = Extent> + '_ {
    ram.iter().scan(0, |next, region| {
        let offset = *next;
        *next += region.len();
        Some(Extent {
            address: region.start_addr().0,
            offset,
            length: region.len(),
        })
    })
}

/// What of the memory is there: reading a hole of a memfd would fill it.
fn present(ram: &Ram) -> Vec<Extent> {
    let mut present = Vec::new();
    for (extent, region) in all(ram).zip(ram.iter()) {
        match region.file_offset() {
            Some(file) if region.flags() & libc::MAP_SHARED != 0 => {
                let data = data_extents(file.file(), file.start(), extent.length);
                present.extend(data.into_iter().map(|(start, length)| {
                    let within = start - file.start();
                    Extent {
                        address: extent.address + within,
                        offset: extent.offset + within,
                        length,
                    }
                }));
            }
            _ => present.push(extent),
        }
    }
    present
}

/// What of a file is no hole, as far as its file system says: (start, length) pairs, by pages.
fn data_extents(file: &File, from: u64, length: u64) -> Vec<(u64, u64)> {
    let end = from + length;
    let seek = |from: u64, whence| {
        let from = libc::off64_t::try_from(from).unwrap_or(libc::off64_t::MAX);
        // SAFETY: lseek touches no memory.
        let found = unsafe { libc::lseek64(file.as_raw_fd(), from, whence) };
        u64::try_from(found).map_err(|_| io::Error::last_os_error())
    };
    let mut extents = Vec::new();
    let mut position = from;
    while position < end {
        let start = match seek(position, libc::SEEK_DATA) {
            Ok(start) => start.min(end),
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => break,
            // Not every file system knows its holes.
            Err(_) => position,
        };
        let next = seek(start, libc::SEEK_HOLE).map_or(end, |next| next.min(end));
        if start >= end || next <= start {
            break;
        }
        let (first, last) = (start & !(PAGE - 1), next.next_multiple_of(PAGE).min(end));
        extents.push((first, last - first));
        position = next;
    }
    extents
}

fn extents_of(ram: &Ram, range: PageRange) -> Vec<Extent> {
    let (start, end) = (range.first * PAGE, (range.first + range.count) * PAGE);
    all(ram)
        .filter_map(|extent| {
            let first = start.max(extent.offset);
            let last = end.min(extent.offset + extent.length);
            (first < last).then(|| Extent {
                address: extent.address + (first - extent.offset),
                offset: first,
                length: last - first,
            })
        })
        .collect()
}

fn blocks(extent: Extent) -> impl Iterator<Item = Extent> {
    (0..extent.length)
        .step_by(usize_of(BLOCK))
        .map(move |start| Extent {
            address: extent.address + start,
            offset: extent.offset + start,
            length: BLOCK.min(extent.length - start),
        })
}

/// Ascending pages as ranges.
#[derive(Default)]
struct PageList(Vec<PageRange>);

impl PageList {
    fn push(&mut self, page: u64) {
        match self.0.last_mut() {
            Some(last) if last.first + last.count == page => last.count += 1,
            _ => self.0.push(PageRange {
                first: page,
                count: 1,
            }),
        }
    }
}

fn usize_of(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MemoryConfig;
    use crate::memory::allocate;
    use proptest::prelude::*;

    const MIB: u64 = 16;
    const PAGES: u64 = MIB << 20 >> 12;

    fn ram() -> crate::memory::GuestMemory {
        let config = MemoryConfig {
            size_mib: MIB,
            ..MemoryConfig::default()
        };
        allocate(&config, true).unwrap()
    }

    fn file() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(MIB << 20).unwrap();
        file
    }

    fn ranges(pages: &[u64]) -> Vec<PageRange> {
        let mut list = PageList::default();
        for page in pages {
            list.push(*page);
        }
        list.0
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn memory_comes_back_whole_and_by_its_differences(
            first in prop::collection::btree_map(0..PAGES, any::<u8>(), 0..40),
            later in prop::collection::btree_map(0..PAGES, any::<u8>(), 0..40),
        ) {
            let (here, there) = (ram(), ram());
            let full = file();
            for (page, value) in &first {
                here.write_slice(&[*value; 4096], GuestAddress(page * PAGE)).unwrap();
            }
            write_all(&here, &full).unwrap();
            prop_assert!(differing(&here, &full).unwrap().is_empty());
            read_all(&there, &full).unwrap();
            prop_assert!(differing(&there, &full).unwrap().is_empty());
            let before = checksums(&full, MIB << 20).unwrap();

            for (page, value) in &later {
                here.write_slice(&[*value], GuestAddress(page * PAGE + 7)).unwrap();
            }
            let changed = differing(&here, &full).unwrap();
            let difference = file();
            write_pages(&here, &difference, &changed).unwrap();
            read_pages(&there, &difference, &changed).unwrap();
            write_pages(&here, &full, &changed).unwrap();
            prop_assert!(differing(&there, &full).unwrap().is_empty());
            prop_assert_eq!(changed.is_empty(), checksums(&full, MIB << 20).unwrap() == before);
        }

        #[test]
        fn ranges_are_united(
            first in prop::collection::btree_set(0u64..200, 0..60),
            second in prop::collection::btree_set(0u64..200, 0..60),
        ) {
            let list = |set: &std::collections::BTreeSet<u64>| ranges(&set.iter().copied().collect::<Vec<_>>());
            let both: std::collections::BTreeSet<u64> = first.union(&second).copied().collect();
            prop_assert_eq!(union(&list(&first), &list(&second)), list(&both));
        }
    }
}
