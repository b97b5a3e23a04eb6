//! What the integration tests share: the real binary as a child process, the independent
//! client of the crate `virtio-driver`, and a bare guest that can write anything into its rings.

#![allow(dead_code, reason = "each test binary uses its own part")]
#![allow(
    clippy::unwrap_used,
    reason = "the exception for tests covers only their functions"
)]

pub mod driver;
pub mod loop_device;
pub mod raw_guest;
pub mod steady_guest;

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Longer than anything here takes; only a hang gets there.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// A directory with an image of known content and a socket's path. On the build directory's
/// file system: the usual one for temporary files is often tmpfs, which older kernels don't
/// open with O_DIRECT.
pub struct Scene {
    pub directory: TempDir,
    pub image: PathBuf,
    pub socket: PathBuf,
}

impl Scene {
    pub fn new(image_bytes: u64) -> Self {
        let directory = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let image = directory.path().join("disk.img");
        File::create(&image).unwrap().set_len(image_bytes).unwrap();
        let socket = directory.path().join("blk.sock");
        Self {
            directory,
            image,
            socket,
        }
    }

    pub fn fill(&self, offset: u64, bytes: &[u8]) {
        let file = OpenOptions::new().write(true).open(&self.image).unwrap();
        file.write_all_at(bytes, offset).unwrap();
        file.sync_all().unwrap();
    }

    pub fn image_bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let file = File::open(&self.image).unwrap();
        file.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }

    pub fn command(&self) -> Command {
        command(&self.image, &self.socket)
    }

    pub fn start(&self, arguments: &[&str]) -> Backend {
        let mut command = self.command();
        command.args(arguments);
        Backend::start(command)
    }

    pub fn socket_path(&self) -> &str {
        self.socket.to_str().unwrap()
    }
}

pub fn command(image: &Path, socket: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_keelson-blk"));
    command
        .arg("--image")
        .arg(image)
        .arg("--socket")
        .arg(socket);
    command
}

/// A running keelson-blk.
pub struct Backend {
    child: Child,
    stdout: BufReader<ChildStdout>,
    pub ready: serde_json::Value,
}

impl Backend {
    pub fn start(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        let ready = serde_json::from_str(&line).expect("a ready line");
        Self {
            child,
            stdout,
            ready,
        }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Nanoseconds that all threads have run, by the scheduler's clock.
    pub fn processor_time(&self) -> u64 {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.id())).unwrap();
        let times = threads.map(|thread| {
            let text = std::fs::read_to_string(thread.unwrap().path().join("schedstat")).unwrap();
            let time = text.split_whitespace().next().unwrap();
            time.parse::<u64>().unwrap()
        });
        times.sum()
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let id = i32::try_from(self.child.id()).unwrap();
        let id = rustix::process::Pid::from_raw(id).unwrap();
        rustix::process::kill_process(id, signal).unwrap();
    }

    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Asks it to stop and waits until it has.
    pub fn terminate(mut self) -> ExitStatus {
        self.signal(rustix::process::Signal::TERM);
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "it doesn't stop");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a backend that is expected to refuse, and returns its exit code and last line.
pub fn refusal(mut command: Command) -> (i32, String) {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stderr = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut stderr)
        .unwrap();
    let status = child.wait().unwrap();
    let reason = stderr.trim_end().lines().last().unwrap_or_default();
    (status.code().expect("an exit code"), reason.to_owned())
}

/// Bytes that differ from block to block and from seed to seed.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
