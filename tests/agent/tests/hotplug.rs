//! Disks and interfaces come and go while their guest runs.

use std::path::Path;

use keelson_agent_tests::{Guest, Host, disk, network};
use keelson_vmm_tests::Image;
use serde_json::Value;

const SECTORS: u64 = 2048;
const DISKS: &str = "disks: [{name: data, disk: data}]";
const INTERFACES: &str = "interfaces: [{name: eth0, network: lan, address: 10.67.0.9}]";

/// A guest with memory that disks' backends can map.
fn sharing(steps: &str, fields: &[&str]) -> String {
    let guest = Guest::new("web", steps).field("sharedMemory: true");
    let fields = fields.iter();
    fields
        .fold(guest, |guest, field| guest.field(field))
        .manifest()
}

fn image() -> Image {
    let image = Image::create(SECTORS);
    image.write_pattern(0, SECTORS, 7);
    image
}

fn condition<'a>(status: &'a Value, kind: &str) -> Option<&'a Value> {
    let mut conditions = status["conditions"].as_array()?.iter();
    conditions.find(|condition| condition["type"] == kind)
}

/// Waits until the guest's devices are in these states and nothing is pending, but for `reason`.
#[track_caller]
fn wait_for_devices(host: &Host, states: &[(&str, &str)], reason: Option<&str>) -> Value {
    let what = format!("devices as in {states:?}, {reason:?}");
    host.wait_for_status("web", &what, |status| {
        let none = Vec::new();
        let devices = status["devices"].as_array().unwrap_or(&none);
        let devices: Vec<_> = devices
            .iter()
            .map(|device| (device["name"].as_str(), device["state"].as_str()))
            .collect();
        let states: Vec<_> = states
            .iter()
            .map(|(name, state)| (Some(*name), Some(*state)))
            .collect();
        let pending = condition(status, "DevicesPending");
        status["phase"] == "Running"
            && devices == states
            && pending.map(|pending| &pending["reason"]) == reason.map(Value::from).as_ref()
    })
}

fn no_disk_is_left(host: &Host) -> bool {
    let folder = host.path("run/vms/web");
    let entries = std::fs::read_dir(folder).expect("the guest's folder");
    let mut names = entries.flatten().map(|entry| entry.file_name());
    host.processes("keelson-blk").is_empty()
        && !names.any(|name| name.to_string_lossy().contains(".disk"))
}

fn taps(host: &Host) -> usize {
    let devices = host.devices();
    let taps = devices.iter().filter(|name| name.starts_with("ktap-"));
    taps.count()
}

fn with_disk(image: &Path, steps: &str) -> String {
    disk("data", image) + &sharing(steps, &[DISKS])
}

#[test]
fn a_disk_comes_is_read_and_goes_twice() {
    let host = Host::new();
    let image = image();
    let cycle = "plug-wait blk-verify:seed=7 plug-release";
    let steps = format!("{cycle} hello {cycle} wait-power-button:ms=600000");
    host.apply(&sharing(&steps, &[])).done();
    host.wait_for_console("web", "payload: plug-wait ready");
    let process = wait_for_devices(&host, &[], None)["processId"].clone();
    for last in ["payload: hello ok", "payload: wait-power-button ready"] {
        host.apply(&with_disk(image.path(), &steps)).done();
        let status = wait_for_devices(&host, &[("data", "Attached")], None);
        assert_eq!(condition(&status, "RestartRequired"), None, "{status}");
        host.apply(&sharing(&steps, &[])).done();
        host.wait_for_console("web", last);
        let status = wait_for_devices(&host, &[], None);
        assert_eq!(condition(&status, "RestartRequired"), None, "{status}");
        assert!(no_disk_is_left(&host));
        assert_eq!(status["processId"], process);
    }
    let events = host.keelson(&["events", "web"]).done();
    for word in ["DeviceAttached", "DeviceDetached"] {
        assert!(events.contains(word), "no {word}: {events}");
    }
}

#[test]
fn an_interface_comes_pings_and_goes() {
    let host = Host::new();
    let steps = "plug-wait net-ping:address=10.67.0.9,target=10.67.0.1 plug-release \
                 wait-power-button:ms=600000";
    let lan = network("lan", "10.67.0.0/24", "10.67.0.1");
    host.apply(&(lan + &sharing(steps, &[]))).done();
    host.wait_for_console("web", "payload: plug-wait ready");
    host.apply(&sharing(steps, &[INTERFACES])).done();
    host.wait_for_console("web", "payload: net-ping ok");
    let status = wait_for_devices(&host, &[("eth0", "Attached")], None);
    assert_eq!(condition(&status, "RestartRequired"), None, "{status}");
    assert_eq!(taps(&host), 1);
    host.apply(&sharing(steps, &[])).done();
    host.wait_for_console("web", "payload: plug-release ok");
    let status = wait_for_devices(&host, &[], None);
    assert_eq!(condition(&status, "RestartRequired"), None, "{status}");
    assert_eq!(taps(&host), 0);
}

#[test]
fn what_a_guest_does_not_let_go_of_is_told_and_stays_until_it_ends() {
    let mut host = Host::new();
    let image = image();
    // This one looks at no slot.
    let steps = "wait-power-button:ms=600000";
    host.apply(&with_disk(image.path(), steps)).done();
    wait_for_devices(&host, &[("data", "Attached")], None);
    host.apply(&sharing(steps, &[])).done();
    let pending = [("data", "Detaching")];
    let status = wait_for_devices(&host, &pending, Some("NotReleased"));
    let before = status["processId"].clone();
    host.keelson(&["snapshot", "take", "web", "now"])
        .refused(5, &["data", "Detaching"]);
    host.kill_agent();
    host.start_agent();
    let status = wait_for_devices(&host, &pending, Some("NotReleased"));
    assert_eq!(status["processId"], before);
    assert_eq!(host.processes("keelson-blk").len(), 1);
    let described = host.keelson(&["describe", "vm", "web"]).done();
    assert!(described.contains("Detaching"), "{described}");
    // It is wanted again, and can't be had before it is gone.
    host.apply(&with_disk(image.path(), steps)).done();
    wait_for_devices(&host, &pending, Some("NotReleased"));
    host.apply(&sharing(steps, &[])).done();
    host.keelson(&["stop", "web"]).done();
    host.wait_for_phase("web", "Stopped");
    assert!(host.processes("keelson-blk").is_empty());
    host.keelson(&["start", "web"]).done();
    wait_for_devices(&host, &[], None);
}

#[test]
fn a_guest_that_started_without_disks_gets_one_when_it_starts_again() {
    let host = Host::new();
    let image = image();
    let guest = |fields: &[&str]| {
        let guest = Guest::new("web", "wait-power-button:ms=600000");
        let fields = fields.iter();
        fields
            .fold(guest, |guest, field| guest.field(field))
            .manifest()
    };
    host.apply(&guest(&[])).done();
    wait_for_devices(&host, &[], None);
    host.apply(&(disk("data", image.path()) + &guest(&[DISKS])))
        .done();
    let pending = [("data", "Attaching")];
    let status = wait_for_devices(&host, &pending, Some("MemoryNotShared"));
    assert!(condition(&status, "RestartRequired").is_some(), "{status}");
    assert!(no_disk_is_left(&host));
    host.keelson(&["stop", "web"]).done();
    host.wait_for_phase("web", "Stopped");
    host.keelson(&["start", "web"]).done();
    let status = wait_for_devices(&host, &[("data", "Attached")], None);
    assert_eq!(condition(&status, "RestartRequired"), None, "{status}");
}

#[test]
fn a_snapshot_has_what_came_while_the_guest_ran() {
    let host = Host::new();
    let lan = network("lan", "10.67.0.0/24", "10.67.0.1");
    let steps = "plug-wait net-ping:address=10.67.0.9,target=10.67.0.1 console-read:ms=600000 \
                 net-ping:address=10.67.0.9,target=10.67.0.1,count=4 wait-power-button:ms=600000";
    host.apply(&(lan + &sharing(steps, &[]))).done();
    host.wait_for_console("web", "payload: plug-wait ready");
    host.apply(&sharing(steps, &[INTERFACES])).done();
    host.wait_for_console("web", "payload: net-ping ok");
    wait_for_devices(&host, &[("eth0", "Attached")], None);
    host.keelson(&["snapshot", "take", "web", "now", "--stop"])
        .done();
    host.wait_for_phase("web", "Stopped");
    host.keelson(&["restore", "web", "now"]).done();
    let status = wait_for_devices(&host, &[("eth0", "Attached")], None);
    assert_eq!(condition(&status, "RestartRequired"), None, "{status}");
    assert_eq!(taps(&host), 1);
}
