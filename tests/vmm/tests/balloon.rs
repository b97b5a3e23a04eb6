//! The memory balloon: reported and given pages are gone from the host, sizes change, statistics come.

use keelson_vmm::api::{AfterSnapshot, BalloonAnswer, SnapshotKind, SnapshotRequest};
use keelson_vmm::client::ClientError;
use keelson_vmm_tests::{Guest, GuestBuilder, wait_until};
use serde_json::json;

const MIB: u64 = 1 << 20;

fn with_balloon(steps: &str) -> GuestBuilder {
    GuestBuilder::new(steps).set("/balloon", json!({}))
}

fn balloon(guest: &Guest) -> BalloonAnswer {
    guest.client().balloon().expect("it has a balloon")
}

fn wait_for_actual(guest: &Guest, bytes: u64) {
    wait_until("balloon's size", || {
        (balloon(guest).actual_bytes == bytes).then_some(())
    });
}

#[test]
fn memory_is_reported_given_and_taken() {
    // Queue 4, and 3 as Linux had it before 6.11.
    for reporting in [4, 3] {
        let mut guest = with_balloon(&format!("balloon:reporting={reporting}")).start();
        guest.wait_for_line("payload: balloon ready");
        let answer = balloon(&guest);
        assert_eq!((answer.wanted_bytes, answer.actual_bytes), (0, 0));
        assert_eq!(answer.reported_bytes, 4 * MIB);
        let statistics = answer.statistics.expect("the guest told");
        assert_eq!(statistics.total_bytes, Some(64 * MIB));
        assert_eq!(statistics.swapped_in_bytes, None);
        // Asked again, it tells again.
        wait_until("further statistics", || {
            (balloon(&guest).statistics?.free_bytes > statistics.free_bytes).then_some(())
        });
        guest.client().resize_balloon(3).expect("it can be resized");
        guest.wait_for_line("payload: balloon inflated pages=768");
        wait_for_actual(&guest, 3 * MIB);
        guest.client().resize_balloon(0).expect("it can be resized");
        guest.wait().assert_passed();
    }
}

#[test]
fn a_balloon_goes_on_after_a_restore() {
    let place = tempfile::TempDir::new().expect("there is a place for temporary files");
    let snapshot = place.path().join("snapshot");
    let mut guest = with_balloon("balloon").start();
    guest.wait_for_line("payload: balloon ready");
    guest.client().resize_balloon(2).expect("it can be resized");
    guest.wait_for_line("payload: balloon inflated");
    let taken = guest.client().snapshot(SnapshotRequest {
        directory: snapshot.clone(),
        kind: SnapshotKind::Full,
        then: AfterSnapshot::Resume,
    });
    taken.expect("a snapshot");
    guest.client().resize_balloon(0).expect("it can be resized");
    guest.wait().assert_passed();
    let mut clone = with_balloon("").restore(&snapshot, &[]).start();
    clone.wait_for_running();
    let answer = balloon(&clone);
    assert_eq!(
        (answer.wanted_bytes, answer.actual_bytes),
        (2 * MIB, 2 * MIB)
    );
    clone.client().resize_balloon(0).expect("it can be resized");
    clone.wait().assert_passed();
}

#[test]
fn sizes_that_leave_too_little_are_refused() {
    GuestBuilder::new("hello")
        .set("/balloon", json!({"size_mib": 49}))
        .run()
        .assert_refused(2, &["balloon.size_mib", "0 to 48"]);
    let mut guest = with_balloon("hang").start();
    guest.wait_for_line("payload: hang ok");
    let refused = guest.client().resize_balloon(49).expect_err("too much");
    assert!(
        matches!(&refused, ClientError::Refused(body) if body.kind == "out_of_range"),
        "{refused}"
    );
    let mut guest = GuestBuilder::new("hang").start();
    guest.wait_for_line("payload: hang ok");
    let refused = guest.client().balloon().expect_err("there is none");
    assert!(
        matches!(&refused, ClientError::Refused(body) if body.kind == "no_balloon"),
        "{refused}"
    );
}
