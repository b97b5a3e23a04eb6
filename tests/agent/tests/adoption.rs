//! Guests live without their agent; the next one finds them, or what became of them.

use keelson_agent_tests::{Guest, Host, network};
use keelson_vmm_tests::wait_until;
use rustix::process::Signal;

#[test]
fn a_running_guest_is_found_again() {
    let mut host = Host::new();
    let guest = Guest::new("web", "wait-power-button:ms=600000")
        .field("interfaces: [{name: eth0, network: lan}]")
        .manifest();
    host.apply(&format!(
        "{}{guest}",
        network("lan", "10.80.0.0/24", "10.80.0.1")
    ))
    .done();
    host.wait_for_console("web", "payload: wait-power-button ready");
    let before = host.wait_for_phase("web", "Running");
    let bridge = bridge_of(&host, "10.80.0.1");
    let neighbour = ["10.80.0.99", "lladdr", "02:00:00:00:00:99", "dev", &bridge];
    host.within(
        "ip",
        &[&["neigh", "add"], &neighbour[..], &["nud", "permanent"]].concat(),
    );
    for _ in 0..3 {
        host.kill_agent();
        host.start_agent();
        wait_until("its adoption", || {
            host.keelson(&["events", "web"])
                .output
                .contains("Adopted")
                .then_some(())
        });
        let after = host.wait_for_phase("web", "Running");
        assert_eq!(after["processId"], before["processId"]);
        assert_eq!(after["startedAt"], before["startedAt"]);
    }
    assert_eq!(host.processes("keelson-vmm").len(), 1);
    // Whoever makes a bridge anew, or gives it the address that it has, makes the kernel forget them.
    let neighbours = host.within("ip", &["neigh", "show", "dev", &bridge]);
    assert!(
        neighbours.contains("10.80.0.99"),
        "the bridge's neighbours are kept: {neighbours:?}"
    );
    host.keelson(&["stop", "web"]).done();
}

/// The network device with this address.
fn bridge_of(host: &Host, address: &str) -> String {
    let line = host.within("ip", &["-o", "address", "show", "to", address]);
    let name = line.split_whitespace().nth(1);
    name.expect("the gateway's device").to_owned()
}

#[test]
fn a_guest_that_shut_down_meanwhile_is_stopped() {
    let mut host = Host::new();
    host.apply(&Guest::new("web", "idle:ms=3000 power-off").manifest())
        .done();
    host.wait_for_phase("web", "Running");
    host.kill_agent();
    wait_until("its end", || {
        host.processes("keelson-vmm").is_empty().then_some(())
    });
    host.start_agent();
    host.wait_for_phase("web", "Stopped");
    assert!(host.processes("keelson-vmm").is_empty());
}

#[test]
fn a_guest_that_was_killed_meanwhile_is_started_again() {
    let mut host = Host::new();
    host.apply(&Guest::new("web", "hang").manifest()).done();
    host.wait_for_console("web", "payload: hang ok");
    let killed = host.signal_machine("web", Signal::STOP);
    host.kill_agent();
    let id = rustix::process::Pid::from_raw(killed.cast_signed()).expect("not zero");
    rustix::process::kill_process(id, Signal::KILL).expect("it is there");
    wait_until("its end", || {
        host.processes("keelson-vmm").is_empty().then_some(())
    });
    host.start_agent();
    let status = host.wait_for_status("web", "a second start", |status| {
        status["phase"] == "Running" && status["restarts"] == 1
    });
    assert_ne!(status["processId"], killed);
}

#[test]
fn an_agent_that_is_killed_while_it_starts_guests_loses_none() {
    let mut host = Host::new();
    let names: Vec<_> = (0..4).map(|number| format!("web{number}")).collect();
    let manifest: String = names
        .iter()
        .map(|name| Guest::new(name, "hang").manifest())
        .collect();
    host.apply(&manifest).done();
    // Wherever it is in its work.
    for pause in [5, 40, 120] {
        std::thread::sleep(std::time::Duration::from_millis(pause));
        host.kill_agent();
        host.start_agent();
    }
    for name in &names {
        host.wait_for_phase(name, "Running");
        host.wait_for_console(name, "payload: hang ok");
    }
    wait_until("one process for each guest", || {
        (host.processes("keelson-vmm").len() == names.len()).then_some(())
    });
}
