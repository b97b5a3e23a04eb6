//! Locks that keep two writers off one image.
//!
//! Open-file-description locks (`fcntl(2)`): they belong to the open file, not the process,
//! end with it however it dies, and QEMU's tools hold the same kind.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

/// Takes the lock on the whole file: shared for readers, exclusive for a writer.
///
/// Returns `Ok(false)` when someone else's lock conflicts.
pub fn try_lock(file: &File, exclusive: bool) -> io::Result<bool> {
    let kind = if exclusive {
        libc::F_WRLCK
    } else {
        libc::F_RDLCK
    };
    // SAFETY: flock is a plain C struct for which all zeroes is valid; OFD locks want l_pid 0.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = i16::try_from(kind).map_err(io::Error::other)?;
    lock.l_whence = i16::try_from(libc::SEEK_SET).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open and the struct outlives the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if result == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}

/// Who holds a lock on this file, as a phrase for a message, if any process shows it.
///
/// The kernel doesn't name the holder of an OFD lock, but `/proc/PID/fdinfo` shows the locks
/// of each open file, as far as this process may look.
pub fn find_holder(file: &File) -> Option<String> {
    let wanted = file.metadata().ok()?;
    let own = std::process::id();
    for entry in fs::read_dir("/proc").ok()?.flatten() {
        let Some(process_id) = entry
            .file_name()
            .to_str()
            .and_then(|s| s.parse::<u32>().ok())
        else {
            continue;
        };
        if process_id == own {
            continue;
        }
        let Ok(descriptors) = fs::read_dir(entry.path().join("fd")) else {
            continue;
        };
        for descriptor in descriptors.flatten() {
            let Ok(metadata) = fs::metadata(descriptor.path()) else {
                continue;
            };
            if (metadata.dev(), metadata.ino()) != (wanted.dev(), wanted.ino()) {
                continue;
            }
            let information = entry.path().join("fdinfo").join(descriptor.file_name());
            let locked = fs::read_to_string(information)
                .is_ok_and(|text| text.lines().any(|line| line.starts_with("lock:")));
            if locked {
                let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
                return Some(format!("process {process_id} ({})", name.trim()));
            }
        }
    }
    None
}
