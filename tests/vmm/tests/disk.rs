//! Disks: what one side writes, the other reads.

use std::time::Duration;

use keelson_vmm_tests::{Backend, GuestBuilder, Image};
use rustix::process::Signal;
use tempfile::TempDir;

const SECTORS: u64 = 16_384;

#[test]
fn what_the_guest_writes_is_in_the_image() {
    let builder = GuestBuilder::new(
        "blk-write:seed=7,first=100,sectors=8000 blk-verify:seed=7,first=100,sectors=8000",
    );
    let image = Image::create(SECTORS);
    let backend = Backend::start(image.path(), &builder.directory().join("blk.sock"), &[]);
    builder
        .disk("disk", &backend, false, 1)
        .run()
        .assert_passed();
    image.assert_pattern(100, 8000, 7);
    let zeros = |bytes: Vec<u8>| bytes.iter().all(|byte| *byte == 0);
    assert!(
        zeros(image.read(0, 100)) && zeros(image.read(8100, 100)),
        "written beyond the range"
    );
}

#[test]
fn what_the_host_wrote_the_guest_reads() {
    let builder = GuestBuilder::new("blk-verify:seed=42");
    let image = Image::create(SECTORS);
    image.write_pattern(0, SECTORS, 42);
    let backend = Backend::start(image.path(), &builder.directory().join("blk.sock"), &[]);
    let ended = builder.disk("disk", &backend, false, 1).run();
    ended.assert_passed();
    ended.line(&format!("payload: blk-verify ok sectors={SECTORS}"));
}

#[test]
fn wrong_data_is_found() {
    let builder = GuestBuilder::new("blk-verify:seed=42");
    let image = Image::create(SECTORS);
    image.write_pattern(0, SECTORS, 42);
    image.write_pattern(9999, 1, 43);
    let backend = Backend::start(image.path(), &builder.directory().join("blk.sock"), &[]);
    let ended = builder.disk("disk", &backend, false, 1).run();
    ended.line("payload: FAIL step=blk-verify reason=sector 9999 is wrong from byte 8 on");
}

#[test]
fn requests_of_every_size_and_depth_work() {
    let builder = GuestBuilder::new(
        "blk-write:seed=1,size=512,depth=64,sectors=2000 blk-verify:seed=1,size=4096,depth=1,sectors=2000 \
         blk-write:seed=2,size=65536,depth=32 blk-verify:seed=2,size=512,sectors=999,depth=3 \
         blk-verify:seed=2,depth=64 blk-flush",
    );
    let image = Image::create(SECTORS);
    let backend = Backend::start(image.path(), &builder.directory().join("blk.sock"), &[]);
    builder
        .disk("disk", &backend, false, 1)
        .run()
        .assert_passed();
    image.assert_pattern(0, SECTORS, 2);
}

#[test]
fn several_queues_carry_one_disk() {
    let builder = GuestBuilder::new("blk-id blk-write:seed=3,depth=32 blk-verify:seed=3,depth=32");
    let image = Image::create(SECTORS);
    let socket = builder.directory().join("blk.sock");
    let backend = Backend::start(image.path(), &socket, &["--queues", "4"]);
    let ended = builder.disk("disk", &backend, false, 4).run();
    ended.assert_passed();
    assert!(ended.line("payload: blk-id ok").contains("queues=4"));
    image.assert_pattern(0, SECTORS, 3);
}

#[test]
fn the_guest_sees_serial_and_capacity() {
    let builder = GuestBuilder::new("blk-id");
    let image = Image::create(12_345);
    let socket = builder.directory().join("blk.sock");
    let backend = Backend::start(image.path(), &socket, &["--serial", "keelson-0001"]);
    let ended = builder.disk("disk", &backend, false, 1).run();
    ended.assert_passed();
    let line = ended.line("payload: blk-id ok serial=keelson-0001 sectors=12345 read_only=false");
    assert!(line.contains("flush=true"), "{line}");
}

#[test]
fn disks_keep_their_order_and_their_data() {
    let builder = GuestBuilder::new(
        "blk-write:disk=0,seed=10 blk-write:disk=1,seed=11 blk-verify:disk=0,seed=10 blk-verify:disk=1,seed=11",
    );
    let first = Image::create(1000);
    let second = Image::create(2000);
    let first_backend = Backend::start(first.path(), &builder.directory().join("1.sock"), &[]);
    let second_backend = Backend::start(second.path(), &builder.directory().join("2.sock"), &[]);
    let ended = builder
        .disk("a", &first_backend, false, 1)
        .disk("b", &second_backend, false, 1)
        .run();
    ended.assert_passed();
    first.assert_pattern(0, 1000, 10);
    second.assert_pattern(0, 2000, 11);
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let builder = GuestBuilder::new("blk-verify:seed=5 blk-readonly-write blk-verify:seed=5");
    let image = Image::create(2048);
    image.write_pattern(0, 2048, 5);
    let socket = builder.directory().join("blk.sock");
    let backend = Backend::start(image.path(), &socket, &["--read-only"]);
    builder
        .disk("disk", &backend, true, 1)
        .run()
        .assert_passed();
    image.assert_pattern(0, 2048, 5);
}

#[test]
fn requests_beyond_the_end_fail_and_touch_nothing() {
    let builder = GuestBuilder::new("blk-out-of-range blk-verify:seed=6");
    let image = Image::create(2048);
    image.write_pattern(0, 2048, 6);
    let backend = Backend::start(image.path(), &builder.directory().join("blk.sock"), &[]);
    builder
        .disk("disk", &backend, false, 1)
        .run()
        .assert_passed();
    image.assert_pattern(0, 2048, 6);
    let length = std::fs::metadata(image.path())
        .expect("the image is there")
        .len();
    assert_eq!(length, 2048 * 512);
}

#[test]
fn a_disk_comes_back_with_a_new_backend() {
    let builder = GuestBuilder::new("blk-watch:outages=1,ms=50000 blk-verify:seed=8");
    let image = Image::create(2048);
    image.write_pattern(0, 2048, 8);
    let socket = builder.directory().join("blk.sock");
    let backend = Backend::start(image.path(), &socket, &[]);
    let mut guest = builder.disk("disk", &backend, false, 1).start();
    guest.wait_for_line("payload: blk-watch up");
    backend.kill();
    guest.wait_for_line("payload: blk-watch down");
    guest
        .client()
        .status()
        .expect("the VMM lives without its disk's backend");
    // A killed backend leaves its socket behind.
    let _ = std::fs::remove_file(&socket);
    let _backend = Backend::start(image.path(), &socket, &[]);
    guest.wait_for_line("payload: blk-watch ok");
    guest.wait().assert_passed();
}

#[test]
fn a_driver_that_starts_over_while_there_is_no_backend_waits_for_one() {
    let builder = GuestBuilder::new(
        "blk-verify:seed=8 console-read:ms=120000 blk-verify:seed=8 blk-verify:seed=8",
    );
    let image = Image::create(2048);
    image.write_pattern(0, 2048, 8);
    let socket = builder.directory().join("blk.sock");
    let backend = Backend::start(image.path(), &socket, &[]);
    let mut guest = builder.disk("disk", &backend, false, 1).start();
    guest.wait_for_line("payload: blk-verify ok");
    backend.kill();
    let _ = std::fs::remove_file(&socket);
    // Each step resets the device and sets it up.
    guest.type_line("go on");
    guest.wait_for_line("payload: console-read ok");
    std::thread::sleep(Duration::from_millis(300));
    guest
        .client()
        .status()
        .expect("the VMM lives without its disk's backend");
    let _backend = Backend::start(image.path(), &socket, &[]);
    guest.wait().assert_passed();
}

#[test]
fn a_disk_that_grows_interrupts_the_guest_which_then_uses_all_of_it() {
    let builder = GuestBuilder::new("blk-grow:ms=60000");
    let image = Image::create(SECTORS);
    let backend = Backend::start(image.path(), &builder.directory().join("blk.sock"), &[]);
    let mut guest = builder.disk("disk", &backend, false, 1).start();
    guest.wait_for_line(&format!("payload: blk-grow ready sectors={SECTORS}"));
    image.grow(3 * SECTORS);
    backend.signal(Signal::HUP);
    let ended = guest.wait();
    ended.assert_passed();
    ended.line(&format!("payload: blk-grow ok sectors={}", 3 * SECTORS));
}

#[test]
fn a_guest_without_its_backend_can_be_ended() {
    let builder = GuestBuilder::new("blk-watch:outages=1,ms=600000");
    let image = Image::create(2048);
    let backend = Backend::start(image.path(), &builder.directory().join("blk.sock"), &[]);
    let mut guest = builder.disk("disk", &backend, false, 1).start();
    guest.wait_for_line("payload: blk-watch up");
    backend.kill();
    guest.wait_for_line("payload: blk-watch down");
    guest.client().kill().expect("it can be killed");
    assert_eq!(guest.wait().code, Some(0));
}

#[test]
fn a_backend_serves_the_next_guest_after_a_killed_one() {
    let image = Image::create(SECTORS);
    let directory = TempDir::new().expect("there is a place for temporary files");
    let mut backend = Backend::start(image.path(), &directory.path().join("blk.sock"), &[]);
    let writes = "blk-write:seed=1,depth=32 ".repeat(60);
    let mut first = GuestBuilder::new(&format!("hello {writes}"))
        .disk("disk", &backend, false, 1)
        .start();
    first.wait_for_line("payload: blk-write ok");
    first.signal(Signal::KILL);
    assert_eq!(first.wait().code, None);
    let second = GuestBuilder::new("blk-write:seed=2 blk-verify:seed=2")
        .disk("disk", &backend, false, 1)
        .run();
    second.assert_passed();
    assert!(backend.is_running());
    image.assert_pattern(0, SECTORS, 2);
}
