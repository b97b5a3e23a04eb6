//! What a layered image needs of the file that holds it.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate};

/// A file, or what tests put in its place. All calls may come from several threads.
///
/// Offsets, lengths and addresses are multiples of the alignment of O_DIRECT, if the file is
/// open with it.
pub trait Storage: Debug + Send + Sync {
    /// Fills the buffer; what lies past the end is zero.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of it; it is durable only after [`sync`](Self::sync).
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Makes a range zero and gives its room back where possible.
    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Makes the file this long; what is added reads as zeroes.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Makes everything that was written durable.
    fn sync(&self) -> io::Result<()>;
}

/// A real file or block device.
#[derive(Debug)]
pub struct FileStorage(pub File);

impl Storage for FileStorage {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.0.read_at(rest, offset + done as u64) {
                Ok(0) => {
                    rest.fill(0);
                    return Ok(());
                }
                Ok(bytes) => {
                    done += bytes;
                    // The end of a file whose size is no multiple of the block.
                    if !done.is_multiple_of(512) {
                        buffer.get_mut(done..).unwrap_or_default().fill(0);
                        return Ok(());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(self.0.as_fd(), flags, offset, len) {
            Err(rustix::io::Errno::OPNOTSUPP) => write_zeroes(self, offset, len),
            result => Ok(result?),
        }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }
}

fn write_zeroes(storage: &FileStorage, offset: u64, len: u64) -> io::Result<()> {
    const CHUNK: usize = 256 << 10;
    let too_large = || io::Error::from(io::ErrorKind::OutOfMemory);
    let zeroes = crate::aligned_buffer::AlignedBuffer::new(CHUNK, 4096).ok_or_else(too_large)?;
    let mut done = 0;
    while done < len {
        let step = usize::try_from(len - done).unwrap_or(CHUNK).min(CHUNK);
        let part = zeroes.as_slice().get(..step).unwrap_or_default();
        storage.write_at(part, offset + done)?;
        done += step as u64;
    }
    Ok(())
}
