//! A layered image from an unknown source: any header and map, with checksums that are right.
#![no_main]

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use keelson_blk::overlay::chain::Bottom;
use keelson_blk::overlay::header::BLOCK_BYTES;
use keelson_blk::overlay::striped_file::StripedOptions;
use keelson_blk::overlay::{Chain, Storage, StripedFile};
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

fuzz_target!(|input: &[u8]| {
    // A fuzzer finds no checksums.
    let mut bytes = input.to_vec();
    bytes.resize(4 * BLOCK_BYTES, 0);
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
        let _ = chain.locate(offset, u64::MAX - offset);
        let _ = chain.write(&[7; 512], offset);
        chain.read(&mut sector, offset).expect("memory can be read");
        let _ = chain.write_zeroes(offset, 512);
    }
    chain.flush().expect("memory can be written");
    let _ = chain.top().grow(chain.bytes() + 512);
});
