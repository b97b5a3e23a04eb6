//! What has been acknowledged stays.

#![allow(
    clippy::unwrap_used,
    reason = "the exception for tests covers only their functions"
)]

mod harness;

use harness::driver::{Driver, FLUSH, USUAL};
use harness::loop_device::flushes;
use harness::{Backend, Scene, pattern};

const BLOCK: usize = 4096;
const BLOCKS: u64 = 256;

#[test]
fn flushed_blocks_survive_kills_at_any_moment() {
    let scene = Scene::new(BLOCKS * BLOCK as u64);
    let mut flushed = vec![0_u64; usize::try_from(BLOCKS).unwrap()];
    let mut maybe = flushed.clone();
    let mut version = 0;
    for kill in 0..30_u64 {
        let backend = scene.start(&[]);
        let mut driver = Driver::connect(scene.socket_path(), USUAL, 1, 4 << 20);
        check(&mut driver, &mut flushed, &mut maybe);
        for _ in 0..kill % 4 {
            write_some(&mut driver, &mut version, &mut maybe);
            assert_eq!(driver.flush(), 0);
            flushed.clone_from(&maybe);
        }
        // Killed with these in flight: each block may have the old or the new content.
        write_unfinished(&mut driver, &mut version, &mut maybe);
        backend.kill();
    }
}

fn content(block: usize, version: u64) -> Vec<u8> {
    match version {
        0 => vec![0; BLOCK],
        _ => pattern((block as u64) << 32 | version, BLOCK),
    }
}

fn check(driver: &mut Driver, flushed: &mut [u64], maybe: &mut [u64]) {
    for block in 0..flushed.len() {
        let found = driver.read((block * BLOCK) as u64, BLOCK).unwrap();
        let version = [flushed[block], maybe[block]]
            .into_iter()
            .find(|version| found == content(block, *version));
        let version = version.unwrap_or_else(|| panic!("block {block} is lost or torn"));
        (flushed[block], maybe[block]) = (version, version);
    }
}

fn queue_writes(driver: &mut Driver, version: &mut u64, maybe: &mut [u64]) {
    *version += 1;
    for slot in 0..64 {
        let block = (slot * 37 + usize::try_from(*version).unwrap() * 11) % maybe.len();
        driver.put(slot * BLOCK, &content(block, *version));
        driver.queue_write(0, (block * BLOCK) as u64, slot * BLOCK, BLOCK, 0);
        maybe[block] = *version;
    }
}

fn write_some(driver: &mut Driver, version: &mut u64, maybe: &mut [u64]) {
    queue_writes(driver, version, maybe);
    assert!(driver.finish(0, 64).iter().all(|done| done.ret == 0));
}

fn write_unfinished(driver: &mut Driver, version: &mut u64, maybe: &mut [u64]) {
    queue_writes(driver, version, maybe);
    driver.kick(0);
}

// How many cache flushes a loop device has completed (Documentation/block/stat.rst).
#[test]
fn without_flush_each_write_is_durable_and_with_it_flushes_are() {
    let scene = Scene::new(16 << 20);
    let Some(device) = harness::loop_device::LoopDevice::over(&scene.image) else {
        return;
    };
    let command = harness::command(device.path().as_ref(), &scene.socket);
    let _backend = Backend::start(command);

    let mut driver = Driver::connect(scene.socket_path(), USUAL & !FLUSH, 1, 1 << 20);
    let before = flushes(device.path());
    for block in 0..10 {
        assert_eq!(driver.write(block * 4096, &[1; 4096]), 0);
    }
    assert!(flushes(device.path()) >= before + 10);
    drop(driver);

    let mut driver = Driver::connect(scene.socket_path(), USUAL, 1, 1 << 20);
    let before = flushes(device.path());
    for block in 0..10 {
        assert_eq!(driver.write(block * 4096, &[2; 4096]), 0);
    }
    assert_eq!(flushes(device.path()), before);
    assert_eq!(driver.flush(), 0);
    assert_eq!(flushes(device.path()), before + 1);
}
