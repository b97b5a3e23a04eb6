//! The disk as a member sees it: one folder of files, given from outside.
//!
//! Everything that a member stores goes through [`Disk`], so that a simulation can lose unsynced
//! writes, tear them, flip bits and fill up. A write that a crash tears leaves whole sectors of 512
//! bytes, each of before or after it: what is neither is taken for damage.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Alignment of what goes around the page cache: no disk needs more.
pub const BLOCK: usize = 4096;

/// One folder of files. Names have no path separators.
pub trait Disk: fmt::Debug + Send + Sync + 'static {
    /// Opens a file, or creates it if `create` is set. Without it, one that is missing is
    /// [`io::ErrorKind::NotFound`].
    fn open(&self, name: &str, create: bool) -> io::Result<Arc<dyn DiskFile>>;

    /// Opens a file that is written in whole blocks of [`BLOCK`] bytes, each soon synced: it may go
    /// around the page cache, so that a sync writes those blocks and nothing beside them.
    fn open_for_blocks(&self, name: &str, create: bool) -> io::Result<Arc<dyn DiskFile>>;

    /// Names of all files, in no order.
    fn list(&self) -> io::Result<Vec<String>>;

    /// Renames a file, replacing what has the new name.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Removes a file.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Makes creations, renames and removals durable.
    fn sync(&self) -> io::Result<()>;

    /// A number that tells a new file from every other: random, unless a run is to be repeated.
    fn file_number(&self) -> u64 {
        use std::hash::{BuildHasher as _, RandomState};
        RandomState::new().hash_one(0)
    }
}

/// A file of a [`Disk`].
pub trait DiskFile: fmt::Debug + Send + Sync + 'static {
    /// Its length in bytes.
    fn length(&self) -> io::Result<u64>;

    /// Fills `bytes` from `offset`; the file's end before that is
    /// [`io::ErrorKind::UnexpectedEof`].
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of `bytes` at `offset`. Durable only after [`DiskFile::sync_data`].
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Changes the length; what is new reads as zeros.
    fn set_length(&self, length: u64) -> io::Result<()>;

    /// Makes every write that returned before durable.
    fn sync_data(&self) -> io::Result<()>;
}

/// A real folder, locked for as long as this lives.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    directory: File,
    _lock: File,
}

impl Folder {
    /// Creates the folder if it is missing (mode 0700) and locks it against a second member; one
    /// that is in use is [`io::ErrorKind::WouldBlock`].
    pub fn open(path: &Path) -> io::Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path.join("lock"))?;
        lock.try_lock()?;
        Ok(Self {
            path: path.to_owned(),
            directory: File::open(path)?,
            _lock: lock,
        })
    }
}

impl Disk for Folder {
    fn open(&self, name: &str, create: bool) -> io::Result<Arc<dyn DiskFile>> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(create)
            .truncate(false)
            .open(self.path.join(name))?;
        Ok(Arc::new(file))
    }

    fn open_for_blocks(&self, name: &str, create: bool) -> io::Result<Arc<dyn DiskFile>> {
        use std::os::unix::fs::OpenOptionsExt;
        let cached = OpenOptions::new()
            .read(true)
            .write(true)
            .create(create)
            .truncate(false)
            .open(self.path.join(name))?;
        let flags = rustix::fs::OFlags::DIRECT.bits();
        let direct = OpenOptions::new()
            .write(true)
            .custom_flags(i32::try_from(flags).unwrap_or(0))
            .open(self.path.join(name));
        match direct {
            Ok(direct) => Ok(Arc::new(BlockFile { cached, direct })),
            // The file system has no direct I/O (tmpfs, before Linux 6.5).
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(Arc::new(cached)),
            Err(error) => Err(error),
        }
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.path)? {
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        std::fs::rename(self.path.join(from), self.path.join(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        std::fs::remove_file(self.path.join(name))
    }

    fn sync(&self) -> io::Result<()> {
        self.directory.sync_all()
    }
}

impl DiskFile for File {
    fn length(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(bytes, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.set_len(length)
    }

    fn sync_data(&self) -> io::Result<()> {
        File::sync_data(self)
    }
}

/// A file that is written around the page cache where a write is aligned, and read through it.
#[derive(Debug)]
struct BlockFile {
    cached: File,
    direct: File,
}

impl DiskFile for BlockFile {
    fn length(&self) -> io::Result<u64> {
        self.cached.length()
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.cached.read_exact_at(bytes, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let aligned = bytes.as_ptr().align_offset(BLOCK) == 0
            && bytes.len().is_multiple_of(BLOCK)
            && offset.is_multiple_of(BLOCK as u64);
        let file = if aligned { &self.direct } else { &self.cached };
        file.write_all_at(bytes, offset)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.cached.set_len(length)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.direct.sync_data()
    }
}

/// Bytes at an address that is a multiple of [`BLOCK`].
#[derive(Debug, Default)]
pub struct AlignedBytes {
    /// Begins at most one block before the bytes.
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl AlignedBytes {
    /// A copy of `bytes`, padded with zeros to whole blocks.
    pub fn copy_of(&mut self, bytes: &[u8]) -> &[u8] {
        self.length = bytes.len().next_multiple_of(BLOCK);
        if self.memory.len() < self.length + BLOCK {
            self.memory = vec![0; (self.length + BLOCK).next_power_of_two()];
        }
        self.start = self.memory.as_ptr().align_offset(BLOCK);
        let place = &mut self.memory[self.start..self.start + self.length];
        place[..bytes.len()].copy_from_slice(bytes);
        place[bytes.len()..].fill(0);
        &self.memory[self.start..self.start + self.length]
    }
}
