//! Reads and writes against a real file, through the crate `virtio-driver`.

mod harness;

use harness::driver::{Driver, EVENT_IDX, FLUSH, MQ, USUAL, VERSION_1};
use harness::{Scene, pattern};

const MIB: usize = 1 << 20;

#[test]
fn what_is_written_is_read_back_and_is_in_the_file() {
    let scene = Scene::new(64 << 20);
    let known = pattern(1, MIB);
    scene.fill(8 << 20, &known);
    let backend = scene.start(&[]);
    assert_eq!(backend.ready["capacity_bytes"], 64 << 20);
    let mut driver = Driver::connect(scene.socket_path(), USUAL, 1, 4 * MIB);
    assert_eq!(u64::from(driver.config().capacity), (64 << 20) / 512);

    assert!(driver.read(8 << 20, MIB).unwrap() == known);
    let written = pattern(2, MIB);
    assert_eq!(driver.write(16 << 20, &written), 0);
    assert_eq!(driver.flush(), 0);
    assert!(driver.read(16 << 20, MIB).unwrap() == written);
    assert!(scene.image_bytes(16 << 20, MIB) == written);
    assert!(scene.image_bytes(8 << 20, MIB) == known);
}

#[test]
fn every_negotiation_of_notifications_works_at_depth() {
    for features in [VERSION_1, VERSION_1 | EVENT_IDX, USUAL] {
        let scene = Scene::new(16 << 20);
        let _backend = scene.start(&[]);
        let mut driver = Driver::connect(scene.socket_path(), features, 1, 4 * MIB);
        for round in 0..20_u64 {
            for slot in 0..128_u64 {
                let place = usize::try_from(slot).unwrap() * 4096;
                driver.put(place, &pattern(round << 8 | slot, 4096));
                driver.queue_write(0, slot * 8192, place, 4096, slot);
            }
            assert!(driver.finish(0, 128).iter().all(|done| done.ret == 0));
        }
        for slot in 0..128_u64 {
            let bytes = driver.read(slot * 8192, 4096).unwrap();
            assert!(bytes == pattern(19 << 8 | slot, 4096), "block {slot}");
        }
    }
}

#[test]
fn queues_work_side_by_side() {
    let scene = Scene::new(16 << 20);
    let _backend = scene.start(&["--queues", "4"]);
    let mut driver = Driver::connect(scene.socket_path(), USUAL | MQ, 4, 4 * MIB);
    assert_eq!(u16::from(driver.config().num_queues), 4);
    for queue in 0..4 {
        for slot in 0..32 {
            let place = (queue * 32 + slot) * 4096;
            driver.put(place, &pattern(place as u64, 4096));
            driver.queue_write(queue, place as u64, place, 4096, 0);
        }
        driver.kick(queue);
    }
    for queue in 0..4 {
        assert!(driver.finish(queue, 32).iter().all(|done| done.ret == 0));
    }
    for place in (0_u64..128 * 4096).step_by(4096) {
        assert!(scene.image_bytes(place, 4096) == pattern(place, 4096));
    }
}

#[test]
fn buffers_at_odd_addresses_are_bounced() {
    let scene = Scene::new(16 << 20);
    scene.fill(0, &pattern(7, 2 * MIB));
    let _backend = scene.start(&[]);
    let mut driver = Driver::connect(scene.socket_path(), USUAL, 1, 4 * MIB);
    for (place, len) in [(1, 512), (3, 4096), (513, 70 * 1024), (4095, MIB + 512)] {
        driver.queue_read(0, 512, place, len, 0);
        assert_eq!(driver.finish(0, 1)[0].ret, 0);
        assert!(driver.get(place, len) == pattern(7, 2 * MIB)[512..512 + len]);

        let written = pattern(place as u64, len);
        driver.put(place, &written);
        driver.queue_write(0, 4 << 20, place, len, 0);
        assert_eq!(driver.finish(0, 1)[0].ret, 0);
        assert!(scene.image_bytes(4 << 20, len) == written);
        // Neighbours on both sides are untouched.
        assert_eq!(scene.image_bytes((4 << 20) - 512, 512), [0; 512]);
        assert_eq!(scene.image_bytes((4 << 20) + len as u64, 512), [0; 512]);
    }
}

#[test]
fn through_the_page_cache_it_is_the_same() {
    let scene = Scene::new(16 << 20);
    let backend = scene.start(&["--direct", "off"]);
    assert_eq!(backend.ready["direct"], false);
    let mut driver = Driver::connect(scene.socket_path(), USUAL, 1, 4 * MIB);
    let written = pattern(3, 3 * 512);
    driver.put(1, &written);
    driver.queue_write(0, 512, 1, written.len(), 0);
    assert_eq!(driver.finish(0, 1)[0].ret, 0);
    assert!(driver.read(512, written.len()).unwrap() == written);
    assert!(scene.image_bytes(512, written.len()) == written);
}

#[test]
fn outside_the_disk_is_an_io_error_and_nothing_grows() {
    let scene = Scene::new(1 << 20);
    let _backend = scene.start(&[]);
    let mut driver = Driver::connect(scene.socket_path(), USUAL, 1, 4 * MIB);
    assert_eq!(driver.write(1 << 20, &[1; 512]), -libc::EIO);
    assert_eq!(driver.write((1 << 20) - 512, &[1; 1024]), -libc::EIO);
    assert_eq!(driver.read(!511, 512), Err(-libc::EIO));
    assert_eq!(driver.write(0, &[1; 100]), -libc::EIO, "not a whole sector");
    assert_eq!(std::fs::metadata(&scene.image).unwrap().len(), 1 << 20);
    assert_eq!(driver.write((1 << 20) - 512, &[1; 512]), 0);
}

#[test]
fn a_read_only_disk_says_so_and_refuses_writes() {
    let scene = Scene::new(1 << 20);
    scene.fill(0, &pattern(4, 4096));
    let backend = scene.start(&["--read-only"]);
    assert_eq!(backend.ready["read_only"], true);
    let mut driver = Driver::connect(scene.socket_path(), USUAL, 1, MIB);
    assert_ne!(driver.features() & harness::driver::RO, 0);
    assert!(driver.read(0, 4096).unwrap() == pattern(4, 4096));
    assert_eq!(driver.write(0, &[0; 512]), -libc::EIO);
    assert_eq!(driver.flush(), 0);
    assert!(scene.image_bytes(0, 4096) == pattern(4, 4096));
}

#[test]
fn what_is_not_offered_is_unsupported() {
    let scene = Scene::new(1 << 20);
    let _backend = scene.start(&["--read-only"]);
    let mut driver = Driver::connect(scene.socket_path(), USUAL, 1, MIB);
    driver.queue_discard(0, 0, 4096, 0);
    assert_eq!(driver.finish(0, 1)[0].ret, -libc::ENOTSUP);
    assert_eq!(driver.flush(), 0);
}

#[test]
fn a_size_that_is_no_multiple_of_a_sector_is_rounded_up_with_zeroes() {
    let scene = Scene::new(4096 + 100);
    scene.fill(4096, &[7; 100]);
    let backend = scene.start(&[]);
    assert_eq!(backend.ready["capacity_bytes"], 4096 + 512);
    let mut driver = Driver::connect(scene.socket_path(), USUAL | FLUSH, 1, MIB);
    let mut expected = vec![0; 4096];
    expected.extend_from_slice(&[7; 100]);
    expected.resize(4096 + 512, 0);
    driver.put(0, &[0xff; 8192]);
    assert!(driver.read(0, 4096 + 512).unwrap() == expected);
    driver.queue_read(0, 4096, 8193, 512, 0);
    assert_eq!(driver.finish(0, 1)[0].ret, 0);
    assert!(driver.get(8193, 512) == expected[4096..]);
    assert_eq!(driver.write(4096, &[9; 512]), 0);
    assert!(driver.read(4096, 512).unwrap() == [9; 512]);
}

#[test]
fn a_device_of_4_kib_sectors_is_shown_as_such_and_read_in_any_piece() {
    let scene = Scene::new(1 << 20);
    scene.fill(0, &pattern(5, MIB));
    let Some(device) = harness::loop_device::LoopDevice::with_sectors(&scene.image, 4096) else {
        return;
    };
    let command = harness::command(device.path().as_ref(), &scene.socket);
    let backend = harness::Backend::start(command);
    assert_eq!(backend.ready["direct"], true);
    let mut driver = Driver::connect(scene.socket_path(), USUAL, 1, 4 * MIB);
    assert_eq!(u32::from(driver.config().blk_size), 4096);
    for (offset, len) in [(512, 512), (0, 4096), (3584, 1024), (512, 300 * 1024)] {
        let place = usize::try_from(offset).unwrap();
        let bytes = driver.read(offset, len).unwrap();
        assert!(bytes == pattern(5, MIB)[place..place + len], "{offset}");
    }
    assert_eq!(driver.write(4096, &[1; 4096]), 0);
    assert_eq!(driver.write(512, &[1; 512]), -libc::EIO);
    assert_eq!(driver.read(4096, 4096).unwrap(), [1; 4096]);
}
