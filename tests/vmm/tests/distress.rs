//! What tells that a guest's kernel is at its end: panic device and watchdog.

use keelson_vmm::api::{AfterSnapshot, Event, SnapshotKind, SnapshotRequest};
use keelson_vmm_tests::{GuestBuilder, wait_until};
use serde_json::json;

#[test]
fn a_panic_is_an_event_and_what_is_configured() {
    let mut guest = GuestBuilder::new("console-read:ms=60000 panic:times=2000 hang")
        .set("/panic", json!({}))
        .start();
    guest.wait_for_line("payload: console-read ready");
    let mut events = guest.client().subscribe().expect("events");
    guest.type_line("on");
    guest.wait_for_line("payload: hang ok");
    let panics = |event: &Event| {
        matches!(
            event,
            Event::GuestPanic {
                crash_loaded: false
            }
        )
    };
    assert!(events.any(|event| event.is_ok_and(|event| panics(&event))));
    guest.client().kill().expect("it can be killed");
    // However often it was told.
    assert!(!events.any(|event| event.is_ok_and(|event| panics(&event))));
    assert_eq!(guest.wait().code, Some(0));

    let ended = GuestBuilder::new("panic hang")
        .set("/panic", json!({"action": "exit"}))
        .run();
    ended.assert_refused(1, &["panicked"]);
    let ended = GuestBuilder::new("panic hang")
        .set("/panic", json!({"action": "reset"}))
        .set("/on_reboot", "exit")
        .run();
    assert_eq!(ended.code, Some(0), "{ended:?}");
}

#[test]
fn a_starved_watchdog_resets_the_guest() {
    let mut guest = GuestBuilder::new("watchdog:ms=300,feeds=4 hang")
        .set("/watchdog", json!({}))
        .start();
    guest.wait_for_line("payload: hang ok");
    wait_until("second boot", || {
        (guest.client().status().ok()?.boots > 1).then_some(())
    });
    drop(guest);
    let ended = GuestBuilder::new("watchdog:ms=100 hang")
        .set("/watchdog", json!({"action": "exit"}))
        .run();
    ended.assert_refused(1, &["watchdog"]);
}

#[test]
fn a_watchdog_stands_still_with_its_guest() {
    let place = tempfile::TempDir::new().expect("there is a place for temporary files");
    let snapshot = place.path().join("snapshot");
    let mut guest = GuestBuilder::new("watchdog:ms=4000 hang")
        .set("/watchdog", json!({"action": "exit"}))
        .set("/panic", json!({}))
        .start();
    guest.wait_for_line("payload: hang ok");
    let mut client = guest.client();
    let taken = client.snapshot(SnapshotRequest {
        directory: snapshot.clone(),
        kind: SnapshotKind::Full,
        then: AfterSnapshot::Pause,
    });
    taken.expect("a snapshot");
    std::thread::sleep(std::time::Duration::from_secs(5));
    assert!(guest.is_running());
    client.resume().expect("it can go on");
    guest.wait().assert_refused(1, &["watchdog"]);
    let clone = GuestBuilder::new("")
        .set("/watchdog", json!({"action": "exit"}))
        .set("/panic", json!({}))
        .restore(&snapshot, &[])
        .run();
    clone.assert_refused(1, &["watchdog"]);
    GuestBuilder::new("")
        .set("/watchdog", json!({}))
        .restore(&snapshot, &[])
        .run()
        .assert_refused(3, &["panic device"]);
}
