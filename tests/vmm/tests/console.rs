//! The serial console: its log, its replay, its readers and writers.

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

#[test]
fn a_reader_that_does_not_read_holds_nothing_up() {
    let mut guest = GuestBuilder::new("wait-power-button:ms=60000 lines:count=20000").start();
    guest.wait_for_line("payload: wait-power-button ready");
    let stalled = guest.console();
    let reading = guest.console();
    let reader = std::thread::spawn(move || {
        let lines = BufReader::new(reading).lines().map_while(Result::ok);
        lines
            .filter(|line| line.starts_with("payload: lines number="))
            .count()
    });
    guest
        .client()
        .power_button()
        .expect("the button can be pressed");
    let ended = guest.wait();
    ended.assert_passed();
    drop(stalled);
    let numbers: Vec<_> = ended
        .console
        .lines()
        .filter_map(|line| {
            line.strip_prefix("payload: lines number=")?
                .parse::<usize>()
                .ok()
        })
        .collect();
    assert!(
        numbers.into_iter().eq(0..20_000),
        "the log has lost or mixed lines"
    );
    assert_eq!(reader.join().expect("the reader ends"), 20_000);
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

#[test]
fn the_log_is_limited() {
    let guest = GuestBuilder::new("lines:count=60000")
        .set("/console/log_limit_mib", 1)
        .start();
    let (log, older) = (
        guest.directory().join("console.log"),
        guest.directory().join("console.log.1"),
    );
    let client = guest.client();
    let events = client.subscribe().expect("events");
    // Until its end: then the log is complete, and the directory still there.
    events.for_each(drop);
    let size = |path| std::fs::metadata(path).expect("the log is there").len();
    assert!(size(&log) + size(&older) <= 1 << 20);
    assert!(size(&older) > 0);
    guest.wait().line("payload: done passed=1");
}
