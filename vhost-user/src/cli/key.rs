//! A disk's key, over a descriptor that the caller handed over.

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, RawFd};
use std::sync::Arc;

use keelson_blk::Error;
use keelson_blk::sector_cipher::SectorCipher;

/// Reads a key to the end of an inherited descriptor, and closes it.
pub fn read(descriptor: Option<RawFd>) -> Result<Option<Arc<SectorCipher>>, Error> {
    let Some(descriptor) = descriptor else {
        return Ok(None);
    };
    // SAFETY: F_GETFD has no preconditions.
    if descriptor < 3 || unsafe { libc::fcntl(descriptor, libc::F_GETFD) } < 0 {
        return Err(Error::Io {
            action: format!("can't read the key from descriptor {descriptor}"),
            source: io::Error::from_raw_os_error(libc::EBADF),
        });
    }
    // SAFETY: it is open, was handed over for this, and is above what the standard library uses.
    let source = unsafe { File::from_raw_fd(descriptor) };
    Ok(Some(Arc::new(SectorCipher::read_key(source)?)))
}
