//! Pausing, snapshots, and guests that go on from them.

use std::fs;
use std::path::{Path, PathBuf};

use keelson_vmm::api::{AfterSnapshot, GuestState, SnapshotKind, SnapshotRequest, SnapshotTaken};
use keelson_vmm::client::ClientError;
use keelson_vmm_tests::{Backend, Guest, GuestBuilder, Image, Namespaces, wait_until};
use serde_json::json;

fn take(guest: &Guest, directory: &Path, kind: SnapshotKind, then: AfterSnapshot) -> SnapshotTaken {
    let request = SnapshotRequest {
        directory: directory.to_owned(),
        kind,
        then,
    };
    guest.client().snapshot(request).expect("a snapshot")
}

fn full(guest: &Guest, directory: &Path) -> SnapshotTaken {
    take(guest, directory, SnapshotKind::Full, AfterSnapshot::Resume)
}

fn folder() -> tempfile::TempDir {
    tempfile::TempDir::new().expect("there is a place for temporary files")
}

/// A snapshot of a guest that remembers 16 MiB and waits for a line.
fn remembering(place: &Path) -> PathBuf {
    let mut guest = GuestBuilder::new("remember").start();
    guest.wait_for_line("payload: remember ready");
    let snapshot = place.join("full");
    full(&guest, &snapshot);
    guest.type_line("done");
    guest.wait().assert_passed();
    snapshot
}

#[test]
fn a_paused_guest_stands_still_until_it_is_resumed() {
    let mut guest = GuestBuilder::new("remember lines:count=100000 hang").start();
    guest.wait_for_line("payload: remember ready");
    let mut client = guest.client();
    guest.type_line("done");
    guest.wait_for_line("payload: lines number=00000010");
    client.pause().expect("it can be paused");
    assert_eq!(client.status().expect("a status").state, GuestState::Paused);
    // What it printed before is on its way to the log.
    std::thread::sleep(std::time::Duration::from_millis(100));
    let before = guest.log();
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert_eq!(guest.log(), before);
    client.pause().expect("twice is as good as once");
    client.resume().expect("it can go on");
    assert_eq!(
        client.status().expect("a status").state,
        GuestState::Running
    );
    wait_until("further lines", || {
        (guest.log().len() > before.len()).then_some(())
    });
    let refused = client.resume().expect_err("it isn't paused");
    assert!(matches!(refused, ClientError::Refused(body) if body.kind == "not_paused"));
    client.pause().expect("it can be paused");
    client.kill().expect("a paused guest can be killed");
    assert_eq!(guest.wait().code, Some(0));
}

#[test]
fn a_guest_goes_on_after_a_snapshot_and_from_it() {
    let place = folder();
    let snapshot = remembering(place.path());
    // Twice: a restored guest does nothing to its snapshot.
    for arguments in [&[][..], &["--verify"]] {
        let mut clone = GuestBuilder::new("hello")
            .restore(&snapshot, arguments)
            .start();
        clone.type_line("next");
        clone.wait_for_line("payload: remember round=1");
        clone.type_line("next");
        clone.wait_for_line("payload: remember round=2");
        clone.type_line("done");
        clone.wait().assert_passed();
    }
}

#[test]
fn differences_add_up() {
    let place = folder();
    let names = ["full", "first", "second"].map(|name| place.path().join(name));
    // Shared memory is in pages of 4 KiB. Of huge ones, which KVM splits to note what is written, some
    // hosts' KVM counts as written what is only read, once.
    let mut guest = GuestBuilder::new("remember")
        .set("/memory/shared", true)
        .start();
    guest.wait_for_line("payload: remember ready");
    let kind = SnapshotKind::Differential;
    let request = |directory: &PathBuf| SnapshotRequest {
        directory: directory.clone(),
        kind,
        then: AfterSnapshot::Resume,
    };
    let early = guest.client().snapshot(request(&names[1]));
    assert!(
        early
            .expect_err("nothing to differ from")
            .to_string()
            .contains("full one first")
    );
    let whole = full(&guest, &names[0]).memory_bytes;
    assert!(whole >= 16 << 20, "{whole}");
    for (round, directory) in names[1..].iter().enumerate() {
        guest.type_line("next");
        guest.wait_for_line(&format!("payload: remember round={}", round + 1));
        let taken = guest
            .client()
            .snapshot(request(directory))
            .expect("a difference");
        // Every sixteenth of 16 MiB, and a little that runs.
        let bytes = taken.memory_bytes;
        assert!((1 << 20..4 << 20).contains(&bytes), "{bytes}");
    }
    guest.type_line("done");
    guest.wait().assert_passed();

    let merged = place.path().join("merged");
    keelson_vmm::snapshot::merge(&names[2], &merged).expect("they merge");
    for (directory, rounds) in [(&names[0], 0), (&names[1], 1), (&names[2], 2), (&merged, 2)] {
        let mut clone = GuestBuilder::new("hello")
            .restore(directory, &["--track-dirty-pages"])
            .start();
        clone.type_line("next");
        clone.wait_for_line(&format!("payload: remember round={}", rounds + 1));
        let name = directory
            .file_name()
            .unwrap_or_default()
            .display()
            .to_string();
        let later = place.path().join(format!("after-{name}"));
        let taken = clone
            .client()
            .snapshot(request(&later))
            .expect("a difference");
        assert!(taken.memory_bytes < 4 << 20, "{taken:?}");
        clone.type_line("done");
        clone.wait().assert_passed();
        GuestBuilder::new("hello")
            .restore(&later, &["--verify"])
            .start_and_finish(rounds + 1);
    }
}

trait Finish {
    fn start_and_finish(self, rounds: usize);
}

impl Finish for GuestBuilder {
    fn start_and_finish(self, rounds: usize) {
        let guest = self.start();
        guest.type_line("done");
        let ended = guest.wait();
        ended.assert_passed();
        ended.line(&format!("payload: remember ok rounds={rounds}"));
    }
}

#[test]
fn clones_know_that_they_are() {
    let place = folder();
    let snapshot = place.path().join("full");
    let mut guest = GuestBuilder::new("wait-generation").start();
    let ready = guest.wait_for_line("payload: wait-generation ready");
    let taken = take(&guest, &snapshot, SnapshotKind::Full, AfterSnapshot::Pause);
    assert!(taken.memory_bytes > 0);
    assert_eq!(
        guest.client().status().expect("a status").state,
        GuestState::Paused
    );
    let clones: Vec<Guest> = (0..10)
        .map(|number| {
            GuestBuilder::new("hello")
                .set("/name", format!("clone-{number}"))
                .restore(&snapshot, &[])
                .start()
        })
        .collect();
    let mut ids: Vec<String> = clones
        .into_iter()
        .map(|clone| {
            let ended = clone.wait();
            ended.assert_passed();
            ended
                .line("payload: wait-generation ok")
                .split_once("id=")
                .expect("an id")
                .1
                .to_owned()
        })
        .collect();
    ids.push(ready.split_once("id=").expect("an id").1.to_owned());
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 11, "{ids:?}");
    guest.client().kill().expect("it can be killed");
    assert_eq!(guest.wait().code, Some(0));
}

#[test]
fn a_disk_goes_on_with_its_guest() {
    let place = folder();
    let snapshot = place.path().join("full");
    let builder =
        GuestBuilder::new("blk-write:seed=3 blk-verify:seed=3 remember blk-verify:seed=3");
    let image = Image::create(65536);
    let backend = Backend::start(
        image.path(),
        &builder.directory().join("blk.sock"),
        &["--queues", "2"],
    );
    let mut guest = builder.disk("disk", &backend, false, 2).start();
    // In the middle of its requests, running and paused.
    guest.wait_for_line("payload: start");
    for number in 0..5 {
        full(&guest, &place.path().join(format!("{number}")));
        let mut client = guest.client();
        client.pause().expect("it can be paused");
        client.resume().expect("it can go on");
    }
    guest.wait_for_line("payload: remember ready");
    take(&guest, &snapshot, SnapshotKind::Full, AfterSnapshot::Pause);
    let copy = Image::create(65536);
    fs::copy(image.path(), copy.path()).expect("the image can be copied");
    guest.client().resume().expect("it can go on");
    let difference = place.path().join("difference");
    take(
        &guest,
        &difference,
        SnapshotKind::Differential,
        AfterSnapshot::Resume,
    );
    guest.type_line("done");
    guest.wait().assert_passed();
    drop(backend);

    let builder = GuestBuilder::new("hello");
    let backend = Backend::start(
        copy.path(),
        &builder.directory().join("blk.sock"),
        &["--queues", "2"],
    );
    let mut clone = builder
        .disk("disk", &backend, false, 2)
        .restore(&snapshot, &[])
        .start();
    clone.wait_for_running();
    clone.type_line("done");
    clone.wait().assert_passed();
    drop(backend);

    let small = Image::create(64);
    let builder = GuestBuilder::new("hello");
    let backend = Backend::start(
        small.path(),
        &builder.directory().join("blk.sock"),
        &["--queues", "2"],
    );
    let refused = builder
        .disk("disk", &backend, false, 2)
        .restore(&difference, &[])
        .run();
    refused.assert_refused(3, &["disk", "another size"]);
}

#[test]
fn disk_requests_survive_clones() {
    let place = folder();
    let steps = "blk-write:seed=4,sectors=60000 blk-verify:seed=4,sectors=60000";
    let builder = GuestBuilder::new(steps);
    let image = Image::create(65536);
    let backend = Backend::start(image.path(), &builder.directory().join("blk.sock"), &[]);
    let mut guest = builder.disk("disk", &backend, false, 1).start();
    guest.wait_for_line("payload: start");
    let snapshot = place.path().join("full");
    take(&guest, &snapshot, SnapshotKind::Full, AfterSnapshot::Pause);
    let copy = Image::create(65536);
    fs::copy(image.path(), copy.path()).expect("the image can be copied");
    guest.client().resume().expect("it can go on");
    guest.wait().assert_passed();
    let builder = GuestBuilder::new("hello");
    let backend = Backend::start(copy.path(), &builder.directory().join("blk.sock"), &[]);
    let clone = builder
        .disk("disk", &backend, false, 1)
        .restore(&snapshot, &[])
        .start();
    clone.wait().assert_passed();
    copy.assert_pattern(0, 60000, 4);
}

#[test]
fn an_interface_goes_on_with_its_guest() {
    let namespaces = Namespaces::enter();
    namespaces.tap("payload0", "10.77.0.1/24");
    let place = folder();
    let snapshot = place.path().join("full");
    let ping = "net-ping:address=10.77.0.2,target=10.77.0.1,count=2000";
    let mut guest = GuestBuilder::new(&format!("{ping} remember {ping}"))
        .interface("eth0", "payload0", "52:54:00:00:00:01")
        .start();
    guest.wait_for_line("payload: start");
    full(&guest, &place.path().join("early"));
    guest.wait_for_line("payload: remember ready");
    full(&guest, &snapshot);
    guest.type_line("done");
    guest.wait().assert_passed();
    let clone = GuestBuilder::new("hello")
        .interface("eth0", "payload0", "52:54:00:00:00:02")
        .restore(&snapshot, &[])
        .start();
    clone.type_line("done");
    clone.wait().assert_passed();
    let clone = GuestBuilder::new("hello")
        .interface("eth0", "payload0", "52:54:00:00:00:02")
        .restore(&place.path().join("early"), &[])
        .start();
    clone.type_line("done");
    clone.wait().assert_passed();
}

/// Taken while the pairs come and go; the clone's number of vCPUs doesn't matter, for its driver knows
/// how many pairs it has.
#[test]
fn queue_pairs_go_on_with_their_guest() {
    let namespaces = Namespaces::enter();
    namespaces.tap_of_several_queues("payload0", "10.77.0.1/24");
    let place = folder();
    let pairs = "net-pairs:address=10.77.0.2,target=10.77.0.1,pairs=3,rounds=150";
    let guest = GuestBuilder::new(pairs).set("/vcpus", 3).interface(
        "eth0",
        "payload0",
        "52:54:00:00:00:01",
    );
    let mut guest = guest.start();
    guest.wait_for_line("payload: start");
    let snapshots: Vec<_> = (0..5)
        .map(|number| {
            std::thread::sleep(std::time::Duration::from_millis(20));
            let snapshot = place.path().join(number.to_string());
            full(&guest, &snapshot);
            snapshot
        })
        .collect();
    guest.client().kill().expect("it can be killed");
    guest.wait();
    for snapshot in snapshots {
        let clone = GuestBuilder::new("hello")
            .set("/vcpus", 3)
            .interface("eth0", "payload0", "52:54:00:00:00:01")
            .restore(&snapshot, &[])
            .start();
        clone.wait().assert_passed();
    }
    let other = json!({"queues": 2});
    let ended = GuestBuilder::new("hello")
        .set("/vcpus", 3)
        .interface_with("eth0", "payload0", "52:54:00:00:00:01", &other)
        .restore(&place.path().join("0"), &[])
        .run();
    ended.assert_refused(3, &["eth0"]);
}

#[test]
fn a_snapshot_that_is_not_whole_is_refused() {
    let place = folder();
    let snapshot = remembering(place.path());
    let refused = |words: &[&str], arguments: &[&str]| {
        let ended = GuestBuilder::new("hello")
            .restore(&snapshot, arguments)
            .run();
        ended.assert_refused(3, words);
    };
    let (state, memory) = (snapshot.join("state"), snapshot.join("memory"));
    let whole = fs::read(&state).expect("the state can be read");

    let mut corrupt = whole.clone();
    corrupt[500] ^= 4;
    fs::write(&state, &corrupt).expect("the state can be written");
    refused(&["state", "corrupt"], &[]);
    fs::write(&state, &whole[..1000]).expect("the state can be written");
    refused(&["cut short", "1000"], &[]);
    fs::write(&state, b"{}").expect("the state can be written");
    refused(&["no snapshot"], &[]);
    for (offset, value, words) in [
        (8, 99, ["version", "99"]),
        (12, 183, ["architecture", "183"]),
    ] {
        let mut other = whole.clone();
        other[offset] = value;
        let checksum = crc32fast::hash(&other[..28]);
        other[28..32].copy_from_slice(&checksum.to_le_bytes());
        fs::write(&state, &other).expect("the state can be written");
        refused(&words, &[]);
    }
    fs::remove_file(&state).expect("the state can be removed");
    refused(&["never finished"], &[]);
    fs::write(&state, &whole).expect("the state can be written");

    let file = fs::File::options()
        .write(true)
        .open(&memory)
        .expect("the memory can be opened");
    let length = file.metadata().expect("a size").len();
    std::os::unix::fs::FileExt::write_all_at(&file, &[1], (33 << 20) + 5).expect("written");
    refused(&["memory", "corrupt", "0x2000000"], &["--verify"]);
    file.set_len(length - 4096).expect("the memory can be cut");
    refused(&["memory", "bytes, not"], &[]);
}

#[test]
fn a_clone_must_fit_its_snapshot() {
    let place = folder();
    let snapshot = remembering(place.path());
    let clone = || GuestBuilder::new("hello").restore(&snapshot, &[]);
    clone()
        .set("/vcpus", 2)
        .run()
        .assert_refused(3, &["vcpus", "was 1", "is 2"]);
    clone()
        .set("/memory/size_mib", 128)
        .run()
        .assert_refused(3, &["memory.size_mib", "was 64"]);
    let image = Image::create(64);
    let builder = clone();
    let backend = Backend::start(image.path(), &builder.directory().join("blk.sock"), &[]);
    builder
        .disk("disk", &backend, false, 1)
        .run()
        .assert_refused(3, &["number of disks"]);
    let taken = GuestBuilder::new("remember").start();
    let request = SnapshotRequest {
        directory: snapshot.clone(),
        kind: SnapshotKind::Full,
        then: AfterSnapshot::Resume,
    };
    let refused = taken
        .client()
        .snapshot(request)
        .expect_err("the directory is taken");
    assert!(
        refused.to_string().contains("empty or not there yet"),
        "{refused}"
    );
}
