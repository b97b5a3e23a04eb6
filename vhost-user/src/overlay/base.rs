//! How a raw base is recognized, so that a changed one is refused.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;

use sha2::{Digest, Sha256};

use super::OverlayError;
use super::header::Base;

/// Bytes of the first and the last sample.
const END_SAMPLE: u64 = 64 << 10;
/// Samples in between, and their bytes.
const SAMPLES: u64 = 30;
const SAMPLE: u64 = 4 << 10;

/// What is recorded of a raw image or device: its size, a digest of samples of its content (the
/// first and last 64 KiB and 30 pieces of 4 KiB in between), and for a file its time of change.
///
/// Samples, so that a clone takes milliseconds whatever the base's size; the time notices what
/// they miss.
pub fn identify(path: &Path, file: &File, bytes: u64) -> io::Result<Base> {
    let metadata = file.metadata()?;
    let modified = if metadata.file_type().is_block_device() {
        (0, 0)
    } else {
        let nanoseconds = u32::try_from(metadata.mtime_nsec()).unwrap_or(0);
        (metadata.mtime(), nanoseconds)
    };
    Ok(Base::Raw {
        path: path.into(),
        bytes,
        digest: digest(file, bytes)?,
        modified,
    })
}

/// Compares a base with what was recorded of it when `overlay` was made.
pub fn check(overlay: &Path, recorded: &Base, found: &Base) -> Result<(), OverlayError> {
    let (
        Base::Raw {
            path,
            bytes,
            digest,
            modified,
        },
        Base::Raw {
            bytes: bytes_now,
            digest: digest_now,
            modified: modified_now,
            ..
        },
    ) = (recorded, found)
    else {
        return Ok(());
    };
    let reason = if bytes != bytes_now {
        format!("it had {bytes} bytes and has {bytes_now} now")
    } else if digest != digest_now {
        "its content is another".into()
    } else if modified != modified_now {
        format!(
            "it was written to. If it is a copy with the same content, accept it with: \
             keelson-blk image rebase --base {} {}",
            path.display(),
            overlay.display()
        )
    } else {
        return Ok(());
    };
    Err(OverlayError::BaseChanged {
        path: overlay.into(),
        base: path.clone(),
        reason,
    })
}

fn digest(file: &File, bytes: u64) -> io::Result<[u8; 32]> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; usize::try_from(END_SAMPLE).unwrap_or_default()];
    let mut sample = |offset: u64, len: u64| {
        let len = len.min(bytes.saturating_sub(offset));
        let part = usize::try_from(len)
            .ok()
            .and_then(|len| buffer.get_mut(..len));
        let part = part.unwrap_or_default();
        file.read_exact_at(part, offset)?;
        hasher.update(&*part);
        Ok::<_, io::Error>(())
    };
    sample(0, END_SAMPLE)?;
    let step = bytes / (SAMPLES + 1);
    for index in 1..=SAMPLES {
        sample(step * index, SAMPLE)?;
    }
    sample(bytes.saturating_sub(END_SAMPLE), END_SAMPLE)?;
    Ok(hasher.finalize().into())
}
