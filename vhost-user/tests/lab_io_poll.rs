//! `--io-poll`, where a device has queues for it: in the lab, on the kernel's null_blk with memory.
//! What isn't polled for takes two seconds there, so whatever is quick was polled for.

#![allow(clippy::unwrap_used, reason = "in tests")]

mod harness;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use harness::driver::{Driver, USUAL};
use harness::{Backend, Scene, pattern, refusal};
use keelson_lab::{Exec, FileCopy, Lab, LabOptions};

const IN_LAB: &str = "KEELSON_IO_POLL_DEVICE";
const BLOCK: usize = 4096;

#[test]
fn a_device_that_polls_is_polled_and_others_are_refused() {
    if let Some(device) = std::env::var_os(IN_LAB) {
        return in_lab(Path::new(&device));
    }
    let (own, blk) = (
        std::env::current_exe().unwrap(),
        env!("CARGO_BIN_EXE_keelson-blk"),
    );
    let copy = |from: &Path, to: &str| FileCopy {
        from: from.into(),
        to: to.into(),
    };
    let lab = Lab::boot(&LabOptions {
        files: vec![
            copy(&own, "/usr/bin/io-poll-test"),
            copy(Path::new(blk), blk),
        ],
        ..LabOptions::default()
    })
    .unwrap_or_else(|error| panic!("{error}"));
    let script = format!(
        "modprobe null_blk nr_devices=1 gb=1 queue_mode=2 submit_queues=1 poll_queues=1 memory_backed=1 \
         irqmode=2 completion_nsec=2000000000 && mkdir -p {} && {IN_LAB}=/dev/nullb0 exec /usr/bin/io-poll-test --nocapture",
        env!("CARGO_TARGET_TMPDIR")
    );
    let exec = Exec {
        arguments: ["sh", "-c", &script].map(String::from).into(),
        timeout_seconds: Some(280),
        ..Exec::default()
    };
    let shown = lab
        .output(&exec, b"")
        .unwrap_or_else(|error| panic!("{error}"));
    let errors = String::from_utf8_lossy(&shown.stderr);
    println!("{}", shown.text());
    assert!(shown.status.success(), "{errors}");
    assert!(shown.text().contains("1 passed"), "{}", shown.text());
    lab.shut_down().unwrap();
}

fn in_lab(device: &Path) {
    let scene = Scene::new(1 << 20);
    let start = |image: &Path| {
        let mut command = harness::command(image, &scene.socket);
        command.args(["--io-poll", "--workers", "1"]);
        command
    };
    // The lab's own disk has no such queue.
    let (code, said) = refusal(start(&scene.image));
    assert_eq!(code, 3, "{said}");
    assert!(said.contains("no queue that polls"), "{said}");

    let backend = Backend::start(start(device));
    let mut driver = Driver::connect(scene.socket_path(), USUAL, 1, 1 << 20);
    let content = pattern(3, 64 * BLOCK);
    let begin = Instant::now();
    for (block, part) in content.chunks(BLOCK).enumerate() {
        let offset = (block * BLOCK) as u64;
        assert_eq!(driver.write(offset, part), 0);
        assert!(driver.read(offset, BLOCK).unwrap() == part, "block {block}");
    }
    // Two seconds for each of them otherwise, one after the other.
    let took = begin.elapsed();
    assert!(took < Duration::from_secs(128), "{took:?}");
    println!("128 polled requests took {took:?}");

    // Many at once.
    for slot in 0..64_u64 {
        let place = usize::try_from(slot).unwrap() * BLOCK;
        driver.queue_read(0, slot * BLOCK as u64, place, BLOCK, slot);
    }
    assert!(driver.finish(0, 64).iter().all(|done| done.ret == 0));
    // What isn't aligned goes through a buffer, and a flush through the worker's own ring.
    assert_eq!(driver.write(512, &pattern(4, 1024)), 0);
    assert!(driver.read(512, 1024).unwrap() == pattern(4, 1024));
    assert_eq!(driver.flush(), 0);

    std::thread::sleep(Duration::from_millis(500));
    let before = backend.processor_time();
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(backend.processor_time(), before, "an idle worker polls");

    // A queue that starts anew has its ring again.
    drop(driver);
    let mut driver = Driver::connect(scene.socket_path(), USUAL, 1, 1 << 20);
    assert!(driver.read(512, 1024).unwrap() == pattern(4, 1024));
    drop(driver);
    assert_eq!(backend.terminate().code(), Some(0));
    let mut stored = vec![0; 64 * BLOCK];
    File::open(device)
        .unwrap()
        .read_exact_at(&mut stored, 0)
        .unwrap();
    let mut expected = content;
    expected[512..1536].copy_from_slice(&pattern(4, 1024));
    assert!(stored == expected, "the device holds something else");
}
