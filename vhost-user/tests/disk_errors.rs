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
fn a_full_file_system_under_an_overlay_gives_errors_until_there_is_room() {
    const STRIPE: u64 = 64 << 10;
    let scene = Scene::new(16 << 20);
    let base = pattern(2, 16 << 20);
    scene.fill(0, &base);
    let Some(small) = SmallFileSystem::mount(scene.directory.path(), 4 << 20) else {
        return;
    };
    let overlay = small.path().join("overlay.img");
    let created = std::process::Command::new(env!("CARGO_BIN_EXE_keelson-blk"))
        .args(["image", "create", "--overlay-of"])
        .args([&scene.image, &overlay])
        .status();
    assert!(created.unwrap().success());
    let hog = small.path().join("hog");
    std::fs::write(&hog, vec![0; 2 << 20]).unwrap();
    // On the same worker, with room of its own.
    let neighbour = scene.directory.path().join("neighbour.img");
    std::fs::write(&neighbour, vec![0; 1 << 20]).unwrap();
    let other = scene.directory.path().join("other.sock");
    let disk = format!("socket={},image={}", other.display(), neighbour.display());
    let start = || {
        let mut command = harness::command(&overlay, &scene.socket);
        command.args(["--format", "overlay", "--workers", "1", "--disk"]);
        Backend::start({
            command.arg(format!("{disk},format=raw"));
            command
        })
    };
    let mut backend = start();
    let mut driver = Driver::connect(scene.socket_path(), USUAL, 1, 1 << 20);
    let mut beside = Driver::connect(other.to_str().unwrap(), USUAL, 1, 1 << 20);

    // A sector each, so that its stripe has to be copied up.
    let mut failed = None;
    for stripe in 0..64 {
        match driver.write(stripe * STRIPE, &[7; 512]) {
            0 => {}
            errno => {
                assert_eq!(errno, -libc::EIO);
                failed = Some(stripe);
                break;
            }
        }
        assert_eq!(beside.write(0, &[1; 4096]), 0);
    }
    let failed = failed.expect("2 MiB to hold less than 4");
    assert!(failed > 8, "{failed}");
    assert!(backend.is_running());
    let check = |driver: &mut Driver, written: u64| {
        for stripe in 0..=failed {
            let place = usize::try_from(stripe * STRIPE).unwrap();
            let mut expected = base[place..place + 1024].to_vec();
            if stripe < written {
                expected[..512].fill(7);
            }
            assert!(
                driver.read(stripe * STRIPE, 1024) == Ok(expected),
                "{stripe}"
            );
        }
    };
    // What failed is as it was, and what is there can be written and flushed.
    check(&mut driver, failed);
    assert_eq!(driver.write(0, &[7; 512]), 0);
    assert_eq!(driver.flush(), 0);
    assert_eq!(beside.flush(), 0);

    std::fs::remove_file(&hog).unwrap();
    assert_eq!(driver.write(failed * STRIPE, &[7; 512]), 0);
    assert_eq!(driver.flush(), 0);
    backend.kill();
    let backend = start();
    let mut driver = Driver::connect(scene.socket_path(), USUAL, 1, 1 << 20);
    check(&mut driver, failed + 1);
    drop((driver, beside));
    assert_eq!(backend.terminate().code(), Some(0));
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
