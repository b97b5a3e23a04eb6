//! Starting, refusing to start, one frontend after another, and stopping.

mod harness;

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::Command;

use harness::driver::{Driver, USUAL};
use harness::{Scene, command, pattern, refusal};

#[test]
fn an_image_that_cannot_be_a_disk_is_refused_with_code_3() {
    let scene = Scene::new(0);
    let missing = scene.directory.path().join("missing.img");
    for (image, word) in [
        (missing.as_path(), "No such file"),
        (scene.directory.path(), "a directory"),
        (scene.image.as_path(), "size 0"),
        ("/dev/null".as_ref(), "a character device"),
    ] {
        let (code, reason) = refusal(command(image, &scene.socket));
        assert_eq!(code, 3, "{reason}");
        assert!(reason.contains(word), "{reason}");
        assert!(reason.contains(image.to_str().unwrap()), "{reason}");
    }
}

#[test]
fn an_image_in_use_is_refused_with_code_4_and_names_the_holder() {
    let scene = Scene::new(1 << 20);
    let writer = scene.start(&[]);
    let other_socket = scene.directory.path().join("other.sock");
    for arguments in [&[][..], &["--read-only"][..]] {
        let mut second = command(&scene.image, &other_socket);
        second.args(arguments);
        let (code, reason) = refusal(second);
        assert_eq!(code, 4, "{reason}");
        let holder = format!("process {} (keelson-blk)", writer.id());
        assert!(reason.contains(&holder), "{reason}");
    }
    assert!(!other_socket.exists());
    writer.kill();
    drop(scene.start(&[]));
}

#[test]
fn readers_share_an_image_and_keep_writers_out() {
    let scene = Scene::new(1 << 20);
    let _first = scene.start(&["--read-only"]);
    let other_socket = scene.directory.path().join("other.sock");
    let mut second = command(&scene.image, &other_socket);
    second.arg("--read-only");
    let _second = harness::Backend::start(second);
    let third_socket = scene.directory.path().join("third.sock");
    assert_eq!(refusal(command(&scene.image, &third_socket)).0, 4);
}

#[test]
fn a_socket_that_is_taken_is_refused_with_code_6_and_a_stale_one_replaced() {
    let scene = Scene::new(1 << 20);
    let listener = UnixListener::bind(&scene.socket).unwrap();
    let (code, reason) = refusal(scene.command());
    assert_eq!(code, 6, "{reason}");
    assert!(reason.contains("another process listens there"), "{reason}");
    drop(listener);

    drop(scene.start(&[]));
    std::fs::remove_file(&scene.socket).unwrap();
    std::fs::write(&scene.socket, "precious").unwrap();
    let (code, reason) = refusal(scene.command());
    assert_eq!(code, 6, "{reason}");
    assert_eq!(std::fs::read(&scene.socket).unwrap(), b"precious");
}

#[test]
fn wrong_usage_has_code_2() {
    let scene = Scene::new(1 << 20);
    for arguments in [
        ["--queues", "0"],
        ["--queues", "65"],
        ["--queue-size", "100"],
        ["--queue-size", "2048"],
        ["--serial", "more than twenty bytes"],
        ["--direct", "maybe"],
    ] {
        let mut command = scene.command();
        command.args(arguments);
        assert_eq!(refusal(command).0, 2, "{arguments:?}");
    }
}

// Makes io_uring_setup fail in the child, as containers' seccomp profiles do.
fn without_io_uring(command: &mut Command, errno: u16) {
    let errno = u32::from(errno);
    let filter = move || {
        let statement = |code: u32, jump_true, k| libc::sock_filter {
            code: u16::try_from(code).unwrap_or_default(),
            jt: jump_true,
            jf: 0,
            k,
        };
        let number = u32::try_from(libc::SYS_io_uring_setup).unwrap_or_default();
        let mut program = [
            statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
            statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, number),
            statement(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
            statement(
                libc::BPF_RET | libc::BPF_K,
                0,
                libc::SECCOMP_RET_ERRNO | errno,
            ),
        ];
        let program = libc::sock_fprog {
            len: 4,
            filter: program.as_mut_ptr(),
        };
        // SAFETY: plain system calls with pointers into this frame.
        let failed = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
                || libc::prctl(libc::PR_SET_SECCOMP, 2, &raw const program, 0, 0) != 0
        };
        if failed {
            return Err(std::io::Error::last_os_error());
        }
        Ok(())
    };
    // SAFETY: the closure makes system calls only and allocates nothing.
    unsafe { command.pre_exec(filter) };
}

#[test]
fn forbidden_io_uring_is_said_with_code_5() {
    for (errno, word) in [(libc::EPERM, "seccomp"), (libc::ENOSYS, "ENOSYS")] {
        let scene = Scene::new(1 << 20);
        let mut command = scene.command();
        without_io_uring(&mut command, u16::try_from(errno).unwrap());
        let (code, reason) = refusal(command);
        assert_eq!(code, 5, "{reason}");
        assert!(
            reason.contains("io_uring") && reason.contains(word),
            "{reason}"
        );
    }
}

#[test]
fn only_the_owner_may_connect() {
    let scene = Scene::new(1 << 20);
    let _backend = scene.start(&[]);
    let mode = std::fs::metadata(&scene.socket)
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn the_next_frontend_is_served_after_one_disconnects() {
    let scene = Scene::new(4 << 20);
    let backend = scene.start(&["--queues", "2"]);
    for round in 0..20_u64 {
        let mut driver = Driver::connect(scene.socket_path(), USUAL, 2, 1 << 20);
        if round > 0 {
            assert!(driver.read(0, 65536).unwrap() == pattern(round - 1, 65536));
        }
        assert_eq!(driver.write(0, &pattern(round, 65536)), 0);
        // Leave with requests in flight: nobody waits for these.
        for slot in 0..64 {
            driver.queue_read(1, slot * 4096, 0, 4096, slot);
        }
        driver.kick(1);
    }
    assert_eq!(backend.terminate().code(), Some(0));
}

#[test]
fn a_frontend_that_waits_is_served_when_the_first_leaves() {
    let scene = Scene::new(1 << 20);
    let _backend = scene.start(&[]);
    let first = Driver::connect(scene.socket_path(), USUAL, 1, 1 << 20);
    let path = scene.socket_path().to_owned();
    let second = std::thread::spawn(move || {
        let mut driver = Driver::connect(&path, USUAL, 1, 1 << 20);
        driver.write(0, &[5; 512])
    });
    drop(first);
    assert_eq!(second.join().unwrap(), 0);
}

#[test]
fn sigterm_finishes_what_is_in_flight_and_exits_0() {
    let scene = Scene::new(64 << 20);
    let backend = scene.start(&[]);
    let mut driver = Driver::connect(scene.socket_path(), USUAL, 1, 4 << 20);
    for slot in 0..128_u64 {
        let place = usize::try_from(slot).unwrap() * 16384;
        driver.put(place, &pattern(slot, 16384));
        driver.queue_write(0, slot * 16384, place, 16384, slot);
    }
    let done = driver.finish(0, 128);
    assert!(done.iter().all(|done| done.ret == 0));
    assert_eq!(backend.terminate().code(), Some(0));
    assert!(!scene.socket.exists());
    for slot in 0..128_u64 {
        assert!(scene.image_bytes(slot * 16384, 16384) == pattern(slot, 16384));
    }
}

#[test]
fn sigterm_is_heard_in_the_middle_of_a_message() {
    let scene = Scene::new(1 << 20);
    let backend = scene.start(&[]);
    let mut connection = UnixStream::connect(&scene.socket).unwrap();
    connection.write_all(&[1, 0, 0]).unwrap();
    assert_eq!(backend.terminate().code(), Some(0));
}
