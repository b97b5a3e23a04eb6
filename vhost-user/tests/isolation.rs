//! What the threads of a serving keelson-blk may do, and that it serves in spite of that.

#![allow(clippy::unwrap_used, reason = "in tests")]

mod harness;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use harness::driver::{Driver, USUAL};
use harness::{Backend, pattern, refusal};
use tempfile::TempDir;

const BINARY: &str = env!("CARGO_BIN_EXE_keelson-blk");
const STRIPE: usize = 64 << 10;

/// Two folders, of which the process is told one.
struct Host {
    own: TempDir,
    other: TempDir,
}

impl Host {
    fn new() -> Self {
        let folder = || TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        Self {
            own: folder(),
            other: folder(),
        }
    }

    fn start(&self, arguments: &[&str]) -> Backend {
        let mut command = Command::new(BINARY);
        let control = self.own.path().join("control");
        command.arg("--control").arg(control).args(arguments);
        Backend::start(command)
    }

    fn control(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(BINARY);
        command.args(["control", "--socket"]);
        command.arg(self.own.path().join("control"));
        command.args(arguments).stdin(Stdio::null());
        command.output().unwrap()
    }

    fn add(&self, folder: &Path, name: &str) -> Output {
        let image = image(folder, name);
        let socket = folder.join(name);
        let disk = format!("socket={},image={}", socket.display(), image.display());
        self.control(&["add", &disk])
    }
}

fn image(folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(name).with_extension("img");
    fs::write(&path, pattern(7, 8 * STRIPE)).unwrap();
    path
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The fields of each thread's status, by the threads' names.
fn threads(backend: &Backend) -> BTreeMap<String, String> {
    let tasks = fs::read_dir(format!("/proc/{}/task", backend.id())).unwrap();
    let tasks = tasks.map(|task| {
        let path = task.unwrap().path();
        let name = fs::read_to_string(path.join("comm")).unwrap();
        let status = fs::read_to_string(path.join("status")).unwrap();
        (name.trim().to_owned(), status)
    });
    tasks.collect()
}

/// An overlay that is served and written to, so that all kinds of threads are there.
fn serve_overlay(host: &Host, arguments: &[&str]) -> (Backend, Driver) {
    let (base, disk) = (
        image(host.other.path(), "base"),
        host.own.path().join("disk"),
    );
    let mut create = Command::new(BINARY);
    create
        .args(["image", "create", "--overlay-of"])
        .arg(base)
        .arg(&disk);
    assert!(create.output().unwrap().status.success());
    let socket = host.own.path().join("disk.sock");
    let disk = [
        "--socket",
        text(&socket),
        "--image",
        text(&disk),
        "--format",
        "overlay",
    ];
    let backend = host.start(&[&disk, arguments].concat());
    let mut driver = Driver::connect(text(&socket), USUAL, 1, 1 << 20);
    assert_eq!(driver.write(512, &pattern(1, 4096)), 0);
    assert_eq!(driver.flush(), 0);
    (backend, driver)
}

#[test]
fn every_thread_has_its_list_of_system_calls() {
    let host = Host::new();
    let (backend, mut driver) = serve_overlay(&host, &[]);
    let threads = threads(&backend);
    for name in [
        "keelson-blk",
        "starter",
        "signals",
        "control",
        "disk",
        "worker 0",
        "overlay",
    ] {
        assert!(threads.contains_key(name), "{name}: {:?}", threads.keys());
    }
    for (name, status) in &threads {
        assert!(status.contains("Seccomp:\t2\n"), "{name}: {status}");
        assert!(status.contains("NoNewPrivs:\t1\n"), "{name}: {status}");
    }
    // The starter's two filters, that of the role, and the one that refuses to open.
    let worker = threads.get("worker 0").unwrap();
    assert!(worker.contains("Seccomp_filters:\t4\n"), "{worker}");
    let snapshot = host.control(&["snapshot", "disk.sock", "monday"]);
    assert!(snapshot.status.success(), "{snapshot:?}");
    assert_eq!(driver.write(5 * 65536, &pattern(2, 4096)), 0);
    assert!(driver.read(512, 4096).unwrap() == pattern(1, 4096));
    drop(driver);
    assert!(backend.terminate().success());
    for socket in ["control", "disk.sock"] {
        assert!(!host.own.path().join(socket).exists(), "{socket} is left");
    }
}

#[test]
fn disks_are_added_from_folders_that_were_named_alone() {
    let host = Host::new();
    let backend = host.start(&["--allow-path", text(host.own.path())]);
    let refused = host.add(host.other.path(), "elsewhere");
    let reason = String::from_utf8(refused.stderr).unwrap();
    assert!(!refused.status.success());
    assert!(reason.contains("--allow-path"), "{reason}");
    let added = host.add(host.own.path(), "here");
    assert!(added.status.success(), "{added:?}");
    let socket = host.own.path().join("here");
    let mut driver = Driver::connect(text(&socket), USUAL, 1, 1 << 20);
    assert!(driver.read(0, 4096).unwrap() == pattern(7, 8 * STRIPE)[..4096]);
    drop(driver);
    assert!(host.control(&["remove", "here"]).status.success());
    assert!(!socket.exists());
    assert!(backend.terminate().success());
}

#[test]
fn the_sandbox_can_be_turned_off() {
    let host = Host::new();
    let (backend, _driver) = serve_overlay(&host, &["--sandbox", "off"]);
    for (name, status) in threads(&backend) {
        assert!(status.contains("Seccomp:\t0\n"), "{name}: {status}");
    }
    let added = host.add(host.other.path(), "elsewhere");
    assert!(added.status.success(), "{added:?}");
}

#[test]
fn a_process_that_could_never_serve_a_disk_is_refused_with_code_2() {
    let host = Host::new();
    let control = host.own.path().join("control");
    for (arguments, word) in [
        (&[][..], "--allow-path"),
        (&["--allow-path", "/nonexistent"][..], "/nonexistent"),
    ] {
        let mut command = Command::new(BINARY);
        command.arg("--control").arg(&control).args(arguments);
        let mut shown = Command::new(BINARY);
        shown.arg("--control").arg(&control).args(arguments);
        let errors = String::from_utf8(shown.output().unwrap().stderr).unwrap();
        assert!(errors.contains(word), "{errors}");
        assert_eq!(refusal(command).0, 2);
    }
}
