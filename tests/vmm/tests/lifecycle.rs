//! How a guest's life ends or begins again, from inside and from outside.

use keelson_vmm::api::{Event, ExitReason, GuestState};
use keelson_vmm_tests::{Backend, GuestBuilder, Image, wait_until};
use rustix::process::Signal;

/// The exit event that ends a guest's stream of events.
fn exit_reason(events: impl IntoIterator<Item = Event>) -> Option<ExitReason> {
    events.into_iter().find_map(|event| match event {
        Event::Exit { reason, .. } => Some(reason),
        _ => None,
    })
}

#[test]
fn a_reboot_boots_again_in_the_same_process() {
    let builder = GuestBuilder::new("blk-boot-count:until=3 wait-power-button:ms=60000");
    let image = Image::create(64);
    let backend = Backend::start(image.path(), &builder.directory().join("blk.sock"), &[]);
    let mut guest = builder.disk("disk", &backend, false, 1).start();
    guest.wait_for_line("payload: wait-power-button ready");
    let mut client = guest.client();
    let status = client.status().expect("a status");
    assert_eq!((status.boots, status.state), (3, GuestState::Running));
    assert_eq!(status.process_id, guest.process_id());
    client.power_button().expect("the button can be pressed");
    let ended = guest.wait();
    ended.assert_passed();
    for boot in 1..=3 {
        ended.line(&format!("payload: blk-boot-count ok boots={boot}"));
    }
}

#[test]
fn a_reboot_ends_a_guest_that_is_configured_so() {
    let mut guest = GuestBuilder::new("wait-power-button:ms=60000 reboot")
        .set("/on_reboot", "exit")
        .start();
    guest.wait_for_line("payload: wait-power-button ready");
    let events = guest.client().subscribe().expect("events");
    guest
        .client()
        .power_button()
        .expect("the button can be pressed");
    assert_eq!(exit_reason(events.flatten()), Some(ExitReason::Reboot));
    assert_eq!(guest.wait().code, Some(0));
}

#[test]
fn the_power_button_reaches_the_guest() {
    let mut guest = GuestBuilder::new("wait-power-button:ms=60000").start();
    guest.wait_for_line("payload: wait-power-button ready");
    guest
        .client()
        .power_button()
        .expect("the button can be pressed");
    let ended = guest.wait();
    ended.assert_passed();
    ended.line("payload: wait-power-button ok");
}

#[test]
fn a_triple_fault_is_a_failure() {
    let mut guest = GuestBuilder::new("wait-power-button:ms=60000 triple-fault").start();
    guest.wait_for_line("payload: wait-power-button ready");
    let events = guest.client().subscribe().expect("events");
    guest
        .client()
        .power_button()
        .expect("the button can be pressed");
    let events: Vec<_> = events.flatten().collect();
    let failed = |event: &Event| {
        matches!(
            event,
            Event::State {
                state: GuestState::Failed,
                ..
            }
        )
    };
    assert!(events.iter().any(failed), "{events:?}");
    assert_eq!(exit_reason(events), Some(ExitReason::TripleFault));
    let ended = guest.wait();
    ended.line("payload: triple-fault ok");
    ended.assert_refused(1, &["triple"]);
}

#[test]
fn a_guest_that_hangs_can_be_killed() {
    let mut guest = GuestBuilder::new("hang").start();
    guest.wait_for_line("payload: hang ok");
    let events = guest.client().subscribe().expect("events");
    guest.client().kill().expect("it can be killed");
    assert_eq!(exit_reason(events.flatten()), Some(ExitReason::Killed));
    assert_eq!(guest.wait().code, Some(0));
}

#[test]
fn a_guest_that_hangs_can_be_reset() {
    let mut guest = GuestBuilder::new("hang").start();
    guest.wait_for_line("payload: hang ok");
    let mut client = guest.client();
    client.reset().expect("it can be reset");
    wait_until("second boot", || {
        (client.status().ok()?.boots == 2).then_some(())
    });
    wait_until("second boot's line", || {
        (guest.log().matches("payload: hang ok").count() == 2).then_some(())
    });
    client.kill().expect("it can be killed");
    assert_eq!(guest.wait().code, Some(0));
}

#[test]
fn a_guest_that_computes_can_be_killed() {
    let mut guest = GuestBuilder::new("hello busy:ms=600000").start();
    guest.wait_for_line("payload: hello ok");
    guest.client().kill().expect("it can be killed");
    assert_eq!(guest.wait().code, Some(0));
}

#[test]
fn sigterm_ends_the_guest() {
    let mut guest = GuestBuilder::new("hang").start();
    guest.wait_for_line("payload: hang ok");
    let events = guest.client().subscribe().expect("events");
    guest.signal(Signal::TERM);
    assert_eq!(exit_reason(events.flatten()), Some(ExitReason::Killed));
    assert_eq!(guest.wait().code, Some(0));
}

#[test]
fn the_sockets_are_gone_after_the_end() {
    let mut guest = GuestBuilder::new("hang").start();
    guest.wait_for_line("payload: hang ok");
    let mut client = guest.client();
    let sockets = [guest.api_socket(), guest.directory().join("console.sock")];
    assert!(sockets.iter().all(|socket| socket.exists()));
    client.kill().expect("it can be killed");
    wait_until("end of keelson-vmm", || (!guest.is_running()).then_some(()));
    assert!(sockets.iter().all(|socket| !socket.exists()));
}
