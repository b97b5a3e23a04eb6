//! `keelson-blk` and its images.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::NamedTempFile;

use crate::binaries::binary;
use crate::pattern::pattern_sector;

/// Bytes of a sector.
const SECTOR: u64 = 512;

/// A disk image, removed when it is dropped.
pub struct Image {
    file: NamedTempFile,
}

impl Image {
    /// An image of zeros.
    ///
    /// # Panics
    /// If it can't be made.
    pub fn create(sectors: u64) -> Self {
        let file = NamedTempFile::new().expect("there is a place for temporary files");
        let sized = file.as_file().set_len(sectors * SECTOR);
        sized.expect("the image can have its size");
        Self { file }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Writes the pattern to `sectors` sectors from `first` on.
    ///
    /// # Panics
    /// If it can't be written.
    pub fn write_pattern(&self, first: u64, sectors: u64, seed: u64) {
        let mut bytes = Vec::new();
        for sector in first..first + sectors {
            bytes
                .write_all(&pattern_sector(sector, seed))
                .expect("memory takes bytes");
        }
        let file = self.file.as_file();
        let written = file.write_all_at(&bytes, first * SECTOR);
        written.expect("the image can be written");
        file.sync_all().expect("the image can be synced");
    }

    /// Makes it larger.
    ///
    /// # Panics
    /// If it can't be.
    pub fn grow(&self, sectors: u64) {
        let sized = self.file.as_file().set_len(sectors * SECTOR);
        sized.expect("the image can have its size");
    }

    /// The bytes of `sectors` sectors from `first` on.
    ///
    /// # Panics
    /// If they can't be read.
    pub fn read(&self, first: u64, sectors: u64) -> Vec<u8> {
        let length = usize::try_from(sectors * SECTOR).expect("an image fits into memory");
        let mut bytes = vec![0; length];
        let read = self
            .file
            .as_file()
            .read_exact_at(&mut bytes, first * SECTOR);
        read.expect("the image can be read");
        bytes
    }

    /// Whether the pattern is in `sectors` sectors from `first` on.
    ///
    /// # Panics
    /// With the first wrong sector.
    pub fn assert_pattern(&self, first: u64, sectors: u64, seed: u64) {
        let bytes = self.read(first, sectors);
        for (sector, found) in (first..).zip(bytes.chunks_exact(512)) {
            assert!(
                found == pattern_sector(sector, seed),
                "sector {sector} has wrong data"
            );
        }
    }
}

/// A running `keelson-blk`, killed when it is dropped.
pub struct Backend {
    child: Child,
    socket: PathBuf,
}

impl Backend {
    /// Serves `image` on `socket`, with further arguments, and waits until it is ready.
    ///
    /// # Panics
    /// If it doesn't get ready.
    pub fn start(image: &Path, socket: &Path, arguments: &[&str]) -> Self {
        let mut child = Command::new(binary("keelson-blk"))
            .arg("--socket")
            .arg(socket)
            .arg("--image")
            .arg(image)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("keelson-blk starts");
        let output = child.stdout.take().expect("its output is a pipe");
        let mut line = String::new();
        BufReader::new(output)
            .read_line(&mut line)
            .expect("its output can be read");
        assert!(
            line.contains("\"ready\":true"),
            "keelson-blk isn't ready but says: {line:?}"
        );
        Self {
            child,
            socket: socket.to_owned(),
        }
    }

    /// The socket it serves.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Whether it still runs.
    ///
    /// # Panics
    /// If the kernel can't say.
    pub fn is_running(&mut self) -> bool {
        self.child
            .try_wait()
            .expect("a child can be asked for")
            .is_none()
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// If it has ended.
    pub fn signal(&self, signal: Signal) {
        let process = i32::try_from(self.child.id()).expect("a process id");
        let process = Pid::from_raw(process).expect("a process id is above 0");
        kill_process(process, signal).expect("it runs");
    }

    /// Kills it as a crash would, and waits for its end.
    ///
    /// # Panics
    /// If it can't be killed.
    pub fn kill(mut self) {
        self.child.kill().expect("a child can be killed");
        self.child.wait().expect("a killed child ends");
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
