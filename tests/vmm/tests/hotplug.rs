//! Disks and interfaces that come and go while a guest runs.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;

use keelson_vmm::api::{
    AfterSnapshot, DeviceKind, Event, RemovalRequest, SnapshotKind, SnapshotRequest,
};
use keelson_vmm::client::ClientError;
use keelson_vmm::config::{DiskConfig, InterfaceConfig};
use keelson_vmm_tests::{Backend, Guest, GuestBuilder, Image, Namespaces, wait_until};
use serde_json::json;
use tempfile::TempDir;

const SECTORS: u64 = 4096;
const USER: u32 = 1_900_000_002;

/// A disk with a pattern, and the backend that serves it.
struct Served {
    _image: Image,
    backend: Backend,
    _place: TempDir,
}

impl Served {
    fn start(seed: u64) -> Self {
        let place = TempDir::new().expect("there is a place for temporary files");
        let image = Image::create(SECTORS);
        image.write_pattern(0, SECTORS, seed);
        let backend = Backend::start(image.path(), &place.path().join("blk.sock"), &[]);
        Self {
            _image: image,
            backend,
            _place: place,
        }
    }

    fn disk(&self, id: &str) -> DiskConfig {
        disk(id, self.backend.socket())
    }
}

/// A guest to which disks can be added.
fn sharing(steps: &str) -> GuestBuilder {
    GuestBuilder::new(steps).set("/memory/shared", true)
}

fn disk(id: &str, socket: &Path) -> DiskConfig {
    serde_json::from_value(json!({"id": id, "socket": socket})).expect("a disk")
}

fn interface(id: &str, tap: &str) -> InterfaceConfig {
    let mac = "52:54:00:12:34:56";
    serde_json::from_value(json!({"id": id, "tap": tap, "mac": mac})).expect("an interface")
}

fn refusal<T: std::fmt::Debug>(result: Result<T, ClientError>) -> (String, String) {
    match result {
        Err(ClientError::Refused(body)) => (body.kind, body.message),
        other => panic!("not refused: {other:?}"),
    }
}

fn devices(guest: &Guest) -> Vec<(String, DeviceKind, bool)> {
    let answer = guest.client().devices().expect("an answer");
    let devices = answer.devices.into_iter();
    devices
        .map(|device| (device.id, device.kind, device.leaving))
        .collect()
}

fn impatient(id: &str) -> RemovalRequest {
    RemovalRequest {
        timeout_ms: 200,
        ..RemovalRequest::of(id)
    }
}

#[test]
fn a_disk_is_added_read_and_removed_twice_in_the_same_slot() {
    let served = Served::start(7);
    let steps = "plug-wait blk-verify:seed=7 plug-release";
    let mut guest = sharing(&format!("{steps} hello {steps}")).start();
    guest.wait_for_line("payload: plug-wait ready");
    let events = guest.client().subscribe().expect("events");
    let slot = guest.client().add_disk(served.disk("data")).expect("added");
    guest.wait_for_line(&format!("payload: plug-wait ok slot={}", slot.slot));
    guest.wait_for_line("payload: blk-verify ok");
    assert_eq!(devices(&guest), [("data".into(), DeviceKind::Disk, false)]);
    let mut client = guest.client();
    let removed = client.remove_device(RemovalRequest::of("data"));
    removed.expect("removed");
    assert_eq!(devices(&guest), []);
    guest.wait_for_line("payload: plug-release ok");
    let again = guest.client().add_disk(served.disk("data")).expect("added");
    assert_eq!(again, slot);
    wait_until("second look at the disk", || {
        (guest.log().matches("payload: blk-verify ok").count() == 2).then_some(())
    });
    let removed = client.remove_device(RemovalRequest::of("data"));
    removed.expect("removed again");
    guest.wait().assert_passed();
    let told: Vec<Event> = events
        .map_while(Result::ok)
        .filter(|event| {
            matches!(
                event,
                Event::DeviceAdded { .. } | Event::DeviceRemoved { .. }
            )
        })
        .collect();
    let id = || "data".to_owned();
    let cycle = [
        Event::DeviceAdded { id: id() },
        Event::DeviceRemoved { id: id() },
    ];
    assert_eq!(told, [cycle.clone(), cycle].concat());
}

#[test]
fn an_interface_is_added_pings_and_is_removed() {
    let namespaces = Namespaces::enter();
    namespaces.tap("payload0", "10.77.0.1/24");
    let mut guest =
        sharing("plug-wait net-ping:address=10.77.0.2,target=10.77.0.1,count=5 plug-release")
            .start();
    guest.wait_for_line("payload: plug-wait ready");
    let added = guest.client().add_interface(interface("eth0", "payload0"));
    added.expect("added");
    guest.wait_for_line("payload: net-ping ok");
    let kind = DeviceKind::Interface;
    assert_eq!(devices(&guest), [("eth0".into(), kind, false)]);
    let removed = guest.client().remove_device(RemovalRequest::of("eth0"));
    removed.expect("removed");
    // Nobody holds the TAP any more.
    let ended = sharing("net-ping:address=10.77.0.2,target=10.77.0.1")
        .interface("eth0", "payload0", "52:54:00:12:34:57")
        .run();
    ended.assert_passed();
    guest.wait().assert_passed();
}

#[test]
fn what_cannot_be_added_or_removed_is_refused_with_the_reason() {
    let served = Served::start(1);
    let mut guest = sharing("plug-serve").start();
    guest.wait_for_line("payload: plug-serve ready");
    let mut client = guest.client();
    let missing = disk("data", Path::new("/nowhere/blk.sock"));
    let (kind, message) = refusal(client.add_disk(missing));
    assert!(kind == "backend_unusable" && message.contains("/nowhere/blk.sock"));
    let mut invalid = served.disk("data");
    invalid.queue_size = 3;
    let (kind, message) = refusal(client.add_disk(invalid));
    assert!(kind == "invalid_device" && message.contains("queue_size"));
    client.add_disk(served.disk("data")).expect("added");
    assert_eq!(
        refusal(client.add_disk(served.disk("data"))).0,
        "name_taken"
    );
    let (kind, message) = refusal(client.remove_device(RemovalRequest::of("other")));
    assert!(kind == "no_device" && message.contains("other"));
    // What isn't a disk or an interface stays.
    assert_eq!(
        refusal(client.remove_device(RemovalRequest::of("rng"))).0,
        "no_device"
    );
    client.pause().expect("paused");
    assert_eq!(
        refusal(client.remove_device(RemovalRequest::of("data"))).0,
        "paused"
    );
    client.resume().expect("resumed");
    client
        .remove_device(RemovalRequest::of("data"))
        .expect("removed");
    client.power_button().expect("the button can be pressed");
    guest.wait().assert_passed();
}

#[test]
fn an_interface_without_its_descriptor_is_refused() {
    use std::io::{BufRead, BufReader, Write};
    let mut guest = sharing("plug-serve").start();
    guest.wait_for_line("payload: plug-serve ready");
    let path = guest.api_socket();
    let mut stream = std::os::unix::net::UnixStream::connect(path).expect("it listens");
    let mut request = serde_json::to_value(interface("eth0", "none")).expect("JSON");
    request["request"] = "add_interface".into();
    writeln!(stream, "{request}").expect("it takes a line");
    let mut answer = String::new();
    BufReader::new(stream)
        .read_line(&mut answer)
        .expect("an answer");
    assert!(answer.contains("no_descriptor"), "{answer}");
    guest.client().power_button().expect("pressed");
    guest.wait().assert_passed();
}

#[test]
fn a_guest_that_does_not_let_go_keeps_its_disk_until_it_does() {
    let served = Served::start(3);
    let mut guest = sharing("console-read blk-verify:seed=3 plug-release blk-id").start();
    guest.wait_for_line("payload: start");
    let mut client = guest.client();
    client.add_disk(served.disk("data")).expect("added");
    let (kind, message) = refusal(client.remove_device(impatient("data")));
    assert_eq!(kind, "not_released");
    assert!(message.contains("`data` within 0.2 s"), "{message}");
    assert_eq!(devices(&guest), [("data".into(), DeviceKind::Disk, true)]);
    let events = guest.client().subscribe().expect("events");
    guest.type_line("go on");
    guest.wait_for_line("payload: blk-verify ok");
    // Nobody waits for it any more, and it is told.
    let removed = events.map_while(Result::ok).find(|event| {
        *event
            == Event::DeviceRemoved {
                id: "data".to_owned(),
            }
    });
    assert!(removed.is_some());
    let ended = guest.wait();
    ended.line("payload: FAIL step=blk-id reason=no virtio device of type 2");
}

#[test]
fn a_reboot_takes_what_was_to_go_and_leaves_the_rest_where_it_was() {
    let (first, second) = (Served::start(1), Served::start(2));
    let mut guest = sharing("pci hang").start();
    guest.wait_for_line("payload: hang ok");
    let mut client = guest.client();
    client.add_disk(first.disk("first")).expect("added");
    let slot = client.add_disk(second.disk("second")).expect("added").slot;
    assert_eq!(
        refusal(client.remove_device(impatient("first"))).0,
        "not_released"
    );
    client.reset().expect("it can be reset");
    wait_until("second boot", || {
        (guest.log().matches("payload: hang ok").count() == 2).then_some(())
    });
    assert_eq!(
        devices(&guest),
        [("second".into(), DeviceKind::Disk, false)]
    );
    let log = guest.log();
    let (_, second_boot) = log.split_once("payload: hang ok").expect("two boots");
    assert!(
        second_boot.contains(&format!("slot={slot} vendor=0x1af4 device=0x1042")),
        "{second_boot}"
    );
    client.kill().expect("it can be killed");
}

#[test]
fn all_slots_can_be_taken_and_no_more() {
    let served: Vec<Served> = (0..31).map(Served::start).collect();
    let mut guest = sharing("plug-serve").start();
    guest.wait_for_line("payload: plug-serve ready");
    let mut client = guest.client();
    for (index, served) in served.iter().take(30).enumerate() {
        let added = client.add_disk(served.disk(&format!("disk{index}")));
        added.expect("there is a slot");
    }
    let (kind, message) = refusal(client.add_disk(served[30].disk("disk30")));
    assert!(kind == "no_free_slot" && message.contains("no free slot"));
    client
        .remove_device(RemovalRequest::of("disk7"))
        .expect("removed");
    client.add_disk(served[30].disk("disk30")).expect("added");
    client.power_button().expect("pressed");
    guest.wait().assert_passed();
}

#[test]
fn a_clone_has_the_disk_that_was_added_and_lets_go_of_it() {
    let served = Served::start(9);
    let place = TempDir::new().expect("there is a place for temporary files");
    let snapshot = place.path().join("snapshot");
    let mut guest = sharing("console-read blk-verify:seed=9 plug-release hang").start();
    guest.wait_for_line("payload: start");
    let mut client = guest.client();
    client.add_disk(served.disk("data")).expect("added");
    // It doesn't listen yet: this is still pending in the snapshot.
    assert_eq!(
        refusal(client.remove_device(impatient("data"))).0,
        "not_released"
    );
    let request = SnapshotRequest {
        directory: snapshot.clone(),
        kind: SnapshotKind::Full,
        then: AfterSnapshot::Pause,
    };
    client.snapshot(request).expect("a snapshot");
    client.kill().expect("it can be killed");
    guest.wait();
    let mut clone = sharing("")
        .set("/disks", json!([served.disk("data")]))
        .restore(&snapshot, &[])
        .start();
    clone.wait_for_running();
    assert_eq!(devices(&clone), [("data".into(), DeviceKind::Disk, true)]);
    clone.type_line("go on");
    clone.wait_for_line("payload: plug-release ok");
    wait_until("end of the disk", || {
        devices(&clone).is_empty().then_some(())
    });
    clone.client().kill().expect("it can be killed");
}

#[test]
fn a_clone_without_disks_takes_one_if_its_memory_is_shared() {
    let served = Served::start(5);
    let place = TempDir::new().expect("there is a place for temporary files");
    let snapshot = place.path().join("snapshot");
    let mut guest = sharing("plug-wait blk-verify:seed=5").start();
    guest.wait_for_line("payload: plug-wait ready");
    let request = SnapshotRequest {
        directory: snapshot.clone(),
        kind: SnapshotKind::Full,
        then: AfterSnapshot::Resume,
    };
    guest.client().snapshot(request).expect("a snapshot");
    guest.client().kill().expect("it can be killed");
    let mut private = GuestBuilder::new("").restore(&snapshot, &[]).start();
    private.wait_for_running();
    let (kind, message) = refusal(private.client().add_disk(served.disk("data")));
    assert!(kind == "memory_not_shared" && message.contains("memory.shared"));
    private.client().kill().expect("it can be killed");
    let mut shared = sharing("").restore(&snapshot, &[]).start();
    shared.wait_for_running();
    shared
        .client()
        .add_disk(served.disk("data"))
        .expect("added");
    shared.wait_for_line("payload: blk-verify ok");
    shared.wait().assert_passed();
}

#[test]
fn a_guest_can_remove_nothing_by_itself() {
    let served = Served::start(4);
    let builder = sharing("plug-hostile blk-verify:seed=4 plug-hostile");
    let ended = builder.disk("data", &served.backend, false, 1).run();
    ended.assert_passed();
}

#[test]
fn a_jailed_guest_takes_a_disk_and_an_interface() {
    let namespaces = Namespaces::enter();
    namespaces.tap("payload0", "10.77.0.1/24");
    let builder = sharing(
        "plug-wait blk-verify:seed=6 plug-release \
         plug-wait net-ping:address=10.77.0.2,target=10.77.0.1 plug-release",
    );
    let open = fs::Permissions::from_mode(0o755);
    fs::set_permissions(builder.directory(), open).expect("the folder can be opened");
    let folder = |name: &str| {
        let path = builder.directory().join(name);
        fs::create_dir(&path).expect("a folder can be made");
        chown(&path, Some(USER), Some(USER)).expect("root can give it away");
        path
    };
    let (log, disks) = (folder("log"), folder("disks"));
    let image = Image::create(SECTORS);
    image.write_pattern(0, SECTORS, 6);
    let socket = disks.join("blk.sock");
    let _backend = Backend::start(image.path(), &socket, &[]);
    chown(&socket, Some(USER), Some(USER)).expect("root can give it away");
    let mut guest = builder
        .set(
            "/console/log",
            log.join("console.log").display().to_string(),
        )
        .argument("--jail")
        .argument(&format!("{USER}:{USER}"))
        .argument("--disk-directory")
        .argument(&disks.display().to_string())
        .start();
    guest.wait_for_line("payload: plug-wait ready");
    let mut client = guest.client();
    let outside = disk("outside", Path::new("/tmp/blk.sock"));
    assert_eq!(refusal(client.add_disk(outside)).0, "backend_unusable");
    client.add_disk(disk("data", &socket)).expect("added");
    guest.wait_for_line("payload: blk-verify ok");
    client
        .remove_device(RemovalRequest::of("data"))
        .expect("removed");
    guest.wait_for_line("payload: plug-release ok");
    client
        .add_interface(interface("eth0", "payload0"))
        .expect("added");
    guest.wait_for_line("payload: net-ping ok");
    client
        .remove_device(RemovalRequest::of("eth0"))
        .expect("removed");
    guest.wait().assert_passed();
}
