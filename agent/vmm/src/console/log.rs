//! The console log: a file with a limit.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// The log and its predecessor `<log>.1`, together at most the limit.
#[derive(Debug)]
pub struct ConsoleLog {
    path: PathBuf,
    file: File,
    length: u64,
    /// The length at which the file becomes `<log>.1`.
    rotate_at: u64,
    failed: bool,
}

impl ConsoleLog {
    /// Opens the log at `path`, appending, with a limit in bytes.
    pub fn open(path: &Path, limit: u64) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        let length = file.metadata()?.len();
        Ok(Self {
            path: path.into(),
            file,
            length,
            rotate_at: limit / 2,
            failed: false,
        })
    }

    /// Appends. A full disk costs log lines, not the guest: it is reported once.
    pub fn write(&mut self, bytes: &[u8]) {
        match self.try_write(bytes) {
            Ok(()) => self.failed = false,
            Err(e) if !self.failed => {
                tracing::warn!("can't write the console log {}: {e}", self.path.display());
                self.failed = true;
            }
            Err(_) => {}
        }
    }

    fn try_write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.length + bytes.len() as u64 > self.rotate_at && self.length > 0 {
            self.rotate()?;
        }
        self.file.write_all(bytes)?;
        self.length += bytes.len() as u64;
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        let mut old = OsString::from(&self.path);
        old.push(".1");
        std::fs::rename(&self.path, old)?;
        self.file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.path)?;
        self.length = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_and_its_predecessor_stay_below_the_limit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.log");
        let mut log = ConsoleLog::open(&path, 1000).unwrap();
        for line in 0..100 {
            log.write(format!("this is line {line:03} of the log\n").as_bytes());
        }
        let new = std::fs::read_to_string(&path).unwrap();
        let old = std::fs::read_to_string(folder.path().join("console.log.1")).unwrap();
        assert!(
            new.len() + old.len() <= 1000,
            "{} + {}",
            new.len(),
            old.len()
        );
        assert!(
            (old + &new).ends_with("this is line 098 of the log\nthis is line 099 of the log\n")
        );
    }
}
