//! Overlays of images on HTTP servers: fetched as they are read, checked, kept, and never mixed.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "in tests"
)]

mod harness;
#[path = "harness/http_server.rs"]
mod http_server;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use harness::driver::{Driver, USUAL};
use harness::loop_device::SmallFileSystem;
use harness::{Backend, PATIENCE, pattern};
use http_server::{Fault, HttpServer};
use keelson_blk::remote::Manifest;
use tempfile::TempDir;

const CHUNK: usize = 256 << 10;
const IMAGE: usize = 4 << 20;

struct Scene {
    folder: TempDir,
    content: Vec<u8>,
    server: HttpServer,
}

impl Scene {
    fn new() -> Self {
        Self::of(pattern(1, IMAGE + 1536))
    }

    /// An image with a manifest on a server.
    fn of(content: Vec<u8>) -> Self {
        let server = HttpServer::start(content.clone(), Some(manifest(&content)));
        Self::on(server, content)
    }

    fn on(server: HttpServer, content: Vec<u8>) -> Self {
        Self {
            folder: TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap(),
            content,
            server,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `web.img`, an overlay of the image.
    fn create(&self, arguments: &[&str]) -> PathBuf {
        let path = self.path("web.img");
        let output = self.try_create(&path, arguments);
        assert!(output.status.success(), "{}", said(&output));
        path
    }

    fn try_create(&self, path: &Path, arguments: &[&str]) -> Output {
        let mut command = image("create");
        command.args(["--overlay-of", &self.server.url()]);
        command.args(arguments).arg(path).output().unwrap()
    }

    fn start(&self, arguments: &[&str]) -> Backend {
        let mut command = harness::command(&self.path("web.img"), &self.path("blk.sock"));
        command.args(["--format", "overlay"]).args(arguments);
        Backend::start(command)
    }

    fn connect(&self) -> Driver {
        let socket = self.path("blk.sock");
        Driver::connect(socket.to_str().unwrap(), USUAL, 1, 16 << 20)
    }

    /// The image as a disk: in whole sectors.
    fn disk(&self) -> Vec<u8> {
        let mut disk = self.content.clone();
        disk.resize(disk.len().next_multiple_of(512), 0);
        disk
    }

    fn assert_whole(&self, driver: &mut Driver, expected: &[u8]) {
        for (chunk, part) in expected.chunks(1 << 20).enumerate() {
            let read = driver.read((chunk << 20) as u64, part.len());
            assert!(read == Ok(part.to_vec()), "MiB {chunk} is another");
        }
        assert!(self.content.len() <= expected.len());
    }
}

fn manifest(content: &[u8]) -> Vec<u8> {
    let manifest = Manifest::of(&mut &content[..], CHUNK as u64, |_| {});
    manifest.unwrap().to_text().into_bytes()
}

fn image(command: &str) -> Command {
    let mut image = Command::new(env!("CARGO_BIN_EXE_keelson-blk"));
    image.args(["image", command]);
    image
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_clone_reads_what_is_on_the_server_and_keeps_it() {
    let scene = Scene::new();
    scene.create(&[]);
    let backend = scene.start(&[]);
    let mut driver = scene.connect();
    scene.server.take_ranges();
    let capacity = driver.config().capacity;
    assert_eq!(capacity, scene.disk().len() as u64 / 512);
    scene.assert_whole(&mut driver, &scene.disk());
    // Each byte once, whatever was read ahead.
    let ranges = scene.server.take_ranges();
    let fetched: u64 = ranges.iter().map(|(first, last)| last - first + 1).sum();
    assert_eq!(fetched, scene.content.len() as u64);
    scene.assert_whole(&mut driver, &scene.disk());
    assert_eq!(scene.server.take_ranges(), []);

    // What was written wins, and needs no server any more.
    let mut model = scene.disk();
    model[5000 * 512..5003 * 512].fill(7);
    assert_eq!(driver.write(5000 * 512, &[7; 1536]), 0);
    assert_eq!(driver.flush(), 0);
    drop(driver);
    assert!(backend.terminate().success());
    scene.server.set_fault(Fault::Status(500));
    let _backend = scene.start(&[]);
    scene.assert_whole(&mut scene.connect(), &model);
}

#[test]
fn what_is_written_first_needs_only_what_is_around_it() {
    let scene = Scene::new();
    scene.create(&["--size", "8M"]);
    let _backend = scene.start(&[]);
    let mut driver = scene.connect();
    scene.server.take_ranges();
    let mut model = scene.disk();
    model.resize(8 << 20, 0);
    // Whole stripes, and what lies behind the image, need nothing from the server.
    model[1 << 20..2 << 20].fill(3);
    assert_eq!(driver.write(1 << 20, &vec![3; 1 << 20]), 0);
    model[6 << 20..(6 << 20) + 512].fill(4);
    assert_eq!(driver.write(6 << 20, &[4; 512]), 0);
    assert_eq!(scene.server.take_ranges(), []);
    // Across two chunks, of which each has a stripe that is covered in part.
    model[(2 << 20) - 1024..(2 << 20) + CHUNK + 512].fill(5);
    assert_eq!(driver.write((2 << 20) - 1024, &vec![5; CHUNK + 1536]), 0);
    assert!(!scene.server.take_ranges().is_empty());
    // The last stripe of the image, which ends within it.
    let last = IMAGE + 512;
    model[last..last + 4096].fill(6);
    assert_eq!(driver.write(last as u64, &[6; 4096]), 0);
    scene.assert_whole(&mut driver, &model);
}

#[test]
fn several_who_read_the_same_chunk_fetch_it_once() {
    let scene = Scene::new();
    scene.create(&[]);
    let _backend = scene.start(&[]);
    let mut driver = scene.connect();
    scene.server.take_ranges();
    scene
        .server
        .set_fault(Fault::Slow(Duration::from_millis(300)));
    for tag in 0..32 {
        let place = 4096 * tag as usize;
        driver.queue_read(0, CHUNK as u64 + 4096 * tag, place, 4096, tag);
    }
    for done in driver.finish(0, 32) {
        assert_eq!(done.ret, 0);
    }
    assert!(driver.get(0, 32 * 4096) == scene.content[CHUNK..CHUNK + 32 * 4096]);
    let first = (CHUNK as u64, 2 * CHUNK as u64 - 1);
    let ranges = scene.server.take_ranges();
    let times = ranges.iter().filter(|range| **range == first).count();
    assert_eq!(times, 1, "{ranges:?}");
}

#[test]
fn reading_in_sequence_is_read_ahead() {
    let scene = Scene::of(pattern(2, 16 << 20));
    scene.create(&[]);
    let _backend = scene.start(&[]);
    let mut driver = scene.connect();
    scene.server.take_ranges();
    scene.assert_whole(&mut driver, &scene.disk());
    let requests = scene.server.take_ranges().len();
    assert!(requests < 45, "{requests} requests for 64 chunks");
}

#[test]
fn a_slow_server_holds_up_nobody_else() {
    let scene = Scene::new();
    scene.create(&[]);
    let local = scene.path("local.img");
    std::fs::write(&local, pattern(3, 1 << 20)).unwrap();
    let other = scene.path("other.sock");
    let disk = format!(
        "socket={},image={},format=raw",
        other.display(),
        local.display()
    );
    // One worker for both.
    let _backend = scene.start(&["--workers", "1", "--disk", &disk]);
    let mut driver = scene.connect();
    assert_eq!(driver.read(0, 4096).unwrap(), scene.content[..4096]);
    scene.server.take_ranges();
    scene.server.set_fault(Fault::Slow(Duration::from_secs(4)));
    let began = Instant::now();
    driver.queue_read(0, 3 << 20, 0, 4096, 1);
    driver.kick(0);
    scene.server.wait_for_request();

    let mut neighbour = Driver::connect(other.to_str().unwrap(), USUAL, 1, 1 << 20);
    assert!(neighbour.read(0, 1 << 20).unwrap() == pattern(3, 1 << 20));
    assert_eq!(neighbour.write(4096, &[1; 4096]), 0);
    assert_eq!(neighbour.flush(), 0);
    // The same disk's other requests, too: what is here, and a flush.
    driver.queue_read(0, 0, 8192, 4096, 2);
    driver.queue_flush(0, 3);
    let done: Vec<u64> = driver
        .finish(0, 2)
        .iter()
        .map(|done| done.context)
        .collect();
    assert!(!done.contains(&1), "{:?}: {done:?}", began.elapsed());
    let last = driver.finish(0, 1);
    assert_eq!((last[0].context, last[0].ret), (1, 0));
    assert_eq!(
        driver.get(0, 4096),
        scene.content[3 << 20..(3 << 20) + 4096]
    );
}

#[test]
fn a_server_that_breaks_off_or_is_gone_is_asked_again_for_a_while() {
    let scene = Scene::new();
    scene.create(&[]);
    let _backend = scene.start(&["--base-timeout", "2"]);
    let mut driver = scene.connect();
    for fault in [Fault::BreaksAfter(100_000), Fault::Status(503)] {
        scene.server.set_fault(fault);
        assert_eq!(driver.read(1 << 20, 4096), Err(-libc::EIO), "{fault:?}");
        // The disk goes on: what needs nothing from there, and a flush.
        assert_eq!(driver.write(3 << 20, &vec![9; 64 << 10]), 0);
        assert_eq!(driver.flush(), 0);
    }
    // Back before the patience ends, and the guest never knows.
    scene.server.take_ranges();
    driver.queue_read(0, 2 << 20, 0, 4096, 0);
    driver.kick(0);
    scene.server.wait_for_request();
    scene.server.set_fault(Fault::None);
    assert_eq!(driver.finish(0, 1)[0].ret, 0);
    assert_eq!(
        driver.read(1 << 20, 4096).unwrap(),
        scene.content[1 << 20..(1 << 20) + 4096]
    );
    assert_eq!(driver.read(3 << 20, 4096).unwrap(), [9; 4096]);
}

#[test]
fn corrupt_bytes_are_told_and_never_served() {
    let scene = Scene::new();
    scene.create(&[]);
    let control = scene.path("control.sock");
    let _backend = scene.start(&["--control", control.to_str().unwrap()]);
    let mut driver = scene.connect();
    let place = 5 * CHUNK as u64 + 77;
    scene.server.set_fault(Fault::Flipped(place));
    // Also where the flipped byte isn't asked for: a chunk is good or not.
    assert_eq!(
        driver.read(5 * CHUNK as u64 + (64 << 10), 4096),
        Err(-libc::EIO)
    );
    assert_eq!(driver.read(5 * CHUNK as u64, 4096), Err(-libc::EIO));
    let metrics = Command::new(env!("CARGO_BIN_EXE_keelson-blk"))
        .args(["control", "-s", control.to_str().unwrap(), "metrics"])
        .output()
        .unwrap();
    let metrics = String::from_utf8(metrics.stdout).unwrap();
    let corrupt = metrics
        .lines()
        .find(|line| line.starts_with("keelson_blk_fetch_corrupt"));
    let count = corrupt.unwrap().rsplit_once(' ').unwrap().1;
    assert_eq!(count, "6", "{metrics}");
    scene.server.set_fault(Fault::None);
    scene.assert_whole(&mut driver, &scene.disk());
}

#[test]
fn a_changed_image_is_never_mixed_with_what_was_fetched() {
    let content = pattern(1, IMAGE);
    let scene = Scene::on(HttpServer::start(content.clone(), None), content);
    scene.create(&["--no-checksums"]);
    let _backend = scene.start(&[]);
    let mut driver = scene.connect();
    assert_eq!(driver.read(0, 4096).unwrap(), scene.content[..4096]);

    scene.server.published().etag = Some("\"second\"".into());
    assert_eq!(driver.read(1 << 20, 4096), Err(-libc::EIO));
    scene.server.published().etag = None;
    assert_eq!(driver.read(1 << 20, 4096), Err(-libc::EIO));
    scene.server.published().etag = Some("\"first\"".into());
    for length in [IMAGE - 512, IMAGE + 512] {
        scene.server.set_fault(Fault::Length(length as u64));
        assert_eq!(driver.read(2 << 20, 4096), Err(-libc::EIO));
    }
    scene.server.set_fault(Fault::NoRanges);
    assert_eq!(driver.read(2 << 20, 4096), Err(-libc::EIO));
    // What is here is here.
    assert_eq!(driver.read(0, 4096).unwrap(), scene.content[..4096]);
    scene.server.set_fault(Fault::None);
    scene.assert_whole(&mut driver, &scene.disk());
}

#[test]
fn with_a_manifest_its_checksums_decide_rather_than_the_servers_word() {
    let scene = Scene::new();
    scene.create(&[]);
    // Another mirror of the same bytes.
    scene.server.published().etag = Some("\"elsewhere\"".into());
    let _backend = scene.start(&[]);
    scene.assert_whole(&mut scene.connect(), &scene.disk());
}

#[test]
fn a_kill_while_chunks_come_loses_nothing() {
    let scene = Scene::of(pattern(4, 16 << 20));
    scene.create(&[]);
    let mut model = scene.disk();
    for round in 0..8_usize {
        let backend = scene.start(&[]);
        let mut driver = scene.connect();
        // Acknowledged and not flushed, in a stripe that had to be fetched for it.
        let place = (round << 20) + 8192;
        model[place..place + 512].fill(round as u8 + 1);
        assert_eq!(driver.write(place as u64, &[round as u8 + 1; 512]), 0);
        scene
            .server
            .set_fault(Fault::Slow(Duration::from_millis(20)));
        scene.server.take_ranges();
        for tag in 0..16 {
            let offset = (tag * 4 * CHUNK as u64 + round as u64 * CHUNK as u64) % (16 << 20);
            driver.queue_read(0, offset, 4096 * tag as usize, 4096, tag);
        }
        driver.kick(0);
        scene.server.wait_for_request();
        std::thread::sleep(Duration::from_millis(7 * round as u64));
        backend.kill();
        scene.server.set_fault(Fault::None);
    }
    let _backend = scene.start(&[]);
    let mut driver = scene.connect();
    scene.server.take_ranges();
    // What the writes had fetched is still here.
    assert!(driver.read(8192, 512).unwrap() == [1; 512]);
    assert!(driver.read(4096, 4096).unwrap() == model[4096..8192]);
    assert_eq!(scene.server.take_ranges(), []);
    scene.assert_whole(&mut driver, &model);
    let check = image("check").arg(scene.path("web.img")).output();
    // It is being served, so the check is refused rather than run beside it.
    assert!(!check.unwrap().status.success());
}

#[test]
fn a_snapshot_of_it_and_the_disk_have_each_their_own_content() {
    let scene = Scene::new();
    scene.create(&[]);
    let control = scene.path("control.sock");
    let control = control.to_str().unwrap();
    let backend = scene.start(&["--id", "web", "--control", control, "--base-fill", "1M"]);
    let mut driver = scene.connect();
    let mut before = scene.disk();
    before[1 << 20..(1 << 20) + 512].fill(1);
    assert_eq!(driver.write(1 << 20, &[1; 512]), 0);
    let made = Command::new(env!("CARGO_BIN_EXE_keelson-blk"))
        .args(["control", "-s", control, "snapshot", "web", "monday"])
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", said(&made));
    let mut after = before.clone();
    after[2 << 20..(2 << 20) + 512].fill(2);
    assert_eq!(driver.write(2 << 20, &[2; 512]), 0);
    scene.assert_whole(&mut driver, &after);
    drop(driver);
    assert!(backend.terminate().success());

    let exported = scene.path("monday.raw");
    let output = image("export")
        .args([scene.path("web.img.monday"), exported.clone()])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", said(&output));
    assert!(std::fs::read(&exported).unwrap() == before);
    let _backend = scene.start(&[]);
    scene.assert_whole(&mut scene.connect(), &after);
}

#[test]
fn a_disk_that_is_only_read_keeps_what_it_fetches_until_it_is_closed() {
    let scene = Scene::new();
    let path = scene.create(&[]);
    let before = std::fs::read(&path).unwrap();
    let backend = scene.start(&["--read-only"]);
    assert_eq!(backend.ready["read_only"], true);
    let mut driver = scene.connect();
    scene.assert_whole(&mut driver, &scene.disk());
    scene.server.take_ranges();
    scene.assert_whole(&mut driver, &scene.disk());
    assert_eq!(scene.server.take_ranges(), []);
    assert_ne!(driver.write(0, &[1; 512]), 0);
    drop(driver);
    assert!(backend.terminate().success());
    assert!(std::fs::read(&path).unwrap() == before);
    assert_eq!(std::fs::read_dir(scene.folder.path()).unwrap().count(), 2);
}

#[test]
fn the_background_fetches_all_of_it_at_its_rate() {
    let scene = Scene::new();
    scene.create(&[]);
    let backend = scene.start(&["--base-fill", "2M"]);
    let began = Instant::now();
    let fetched = || {
        let mut published = scene.server.published();
        let ranges = std::mem::take(&mut published.ranges);
        ranges
            .iter()
            .map(|(first, last)| last - first + 1)
            .sum::<u64>()
    };
    // Of the creation: one byte.
    let mut sum = fetched();
    while sum < scene.content.len() as u64 {
        assert!(began.elapsed() < PATIENCE, "{sum} bytes after {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(20));
        sum += fetched();
    }
    // Never faster: 4 MiB at 2 MiB a second, of which the last one may come at once.
    assert!(
        began.elapsed() > Duration::from_secs(1),
        "{:?}",
        began.elapsed()
    );
    let mut driver = scene.connect();
    scene.assert_whole(&mut driver, &scene.disk());
    drop(driver);
    assert!(backend.terminate().success());
}

#[test]
fn an_image_can_be_fetched_whole_beforehand_and_shared_by_clones() {
    let scene = Scene::new();
    let path = scene.create(&[]);
    let output = image("fetch").arg(&path).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    scene.server.set_fault(Fault::Status(500));
    let clone = scene.path("clone.img");
    let created = image("create")
        .args(["--base-format", "overlay", "--overlay-of"])
        .args([&path, &clone])
        .output()
        .unwrap();
    assert!(created.status.success(), "{}", said(&created));
    let command = harness::command(&clone, &scene.path("blk.sock"));
    let mut command = command;
    command.args(["--format", "overlay"]);
    let _backend = Backend::start(command);
    scene.assert_whole(&mut scene.connect(), &scene.disk());
}

#[test]
fn a_server_that_has_moved_is_taken_if_it_has_the_same_image() {
    let scene = Scene::new();
    let path = scene.create(&[]);
    let moved = HttpServer::start(scene.content.clone(), None);
    let rebase = || {
        let mut command = image("rebase");
        let output = command.args(["--base", &moved.url()]).arg(&path).output();
        output.unwrap()
    };
    assert!(said(&rebase()).contains("no manifest"));
    moved.published().manifest = Some(manifest(&pattern(8, IMAGE + 1536)));
    assert!(said(&rebase()).contains("its SHA-256 is"));
    moved.published().manifest = Some(manifest(&scene.content));
    let rebased = rebase();
    assert!(rebased.status.success(), "{}", said(&rebased));
    scene.server.set_fault(Fault::Status(404));
    let _backend = scene.start(&[]);
    scene.assert_whole(&mut scene.connect(), &scene.disk());
}

#[test]
fn chunks_of_zeroes_are_not_fetched_at_all() {
    let mut content = vec![0; IMAGE];
    content[..4096].copy_from_slice(&pattern(5, 4096));
    let scene = Scene::of(content);
    let path = scene.create(&[]);
    scene.server.take_ranges();
    let output = image("fetch").arg(&path).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(scene.server.take_ranges(), [(0, CHUNK as u64 - 1)]);
    let _backend = scene.start(&[]);
    scene.assert_whole(&mut scene.connect(), &scene.disk());
}

#[test]
fn what_there_is_no_room_for_is_an_error_until_there_is() {
    let scene = Scene::new();
    let Some(small) = SmallFileSystem::mount(scene.folder.path(), 3 << 20) else {
        return;
    };
    let path = small.path().join("web.img");
    let output = scene.try_create(&path, &[]);
    assert!(output.status.success(), "{}", said(&output));
    let hog = small.path().join("hog");
    std::fs::write(&hog, vec![0; 2 << 20]).unwrap();
    let mut command = harness::command(&path, &scene.path("blk.sock"));
    command.args(["--format", "overlay"]);
    let backend = Backend::start(command);
    let mut driver = scene.connect();
    let read = |driver: &mut Driver, chunk: usize| {
        let place = chunk * CHUNK;
        let read = driver.read(place as u64, 4096);
        read.map(|read| assert!(read == scene.content[place..place + 4096]))
    };
    let full = (0..8).find(|chunk| read(&mut driver, *chunk) == Err(-libc::EIO));
    let full = full.expect("1 MiB to hold less than 2");
    assert!(full > 0);
    assert_eq!(read(&mut driver, 0), Ok(()));
    std::fs::remove_file(&hog).unwrap();
    assert_eq!(read(&mut driver, full), Ok(()));
    assert_eq!(driver.flush(), 0);
    drop(driver);
    assert!(backend.terminate().success());
}

#[test]
fn tls_is_verified() {
    let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let ca_file = folder.path().join("ca.pem");
    let content = pattern(6, IMAGE);
    let server = HttpServer::start_tls(content.clone(), Some(manifest(&content)), &ca_file);
    let scene = Scene::on(server, content);
    let ca_file = ca_file.to_str().unwrap();
    let refused = scene.try_create(&scene.path("refused.img"), &[]);
    assert!(!refused.status.success());
    assert!(!scene.path("refused.img").exists());
    scene.create(&["--ca-file", ca_file]);
    let backend = scene.start(&["--base-ca-file", ca_file]);
    scene.assert_whole(&mut scene.connect(), &scene.disk());
    assert!(backend.terminate().success());
}

#[test]
fn what_cannot_be_trusted_is_refused_with_a_reason() {
    let scene = Scene::new();
    let refusal = |arguments: &[&str]| {
        let path = scene.path("refused.img");
        let output = scene.try_create(&path, arguments);
        assert_eq!(output.status.code(), Some(3), "{}", said(&output));
        assert!(!path.exists());
        said(&output)
    };
    let wrong = "0".repeat(64);
    assert!(refusal(&["--manifest-sha256", &wrong]).contains("its SHA-256 is"));
    assert!(refusal(&["--stripe", "1M"]).contains("stripes"));
    scene.server.set_fault(Fault::Length(IMAGE as u64));
    assert!(refusal(&[]).contains("of an image of"));
    scene.server.set_fault(Fault::NoRanges);
    assert!(refusal(&[]).contains("Range"));
    scene.server.set_fault(Fault::Status(403));
    assert!(refusal(&[]).contains("403"));
    scene.server.set_fault(Fault::None);
    scene.server.published().manifest = Some(b"<html>".to_vec());
    assert!(refusal(&[]).contains("keelson-image-manifest"));
    scene.server.published().manifest = None;
    assert!(refusal(&[]).contains("image manifest"));
    scene.server.published().etag = Some("W/\"weak\"".into());
    assert!(refusal(&["--no-checksums"]).contains("strong ETag"));
    for url in ["http://user:secret@127.0.0.1/a.raw", "http:///a.raw"] {
        let mut command = image("create");
        let output = command
            .args(["--overlay-of", url])
            .arg(scene.path("refused.img"));
        assert_eq!(output.output().unwrap().status.code(), Some(3), "{url}");
    }
}

#[test]
fn the_publisher_makes_the_manifest_and_its_digest_pins_the_image() {
    let scene = Scene::new();
    let raw = scene.path("debian.raw");
    std::fs::write(&raw, &scene.content).unwrap();
    let made = image("manifest").arg(&raw).output().unwrap();
    assert!(made.status.success(), "{}", said(&made));
    let text = std::fs::read(scene.path("debian.raw.manifest")).unwrap();
    assert_eq!(Some(&text), scene.server.published().manifest.as_ref());
    let stdout = String::from_utf8(made.stdout).unwrap();
    let digest = stdout.split_whitespace().last().unwrap();
    let path = scene.create(&["--manifest-sha256", digest]);
    // The copy that was kept is gone, and the server has another image by now.
    let copies = std::fs::read_dir(scene.folder.path()).unwrap().flatten();
    for copy in copies.filter(|copy| copy.file_name().to_string_lossy().starts_with('.')) {
        std::fs::remove_file(copy.path()).unwrap();
    }
    scene.server.published().manifest = Some(manifest(&pattern(9, IMAGE)));
    let check = image("check").arg(&path).output().unwrap();
    assert!(
        said(&check).contains("its manifest is another"),
        "{}",
        said(&check)
    );
    scene.server.published().manifest = Some(text);
    let check = image("check").arg(&path).output().unwrap();
    assert!(check.status.success(), "{}", said(&check));
}
