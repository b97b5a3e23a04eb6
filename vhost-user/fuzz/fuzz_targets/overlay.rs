//! A layered image from an unknown source: any header and map, with checksums that are right.
#![no_main]

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use keelson_blk::overlay::chain::Bottom;
use keelson_blk::overlay::header::BLOCK_BYTES;
use keelson_blk::overlay::striped_file::StripedOptions;
use keelson_blk::overlay::{Chain, Place, Storage, StripedFile};
use libfuzzer_sys::fuzz_target;

/// The start of a file; all else is zero, and what is written there is forgotten.
#[derive(Debug)]
struct Start(Mutex<Vec<u8>>);

impl Storage for Start {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = self.0.lock().expect("no panic");
        let from = bytes
            .len()
            .min(usize::try_from(offset).unwrap_or(usize::MAX));
        let rest = &bytes[from..];
        let len = rest.len().min(buffer.len());
        buffer[..len].copy_from_slice(&rest[..len]);
        buffer[len..].fill(0);
        Ok(())
    }

    fn write_at(&self, part: &[u8], offset: u64) -> io::Result<()> {
        let mut bytes = self.0.lock().expect("no panic");
        let from = bytes
            .len()
            .min(usize::try_from(offset).unwrap_or(usize::MAX));
        let len = part.len().min(bytes.len() - from);
        bytes[from..from + len].copy_from_slice(&part[..len]);
        Ok(())
    }

    fn punch_hole(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A header that could be one: a fuzzer rarely finds sizes that fit together.
fn make_plausible(bytes: &mut [u8]) {
    let number = |bytes: &[u8], place: usize| {
        u64::from_le_bytes(bytes[place..place + 8].try_into().expect("eight bytes"))
    };
    let mut put = |place: usize, value: &[u8]| {
        bytes[place..place + value.len()].copy_from_slice(value);
    };
    put(8, &1_u32.to_le_bytes());
    // Features, and no base.
    put(64, &[0; 16]);
    put(136, &[0; 16]);
    let stripe_bytes = 1_u64 << (16 + bytes[56] % 5);
    // As many stripes as one block of the map describes.
    let size = number(bytes, 48) % (32_512 * stripe_bytes);
    let size = size.next_multiple_of(512).max(512);
    let capacity = 1 + number(bytes, 80) % 4;
    let mut put = |place: usize, value: u64, len: usize| {
        bytes[place..place + len].copy_from_slice(&value.to_le_bytes()[..len]);
    };
    put(48, size, 8);
    put(56, stripe_bytes, 4);
    put(80, capacity, 8);
    put(32, 1, 1);
    put(39, 0, 1);
    put(47, 0, 1);
    // The index of the map's first block.
    put(2 * BLOCK_BYTES + 8, 0, 8);
}

fuzz_target!(|input: &[u8]| {
    let Some((kind, input)) = input.split_first() else {
        return;
    };
    // The header's fields, and then the map's first block: without what is zero in between.
    let (fields, map) = input.split_at(input.len().min(200));
    let mut bytes = fields.to_vec();
    bytes.resize(2 * BLOCK_BYTES, 0);
    bytes.extend_from_slice(&map[..map.len().min(BLOCK_BYTES)]);
    bytes.resize(4 * BLOCK_BYTES, 0);
    if kind & 3 != 0 {
        make_plausible(&mut bytes);
    }
    // A fuzzer finds no checksums.
    bytes[..8].copy_from_slice(b"KEELSTRP");
    let checksum = crc32fast::hash(&bytes[..BLOCK_BYTES - 4]);
    bytes[BLOCK_BYTES - 4..BLOCK_BYTES].copy_from_slice(&checksum.to_le_bytes());
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[16..32]);
    hasher.update(&bytes[2 * BLOCK_BYTES + 4..3 * BLOCK_BYTES]);
    let checksum = hasher.finalize();
    bytes[2 * BLOCK_BYTES..2 * BLOCK_BYTES + 4].copy_from_slice(&checksum.to_le_bytes());
    let storage = Arc::new(Start(Mutex::new(bytes)));
    let Ok(file) = StripedFile::open(storage, Path::new("fuzz"), StripedOptions::default()) else {
        return;
    };
    let Ok(chain) = Chain::new(vec![Arc::new(file)], Bottom::Zero) else {
        return;
    };
    let last = chain.bytes() - 512;
    let mut sector = [0; 512];
    for offset in [0, last / 1024 * 512, last] {
        // Not all of the largest disks: their stripes are counted one by one.
        let _ = chain.locate(offset, (u64::MAX - offset).min(1 << 34));
        let _ = chain.locate(last.saturating_sub(1 << 30), u64::MAX);
        let behind = chain.locate(chain.bytes(), u64::MAX);
        assert_eq!((behind.place, behind.len), (Place::Zero, u64::MAX));
        let _ = chain.write(&[7; 512], offset);
        chain.read(&mut sector, offset).expect("memory can be read");
        let _ = chain.write_zeroes(offset, 512);
    }
    chain.flush().expect("memory can be written");
    let _ = chain.top().grow(chain.bytes() + 512);
});
