//! Real block devices for tests, which only root can make.

use std::path::{Path, PathBuf};
use std::process::Command;

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Whether this is root; says so if a test can't run for lack of it.
pub fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: making block devices takes root");
    }
    root
}

/// A loop device, detached at the end.
pub struct LoopDevice(String);

impl LoopDevice {
    /// Attaches one to a file, or says that it can't.
    pub fn over(file: &Path) -> Option<Self> {
        Self::with_sectors(file, 512)
    }

    /// The same, with sectors of this many bytes.
    pub fn with_sectors(file: &Path, bytes: u32) -> Option<Self> {
        if !is_root() {
            return None;
        }
        let sectors = bytes.to_string();
        let file = file.to_str().unwrap();
        let arguments = ["--find", "--show", "--sector-size", &sectors, file];
        Some(Self(run("losetup", &arguments)))
    }

    pub fn path(&self) -> &str {
        &self.0
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

/// Flushes that a block device was asked for.
pub fn flushes(device: &str) -> u64 {
    let name = device.trim_start_matches("/dev/");
    let stat = std::fs::read_to_string(format!("/sys/block/{name}/stat")).unwrap();
    let field = stat.split_whitespace().nth(15);
    field
        .expect("a kernel that counts flushes")
        .parse()
        .unwrap()
}

/// A tmpfs of limited size, unmounted at the end.
pub struct SmallFileSystem(PathBuf);

impl SmallFileSystem {
    pub fn mount(directory: &Path, bytes: u64) -> Option<Self> {
        if !is_root() {
            return None;
        }
        let point = directory.join("small");
        std::fs::create_dir(&point).unwrap();
        let size = format!("size={bytes}");
        let place = point.to_str().unwrap();
        run("mount", &["-t", "tmpfs", "-o", &size, "tmpfs", place]);
        Some(Self(point))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}
