//! Guests that move from one host to another while they run, or stay because something fails.

use std::collections::BTreeSet;

use keelson_agent_tests::{
    DESTINATION_POINTS, Fleet, Guest, SOURCE_POINTS, cluster, disk, shared_disk,
};
use keelson_state_tests::Cluster;
use keelson_vmm_tests::wait_until;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// The exit codes that `keelson --help` lists.
const FAILED: i32 = 1;
const NOT_FOUND: i32 = 3;
const MISSING: i32 = 5;

fn fleet(hosts: usize) -> (Fleet, Cluster) {
    let (namespaces, cluster, urls) = cluster(1);
    // Longer than an agent is gone on a machine that is busy.
    let fleet = Fleet::start_with_leases(namespaces, hosts, "cluster", &urls, 90);
    (fleet, cluster)
}

/// A guest that has counted its boot on its disk, and then checks and writes its memory all the time.
fn scribbling(fleet: &Fleet, name: &str, failover: &str) -> String {
    let guest = Guest::new(name, "blk-boot-count:until=1 scribble:mib=4")
        .field(&format!("failover: {failover}"))
        .field(&format!("disks: [{{name: data, disk: {name}}}]"));
    shared_disk(name, &fleet.shared_image(name)) + &guest.manifest()
}

/// Applies a guest, which runs on the first host then.
fn start(fleet: &Fleet, name: &str, manifest: &str) {
    fleet.hosts[0].keelson(&["cordon", "b"]).done();
    fleet.hosts[0].apply(manifest).done();
    assert_eq!(fleet.wait_until_running(0, name), 0);
    fleet.hosts[0].keelson(&["uncordon", "b"]).done();
}

fn migration(fleet: &Fleet, asked: usize, guest: &str) -> Value {
    fleet.hosts[asked].object("vm", guest)["status"]["migration"].clone()
}

fn wait_for_phase(fleet: &Fleet, asked: usize, guest: &str, phase: &str) -> Value {
    let status = fleet.hosts[asked]
        .wait_for_status(guest, phase, |status| status["migration"]["phase"] == phase);
    status["migration"].clone()
}

/// The guest runs on this host and on no other, has never been started anew, and goes on.
fn check_runs_on(fleet: &Fleet, host: usize, guest: &str, after: &str) {
    wait_until(
        &format!("one virtual machine and one backend after {after}"),
        || {
            let count = |program: &str| -> Vec<usize> {
                let hosts = fleet.hosts.iter();
                hosts.map(|host| host.processes(program).len()).collect()
            };
            let one: Vec<usize> = (0..fleet.hosts.len())
                .map(|at| usize::from(at == host))
                .collect();
            (count("keelson-vmm") == one && count("keelson-blk") == one).then_some(())
        },
    );
    let status = fleet.hosts[host].wait_for_phase(guest, "Running");
    assert_eq!(status["restarts"], 0, "after {after}: {status:#}");
    let log = || fleet.hosts[host].keelson(&["logs", guest]).output;
    let before = log().len();
    wait_until(&format!("further sweeps after {after}"), || {
        (log().len() > before).then_some(())
    });
    assert!(
        !log().contains("boots=2"),
        "it was booted again after {after}"
    );
    for (at, other) in fleet.hosts.iter().enumerate() {
        let folder = other.path(&format!("run/vms/{guest}"));
        assert_eq!(
            folder.exists(),
            at == host,
            "{} after {after}",
            folder.display()
        );
    }
}

#[test]
fn a_guest_moves_there_and_back() {
    let (fleet, _cluster) = fleet(2);
    for (name, failover) in [("moves", "Restart"), ("holds", "Never")] {
        start(&fleet, name, &scribbling(&fleet, name, failover));
        // Any agent may be asked.
        let text = fleet.hosts[1]
            .keelson(&["migrate", name, "b", "-o", "json"])
            .done();
        let moved: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(moved["phase"], "Completed", "{moved:#}");
        assert!(moved["downtimeMilliseconds"].is_u64(), "{moved:#}");
        println!("it stood still for {} ms", moved["downtimeMilliseconds"]);
        check_runs_on(&fleet, 1, name, "the way there");
        let placement = fleet.hosts[0].object("vm", name)["status"]["placement"].clone();
        assert_eq!(placement["host"], "b", "{placement}");
        assert_eq!(placement["epoch"], 2, "{placement}");
        let terms = if failover == "Restart" {
            "Leased"
        } else {
            "Held"
        };
        assert_eq!(placement["state"], terms, "{placement}");
        let lease = fleet.hosts[1].path(&format!("run/vms/{name}/lease"));
        assert_eq!(lease.exists(), terms == "Leased");

        let said = fleet.hosts[0].keelson(&["migrate", name]).done();
        assert!(said.contains("runs on a"), "{said}");
        check_runs_on(&fleet, 0, name, "the way back");
        fleet.hosts[0].keelson(&["stop", name, "--force"]).done();
        fleet.hosts[0].keelson(&["delete", "vm", name]).done();
    }
}

#[test]
fn what_cannot_move_is_refused_with_a_reason() {
    let (fleet, _cluster) = fleet(2);
    let asked = &fleet.hosts[0];
    let refused = |arguments: &[&str], words: &[&str]| {
        let arguments = [&["migrate"], arguments].concat();
        asked.keelson(&arguments).refused(MISSING, words);
    };
    asked
        .keelson(&["migrate", "nobody"])
        .refused(NOT_FOUND, &["nobody"]);
    start(&fleet, "moves", &scribbling(&fleet, "moves", "Never"));
    refused(&["moves", "a"], &["it is on a"]);
    refused(&["moves", "z"], &["Host/z"]);
    refused(&["cancel", "moves"], &["not moving"]);
    asked.keelson(&["cordon", "b"]).done();
    refused(&["moves", "b"], &["cordoned"]);
    refused(&["moves"], &["none of 1 hosts", "cordoned"]);
    asked.keelson(&["uncordon", "b"]).done();

    let local = asked.path("local.img");
    std::fs::write(&local, vec![0; 1 << 20]).expect("an image can be written");
    let guest = Guest::new("stays", "hang").field("disks: [{name: data, disk: local}]");
    start(
        &fleet,
        "stays",
        &(disk("local", &local) + &guest.manifest()),
    );
    refused(&["stays", "b"], &["Disk/local", "shared"]);
    let pinned = Guest::new("pinned", "hang").field("host: a");
    start(&fleet, "pinned", &pinned.manifest());
    refused(&["pinned", "b"], &["spec.host"]);
    asked.keelson(&["stop", "stays", "--force"]).done();
    refused(&["stays", "b"], &["does not run"]);
}

#[test]
fn a_guest_stays_that_is_canceled_or_whose_destination_fails() {
    let (fleet, _cluster) = fleet(2);
    // What it remembers can't be compressed, so that it is on its way for some seconds.
    let guest = Guest::new("slow", "remember:mib=16").manifest();
    start(&fleet, "slow", &guest);
    fleet.hosts[0].wait_for_console("slow", "payload: remember ready");
    let begin = || {
        let arguments = ["migrate", "slow", "b", "--no-wait", "--bandwidth", "1Mi"];
        fleet.hosts[1].keelson(&arguments).done();
        fleet.hosts[0].wait_for_status("slow", "progress", |status| {
            status["migration"]["progress"]["sentBytes"].as_u64() > Some(0)
        });
    };
    let before = fleet.hosts[0].object("vm", "slow")["status"]["processId"].clone();
    let check_stays = || {
        wait_until("the end of what waited for it", || {
            fleet.hosts[1]
                .processes("keelson-vmm")
                .is_empty()
                .then_some(())
        });
        wait_until("its folder's end", || {
            (!fleet.hosts[1].path("run/vms/slow").exists()).then_some(())
        });
        let status = fleet.hosts[0].wait_for_phase("slow", "Running");
        assert_eq!(status["processId"], before);
        assert_eq!(status["placement"]["epoch"], 1, "{status:#}");
    };
    begin();
    fleet.hosts[0]
        .keelson(&["migrate", "slow", "b"])
        .refused(MISSING, &["already"]);
    fleet.hosts[0]
        .keelson(&["migrate", "cancel", "slow"])
        .done();
    check_stays();
    assert_eq!(migration(&fleet, 0, "slow")["phase"], "Canceled");

    begin();
    for id in fleet.hosts[1].processes("keelson-vmm") {
        let id = i32::try_from(id).ok().and_then(Pid::from_raw);
        kill_process(id.expect("a process id"), Signal::KILL).expect("it runs");
    }
    let failed = wait_for_phase(&fleet, 0, "slow", "Failed");
    assert_ne!(failed["message"], "", "{failed:#}");
    check_stays();

    // One who waits hears why.
    let spoiled = fleet.shared_image("gone");
    fleet.hosts[0]
        .apply(&scribbling(&fleet, "gone", "Never"))
        .done();
    let there = fleet.wait_until_running(0, "gone");
    std::fs::remove_file(spoiled).expect("it is there");
    let to = ["b", "a"][there];
    fleet.hosts[0]
        .keelson(&["migrate", "gone", to])
        .refused(FAILED, &["Disk/gone"]);
    assert_eq!(fleet.place_of(0, "gone"), Some(there));
}

#[test]
fn guests_of_a_drained_host_move_or_are_shut_down() {
    let (fleet, _cluster) = fleet(2);
    let mut manifest = scribbling(&fleet, "moves", "Restart");
    manifest += &Guest::new("idle", "wait-power-button:ms=600000 power-off").manifest();
    fleet.hosts[0].keelson(&["cordon", "b"]).done();
    fleet.hosts[0].apply(&manifest).done();
    for name in ["moves", "idle"] {
        assert_eq!(fleet.wait_until_running(0, name), 0);
    }
    fleet.hosts[0].wait_for_console("idle", "payload: wait-power-button ready");
    fleet.hosts[0].keelson(&["uncordon", "b"]).done();
    fleet.hosts[0].keelson(&["drain", "a"]).done();
    for name in ["moves", "idle"] {
        assert_eq!(fleet.place_of(0, name), Some(1), "{name}");
        wait_for_phase(&fleet, 0, name, "Completed");
    }
    let events = fleet.hosts[0].keelson(&["events", "idle"]).done();
    assert!(!events.contains("Stopping"), "{events}");

    // Without moving the other is shut down; it starts anew.
    fleet.hosts[1].keelson(&["stop", "moves", "--force"]).done();
    fleet.hosts[0].keelson(&["uncordon", "a"]).done();
    fleet.hosts[0].keelson(&["drain", "b", "--no-live"]).done();
    assert_eq!(fleet.wait_until_running(0, "idle"), 0);
    let events = fleet.hosts[0].keelson(&["events", "idle"]).done();
    assert!(events.contains("Stopping"), "{events}");
}

/// Kills the agent of one of both hosts at a step of a move; the guest runs on one host in the end.
fn die_at(fleet: &mut Fleet, point: &str, at_source: bool) {
    let guest = "moves";
    let source = fleet.place_of(0, guest).expect("it is placed");
    let destination = 1 - source;
    let (dying, asked) = if at_source {
        (source, destination)
    } else {
        (destination, source)
    };
    fleet.hosts[dying].kill_agent();
    let points = format!("{guest}:{point}=return");
    while !fleet.hosts[dying].start_agent_with(&[("FAILPOINTS", &points)]) {}
    let to = ["a", "b"][destination];
    fleet.hosts[asked]
        .keelson(&["migrate", guest, to, "--no-wait"])
        .done();
    wait_until(&format!("the agent's end at {point}"), || {
        (!fleet.hosts[dying].agent_lives()).then_some(())
    });
    fleet.hosts[dying].kill_agent();
    // What the killed agent had forked holds its locks for a moment.
    while !fleet.hosts[dying].start_agent_with(&[]) {}
    let over = fleet.hosts[asked].wait_for_status(guest, "end of the move", |status| {
        let phase = status["migration"]["phase"].as_str();
        matches!(phase, Some("Completed" | "Failed"))
    });
    println!(
        "{point}: {} {}",
        over["migration"]["phase"], over["migration"]["message"]
    );
    let now = fleet.place_of(asked, guest).expect("it is placed");
    let completed = over["migration"]["phase"] == "Completed";
    assert_eq!(
        now,
        if completed { destination } else { source },
        "after {point}"
    );
    check_runs_on(fleet, now, guest, point);
}

#[test]
fn an_agent_that_is_killed_at_any_step_of_a_move_leaves_the_guest_on_one_host() {
    let (mut fleet, _cluster) = fleet(2);
    start(&fleet, "moves", &scribbling(&fleet, "moves", "Restart"));
    for point in SOURCE_POINTS {
        die_at(&mut fleet, point, true);
    }
    for point in DESTINATION_POINTS {
        die_at(&mut fleet, point, false);
    }
    // It still moves.
    let asked = &fleet.hosts[0];
    asked.keelson(&["migrate", "moves"]).done();
    let place = fleet.place_of(0, "moves").expect("it is placed");
    check_runs_on(&fleet, place, "moves", "all of them");
    // Nothing but the guest's own is left.
    asked.keelson(&["cordon", ["a", "b"][1 - place]]).done();
    fleet.hosts[place]
        .keelson(&["stop", "moves", "--force"])
        .done();
    asked.keelson(&["delete", "vm", "moves"]).done();
    let left: BTreeSet<u32> = fleet
        .hosts
        .iter()
        .flat_map(|host| {
            host.processes("keelson-vmm")
                .into_iter()
                .chain(host.processes("keelson-blk"))
        })
        .collect();
    assert!(left.is_empty(), "{left:?}");
}
