//! Guests paused, snapshotted and restored by the client, in their jails.

use std::fs;

use keelson_agent_tests::{Guest, Host, disk};
use serde_json::Value;

const MIB: usize = 1 << 20;
/// The exit code for what is in the way.
const IN_THE_WAY: i32 = 5;
const WRONG: i32 = 4;
const NOT_FOUND: i32 = 3;

fn json(text: &str) -> Value {
    serde_json::from_str(text).expect("the client prints JSON")
}

#[test]
fn a_guest_is_paused_and_goes_on_across_a_restart_of_its_agent() {
    let mut host = Host::new();
    host.keelson(&["pause", "web"]).refused(NOT_FOUND, &["web"]);
    let guest = Guest::new("web", "wait-power-button:ms=600000");
    host.apply(&guest.manifest()).done();
    host.wait_for_console("web", "payload: wait-power-button ready");
    host.keelson(&["pause", "web"]).done();
    host.wait_for_phase("web", "Paused");
    host.kill_agent();
    host.start_agent();
    host.wait_for_phase("web", "Paused");
    host.keelson(&["pause", "web"]).done();
    host.keelson(&["resume", "web"]).done();
    host.wait_for_phase("web", "Running");
    host.keelson(&["resume", "web"])
        .refused(IN_THE_WAY, &["not paused"]);
    // One that stands still can be shut down all the same.
    host.keelson(&["pause", "web"]).done();
    host.keelson(&["stop", "web"]).done();
    let events = host.keelson(&["events", "web"]).done();
    assert!(!events.contains("Killed"), "{events}");
    host.keelson(&["pause", "web"])
        .refused(IN_THE_WAY, &["does not run"]);
}

#[test]
fn a_guest_without_disks_goes_back_as_often_as_one_likes() {
    let host = Host::new();
    host.apply(&Guest::new("web", "remember").manifest()).done();
    host.wait_for_console("web", "payload: remember ready");
    let taken = host.keelson(&["snapshot", "take", "web", "one", "-o", "json"]);
    let taken = json(&taken.done());
    assert_eq!(taken["name"], "one");
    assert!(
        taken["memoryBytes"].as_u64().is_some_and(|bytes| bytes > 0),
        "{taken}"
    );
    host.type_line("web", "next");
    host.wait_for_console("web", "payload: remember round=1");
    host.keelson(&["snapshot", "take", "web", "two", "--differential"])
        .done();
    host.keelson(&["snapshot", "take", "web", "two"])
        .refused(IN_THE_WAY, &["two", "already"]);
    host.keelson(&["snapshot", "take", "web", "../three"])
        .refused(WRONG, &["the snapshot's name"]);
    host.keelson(&["restore", "web", "one"])
        .refused(IN_THE_WAY, &["keelson stop web"]);
    let list = json(
        &host
            .keelson(&["snapshot", "list", "web", "-o", "json"])
            .done(),
    );
    assert_eq!(list["items"][0]["name"], "one");
    assert_eq!(list["items"][1]["base"], "one");
    assert_eq!(list["items"][1]["problem"], Value::Null);
    let table = host.keelson(&["snapshot", "list", "web"]).done();
    assert!(table.contains("difference to one"), "{table}");
    for (snapshot, rounds) in [("one", 0), ("two", 1), ("one", 0)] {
        host.keelson(&["stop", "web", "--force"]).done();
        host.keelson(&["restore", "web", snapshot]).done();
        host.type_line("web", "done");
        host.wait_for_phase("web", "Stopped");
        let log = fs::read_to_string(host.path("log/web/console.log")).expect("a log");
        let ended = log
            .lines()
            .rfind(|line| line.starts_with("payload: remember ok"));
        assert_eq!(
            ended,
            Some(&format!("payload: remember ok rounds={rounds}")[..])
        );
    }
    host.keelson(&["snapshot", "delete", "web", "one"])
        .refused(IN_THE_WAY, &["two", "difference"]);
    host.keelson(&["restore", "web", "three"])
        .refused(IN_THE_WAY, &["no snapshot", "three"]);
    // Another machine than the snapshot's: refused, until it is stopped.
    let larger = Guest::new("web", "hang")
        .field("memory: 96Mi")
        .field("stopTimeout: 1s");
    host.apply(&larger.manifest()).done();
    host.keelson(&["stop", "web", "--force"]).done();
    host.keelson(&["restore", "web", "one"])
        .refused(1, &["memory.size_mib"]);
    host.keelson(&["stop", "web"]).done();
    host.keelson(&["start", "web"]).done();
    host.wait_for_console("web", "payload: hang ok");
    host.keelson(&["delete", "vm", "web"]).done();
    assert!(!host.path("snapshots/web").exists());
}

#[test]
fn a_guest_with_disks_goes_on_from_where_it_was_shut_off_and_only_once() {
    let host = Host::new();
    let image = host.path("data.img");
    fs::write(&image, vec![0; 2 * MIB]).expect("an image can be written");
    let steps = "blk-write:seed=3,sectors=2000 remember blk-verify:seed=3,sectors=2000";
    let guest = Guest::new("web", steps)
        .field("disks: [{name: data, disk: data}]")
        .manifest();
    host.apply(&format!("{}{guest}", disk("data", &image)))
        .done();
    host.wait_for_console("web", "payload: remember ready");
    host.keelson(&["snapshot", "take", "web", "one"])
        .refused(IN_THE_WAY, &["writes to disks", "--stop"]);
    host.keelson(&["snapshot", "take", "web", "one", "--stop"])
        .done();
    assert!(host.processes("keelson-vmm").is_empty());
    host.keelson(&["restore", "web", "one"]).done();
    host.type_line("web", "done");
    host.wait_for_phase("web", "Stopped");
    host.wait_for_console("web", "payload: done passed=3 failed=0");
    host.keelson(&["restore", "web", "one"])
        .refused(IN_THE_WAY, &["disks", "not as they were"]);
    // Taken, and gone on with: its disks are not those of the snapshot any more.
    host.keelson(&["start", "web"]).done();
    host.wait_for_phase("web", "Running");
    host.keelson(&["snapshot", "take", "web", "two", "--stop"])
        .done();
    host.keelson(&["start", "web"]).done();
    host.keelson(&["stop", "web", "--force"]).done();
    host.keelson(&["restore", "web", "two"])
        .refused(IN_THE_WAY, &["not as they were"]);
}
