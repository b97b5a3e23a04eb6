//! Guests that move from one process to another while they run, or stay because something fails.

use std::time::Duration;

use keelson_vmm::api::{GuestState, MigrationLimits, MigrationPhase, MigrationStatus};
use keelson_vmm::client::ClientError;
use keelson_vmm_tests::{Backend, Fate, Guest, GuestBuilder, Image, Relay, wait_until};
use rustix::process::Signal;

/// A process that waits for a guest of `GuestBuilder::new`'s kind.
fn incoming() -> Guest {
    let guest = GuestBuilder::new("hello").argument("--incoming").start();
    wait_for_state(&guest, GuestState::Incoming);
    guest
}

fn wait_for_state(guest: &Guest, state: GuestState) {
    wait_until(&format!("state {state:?}"), || {
        (guest.client().status().ok()?.state == state).then_some(())
    });
}

fn wait_for_phase(guest: &Guest, phase: MigrationPhase) -> MigrationStatus {
    wait_until(&format!("migration in the phase {phase:?}"), || {
        let status = guest.client().migration().ok()?;
        assert!(
            status.phase == phase || status.phase != MigrationPhase::Failed,
            "the migration failed: {status:?}"
        );
        (status.phase == phase).then_some(status)
    })
}

fn begin(from: &Guest, to: &Guest, limits: MigrationLimits, fate: Fate) -> Relay {
    let destination = to.client().receive().expect("it waits for a guest");
    let source = from.client().migrate(limits).expect("it can be sent");
    Relay::between(source, destination, fate)
}

/// Lets the guest go on at the other side, as an agent does once it is placed there.
fn switch(from: Guest, to: &Guest) -> MigrationStatus {
    wait_for_phase(&from, MigrationPhase::Loaded);
    from.client().release_migration().expect("it is loaded");
    to.client().resume().expect("it has come");
    let status = from.client().migration().expect("a status");
    from.client().kill().expect("it can be ended");
    assert_eq!(from.wait().code, Some(0));
    status
}

/// So slow that a test finds the guest on its way.
fn slow() -> MigrationLimits {
    MigrationLimits {
        bandwidth: Some(1 << 20),
        ..MigrationLimits::default()
    }
}

/// A guest that writes its memory all the time goes on writing, and ends with all of it in order.
fn finish_scribbling(mut guest: Guest) {
    let before = guest.log().len();
    wait_until("further sweeps", || {
        assert!(guest.is_running(), "{}", guest.log());
        (guest.log().len() > before).then_some(())
    });
    guest.type_line("done");
    let ended = guest.wait();
    ended.assert_passed();
    ended.line("payload: scribble ok");
}

fn scribbling() -> Guest {
    let mut guest = GuestBuilder::new("scribble:mib=4").start();
    guest.wait_for_line("payload: scribble sweep=");
    guest
}

#[test]
fn a_guest_goes_on_elsewhere_with_all_that_it_remembers() {
    let mut source = GuestBuilder::new("remember").start();
    source.wait_for_line("payload: remember ready");
    source.type_line("next");
    source.wait_for_line("payload: remember round=1");
    let mut destination = incoming();
    let relay = begin(
        &source,
        &destination,
        MigrationLimits::default(),
        Fate::Whole,
    );
    wait_for_state(&destination, GuestState::Arrived);
    assert_eq!(destination.log(), "", "it runs before it is told to");
    let status = switch(source, &destination);
    println!(
        "stopped for {} us: {status:?}",
        status.stopped_us.unwrap_or_default()
    );
    assert_eq!(status.phase, MigrationPhase::Released);
    assert!(
        status.stopped_us.is_some_and(|us| us < 10_000_000),
        "{status:?}"
    );
    // 16 MiB that don't compress; of 64 MiB the rest is zero, and isn't sent.
    assert!(
        (16 << 20..40 << 20).contains(&relay.passed()),
        "{}",
        relay.passed()
    );
    destination.type_line("next");
    destination.wait_for_line("payload: remember round=2");
    destination.type_line("done");
    let ended = destination.wait();
    ended.assert_passed();
    ended.line("payload: remember ok rounds=2");
}

#[test]
fn what_is_written_meanwhile_comes_along() {
    let source = scribbling();
    let destination = incoming();
    let _relay = begin(
        &source,
        &destination,
        MigrationLimits::default(),
        Fate::Whole,
    );
    let status = switch(source, &destination);
    assert!(
        status.rounds > 0 && status.sent_bytes > 4 << 20,
        "{status:?}"
    );
    finish_scribbling(destination);
}

#[test]
fn a_guest_can_move_again_and_again() {
    let mut guest = scribbling();
    for _ in 0..5 {
        let next = incoming();
        let relay = begin(&guest, &next, MigrationLimits::default(), Fate::Whole);
        switch(guest, &next);
        drop(relay);
        guest = next;
    }
    finish_scribbling(guest);
}

#[test]
fn a_canceled_migration_leaves_the_guest_where_it_is() {
    let source = scribbling();
    let destination = incoming();
    let relay = begin(&source, &destination, slow(), Fate::Whole);
    wait_until("some of it over", || {
        (relay.passed() > 100_000).then_some(())
    });
    for refused in [
        source.client().pause().expect_err("it moves"),
        source
            .client()
            .release_migration()
            .expect_err("it isn't there yet"),
        source
            .client()
            .migrate(slow())
            .expect_err("it moves already"),
    ] {
        assert!(matches!(&refused, ClientError::Refused(_)), "{refused}");
    }
    source
        .client()
        .cancel_migration()
        .expect("it can be canceled");
    let status = source.client().migration().expect("a status");
    assert_eq!(status.phase, MigrationPhase::Failed);
    assert!(status.error.is_some_and(|error| error.contains("canceled")));
    let refused = source.client().cancel_migration().expect_err("twice");
    assert!(matches!(refused, ClientError::Refused(body) if body.kind == "not_migrating"));
    destination.wait().assert_refused(3, &["cut off"]);
    drop(relay);

    // And with all of it over.
    let destination = incoming();
    let _relay = begin(
        &source,
        &destination,
        MigrationLimits::default(),
        Fate::Whole,
    );
    wait_for_phase(&source, MigrationPhase::Loaded);
    source
        .client()
        .cancel_migration()
        .expect("it can be canceled");
    wait_for_state(&source, GuestState::Running);
    destination.client().kill().expect("it can be ended");
    assert_eq!(destination.wait().code, Some(0));
    finish_scribbling(source);
}

#[test]
fn a_released_guest_stands_still_until_it_is_taken_back() {
    let source = scribbling();
    let destination = incoming();
    let relay = begin(
        &source,
        &destination,
        MigrationLimits::default(),
        Fate::Whole,
    );
    wait_for_phase(&source, MigrationPhase::Loaded);
    source.client().release_migration().expect("it is loaded");
    let refused = source.client().cancel_migration().expect_err("too late");
    assert!(matches!(refused, ClientError::Refused(body) if body.kind == "released"));
    destination.signal(Signal::KILL);
    drop(destination.wait());
    drop(relay);
    let before = source.log();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(
        source.log(),
        before,
        "it went on though nobody may know where it is to run"
    );
    source.client().resume().expect("it can be taken back");
    wait_for_state(&source, GuestState::Running);
    finish_scribbling(source);
}

#[test]
fn a_broken_stream_is_refused_and_the_guest_stays() {
    let source = scribbling();
    for (fate, words) in [
        (Fate::Flip(0), &["signature"][..]),
        (Fate::Flip(8), &["version 17", "same version"]),
        (Fate::Flip(12), &["another architecture"]),
        (Fate::Flip(20), &["corrupt", "header"]),
        (Fate::Flip(60), &["corrupt"]),
        (Fate::Flip(1_000_000), &["corrupt"]),
        (Fate::CutAfter(0), &["cut off"]),
        (Fate::CutAfter(10), &["cut off"]),
        (Fate::CutAfter(40), &["cut off"]),
        (Fate::CutAfter(1_000_000), &["cut off"]),
    ] {
        let destination = incoming();
        // It writes so much that a million bytes are soon over.
        let limits = MigrationLimits {
            downtime_ms: 0,
            max_rounds: 1000,
            ..MigrationLimits::default()
        };
        let _relay = begin(&source, &destination, limits, fate);
        destination.wait().assert_refused(3, words);
        let status = wait_until("failed migration", || {
            let status = source.client().migration().ok()?;
            (status.phase == MigrationPhase::Failed).then_some(status)
        });
        println!("{fate:?}: {}", status.error.unwrap_or_default());
        wait_for_state(&source, GuestState::Running);
    }
    finish_scribbling(source);
}

#[test]
fn the_guest_stays_when_the_other_process_is_killed() {
    let source = scribbling();
    // While memory goes over.
    let destination = incoming();
    let relay = begin(&source, &destination, slow(), Fate::Whole);
    wait_until("some of it over", || {
        (relay.passed() > 100_000).then_some(())
    });
    destination.signal(Signal::KILL);
    wait_until("failed migration", || {
        (source.client().migration().ok()?.phase == MigrationPhase::Failed).then_some(())
    });
    wait_for_state(&source, GuestState::Running);
    drop((destination, relay));
    // When all of it is over.
    let destination = incoming();
    let relay = begin(
        &source,
        &destination,
        MigrationLimits::default(),
        Fate::Whole,
    );
    wait_for_phase(&source, MigrationPhase::Loaded);
    destination.signal(Signal::KILL);
    wait_for_state(&source, GuestState::Running);
    drop((destination, relay));
    finish_scribbling(source);
}

#[test]
fn a_process_that_waits_for_a_guest_ends_with_the_source() {
    let source = scribbling();
    let destination = incoming();
    let relay = begin(&source, &destination, slow(), Fate::Whole);
    wait_until("some of it over", || {
        (relay.passed() > 100_000).then_some(())
    });
    source.signal(Signal::KILL);
    destination.wait().assert_refused(3, &["cut off"]);
    // One that nobody has sent anything to ends when it is told to.
    let destination = incoming();
    let refused = destination
        .client()
        .resume()
        .expect_err("there is no guest");
    assert!(matches!(refused, ClientError::Refused(body) if body.kind == "incoming"));
    destination.signal(Signal::TERM);
    assert_eq!(destination.wait().code, Some(0));
}

#[test]
fn a_guest_that_writes_too_fast_stays() {
    let source = scribbling();
    let destination = incoming();
    let limits = MigrationLimits {
        bandwidth: Some(20 << 20),
        downtime_ms: 1,
        max_rounds: 2,
    };
    let _relay = begin(&source, &destination, limits, Fate::Whole);
    let status = wait_until("failed migration", || {
        let status = source.client().migration().ok()?;
        (status.phase == MigrationPhase::Failed).then_some(status)
    });
    let error = status.error.unwrap_or_default();
    assert!(
        error.contains("after 2 rounds") && error.contains("too fast"),
        "{error}"
    );
    assert_eq!(status.stopped_us, None);
    destination.wait().assert_refused(3, &["cut off"]);
    finish_scribbling(source);
}

#[test]
fn a_guest_that_ends_on_its_way_ends() {
    let mut source = GuestBuilder::new("remember lines:count=10").start();
    source.wait_for_line("payload: remember ready");
    let destination = incoming();
    let _relay = begin(&source, &destination, slow(), Fate::Whole);
    source.type_line("done");
    source.wait().assert_passed();
    destination.wait().assert_refused(3, &["cut off"]);
}

#[test]
fn another_kind_of_machine_is_refused() {
    let source = scribbling();
    for (pointer, value, words) in [
        ("/vcpus", 2.into(), &["vcpus was 1 and is 2"][..]),
        ("/memory/size_mib", 128.into(), &["memory.size_mib was 64"]),
        ("/watchdog", serde_json::json!({}), &["watchdog"]),
    ] {
        let destination = GuestBuilder::new("hello")
            .set(pointer, value)
            .argument("--incoming")
            .start();
        wait_for_state(&destination, GuestState::Incoming);
        let _relay = begin(
            &source,
            &destination,
            MigrationLimits::default(),
            Fate::Whole,
        );
        destination.wait().assert_refused(3, words);
        let status = wait_until("failed migration", || {
            let status = source.client().migration().ok()?;
            (status.phase == MigrationPhase::Failed).then_some(status)
        });
        // The source hears why.
        let error = status.error.unwrap_or_default();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
        wait_for_state(&source, GuestState::Running);
    }
    finish_scribbling(source);
}

/// The disk is written and read back while its guest moves; its backend notes what it writes into the
/// guest's memory, and hands the image over.
#[test]
fn a_disk_goes_over_between_two_requests() {
    const SECTORS: u64 = 65536;
    let image = Image::create(SECTORS);
    let folder = tempfile::TempDir::new().expect("there is a place for temporary files");
    let sockets = ["here", "there"].map(|name| folder.path().join(name));
    let here = Backend::start(image.path(), &sockets[0], &[]);
    let steps = "blk-write:seed=7 blk-verify:seed=7 blk-write:seed=8 blk-verify:seed=8";
    let mut source = GuestBuilder::new(steps)
        .disk("data", &here, false, 1)
        .start();
    source.wait_for_running();
    // The backend that is to come is named, and not there.
    let destination = GuestBuilder::new("hello")
        .set("/disks", serde_json::json!([{"id": "data", "socket": sockets[1], "read_only": false, "queues": 1}]))
        .argument("--incoming")
        .start();
    wait_for_state(&destination, GuestState::Incoming);
    let limits = MigrationLimits {
        downtime_ms: 1000,
        ..MigrationLimits::default()
    };
    let _relay = begin(&source, &destination, limits, Fate::Whole);
    wait_for_phase(&source, MigrationPhase::Loaded);
    assert!(
        !source.log().contains("payload: done"),
        "it was too fast to move: {}",
        source.log()
    );
    source.client().release_migration().expect("it is loaded");
    here.kill();
    let there = Backend::start(image.path(), &sockets[1], &[]);
    destination.client().resume().expect("it has come");
    source.client().kill().expect("it can be ended");
    drop(source);
    destination.wait().assert_passed();
    image.assert_pattern(0, SECTORS, 8);
    drop(there);
}

#[test]
fn a_guest_with_a_disk_stays_when_it_is_canceled() {
    const SECTORS: u64 = 65536;
    let image = Image::create(SECTORS);
    let folder = tempfile::TempDir::new().expect("there is a place for temporary files");
    let here = Backend::start(image.path(), &folder.path().join("here"), &[]);
    let steps = "blk-write:seed=7 blk-verify:seed=7 blk-write:seed=8 blk-verify:seed=8";
    let mut source = GuestBuilder::new(steps)
        .disk("data", &here, false, 1)
        .start();
    source.wait_for_running();
    let disks = serde_json::json!([{"id": "data", "socket": folder.path().join("there"), "read_only": false, "queues": 1}]);
    let destination = GuestBuilder::new("hello")
        .set("/disks", disks)
        .argument("--incoming")
        .start();
    wait_for_state(&destination, GuestState::Incoming);
    let _relay = begin(
        &source,
        &destination,
        MigrationLimits::default(),
        Fate::Whole,
    );
    wait_for_phase(&source, MigrationPhase::Loaded);
    source.client().release_migration().expect("it is loaded");
    // The other host has failed to open the image: this one does again.
    here.kill();
    let again = Backend::start(image.path(), &folder.path().join("here"), &[]);
    source.client().resume().expect("it can be taken back");
    source.wait().assert_passed();
    image.assert_pattern(0, SECTORS, 8);
    drop(again);
}
