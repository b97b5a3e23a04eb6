//! Disks that fail: the guest is told, and the backend goes on.

mod harness;

use std::fs::File;

use harness::driver::{Driver, USUAL};
use harness::loop_device::{LoopDevice, SmallFileSystem};
use harness::{Backend, Scene, pattern};

#[test]
fn an_image_cut_off_while_it_runs_gives_errors_where_it_is_gone() {
    for direct in ["auto", "off"] {
        let scene = Scene::new(1 << 20);
        scene.fill(0, &pattern(1, 1 << 20));
        let mut backend = scene.start(&["--direct", direct]);
        let mut driver = Driver::connect(scene.socket_path(), USUAL, 1, 1 << 20);
        let file = File::options().write(true).open(&scene.image).unwrap();
        file.set_len(512 << 10).unwrap();

        assert_eq!(driver.read(768 << 10, 4096), Err(-libc::EIO));
        assert_eq!(driver.read((512 << 10) - 4096, 8192), Err(-libc::EIO));
        assert!(driver.read(0, 512 << 10).unwrap() == pattern(1, 1 << 20)[..512 << 10]);
        assert_eq!(driver.write(0, &[1; 4096]), 0);
        assert!(backend.is_running());
    }
}

#[test]
fn a_device_that_cannot_write_gives_errors_and_recovers_with_it() {
    const DEVICE_BYTES: u64 = 64 << 20;
    let scene = Scene::new(1 << 20);
    let Some(small) = SmallFileSystem::mount(scene.directory.path(), 4 << 20) else {
        return;
    };
    // A disk of 64 MiB on 4 MiB of memory, of which something else holds 2.
    let backing = small.path().join("backing");
    File::create(&backing)
        .unwrap()
        .set_len(DEVICE_BYTES)
        .unwrap();
    let hog = small.path().join("hog");
    std::fs::write(&hog, vec![0; 2 << 20]).unwrap();
    let device = LoopDevice::over(&backing).unwrap();
    let mut backend = Backend::start(harness::command(device.path().as_ref(), &scene.socket));
    assert_eq!(backend.ready["capacity_bytes"], DEVICE_BYTES);
    let mut driver = Driver::connect(scene.socket_path(), USUAL, 1, 1 << 20);

    let mut failed = None;
    for block in 0..64_u64 {
        match driver.write(block << 16, &vec![1; 1 << 16]) {
            0 => {}
            errno => {
                assert_eq!(errno, -libc::EIO);
                failed = Some(block);
                break;
            }
        }
    }
    let failed = failed.expect("2 MiB to hold less than 4");
    assert!(backend.is_running());
    assert_eq!(driver.read(0, 4096).unwrap(), [1; 4096]);

    std::fs::remove_file(&hog).unwrap();
    assert_eq!(driver.write(failed << 16, &vec![2; 1 << 16]), 0);
    assert_eq!(driver.flush(), 0);
    assert_eq!(driver.read(failed << 16, 4096).unwrap(), [2; 4096]);
}

#[test]
fn a_mounted_device_is_in_use() {
    let scene = Scene::new(16 << 20);
    let Some(device) = LoopDevice::over(&scene.image) else {
        return;
    };
    let mut mkfs = std::process::Command::new("mkfs.ext4");
    let made = mkfs.args(["-q", device.path()]).status().unwrap();
    assert!(made.success());
    let point = scene.directory.path().join("mounted");
    std::fs::create_dir(&point).unwrap();
    let mut mount = std::process::Command::new("mount");
    assert!(
        mount
            .arg(device.path())
            .arg(&point)
            .status()
            .unwrap()
            .success()
    );
    let outcome = harness::refusal(harness::command(device.path().as_ref(), &scene.socket));
    let mut unmount = std::process::Command::new("umount");
    assert!(unmount.arg(&point).status().unwrap().success());
    assert_eq!(outcome.0, 4, "{}", outcome.1);
}
