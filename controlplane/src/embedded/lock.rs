//! Keeps a second process out of a store's directory.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use crate::StateError;

const NAME: &str = "LOCK";

/// An exclusive lock on a directory, held while this lives; the kernel releases it when the
/// process ends, however it ends.
#[derive(Debug)]
pub(super) struct DirectoryLock {
    _file: File,
}

impl DirectoryLock {
    pub(super) fn acquire(directory: &Path) -> Result<Self, StateError> {
        let path = directory.join(NAME);
        let failed = |error: std::io::Error| {
            StateError::Storage(format!("lock {}: {error}", path.display()))
        };
        let options = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .clone();
        let mut file = options.open(&path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let holder = holder(&mut file);
                return Err(StateError::InUse {
                    path: directory.to_path_buf(),
                    holder,
                });
            }
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        file.set_len(0).map_err(failed)?;
        file.seek(SeekFrom::Start(0)).map_err(failed)?;
        writeln!(file, "{}", std::process::id()).map_err(failed)?;
        Ok(Self { _file: file })
    }
}

/// Names the process that wrote its id into the lock file.
fn holder(file: &mut File) -> String {
    let mut text = String::new();
    let read = file.take(32).read_to_string(&mut text).is_ok();
    match text.trim().parse::<u32>() {
        Ok(process) if read => match std::fs::read_to_string(format!("/proc/{process}/comm")) {
            Ok(name) => format!("process {process} ({})", name.trim()),
            Err(_) => format!("process {process}"),
        },
        _ => "another process".into(),
    }
}
