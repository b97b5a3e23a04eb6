//! The serial console: its log, its replay, its readers and writers.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};

use keelson_vmm_tests::GuestBuilder;

#[test]
fn a_late_reader_gets_the_output_before() {
    let mut guest = GuestBuilder::new("hello wait-power-button:ms=60000").start();
    guest.wait_for_line("payload: wait-power-button ready");
    let mut lines = BufReader::new(guest.console())
        .lines()
        .map_while(Result::ok);
    assert!(
        lines
            .next()
            .is_some_and(|line| line.starts_with("payload: start"))
    );
    assert!(
        lines
            .next()
            .is_some_and(|line| line.starts_with("payload: hello ok"))
    );
    guest
        .client()
        .power_button()
        .expect("the button can be pressed");
    assert!(lines.any(|line| line.starts_with("payload: done passed=2")));
    guest.wait().assert_passed();
}

#[test]
fn the_replay_is_the_end_of_the_output() {
    const REPLAY: usize = 64 << 10;
    let mut guest = GuestBuilder::new("lines:count=4000 hang").start();
    guest.wait_for_line("payload: hang ok");
    let mut console = guest.console();
    let mut bytes = vec![0; REPLAY];
    console.read_exact(&mut bytes).expect("a replay of 64 KiB");
    let log = guest.log().into_bytes();
    assert_eq!(bytes, log[log.len() - REPLAY..]);
}

/// Half a mebibyte: more than a client's backlog, and more than half of the log's limit, at which it is
/// moved aside.
#[test]
fn a_reader_that_does_not_read_holds_nothing_up_and_the_log_is_limited() {
    const LINES: usize = 20_000;
    let steps = format!("wait-power-button:ms=60000 lines:count={LINES} hang");
    let mut guest = GuestBuilder::new(&steps)
        .set("/console/log_limit_mib", 1)
        .start();
    guest.wait_for_line("payload: wait-power-button ready");
    let stalled = guest.console();
    let reading = guest.console();
    let reader = std::thread::spawn(move || numbers(reading).take(LINES).eq(0..LINES));
    let mut client = guest.client();
    client.power_button().expect("the button can be pressed");
    guest.wait_for_line("payload: hang ok");
    assert!(
        reader.join().expect("the reader ends"),
        "the reader has lost or mixed lines"
    );
    drop(stalled);
    let open = |name| File::open(guest.directory().join(name)).expect("the log is there");
    let (older, newer) = (open("console.log.1"), open("console.log"));
    let size = |file: &File| file.metadata().expect("its size").len();
    assert!(size(&older) + size(&newer) <= 1 << 20);
    // The one line that the move cut in two is whole again.
    let both = numbers(older.chain(newer));
    assert!(both.eq(0..LINES), "the log has lost or mixed lines");
    client.kill().expect("it can be killed");
    assert_eq!(guest.wait().code, Some(0));
}

fn numbers(source: impl Read) -> impl Iterator<Item = usize> {
    let lines = BufReader::new(source).lines().map_while(Result::ok);
    lines.filter_map(|line| {
        let number = line.strip_prefix("payload: lines number=")?;
        number.parse().ok()
    })
}

#[test]
fn the_guest_reads_what_a_client_writes() {
    let mut guest = GuestBuilder::new("console-read:ms=60000").start();
    guest.wait_for_line("payload: console-read ready");
    guest
        .console()
        .write_all(b"a line for the guest\n")
        .expect("the console takes it");
    let ended = guest.wait();
    ended.assert_passed();
    ended.line("payload: console-read ok line=a line for the guest");
}
