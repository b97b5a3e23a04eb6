//! The socket device: connections in both directions, their ends, limits, and snapshots.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use keelson_vmm::api::{AfterSnapshot, SnapshotKind, SnapshotRequest};
use keelson_vmm_tests::{Guest, GuestBuilder, wait_until};
use serde_json::json;

/// Only a hang reaches it.
const PATIENCE: Duration = Duration::from_mins(1);

fn with_vsock(steps: &str) -> GuestBuilder {
    let builder = GuestBuilder::new(steps);
    let socket = builder.directory().join("vsock.sock");
    builder.set("/vsock", json!({"cid": 17, "socket": socket}))
}

fn socket(guest: &Guest) -> PathBuf {
    guest.directory().join("vsock.sock")
}

/// Connects to a port of the guest; the stream begins behind the answer's line.
fn connect(path: &Path, port: u32) -> BufReader<UnixStream> {
    let mut stream = UnixStream::connect(path).expect("the device listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    writeln!(stream, "CONNECT {port}").expect("it takes a line");
    BufReader::new(stream)
}

fn accepted(stream: &mut BufReader<UnixStream>) {
    let mut line = String::new();
    stream.read_line(&mut line).expect("an answer");
    assert!(line.starts_with("OK "), "{line:?}");
}

/// Sends bytes from a thread and compares what comes back.
fn echo(stream: &mut BufReader<UnixStream>, bytes: usize) {
    let sent: Vec<u8> = (0..251).cycle().take(bytes).collect();
    let mut writer = stream.get_ref().try_clone().expect("a descriptor");
    let data = sent.clone();
    let sending = std::thread::spawn(move || {
        writer.write_all(&data).expect("the guest takes all");
        writer
            .shutdown(Shutdown::Write)
            .expect("a direction can end");
    });
    let mut came = vec![0; bytes];
    stream.read_exact(&mut came).expect("all comes back");
    assert!(came == sent, "other bytes came back");
    sending.join().expect("all was sent");
    assert_eq!(stream.read(&mut [0]).expect("an end"), 0);
}

#[test]
fn the_host_connects_to_the_guest() {
    let mut guest = with_vsock("vsock-serve").start();
    assert_eq!(
        guest.wait_for_line("payload: vsock-serve ready"),
        "payload: vsock-serve ready cid=17"
    );
    // A port where nobody listens, and lines that are none.
    let mut refused = connect(&socket(&guest), 53);
    assert_eq!(refused.read(&mut [0]).expect("an end"), 0);
    for line in [
        "CONNECT\n",
        "CONNECT x\n",
        "GET / HTTP/1.1\n",
        "CONNECT 99999999999999999\n",
    ] {
        let mut stream = UnixStream::connect(socket(&guest)).expect("the device listens");
        stream.write_all(line.as_bytes()).expect("it takes a line");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        // A line that is too long is not read to its end, which the kernel tells as well.
        assert!(!matches!(stream.read(&mut [0]), Ok(1..)), "{line:?}");
    }
    let mut stream = connect(&socket(&guest), 52);
    accepted(&mut stream);
    echo(&mut stream, 300_000);
    let ended = guest.wait();
    ended.assert_passed();
    assert_eq!(
        ended.line("payload: vsock-serve ok"),
        "payload: vsock-serve ok bytes=300000"
    );
}

#[test]
fn the_guest_connects_to_the_host() {
    let builder =
        with_vsock("vsock-refused:port=1025 vsock-connect:port=1024,bytes=200000 vsock-hostile");
    let listener = UnixListener::bind(builder.directory().join("vsock.sock_1024"));
    let listener = listener.expect("a socket");
    let echo = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("the guest connects");
        let mut data = [0; 5000];
        let mut total = 0;
        loop {
            let length = stream.read(&mut data).expect("data");
            if length == 0 {
                return total;
            }
            total += length;
            stream
                .write_all(&data[..length])
                .expect("the guest takes it");
        }
    });
    builder.run().assert_passed();
    assert_eq!(echo.join().expect("the echo's end"), 200_000);
}

#[test]
fn more_connections_than_there_may_be_are_closed() {
    let mut guest = with_vsock("vsock-serve:ms=600000").start();
    guest.wait_for_line("payload: vsock-serve ready");
    // They say nothing, and so keep their places.
    let open = || UnixStream::connect(socket(&guest)).expect("the device listens");
    let idle: Vec<UnixStream> = (0..512).map(|_| open()).collect();
    let mut further = open();
    further.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    assert_eq!(further.read(&mut [0]).expect("an end"), 0);
    drop(idle);
    let mut stream = wait_until("free place", || {
        let mut stream = connect(&socket(&guest), 52);
        let mut line = String::new();
        (stream.read_line(&mut line).is_ok() && line.starts_with("OK ")).then_some(stream)
    });
    echo(&mut stream, 1000);
    guest.wait().assert_passed();
}

#[test]
fn connections_outlive_a_snapshot_and_not_a_restore() {
    let place = tempfile::TempDir::new().expect("there is a place for temporary files");
    let mut guest = with_vsock("vsock-serve:ms=600000 vsock-wait-reset").start();
    guest.wait_for_line("payload: vsock-serve ready");
    let mut stream = connect(&socket(&guest), 52);
    accepted(&mut stream);
    let take = |guest: &Guest, name: &str| {
        let taken = guest.client().snapshot(SnapshotRequest {
            directory: place.path().join(name),
            kind: SnapshotKind::Full,
            then: AfterSnapshot::Resume,
        });
        taken.expect("a snapshot");
    };
    take(&guest, "connected");
    echo(&mut stream, 100_000);
    guest.wait_for_line("payload: vsock-wait-reset ready");
    take(&guest, "waiting");
    guest.client().kill().expect("it can be killed");
    guest.wait();
    let clone = GuestBuilder::new("");
    let socket = clone.directory().join("clone.sock");
    let clone = clone
        .set("/vsock", json!({"cid": 18, "socket": socket}))
        .restore(&place.path().join("waiting"), &[]);
    clone.run().assert_passed();
    // Without the device it is another machine.
    GuestBuilder::new("")
        .restore(&place.path().join("waiting"), &[])
        .run()
        .assert_refused(3, &["other devices"]);
}

#[test]
fn a_socket_that_can_not_be_is_refused() {
    let refused = |vsock: serde_json::Value, words: &[&str]| {
        let ended = GuestBuilder::new("hello").set("/vsock", vsock).run();
        ended.assert_refused(2, words);
    };
    refused(
        json!({"cid": 2, "socket": "/tmp/x"}),
        &["vsock.cid", "3 to"],
    );
    refused(json!({"cid": 3, "socket": ""}), &["vsock.socket"]);
    let long = format!("/tmp/{}", "x".repeat(100));
    refused(json!({"cid": 3, "socket": long}), &["vsock.socket", "107"]);
    GuestBuilder::new("hello")
        .set("/vsock", json!({"socket": "/nonexistent/vsock.sock"}))
        .run()
        .assert_refused(1, &["vsock socket", "/nonexistent"]);
}
