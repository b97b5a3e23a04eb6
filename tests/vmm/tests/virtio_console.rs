//! The virtio console: what is printed and typed, its size, its limits, and that it outlives snapshots.

use std::io::{Read, Write};

use keelson_vmm::api::{AfterSnapshot, SnapshotKind, SnapshotRequest};
use keelson_vmm::client::ClientError;
use keelson_vmm_tests::{Guest, GuestBuilder, wait_until};

fn with_console(steps: &str) -> GuestBuilder {
    GuestBuilder::new(steps).set("/console/device", "virtio")
}

fn resize(guest: &Guest, columns: u16, rows: u16) {
    let resized = guest.client().resize_console(columns, rows);
    resized.expect("a virtio console has a size");
}

#[test]
fn what_is_typed_and_printed_passes_and_sizes_are_told() {
    let mut guest = with_console("hvc-echo").start();
    assert_eq!(
        guest.wait_for_line("payload: hvc-echo ready"),
        "payload: hvc-echo ready columns=80 rows=24"
    );
    // Both are in the one log, as is what the serial port prints.
    guest.wait_for_line("hvc: emergency");
    guest.wait_for_line("hvc: printed");
    // More than the driver has buffers for, and than the serial port's FIFO has room for.
    let long = "0123456789".repeat(12);
    let mut console = guest.console();
    for line in 0..64 {
        writeln!(console, "{line:02} {long}").expect("the console takes input");
    }
    for line in 0..64 {
        guest.wait_for_line(&format!("hvc: typed {line:02} {long}"));
    }
    resize(&guest, 132, 43);
    guest.wait_for_line("payload: hvc-echo size columns=132 rows=43");
    guest.type_line("end");
    guest.wait().assert_passed();
}

#[test]
fn a_reader_of_the_socket_gets_what_both_devices_print() {
    let mut guest = with_console("hvc-echo").start();
    guest.wait_for_line("payload: hvc-echo ready");
    let mut console = guest.console();
    writeln!(console, "end").expect("the console takes input");
    let mut read = String::new();
    console.read_to_string(&mut read).expect("all of it");
    for line in [
        "payload: start",
        "hvc: printed\n",
        "hvc: typed end\n",
        "payload: done",
    ] {
        assert!(read.contains(line), "no {line:?}: {read}");
    }
    guest.wait().assert_passed();
}

/// What can't be taken as fast as it is printed is dropped, and said to be: nothing is lost silently,
/// nothing is kept without limit, and the guest isn't held up.
#[test]
fn output_is_delivered_or_counted_as_dropped() {
    const BYTES: usize = 256 * (64 << 10);
    let guest = with_console("hvc-flood:buffers=256")
        .set("/console/log_limit_mib", 64)
        .start();
    wait_until("all output in the log, or counted there", || {
        let log = guest.log();
        let dropped = log.split("\r\n[").skip(1).filter_map(|rest| {
            let (count, _) = rest.split_once(" bytes of output dropped]\r\n")?;
            count.parse::<usize>().ok()
        });
        let delivered = log.matches("flooded\n").count() * "flooded\n".len();
        (delivered + dropped.sum::<usize>() == BYTES).then_some(())
    });
    guest.type_line("");
    let ended = guest.wait();
    ended.assert_passed();
    ended.line(&format!("payload: hvc-flood ok bytes={BYTES}"));
}

#[test]
fn a_broken_driver_has_to_reset_the_console() {
    let ended = with_console("hvc-hostile").run();
    ended.assert_passed();
    ended.line("hvc: works again");
}

#[test]
fn a_console_goes_on_after_a_restore_with_its_size() {
    let place = tempfile::TempDir::new().expect("there is a place for temporary files");
    let snapshot = place.path().join("snapshot");
    let mut guest = with_console("hvc-echo").start();
    guest.wait_for_line("payload: hvc-echo ready");
    resize(&guest, 100, 30);
    guest.wait_for_line("payload: hvc-echo size columns=100 rows=30");
    let taken = guest.client().snapshot(SnapshotRequest {
        directory: snapshot.clone(),
        kind: SnapshotKind::Full,
        then: AfterSnapshot::Resume,
    });
    taken.expect("a snapshot");
    guest.type_line("end");
    guest.wait().assert_passed();
    // The size is the guest's: told again it is no change.
    let mut clone = with_console("").restore(&snapshot, &[]).start();
    clone.wait_for_running();
    resize(&clone, 100, 30);
    clone.type_line("typed into the clone");
    clone.wait_for_line("hvc: typed typed into the clone");
    assert!(!clone.log().contains("hvc-echo size"));
    resize(&clone, 99, 30);
    clone.wait_for_line("payload: hvc-echo size columns=99 rows=30");
    clone.type_line("end");
    clone.wait().assert_passed();
    // With a serial console it is another machine.
    let other = GuestBuilder::new("").restore(&snapshot, &[]).run();
    other.assert_refused(3, &["console.device", "virtio", "serial"]);
}

#[test]
fn a_serial_console_has_no_size() {
    let mut guest = GuestBuilder::new("hang").start();
    guest.wait_for_line("payload: hang ok");
    let refused = guest.client().resize_console(80, 24);
    let kind = match refused {
        Err(ClientError::Refused(body)) => body.kind,
        other => panic!("{other:?}"),
    };
    assert_eq!(kind, "no_console_size");
    guest.client().kill().expect("it can be killed");
    guest.wait();
}
