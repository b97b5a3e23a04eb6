//! The raw file or block device behind a disk: opened, locked and measured once.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use serde::{Deserialize, Serialize};

pub use crate::direct_io::DirectAlignment;
use crate::{Error, direct_io, image_lock};

/// The unit in which virtio-blk counts, whatever the disk's block size (virtio 1.2, 5.2.4).
pub const SECTOR_SIZE: u64 = 512;

const LOCK_PATIENCE: Duration = Duration::from_secs(3);
const LOCK_RETRY: Duration = Duration::from_millis(10);

/// Whether to go around the page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DirectMode {
    /// O_DIRECT where the file system and the image's size allow it.
    #[default]
    Auto,
    /// O_DIRECT, or refuse to start.
    On,
    /// Through the page cache.
    Off,
}

/// How to open an image.
#[derive(Clone, Debug)]
pub struct ImageOptions {
    /// A raw file or a block device.
    pub path: PathBuf,
    /// Open for reading only; other readers may share it.
    pub read_only: bool,
    /// Whether to go around the page cache.
    pub direct: DirectMode,
}

/// Block sizes that the guest should know of, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// The smallest unit that can be written; smaller writes fail, as in QEMU.
    pub logical: u32,
    /// The unit that the medium writes at once.
    pub physical: u32,
    /// The largest transfer that is still efficient; 0 when unknown.
    pub optimal: u32,
}

/// An open, locked image.
///
/// A size that is no multiple of 512 is rounded up as QEMU does it: the missing bytes of the
/// last sector read as zeroes, and writing that sector extends the file to a whole sector.
#[derive(Debug)]
pub struct Image {
    file: File,
    read_only: bool,
    direct: Option<DirectAlignment>,
    bytes: AtomicU64,
    block_sizes: BlockSizes,
    lost_writes: AtomicBool,
}

impl Image {
    /// Opens and locks the image, and finds out what it can do.
    pub fn open(options: &ImageOptions) -> Result<Self, Error> {
        let path = options.path.as_path();
        let block_device = check_type(path)?;
        let file = open_file(options, block_device)?;
        lock(&file, options)?;
        let bytes = (&file)
            .seek(SeekFrom::End(0))
            .map_err(|source| open_error(path, source))?;
        if bytes == 0 {
            return Err(Error::EmptyImage { path: path.into() });
        }
        let direct = match options.direct {
            DirectMode::Off => None,
            mode => match enable_direct(&file, bytes, mode, block_device) {
                Ok(alignment) => Some(alignment),
                Err(reason) if mode == DirectMode::On => {
                    return Err(Error::NoDirectIo {
                        path: path.into(),
                        reason,
                    });
                }
                Err(reason) => {
                    tracing::info!(image = %path.display(), %reason, "going through the page cache");
                    None
                }
            },
        };
        let block_sizes = block_sizes(&file, block_device, direct);
        Ok(Self {
            file,
            read_only: options.read_only,
            direct,
            bytes: AtomicU64::new(bytes),
            block_sizes,
            lost_writes: AtomicBool::new(false),
        })
    }

    /// The open file, for the kernel.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Lets readers in beside this user, who won't write any more.
    pub(crate) fn share_lock(&self) -> io::Result<()> {
        image_lock::try_lock(&self.file, false).map(drop)
    }

    /// Whether the image was opened for reading only.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// The alignment that O_DIRECT needs, or `None` through the page cache.
    pub fn direct(&self) -> Option<DirectAlignment> {
        self.direct
    }

    /// The image's size when it was last measured, in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    /// Measures the image again. It may have grown; one that has shrunk keeps the size that the
    /// guest was promised, and what is missing fails.
    pub fn remeasure(&self) -> io::Result<u64> {
        let bytes = (&self.file).seek(SeekFrom::End(0))?;
        let before = self.bytes.fetch_max(bytes, Ordering::AcqRel);
        Ok(before.max(bytes))
    }

    /// What the guest sees, in sectors of 512 bytes.
    pub fn capacity_sectors(&self) -> u64 {
        self.bytes().div_ceil(SECTOR_SIZE)
    }

    /// Block sizes to tell the guest.
    pub fn block_sizes(&self) -> BlockSizes {
        self.block_sizes
    }

    /// Makes everything written so far durable, in the calling thread.
    pub fn sync(&self) -> io::Result<()> {
        self.settle_sync(self.file.sync_data())
    }

    /// Turns the result of an `fdatasync` into what may be promised to the guest.
    ///
    /// After a failed one the kernel has dropped the dirty pages and marked them clean, so a
    /// later `fdatasync` succeeds although the data is gone. Through the page cache a failure
    /// is therefore final for this process; O_DIRECT keeps no such pages.
    pub fn settle_sync(&self, result: io::Result<()>) -> io::Result<()> {
        match result {
            Err(error) => {
                if self.direct.is_none() {
                    self.lost_writes.store(true, Ordering::Release);
                }
                Err(error)
            }
            Ok(()) if self.lost_writes.load(Ordering::Acquire) => Err(io::Error::other(
                "an earlier fdatasync failed, so flushed data may be lost",
            )),
            Ok(()) => Ok(()),
        }
    }
}

fn check_type(path: &Path) -> Result<bool, Error> {
    let file_type = fs::metadata(path)
        .map_err(|source| open_error(path, source))?
        .file_type();
    let what = if file_type.is_file() || file_type.is_block_device() {
        return Ok(file_type.is_block_device());
    } else if file_type.is_dir() {
        "a directory"
    } else if file_type.is_char_device() {
        "a character device"
    } else {
        "a pipe or socket"
    };
    Err(Error::NotAnImage {
        path: path.into(),
        what,
    })
}

fn open_file(options: &ImageOptions, block_device: bool) -> Result<File, Error> {
    let path = options.path.as_path();
    let mut flags = libc::O_CLOEXEC;
    // On a block device O_EXCL without O_CREAT claims it, so that a mounted disk is refused.
    if block_device && !options.read_only {
        flags |= libc::O_EXCL;
    }
    fs::OpenOptions::new()
        .read(true)
        .write(!options.read_only)
        .custom_flags(flags)
        .open(path)
        .map_err(|source| match source.raw_os_error() {
            Some(libc::EBUSY) => Error::ImageInUse {
                path: path.into(),
                holder: "the host itself, mounted or claimed by another driver".into(),
            },
            _ => open_error(path, source),
        })
}

// A killed process's io_uring keeps its files open, and so locked, until the kernel has
// cancelled what was in flight. No process shows such a lock, so it is waited for a while.
fn lock(file: &File, options: &ImageOptions) -> Result<(), Error> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match image_lock::try_lock(file, !options.read_only) {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(source) => {
                return Err(Error::LockImage {
                    path: options.path.clone(),
                    source,
                });
            }
        }
        let holder = image_lock::find_holder(file);
        if holder.is_some() || Instant::now() > deadline {
            return Err(Error::ImageInUse {
                path: options.path.clone(),
                holder: holder.unwrap_or_else(|| "another process".into()),
            });
        }
        thread::sleep(LOCK_RETRY);
    }
}

fn enable_direct(
    file: &File,
    bytes: u64,
    mode: DirectMode,
    block_device: bool,
) -> Result<DirectAlignment, String> {
    let flags = fcntl_getfl(file.as_fd()).map_err(|error| error.to_string())?;
    fcntl_setfl(file.as_fd(), flags | OFlags::DIRECT).map_err(|error| error.to_string())?;
    let probed = direct_io::probe(file).and_then(|alignment| {
        let block = alignment.offset as u64;
        let large = block > SECTOR_SIZE;
        // The last block could only be written by growing the file past the guest's disk.
        if large && !bytes.next_multiple_of(SECTOR_SIZE).is_multiple_of(block) {
            return Err(format!(
                "its size is no multiple of the {block} bytes that O_DIRECT needs here"
            ));
        }
        // Partition tables count in blocks, and files are made with 512: a guest that is told
        // of larger ones wouldn't find its partitions. A device has its own block size.
        if large && !block_device && mode == DirectMode::Auto {
            return Err(format!(
                "O_DIRECT needs blocks of {block} bytes here, but disk images have 512"
            ));
        }
        Ok(alignment)
    });
    if probed.is_err() {
        fcntl_setfl(file.as_fd(), flags).map_err(|error| error.to_string())?;
    }
    probed
}

fn block_sizes(file: &File, block_device: bool, direct: Option<DirectAlignment>) -> BlockSizes {
    let floor = u32::try_from(SECTOR_SIZE).unwrap_or(512);
    let logical = direct
        .and_then(|alignment| u32::try_from(alignment.offset).ok())
        .unwrap_or(floor)
        .max(floor);
    let (physical, optimal) = if block_device {
        device_block_sizes(file)
    } else {
        let size = file.metadata().map_or(0, |metadata| metadata.blksize());
        (u32::try_from(size).unwrap_or(0), 0)
    };
    let sane = |size: u32| size.is_power_of_two() && (floor..=1 << 20).contains(&size);
    BlockSizes {
        logical,
        physical: if sane(physical) {
            physical.max(logical)
        } else {
            logical
        },
        optimal: if optimal % logical == 0 { optimal } else { 0 },
    }
}

// The physical block size and the optimal I/O size of a block device (linux/fs.h).
fn device_block_sizes(file: &File) -> (u32, u32) {
    use std::os::fd::AsRawFd;
    const BLKIOOPT: libc::Ioctl = 0x1279;
    const BLKPBSZGET: libc::Ioctl = 0x127b;
    let ask = |request: libc::Ioctl| {
        let mut value: libc::c_uint = 0;
        // SAFETY: both requests write one unsigned int to the pointer, which outlives the call.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut value) };
        if result == 0 { value } else { 0 }
    };
    (ask(BLKPBSZGET), ask(BLKIOOPT))
}

fn open_error(path: &Path, source: io::Error) -> Error {
    Error::OpenImage {
        path: path.into(),
        source,
    }
}
