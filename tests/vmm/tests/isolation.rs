//! The jail: who the process is, what it sees, and that guests live in it as outside.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use keelson_vmm::api::{AfterSnapshot, SnapshotKind, SnapshotRequest};
use keelson_vmm_tests::{Backend, Guest, GuestBuilder, Image, Namespaces, wait_until};
use rustix::process::Signal;
use serde_json::json;

const USER: u32 = 1_900_000_001;

/// A guest in a jail, whose log's folder is its own.
fn jailed(steps: &str) -> GuestBuilder {
    let builder = GuestBuilder::new(steps);
    let log = builder.directory().join("log");
    fs::create_dir(&log).expect("a folder can be made");
    chown(&log, Some(USER), Some(USER)).expect("root can give it away");
    let open = fs::Permissions::from_mode(0o755);
    fs::set_permissions(builder.directory(), open).expect("the folder can be opened");
    builder
        .set(
            "/console/log",
            log.join("console.log").display().to_string(),
        )
        .argument("--jail")
        .argument(&format!("{USER}:{USER}"))
}

/// The process inside of the jail, as the host numbers it.
fn inside(guest: &Guest) -> u32 {
    let path = format!("/proc/{0}/task/{0}/children", guest.process_id());
    wait_until("process in the jail", || {
        fs::read_to_string(&path)
            .ok()?
            .split_whitespace()
            .next()?
            .parse()
            .ok()
    })
}

fn status(process: u32, field: &str) -> Vec<String> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).expect("it runs");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(field))
        .expect("the field is there");
    line.trim_start_matches(':')
        .split_whitespace()
        .map(str::to_owned)
        .collect()
}

fn files_below(root: &Path, at: &Path, into: &mut BTreeSet<PathBuf>) {
    for entry in fs::read_dir(at)
        .expect("the jail can be looked at")
        .flatten()
    {
        let path = entry.path();
        if entry.file_type().expect("a type").is_dir() {
            files_below(root, &path, into);
        } else {
            into.insert(Path::new("/").join(path.strip_prefix(root).expect("below the root")));
        }
    }
}

#[test]
fn a_jailed_process_has_no_rights_and_nothing_to_see() {
    let mut guest = jailed("hang").start();
    guest.wait_for_line("payload: hang ok");
    let process = inside(&guest);
    let user = USER.to_string();
    assert_eq!(status(process, "Uid"), [&user[..]; 4]);
    assert_eq!(status(process, "Gid"), [&user[..]; 4]);
    assert!(status(process, "Groups").is_empty());
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(status(process, set), ["0000000000000000"], "{set}");
    }
    assert_eq!(status(process, "NoNewPrivs"), ["1"]);
    assert_eq!(
        status(process, "NSpid").last().map(String::as_str),
        Some("1")
    );
    for task in fs::read_dir(format!("/proc/{process}/task"))
        .expect("it runs")
        .flatten()
    {
        let text = fs::read_to_string(task.path().join("status")).expect("the thread is there");
        assert!(text.contains("Seccomp:\t2\n"), "{text}");
    }
    for namespace in ["mnt", "net", "ipc", "uts", "pid"] {
        let of = |process: &str| {
            fs::read_link(format!("/proc/{process}/ns/{namespace}")).expect("a link")
        };
        assert_ne!(of("self"), of(&process.to_string()), "{namespace}");
    }
    let root = PathBuf::from(format!("/proc/{process}/root"));
    let mut files = BTreeSet::new();
    files_below(&root, &root, &mut files);
    let log = guest.directory().join("log");
    let outside: Vec<_> = files
        .iter()
        .filter(|file| !file.starts_with(&log))
        .collect();
    assert!(outside.is_empty(), "{outside:?}");
    guest.signal(Signal::TERM);
    let (api, console) = (guest.api_socket(), guest.directory().join("console.sock"));
    wait_until("end of keelson-vmm", || (!guest.is_running()).then_some(()));
    assert!(!api.exists() && !console.exists());
}

#[test]
fn the_jail_ends_with_its_supervisor() {
    let mut guest = jailed("hang").start();
    guest.wait_for_line("payload: hang ok");
    let process = inside(&guest);
    guest.signal(Signal::KILL);
    wait_until("end of the jail", || {
        (!Path::new(&format!("/proc/{process}/ns/mnt")).exists()
            || fs::read_to_string(format!("/proc/{process}/stat")).is_ok_and(|s| s.contains(") Z")))
        .then_some(())
    });
}

#[test]
fn exit_codes_and_reasons_leave_the_jail() {
    let ended = jailed("triple-fault").run();
    ended.assert_refused(1, &["triple"]);
    let ended = jailed("hello").set("/kernel/image", "/nonexistent").run();
    ended.assert_refused(3, &["kernel", "/nonexistent"]);
    let refused = GuestBuilder::new("hello")
        .argument("--jail")
        .argument("0:0")
        .run();
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(refused.errors.contains("is not UID:GID"), "{refused:?}");
}

#[test]
fn a_jailed_guest_has_its_disk_its_network_its_console_and_its_reboots() {
    let namespaces = Namespaces::enter();
    namespaces.tap("payload0", "10.77.0.1/24");
    let builder = jailed(
        "net-ping:address=10.77.0.2,target=10.77.0.1 blk-write:seed=5,sectors=4000 blk-verify:seed=5,sectors=4000 \
         lines:count=9000 blk-boot-count:until=2",
    );
    let disks = builder.directory().join("disks");
    fs::create_dir(&disks).expect("a folder can be made");
    let image = Image::create(4096);
    let backend = Backend::start(image.path(), &disks.join("blk.sock"), &[]);
    chown(backend.socket(), Some(USER), Some(USER)).expect("root can give it away");
    let guest = builder
        .disk("disk", &backend, false, 1)
        .interface("eth0", "payload0", "52:54:00:00:00:01")
        .set("/console/log_limit_mib", 1)
        .start();
    let rotated = guest.directory().join("log/console.log.1");
    wait_until("rotation of the log", || rotated.exists().then_some(()));
    let ended = guest.wait();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(!ended.errors.contains("console log"), "{ended:?}");
}

#[test]
fn snapshots_are_taken_and_restored_in_a_jail() {
    let place = tempfile::TempDir::new().expect("there is a place for temporary files");
    let open = fs::Permissions::from_mode(0o755);
    fs::set_permissions(place.path(), open).expect("the folder can be opened");
    let allowed = place.path().join("allowed");
    fs::create_dir(&allowed).expect("a folder can be made");
    chown(&allowed, Some(USER), Some(USER)).expect("root can give it away");
    let mut guest = jailed("remember")
        .argument("--snapshot-directory")
        .argument(&allowed.display().to_string())
        .start();
    guest.wait_for_line("payload: remember ready");
    let take = |directory: PathBuf| {
        guest.client().snapshot(SnapshotRequest {
            directory,
            kind: SnapshotKind::Full,
            then: AfterSnapshot::Resume,
        })
    };
    for elsewhere in ["/tmp/elsewhere".into(), place.path().join("elsewhere")] {
        let refused = take(elsewhere).expect_err("there is nothing else");
        assert!(refused.to_string().contains("can't create"), "{refused}");
    }
    let snapshot = allowed.join("one");
    take(snapshot.clone()).expect("a snapshot");
    guest.type_line("done");
    assert_eq!(guest.wait().code, Some(0));

    let mut clone = jailed("hello").restore(&snapshot, &["--verify"]).start();
    clone.wait_for_running();
    clone.type_line("next");
    clone.wait_for_line("payload: remember round=1");
    clone.type_line("done");
    assert_eq!(clone.wait().code, Some(0));
}

#[test]
fn a_jailed_guest_connects_to_listeners_that_let_its_user_and_is_connected_to() {
    const BYTES: usize = 50_000;
    let builder = jailed(&format!(
        "vsock-refused:port=1025 vsock-connect:port=1024,bytes={BYTES} vsock-serve"
    ));
    let folder = builder.directory().join("vsock");
    fs::create_dir(&folder).expect("a folder can be made");
    let socket = folder.join("vsock.sock");
    // Whoever may write to a socket may connect to it (unix(7)).
    let listen = |port: u32, mode| {
        let path = folder.join(format!("vsock.sock_{port}"));
        let listener = UnixListener::bind(&path).expect("a socket");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("its mode");
        listener
    };
    let _closed = listen(1025, 0o700);
    let open = listen(1024, 0o777);
    let echo = std::thread::spawn(move || {
        let (mut stream, _) = open.accept().expect("the guest connects");
        let mut writer = stream.try_clone().expect("a descriptor");
        std::io::copy(&mut stream, &mut writer).expect("all goes back")
    });
    let mut guest = builder
        .set("/vsock", json!({"cid": 17, "socket": socket}))
        .start();
    guest.wait_for_line("payload: vsock-serve ready");
    assert_eq!(usize::try_from(echo.join().expect("an end")), Ok(BYTES));
    let mut stream = UnixStream::connect(&socket).expect("the device listens");
    writeln!(stream, "CONNECT 52").expect("it takes a line");
    let mut stream = BufReader::new(stream);
    let mut answer = String::new();
    stream.read_line(&mut answer).expect("an answer");
    assert!(answer.starts_with("OK "), "{answer:?}");
    stream.get_ref().write_all(b"jailed").expect("it is taken");
    let ended = stream.get_ref().shutdown(std::net::Shutdown::Write);
    ended.expect("a direction can end");
    let mut came = String::new();
    stream.read_to_string(&mut came).expect("all comes back");
    assert_eq!(came, "jailed");
    guest.wait().assert_passed();
    assert!(!socket.exists());
}
