//! The life of guests under the agent, and what can go wrong in it.

use std::fs;

use keelson_agent_tests::{Guest, Host, disk};
use rustix::process::Signal;

const MIB: usize = 1 << 20;

#[test]
fn a_deleted_guest_leaves_nothing() {
    let host = Host::new();
    let image = host.path("data.img");
    fs::write(&image, vec![0; MIB]).expect("an image can be written");
    let lan = keelson_agent_tests::network("lan", "10.70.0.0/24", "10.70.0.1");
    let guest = Guest::new("web", "wait-power-button:ms=600000")
        .field("disks: [{name: data, disk: data}]")
        .field("interfaces: [{name: eth0, network: lan}]")
        .manifest();
    host.apply(&format!("{lan}{}{guest}", disk("data", &image)))
        .done();
    host.wait_for_console("web", "payload: wait-power-button ready");
    assert_eq!(host.processes("keelson-vmm").len(), 1);
    assert_eq!(host.processes("keelson-blk").len(), 1);
    let devices = host.devices().len();
    host.keelson(&["delete", "vm", "web"]).done();
    assert!(host.processes("keelson-vmm").is_empty());
    assert!(host.processes("keelson-blk").is_empty());
    assert_eq!(host.devices().len(), devices - 1, "{:?}", host.devices());
    assert!(!host.path("run/vms/web").exists());
    assert!(!host.path("log/web").exists());
    host.keelson(&["get", "vm", "web"])
        .refused(3, &["VirtualMachine/web not found"]);
}

#[test]
fn a_guest_is_stopped_and_started() {
    let host = Host::new();
    host.apply(&Guest::new("web", "wait-power-button:ms=600000").manifest())
        .done();
    host.wait_for_console("web", "payload: wait-power-button ready");
    host.keelson(&["stop", "web"]).done();
    let status = host.object("vm", "web")["status"].clone();
    assert_eq!(status["phase"], "Stopped", "{status:#}");
    assert!(host.processes("keelson-vmm").is_empty());
    host.keelson(&["start", "web"]).done();
    host.wait_for_phase("web", "Running");
    host.keelson(&["wait", "vm", "web", "--for", "phase=Running"])
        .done();
    host.keelson(&["stop", "web", "--force"]).done();
    let events = host.keelson(&["events", "web"]).done();
    for word in ["Started", "Stopping", "Stopped"] {
        assert!(events.contains(word), "no {word}: {events}");
    }
}

#[test]
fn a_guest_that_ignores_its_power_button_is_killed_in_the_end() {
    let host = Host::new();
    let guest = Guest::new("web", "hang")
        .field("stopTimeout: 1s")
        .manifest();
    host.apply(&guest).done();
    host.wait_for_console("web", "payload: hang ok");
    host.keelson(&["stop", "web"]).done();
    assert!(host.keelson(&["events", "web"]).done().contains("Killed"));
}

#[test]
fn a_killed_machine_is_started_again() {
    let host = Host::new();
    host.apply(&Guest::new("web", "hang").manifest()).done();
    host.wait_for_console("web", "payload: hang ok");
    let killed = host.signal_machine("web", Signal::KILL);
    let status = host.wait_for_status("web", "a second start", |status| {
        status["phase"] == "Running" && status["restarts"] == 1
    });
    assert_ne!(status["processId"], killed);
}

#[test]
fn a_killed_machine_that_must_not_restart_is_failed() {
    let mut host = Host::new();
    host.apply(
        &Guest::new("web", "hang")
            .field("restartPolicy: Never")
            .manifest(),
    )
    .done();
    host.wait_for_console("web", "payload: hang ok");
    host.signal_machine("web", Signal::KILL);
    host.wait_for_reason("web", "MachineEnded");
    assert_eq!(host.object("vm", "web")["status"]["phase"], "Failed");
    assert!(host.agent_lives());
}

#[test]
fn a_corrupt_kernel_is_told_in_the_status() {
    let mut host = Host::new();
    let kernel = host.path("vmlinuz");
    fs::write(&kernel, vec![0x5a; 3 * MIB]).expect("a file can be written");
    host.apply(&Guest::new("web", "hello").image(&kernel).manifest())
        .done();
    host.wait_for_phase("web", "Failed");
    let status = host.object("vm", "web")["status"].to_string();
    assert!(status.contains("vmlinuz"), "{status}");
    assert!(host.agent_lives());
    // The next guest is not harmed.
    host.apply(&Guest::new("good", "hang").manifest()).done();
    host.wait_for_console("good", "payload: hang ok");
}

#[test]
fn an_empty_initrd_is_told_in_the_status() {
    let mut host = Host::new();
    let initrd = host.path("initrd");
    fs::write(&initrd, []).expect("a file can be written");
    let guest = Guest::new("web", "hello").manifest();
    let guest = guest.replace(
        "kernel: {",
        &format!("kernel: {{initrd: {}, ", initrd.display()),
    );
    host.apply(&guest).done();
    host.wait_for_phase("web", "Failed");
    let status = host.object("vm", "web")["status"].to_string();
    assert!(status.contains("it is empty"), "{status}");
    assert!(host.agent_lives());
}

#[test]
fn an_image_in_use_is_told_in_the_status() {
    let host = Host::new();
    let image = host.path("data.img");
    fs::write(&image, vec![0; MIB]).expect("an image can be written");
    let guest = |name: &str| {
        Guest::new(name, "hang")
            .field("disks: [{name: data, disk: data}]")
            .manifest()
    };
    host.apply(&format!("{}{}", disk("data", &image), guest("first")))
        .done();
    host.wait_for_console("first", "payload: hang ok");
    host.apply(&guest("second")).done();
    let message = host.wait_for_reason("second", "DiskInUse");
    assert!(message.contains("data.img"), "{message}");
    assert_eq!(host.object("vm", "first")["status"]["phase"], "Running");
    // It starts as soon as it can.
    host.keelson(&["stop", "first", "--force"]).done();
    host.wait_for_phase("second", "Running");
}

#[test]
fn an_image_that_vanishes_is_told_in_the_status() {
    let mut host = Host::new();
    let image = host.path("data.img");
    fs::write(&image, vec![0; MIB]).expect("an image can be written");
    let guest = Guest::new("web", "hang")
        .field("disks: [{name: data, disk: data}]")
        .manifest();
    host.apply(&format!("{}{guest}", disk("data", &image)))
        .done();
    host.wait_for_console("web", "payload: hang ok");
    fs::remove_file(&image).expect("the image can be removed");
    let message = host.wait_for_reason("web", "DiskVanished");
    assert!(message.contains("data.img"), "{message}");
    assert_eq!(host.object("vm", "web")["status"]["phase"], "Running");
    assert!(host.agent_lives());
}

#[test]
fn a_disk_backend_that_is_killed_is_replaced() {
    let host = Host::new();
    let image = host.path("data.img");
    fs::write(&image, vec![0; MIB]).expect("an image can be written");
    let steps = "blk-write:sectors=8 idle:ms=2000 blk-write:sectors=64 hang";
    let guest = Guest::new("web", steps)
        .field("disks: [{name: data, disk: data}]")
        .manifest();
    host.apply(&format!("{}{guest}", disk("data", &image)))
        .done();
    host.wait_for_console("web", "payload: blk-write ok sectors=8");
    let backends = host.processes("keelson-blk");
    let [backend] = backends[..] else {
        panic!("there are backends {backends:?}");
    };
    let id = rustix::process::Pid::from_raw(backend.cast_signed()).expect("not zero");
    rustix::process::kill_process(id, Signal::KILL).expect("it is there");
    host.wait_for_console("web", "payload: blk-write ok sectors=64");
    assert_eq!(host.object("vm", "web")["status"]["phase"], "Running");
    assert_ne!(host.processes("keelson-blk"), [backend]);
}
