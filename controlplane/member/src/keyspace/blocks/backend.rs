//! The engine's side of the file.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use redb::StorageBackend;

use super::Blocks;
use super::layout::{BLOCK_BYTES, GROUP};
use crate::disk::BLOCK;

/// Lets the engine use the blocks.
#[derive(Debug)]
pub(in crate::keyspace) struct Backend(pub(in crate::keyspace) Arc<Blocks>);

impl StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.length.load(Ordering::Acquire))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        if offset + out.len() as u64 > self.0.length.load(Ordering::Acquire) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        parts(offset, out.len(), |block, within, part| {
            let out = &mut out[part];
            if block == 0 {
                let header = self.0.header.lock();
                for (at, byte) in out.iter_mut().enumerate() {
                    *byte = header.first.get(within + at).copied().unwrap_or(0);
                }
                return Ok(());
            }
            if out.len().is_multiple_of(BLOCK) {
                return self.0.read_run(block, out);
            }
            let mut bytes = vec![0; BLOCK];
            self.0.read_run(block, &mut bytes)?;
            out.copy_from_slice(&bytes[within..within + out.len()]);
            Ok(())
        })
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        parts(offset, data.len(), |block, within, part| {
            let data = &data[part];
            if block == 0 {
                let mut header = self.0.header.lock();
                let place = header.first.get_mut(within..within + data.len());
                place
                    .ok_or(io::ErrorKind::InvalidInput)?
                    .copy_from_slice(data);
                return Ok(());
            }
            if data.len().is_multiple_of(BLOCK) {
                return self.0.write_run(block, data);
            }
            let mut bytes = vec![0; BLOCK];
            self.0.read_run(block, &mut bytes)?;
            bytes[within..within + data.len()].copy_from_slice(data);
            self.0.write_run(block, &bytes)
        })
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.0.set_length(length)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync()
    }
}

/// Calls `run` with each part of a range that is within one group, or within one block if it is not
/// whole blocks.
fn parts(
    offset: u64,
    length: usize,
    mut run: impl FnMut(u64, usize, std::ops::Range<usize>) -> io::Result<()>,
) -> io::Result<()> {
    let mut done = 0;
    while done < length {
        let at = offset + done as u64;
        let block = at / BLOCK_BYTES;
        let within = usize::try_from(at % BLOCK_BYTES).unwrap_or(0);
        let left = length - done;
        let count = if within > 0 || left < BLOCK || block == 0 {
            left.min(BLOCK - within)
        } else {
            let in_group = usize::try_from(GROUP - block % GROUP).unwrap_or(1);
            (left / BLOCK).min(in_group) * BLOCK
        };
        run(block, within, done..done + count)?;
        done += count;
    }
    Ok(())
}
