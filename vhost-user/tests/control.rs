//! The control socket and the images behind it, with real processes and the independent client.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "in tests"
)]

mod harness;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use harness::driver::{Driver, USUAL};
use harness::{Backend, PATIENCE, pattern};
use serde_json::{Value, json};
use tempfile::TempDir;

const STRIPE: usize = 64 << 10;

struct Host {
    folder: TempDir,
}

impl Host {
    fn new() -> Self {
        Self {
            folder: TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn base(&self, bytes: usize) -> Vec<u8> {
        let content = pattern(99, bytes);
        fs::write(self.path("base.img"), &content).unwrap();
        content
    }

    fn keelson_blk(arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_keelson-blk"));
        command
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    fn image(arguments: &[&str]) -> String {
        let output = Self::keelson_blk(&[&["image"], arguments].concat());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "image {arguments:?}: {stderr}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn control(&self, arguments: &[&str]) -> Output {
        let socket = self.text("control");
        Self::keelson_blk(&[&["control", "--socket", &socket], arguments].concat())
    }

    fn done(&self, arguments: &[&str]) -> Value {
        let output = self.control(arguments);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "control {arguments:?}: {stderr}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn refused(&self, arguments: &[&str]) -> (i32, String) {
        let output = self.control(arguments);
        let stderr = String::from_utf8(output.stderr).unwrap();
        (output.status.code().unwrap(), stderr)
    }

    fn start(&self, arguments: &[&str]) -> Backend {
        let mut command = Command::new(env!("CARGO_BIN_EXE_keelson-blk"));
        command
            .arg("--control")
            .arg(self.path("control"))
            .arg("--allow-path")
            .arg(self.folder.path())
            .args(arguments);
        Backend::start(command)
    }

    fn overlay(&self) -> (String, Vec<u8>) {
        let base = self.base(40 * STRIPE);
        let disk = self.text("disk.img");
        Self::image(&["create", "--overlay-of", &self.text("base.img"), &disk]);
        (disk, base)
    }

    fn start_overlay(&self, disk: &str, more: &[&str]) -> Backend {
        let socket = self.text("disk");
        let arguments = ["--socket", &socket, "--image", disk, "--format", "overlay"];
        self.start(&[&arguments, more].concat())
    }

    fn connect(&self, name: &str) -> Driver {
        Driver::connect(&self.text(name), USUAL, 1, 1 << 20)
    }
}

#[test]
fn a_clone_serves_its_base_and_keeps_what_is_written() {
    let host = Host::new();
    let (disk, mut model) = host.overlay();
    let backend = host.start_overlay(&disk, &[]);
    let mut driver = host.connect("disk");
    assert!(driver.read(0, 300_000 / 512 * 512).unwrap() == model[..300_000 / 512 * 512]);
    let bytes = pattern(1, 3 * 512);
    for place in [0, STRIPE - 512, 20 * STRIPE + 512, 39 * STRIPE] {
        assert_eq!(driver.write(place as u64, &bytes), 0);
        model[place..place + bytes.len()].copy_from_slice(&bytes);
    }
    assert_eq!(driver.flush(), 0);
    drop(driver);
    assert!(backend.terminate().success());
    let exported = host.text("exported.img");
    Host::image(&["export", &disk, &exported]);
    assert!(fs::read(&exported).unwrap() == model);
    assert!(fs::read(host.path("base.img")).unwrap() == pattern(99, 40 * STRIPE));
    let info: Value = serde_json::from_str(&Host::image(&["info", "-o", "json", &disk])).unwrap();
    assert_eq!(info["layers"][0]["base"]["format"], "raw");
    assert!(Host::image(&["check", &disk]).contains("is whole"));
}

#[test]
fn kills_lose_nothing_that_was_acknowledged_flushed_or_not() {
    let host = Host::new();
    let (disk, mut model) = host.overlay();
    for round in 0..12_u64 {
        let backend = host.start_overlay(&disk, &[]);
        let mut driver = host.connect("disk");
        for place in 0..20 {
            // New stripes and old ones, in part and whole.
            let offset =
                ((round * 7 + place * 3) as usize % 39) * STRIPE + (place as usize % 5) * 512;
            let bytes = pattern(round << 8 | place, (1 + place as usize % 3) * 4096);
            assert_eq!(driver.write(offset as u64, &bytes), 0);
            model[offset..offset + bytes.len()].copy_from_slice(&bytes);
            if round % 3 == 0 && place == 10 {
                assert_eq!(driver.flush(), 0);
            }
        }
        backend.kill();
        drop(driver);
    }
    let _backend = host.start_overlay(&disk, &[]);
    let mut driver = host.connect("disk");
    for place in (0..model.len()).step_by(STRIPE) {
        let found = driver.read(place as u64, STRIPE).unwrap();
        assert!(
            found == model[place..place + STRIPE],
            "stripe {}",
            place / STRIPE
        );
    }
}

#[test]
fn a_snapshot_is_taken_between_two_requests_of_a_running_guest() {
    let host = Host::new();
    let (disk, mut model) = host.overlay();
    let _backend = host.start_overlay(&disk, &["--id", "root"]);
    let mut driver = host.connect("disk");
    assert_eq!(driver.write(0, &[1; 4096]), 0);
    model[..4096].fill(1);
    let before = model.clone();
    let made = host.done(&["snapshot", "root", "monday"]);
    assert_eq!(made["path"], host.text("disk.img.monday"));
    assert_eq!(driver.write(2048, &[2; 4096]), 0);
    model[2048..6144].fill(2);
    assert!(driver.read(0, 8192).unwrap() == model[..8192]);
    assert_eq!(driver.flush(), 0);
    assert_eq!(host.done(&["list"])["disks"][0]["layers"], 2);
    // The snapshot is the base of another disk while the first one goes on.
    let clone = host.text("clone.img");
    let snapshot = host.text("disk.img.monday");
    let base = [
        "create",
        "--overlay-of",
        &snapshot,
        "--base-format",
        "overlay",
    ];
    Host::image(&[&base[..], &[&clone]].concat());
    let socket = host.text("clone");
    let added = format!("id=clone,socket={socket},image={clone},format=overlay");
    host.done(&["add", &added]);
    let mut other = host.connect("clone");
    assert!(other.read(0, 8192).unwrap() == before[..8192]);
    let (code, reason) = host.refused(&["snapshot", "root", "monday"]);
    assert!(code == 1 && reason.contains("already"), "{reason}");
    assert!(driver.read(0, 8192).unwrap() == model[..8192]);
}

#[test]
fn disks_come_and_go_while_others_are_served() {
    let host = Host::new();
    let image = host.text("one.img");
    File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let mut backend = host.start(&[]);
    assert_eq!(host.done(&["list"])["disks"], json!([]));
    let one = format!("id=one,socket={},image={image},queues=2", host.text("one"));
    host.done(&["add", &one]);
    let (code, reason) = host.refused(&["add", &one]);
    assert!(code == 1 && reason.contains("already"), "{reason}");
    let again = one
        .replace("id=one", "id=again")
        .replace("one,image", "again,image");
    let (_, reason) = host.refused(&["add", &again]);
    assert!(reason.contains("in use"), "{reason}");
    let mut driver = host.connect("one");
    assert_eq!(driver.write(0, &[1; 512]), 0);
    host.done(&[
        "add",
        &format!("id=null,socket={},null=1G", host.text("null")),
    ]);
    host.done(&["remove", "null"]);
    let (code, _) = host.refused(&["remove", "null"]);
    assert_eq!(code, 3);
    assert_eq!(driver.write(512, &[2; 512]), 0);
    let metrics = String::from_utf8(host.control(&["metrics"]).stdout).unwrap();
    assert!(
        metrics.contains("keelson_blk_writes_total{disk=\"one\",queue=\"0\"} 2\n"),
        "{metrics}"
    );
    let durations = "keelson_blk_request_duration_seconds";
    let labels = "disk=\"one\",operation=\"write\"";
    for line in [
        format!("# TYPE {durations} histogram\n"),
        format!("{durations}_bucket{{{labels},le=\"+Inf\"}} 2\n"),
        format!("{durations}_bucket{{{labels},le=\"0.000001\"}} 0\n"),
        format!("{durations}_count{{{labels}}} 2\n"),
    ] {
        assert!(metrics.contains(&line), "{line}{metrics}");
    }
    drop(driver);
    host.done(&["remove", "one"]);
    assert!(backend.is_running());
    assert!(backend.terminate().success());
    assert!(!host.path("control").exists());
}

#[test]
fn disks_grow_while_they_are_served() {
    let host = Host::new();
    let (disk, _) = host.overlay();
    let _backend = host.start_overlay(&disk, &["--id", "root"]);
    let mut driver = host.connect("disk");
    let grown = host.done(&["resize", "root", "8M"]);
    assert_eq!(grown["bytes"], 8 << 20);
    assert_eq!(driver.config().capacity.to_native(), (8 << 20) / 512);
    assert!(driver.read((8 << 20) - 4096, 4096).unwrap() == vec![0; 4096]);
    assert_eq!(driver.write((8 << 20) - 4096, &[7; 4096]), 0);
    let (code, reason) = host.refused(&["resize", "root", "1M"]);
    assert!(code == 1 && reason.contains("only grow"), "{reason}");
}

#[test]
fn limits_change_while_requests_are_made() {
    let host = Host::new();
    let image = host.text("one.img");
    File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let socket = host.text("one");
    let arguments = [
        "--socket",
        &socket,
        "--image",
        &image,
        "--operations-per-second",
        "20",
    ];
    let _backend = host.start(
        &[
            &arguments[..],
            &["--operations-burst", "1", "--group", "all"],
        ]
        .concat(),
    );
    let mut driver = host.connect("one");
    let start = std::time::Instant::now();
    for _ in 0..10 {
        driver.read(0, 512).unwrap();
    }
    assert!(start.elapsed().as_millis() >= 350, "{:?}", start.elapsed());
    host.done(&["limit", "one", "--bytes-per-second", "100M"]);
    let listed = host.done(&["list"]);
    assert_eq!(
        listed["disks"][0]["limits"],
        json!({ "bytes": { "per_second": 100 << 20 } })
    );
    host.done(&["limit", "all", "--group", "--operations-per-second", "50"]);
    assert_eq!(
        host.done(&["list"])["groups"]["all"]["operations"]["per_second"],
        50
    );
    let start = std::time::Instant::now();
    for _ in 0..20 {
        driver.read(0, 512).unwrap();
    }
    assert!(start.elapsed().as_millis() >= 200, "{:?}", start.elapsed());
}

// Runs a command that inherits a pipe with the key as descriptor 9.
fn with_key(command: &mut Command, key: &[u8]) {
    let (mut reader, mut writer) = std::io::pipe().unwrap();
    writer.write_all(key).unwrap();
    drop(writer);
    let descriptor = reader.as_fd().as_raw_fd();
    // SAFETY: dup2 is async-signal-safe, and the pipe is open until the child has started.
    unsafe {
        command.pre_exec(move || {
            if libc::dup2(descriptor, 9) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    // Kept open by the command's closure no longer than the test.
    std::mem::forget(std::mem::replace(&mut reader, std::io::pipe().unwrap().0));
}

#[test]
fn an_encrypted_overlay_is_opened_with_its_key_alone() {
    let host = Host::new();
    let base = host.base(4 * STRIPE);
    let disk = host.text("disk.img");
    let key = pattern(5, 64);
    let program = env!("CARGO_BIN_EXE_keelson-blk");
    let mut create = Command::new(program);
    create.args([
        "image",
        "create",
        "--overlay-of",
        &host.text("base.img"),
        "--key-fd",
        "9",
        &disk,
    ]);
    with_key(&mut create, &key);
    assert!(create.status().unwrap().success());
    let socket = host.text("disk");
    let serve = |key: Option<&[u8]>| {
        let mut command = Command::new(program);
        command.args(["--socket", &socket, "--image", &disk, "--format", "overlay"]);
        if let Some(key) = key {
            command.args(["--key-fd", "9"]);
            with_key(&mut command, key);
        }
        command
    };
    let (code, reason) = harness::refusal(serve(None));
    assert!(code == 3 && reason.contains("--key-fd"), "{reason}");
    let (code, reason) = harness::refusal(serve(Some(&pattern(6, 64))));
    assert!(code == 3 && reason.contains("not the one"), "{reason}");
    let (code, reason) = harness::refusal(serve(Some(&key[..40])));
    assert!(code == 3 && reason.contains("32 bytes"), "{reason}");
    let backend = Backend::start(serve(Some(&key)));
    let mut driver = host.connect("disk");
    let secret = pattern(8, 8192);
    assert_eq!(driver.write(4096, &secret), 0);
    assert!(driver.read(0, 4096).unwrap() == base[..4096]);
    assert!(driver.read(4096, 8192).unwrap() == secret);
    assert_eq!(driver.flush(), 0);
    drop(driver);
    assert!(backend.terminate().success());
    let stored = fs::read(&disk).unwrap();
    assert!(!stored.windows(64).any(|window| window == &secret[..64]));
}

#[test]
fn a_key_comes_over_the_control_socket_as_a_descriptor() {
    let host = Host::new();
    let image = host.text("one.img");
    File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let _backend = host.start(&[]);
    let socket = host.text("one");
    let mut add = Command::new(env!("CARGO_BIN_EXE_keelson-blk"));
    let disk = format!("id=one,socket={socket},image={image},key-fd=9");
    add.args(["control", "--socket", &host.text("control"), "add", &disk]);
    with_key(&mut add, &pattern(5, 32));
    assert!(add.output().unwrap().status.success());
    assert_eq!(host.done(&["list"])["disks"][0]["encrypted"], true);
    let mut driver = host.connect("one");
    assert_eq!(driver.write(0, &pattern(1, 4096)), 0);
    assert_eq!(driver.flush(), 0);
    assert!(driver.read(0, 4096).unwrap() == pattern(1, 4096));
    assert!(fs::read(&image).unwrap()[..4096] != pattern(1, 4096));
}

#[test]
fn garbage_and_giants_on_the_control_socket_are_refused() {
    let host = Host::new();
    let _backend = host.start(&[]);
    let answer = |bytes: &[u8]| {
        let mut stream = UnixStream::connect(host.path("control")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        answer
    };
    assert!(answer(b"garbage\n").contains("bad_request"));
    assert!(answer(b"{\"request\":\"fly\"}\n").contains("bad_request"));
    assert!(answer(&vec![b'x'; 200 << 10]).contains("bad_request"));
    assert!(
        answer(b"{\"request\":\"list\"}\n{\"request\":\"list\"}\n")
            .matches("\"ok\"")
            .count()
            == 2
    );
    let idle: Vec<_> = (0..16)
        .map(|_| UnixStream::connect(host.path("control")).unwrap())
        .collect();
    // The server counts a client when it accepts it.
    let full = std::iter::repeat_with(|| answer(b"")).take(500);
    assert!(
        full.into_iter()
            .any(|answer| answer.contains("too_many_clients"))
    );
    drop(idle);
    let mode = fs::metadata(host.path("control")).unwrap();
    assert_eq!(
        std::os::unix::fs::PermissionsExt::mode(&mode.permissions()) & 0o777,
        0o600
    );
}

#[test]
fn an_image_that_only_looks_like_an_overlay_is_served_raw() {
    let host = Host::new();
    let (disk, _) = host.overlay();
    let socket = host.text("disk");
    let _backend = host.start(&["--socket", &socket, "--image", &disk]);
    let mut driver = host.connect("disk");
    let file = fs::read(Path::new(&disk)).unwrap();
    assert!(driver.read(0, 4096).unwrap() == file[..4096]);
}
