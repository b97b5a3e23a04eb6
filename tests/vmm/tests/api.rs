//! The API socket.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use keelson_vmm::api::GuestState;
use keelson_vmm_tests::GuestBuilder;
use serde_json::Value;

#[test]
fn the_status_says_what_was_configured() {
    let mut guest = GuestBuilder::new("hang").set("/vcpus", 2).start();
    guest.wait_for_line("payload: hang ok");
    let status = guest.client().status().expect("a status");
    assert_eq!(status.name, "payload");
    assert_eq!((status.vcpus, status.memory_mib, status.boots), (2, 64, 1));
    assert_eq!(status.state, GuestState::Running);
    assert_eq!(status.process_id, guest.process_id());
    assert_eq!(status.exit, None);
}

#[test]
fn a_bad_request_is_refused_and_the_connection_goes_on() {
    let mut guest = GuestBuilder::new("hang").start();
    guest.wait_for_line("payload: hang ok");
    let mut stream = UnixStream::connect(guest.api_socket()).expect("the API socket");
    let mut answers = BufReader::new(stream.try_clone().expect("a second handle"));
    for request in ["nonsense", "{}", "{\"request\":\"fly\"}", "[1,2]", "\u{0}"] {
        writeln!(stream, "{request}").expect("the request can be sent");
        let answer = read_json(&mut answers);
        assert_eq!(
            answer["error"]["kind"], "bad_request",
            "{request:?}: {answer}"
        );
        assert!(answer["error"]["message"].is_string());
    }
    writeln!(stream, "{{\"request\":\"status\"}}").expect("the request can be sent");
    assert_eq!(read_json(&mut answers)["ok"]["state"], "running");
}

#[test]
fn an_endless_line_ends_the_connection_and_nothing_else() {
    let mut guest = GuestBuilder::new("hang").start();
    guest.wait_for_line("payload: hang ok");
    let mut stream = UnixStream::connect(guest.api_socket()).expect("the API socket");
    let piece = [b'x'; 4096];
    // The limit is 16 KiB; the sending fails when the VMM has closed its side.
    for _ in 0..256 {
        if stream.write_all(&piece).is_err() {
            break;
        }
    }
    assert_eq!(
        guest.client().status().expect("a status").state,
        GuestState::Running
    );
}

#[test]
fn many_clients_are_served_at_once() {
    let mut guest = GuestBuilder::new("hang").start();
    guest.wait_for_line("payload: hang ok");
    let mut clients: Vec<_> = (0..8).map(|_| guest.client()).collect();
    for client in clients.iter_mut().rev() {
        assert_eq!(
            client.status().expect("a status").state,
            GuestState::Running
        );
    }
}

fn read_json(answers: &mut impl BufRead) -> Value {
    let mut line = String::new();
    answers.read_line(&mut line).expect("an answer");
    serde_json::from_str(&line).expect("JSON")
}
