//! Many disks in one process: each has its own content, and those that nobody uses cost nothing.

#![allow(
    clippy::unwrap_used,
    reason = "the exception for tests covers only their functions"
)]

mod harness;

use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use harness::driver::{Driver, USUAL};
use harness::raw_guest::{
    DATA, HEADER, INDIRECT, INDIRECT_FLAG, MEMORY_BYTES, NEXT, QUEUE_SIZE, RawGuest, STATUS, TABLE,
    WRITE, descriptor_bytes,
};
use harness::{Backend, Scene, pattern, refusal};

const INDIRECT_DESC: u64 = 1 << 28;

fn several(scenes: &[Scene], arguments: &[&str]) -> Backend {
    let mut command = Command::new(env!("CARGO_BIN_EXE_keelson-blk"));
    for (disk, scene) in scenes.iter().enumerate() {
        let (socket, image) = (scene.socket.display(), scene.image.display());
        command
            .arg("--disk")
            .arg(format!("id=disk-{disk},socket={socket},image={image}"));
    }
    command.args(arguments).args(["--log-level", "warn"]);
    Backend::start(command)
}

fn resident_kib(backend: &Backend) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/status", backend.id())).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.unwrap()
        .split_whitespace()
        .next()
        .unwrap()
        .parse()
        .unwrap()
}

#[test]
fn a_hundred_idle_disks_use_no_processor_and_little_memory() {
    let scenes: Vec<Scene> = (0..100).map(|_| Scene::new(1 << 20)).collect();
    let backend = several(&scenes, &[]);
    let listed = backend.ready["disks"].as_array().unwrap().len();
    assert_eq!(listed, 100);
    let mut drivers: Vec<Driver> = scenes
        .iter()
        .map(|scene| Driver::connect(scene.socket_path(), USUAL, 1, 4096))
        .collect();
    for (disk, driver) in drivers.iter_mut().enumerate() {
        assert_eq!(driver.write(0, &pattern(disk as u64, 4096)), 0);
    }
    std::thread::sleep(Duration::from_millis(200));
    let before = backend.processor_time();
    std::thread::sleep(Duration::from_secs(1));
    // Nothing at all ran.
    assert_eq!(backend.processor_time(), before);
    let memory = resident_kib(&backend);
    assert!(memory < 100 * 2048, "{memory} KiB");
    drop(drivers);
    assert_eq!(backend.terminate().code(), Some(0));
    for (disk, scene) in scenes.iter().enumerate() {
        assert!(scene.image_bytes(0, 4096) == pattern(disk as u64, 4096));
        assert!(!scene.socket.exists());
    }
}

#[test]
fn a_guest_that_breaks_its_memory_does_not_stop_another_disk() {
    let scenes: Vec<Scene> = (0..2).map(|_| Scene::new(1 << 20)).collect();
    let _backend = several(&scenes, &["--workers", "1"]);
    let mut good = Driver::connect(scenes[0].socket_path(), USUAL, 1, 1 << 20);
    let bad = RawGuest::connect(&scenes[1].socket, 0);
    assert_eq!(good.write(0, &[1; 4096]), 0);
    bad.cut_memory_off();
    bad.kick.write(1).unwrap();
    bad.wait_broken();
    assert_eq!(good.write(4096, &[2; 4096]), 0);
    assert_eq!(good.read(0, 4096).unwrap(), [1; 4096]);
}

#[test]
fn descriptors_that_change_while_they_are_read_reach_no_other_guest() {
    let scenes: Vec<Scene> = (0..2).map(|_| Scene::new(1 << 20)).collect();
    let mut backend = several(&scenes, &["--workers", "1"]);
    let mut good = Driver::connect(scenes[0].socket_path(), USUAL, 1, 1 << 20);
    let content = pattern(7, 1 << 19);
    assert_eq!(good.write(0, &content), 0);
    let mut bad = RawGuest::connect(&scenes[1].socket, INDIRECT_DESC);
    // What a descriptor of data may be from one moment to the next; and that of the status.
    let data = [
        (DATA, 512, NEXT, 2),
        (DATA, 4096, NEXT | WRITE, 2),
        (DATA, u32::MAX, NEXT | WRITE, 2),
        (MEMORY_BYTES - 256, 512, NEXT | WRITE, 2),
        (u64::MAX - 255, 512, NEXT, 2),
        (DATA, 512, NEXT, 1),
        (DATA, 512, NEXT, QUEUE_SIZE),
        (INDIRECT, 32, INDIRECT_FLAG, 0),
    ];
    let (memory, stop) = (bad.memory_file(), AtomicBool::new(false));
    let outcomes = std::thread::scope(|scope| {
        scope.spawn(|| {
            for fields in data.iter().cycle() {
                let bytes = descriptor_bytes(*fields);
                memory.write_all_at(&bytes, TABLE + 16).unwrap();
                memory.write_all_at(&bytes, INDIRECT).unwrap();
                if stop.load(Ordering::Relaxed) {
                    return;
                }
            }
        });
        let mut outcomes = [0; 2];
        for round in 0..3000_u64 {
            // Reads and writes, of sectors that are there and that aren't.
            bad.header(u32::from(round % 2 == 0), round);
            bad.descriptor(TABLE, 0, (HEADER, 16, NEXT, 1));
            bad.descriptor(TABLE, 2, (STATUS, 1, WRITE, 0));
            bad.submit(0);
            let used = bad.wait_used_or_broken();
            outcomes[usize::from(used)] += 1;
            if !used {
                let base = bad.frontend_base();
                bad.set_up_queue(base);
            }
        }
        stop.store(true, Ordering::Relaxed);
        outcomes
    });
    assert!(outcomes.iter().all(|count| *count > 0), "{outcomes:?}");
    assert!(backend.is_running());
    assert!(good.read(0, 1 << 19).unwrap() == content);
    assert!(scenes[0].image_bytes(0, 1 << 19) == content);
    assert_eq!(scenes[1].image.metadata().unwrap().len(), 1 << 20);
}

#[test]
fn workers_may_be_pinned_shared_or_one_for_each_queue() {
    for arguments in [
        &["--workers", "queue"][..],
        &["--workers", "1", "--poll-us", "0"],
        &["--cpus", "0", "--poll-us", "1000"],
        &["--pin-memory"],
        &["--submission-poll-ms", "5"],
    ] {
        let scenes: Vec<Scene> = (0..3).map(|_| Scene::new(1 << 20)).collect();
        let mut scenes_arguments = vec!["--queues", "2"];
        scenes_arguments.extend_from_slice(arguments);
        let backend = several(&scenes, &scenes_arguments);
        for (disk, scene) in scenes.iter().enumerate() {
            let mut driver = Driver::connect(scene.socket_path(), USUAL, 2, 1 << 20);
            let content = pattern(disk as u64, 1 << 16);
            assert_eq!(driver.write(4096, &content), 0);
            for slot in 0..64_u64 {
                let place = usize::try_from(slot).unwrap() * 4096;
                driver.queue_read(usize::try_from(slot % 2).unwrap(), 4096, place, 4096, slot);
            }
            assert!(driver.finish(0, 32).iter().all(|done| done.ret == 0));
            assert!(driver.finish(1, 32).iter().all(|done| done.ret == 0));
            assert!(
                driver.read(4096, 1 << 16).unwrap() == content,
                "{arguments:?}"
            );
        }
        assert_eq!(backend.terminate().code(), Some(0));
    }
}

#[test]
fn a_disk_that_is_described_wrongly_is_named_with_code_2() {
    for wrong in [
        "image=/dev/null",
        "socket=/tmp/a",
        "socket=/tmp/a,image=/b,size=4",
        "socket=/tmp/a,null=1000",
        "socket=/tmp/a,image=/b,queues=65",
        "socket=/tmp/a,image=/b,format=overlay,io-poll",
        "socket=/tmp/a,null=1M,io-poll",
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_keelson-blk"));
        command.args(["--disk", wrong]);
        assert_eq!(refusal(command).0, 2, "{wrong}");
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_keelson-blk"));
    command.args(["--disk", "socket=/tmp/a,image=/b,io-poll", "--pin-memory"]);
    assert_eq!(refusal(command).0, 2);
}
