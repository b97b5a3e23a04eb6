//! Hosts that share a state store: where guests run, and what happens when a host is lost.

use std::time::Duration;

use keelson_agent_tests::{
    Fleet, Guest, Host, LEASE_SECONDS, Loss, cluster, counting, disk, settings, shared_disk,
};
use keelson_vmm_tests::wait_until;

/// The exit codes that `keelson --help` lists.
const FAILED: i32 = 1;
const MISSING: i32 = 5;
const UNAVAILABLE: i32 = 6;

#[test]
fn guests_of_a_dead_host_run_elsewhere() {
    let loss = Loss {
        lease_seconds: LEASE_SECONDS,
        member_flags: &[],
        // Others run on this machine; `wrong_clock` has clocks of its own.
        shift_clock: |_| {},
    };
    loss.of_one_of_three();
}

#[test]
fn a_host_without_its_store_kills_what_may_run_elsewhere_before_it_does() {
    let (namespaces, _cluster, urls) = cluster(3);
    let fleet = Fleet::start(namespaces, 3, "cluster", &urls);
    let manifest = format!(
        "{}{}{}",
        shared_disk("moves", &fleet.shared_image("moves")),
        counting("moves").manifest(),
        Guest::new("stays", "hang")
            .field("hostSelector: {host: a}")
            .manifest(),
    );
    for name in ["b", "c"] {
        fleet.hosts[0].keelson(&["cordon", name]).done();
    }
    fleet.hosts[0].apply(&manifest).done();
    assert_eq!(fleet.wait_until_running(0, "moves"), 0);
    assert_eq!(fleet.wait_until_running(0, "stays"), 0);
    for name in ["b", "c"] {
        fleet.hosts[0].keelson(&["uncordon", name]).done();
    }
    let stays = fleet.hosts[0].object("vm", "stays")["status"]["processId"].clone();
    assert_eq!(fleet.hosts[0].processes("keelson-vmm").len(), 2);

    fleet.links[0].cut(true);
    // At no moment do both hosts have it.
    let runs = |host: usize| {
        let folder = format!("vms{}moves", std::path::MAIN_SEPARATOR);
        let machines = fleet.hosts[host].processes("keelson-vmm").into_iter();
        let mut lines = machines.map(|id| std::fs::read(format!("/proc/{id}/cmdline")));
        lines.any(|line| {
            let line = line.unwrap_or_default();
            String::from_utf8_lossy(&line).contains(&folder)
        })
    };
    wait_until("the end of the guest on the host that is cut off", || {
        assert!(!(runs(0) && (runs(1) || runs(2))), "it runs twice");
        (!runs(0)).then_some(())
    });
    assert_eq!(
        fleet.place_of(1, "moves"),
        Some(0),
        "it was moved before it ended"
    );
    fleet.wait_for_event(1, "moves", "FailedOver");
    let now = fleet.wait_until_running(1, "moves");
    assert_ne!(now, 0);
    fleet.hosts[now].wait_for_console("moves", "payload: blk-boot-count ok boots=2");
    let lost = fleet.hosts[1].wait_for_reason("stays", "HostLost");
    assert!(lost.contains("spec.failover"), "{lost}");
    assert_eq!(
        fleet.hosts[0].processes("keelson-vmm").len(),
        1,
        "what stays runs on"
    );

    fleet.links[0].cut(false);
    fleet.wait_for_event(1, "moves", "Fenced");
    let status = fleet.hosts[1].wait_for_status("stays", "its host back", |status| {
        status["conditions"].to_string().contains("processors run")
    });
    assert_eq!(status["processId"], stays);
    assert_eq!(fleet.place_of(1, "moves"), Some(now));
    assert_eq!(fleet.hosts[0].processes("keelson-vmm").len(), 1);
}

/// Longer than any time limit of the agents', for which an hour is no different.
#[test]
fn without_any_store_guests_run_on_or_are_killed_as_they_say() {
    let (namespaces, mut cluster, urls) = cluster(3);
    let mut fleet = Fleet::start(namespaces, 2, "cluster", &urls);
    let mut manifest =
        shared_disk("moves", &fleet.shared_image("moves")) + &counting("moves").manifest();
    for host in ["a", "b"] {
        let stays = Guest::new(&format!("stays-{host}"), "hang");
        manifest += &stays.field(&format!("host: {host}")).manifest();
    }
    fleet.hosts[0].apply(&manifest).done();
    let place = fleet.wait_until_running(0, "moves");
    let process = |fleet: &Fleet, guest: &str| {
        fleet.hosts[0].object("vm", guest)["status"]["processId"].clone()
    };
    let stay = ["stays-a", "stays-b"].map(|guest| {
        fleet.wait_until_running(0, guest);
        process(&fleet, guest)
    });
    (0..3).for_each(|member| cluster.kill(member));
    wait_until("the end of what might run elsewhere", || {
        (fleet.hosts[place].processes("keelson-vmm").len() == 1).then_some(())
    });
    std::thread::sleep(Duration::from_secs(3 * LEASE_SECONDS));
    for host in &mut fleet.hosts {
        assert!(host.agent_lives());
        assert_eq!(host.processes("keelson-vmm").len(), 1, "what stays runs on");
    }
    let late = Guest::new("late", "hang").manifest();
    fleet.hosts[0]
        .apply(&late)
        .refused(UNAVAILABLE, &["state store unavailable"]);

    (0..3).for_each(|member| cluster.run(member));
    let now = fleet.wait_until_running(0, "moves");
    fleet.hosts[now].wait_for_console("moves", "payload: blk-boot-count ok boots=2");
    for (guest, before) in ["stays-a", "stays-b"].iter().zip(stay) {
        fleet.hosts[0].wait_for_phase(guest, "Running");
        assert_eq!(process(&fleet, guest), before, "{guest}");
    }
    fleet.hosts[0].apply(&late).done();
    fleet.wait_until_running(0, "late");
    let machines = fleet.hosts.iter();
    let machines = machines.map(|host| host.processes("keelson-vmm").len());
    assert_eq!(machines.sum::<usize>(), 4);
}

#[test]
fn without_its_agent_a_guest_runs_on_or_is_killed_as_it_says() {
    let (namespaces, _cluster, urls) = cluster(1);
    let mut fleet = Fleet::start(namespaces, 2, "cluster", &urls);
    let local = fleet.hosts[0].path("local.img");
    std::fs::write(&local, vec![0; 1 << 20]).expect("an image can be written");
    let manifest = format!(
        "{}{}{}{}{}",
        shared_disk("moves", &fleet.shared_image("moves")),
        disk("local", &local),
        counting("moves").manifest(),
        counting("local").manifest(),
        Guest::new("stays", "hang").field("host: a").manifest(),
    );
    fleet.hosts[0].keelson(&["cordon", "b"]).done();
    fleet.hosts[0].apply(&manifest).done();
    for name in ["moves", "local", "stays"] {
        assert_eq!(fleet.wait_until_running(0, name), 0, "{name}");
    }
    fleet.hosts[0].keelson(&["uncordon", "b"]).done();
    fleet.hosts[0].kill_agent();
    assert_eq!(
        fleet.wait_until_running(1, "moves"),
        0,
        "it is there as long as the lease"
    );
    fleet.wait_for_event(1, "moves", "FailedOver");
    assert_eq!(fleet.wait_until_running(1, "moves"), 1);
    let local = fleet.hosts[1].wait_for_reason("local", "HostLost");
    assert!(local.contains("shared"), "{local}");
    fleet.hosts[1].wait_for_reason("stays", "HostLost");
    assert_eq!(fleet.hosts[0].processes("keelson-vmm").len(), 2);

    fleet.hosts[0].start_agent();
    for name in ["local", "stays"] {
        fleet.hosts[1].wait_for_reason(name, "Running");
        let status = fleet.hosts[1].object("vm", name)["status"].clone();
        assert_eq!(status["restarts"], 0, "{status}");
    }
}

#[test]
fn a_restarted_agent_keeps_its_host_and_its_guests() {
    // Longer than a restart takes on a machine that is busy.
    let seconds = 20;
    let (namespaces, _cluster, urls) = cluster(1);
    let mut fleet = Fleet::start_with_leases(namespaces, 1, "etcd", &urls, seconds);
    let manifest = shared_disk("web", &fleet.shared_image("web")) + &counting("web").manifest();
    fleet.hosts[0].apply(&manifest).done();
    fleet.wait_until_running(0, "web");
    let before = fleet.hosts[0].object("vm", "web")["status"]["processId"].clone();
    for _ in 0..2 {
        fleet.hosts[0].kill_agent();
        fleet.hosts[0].start_agent();
    }
    // Longer than any lease that was not renewed.
    std::thread::sleep(Duration::from_secs(seconds + 1));
    let status = fleet.hosts[0].object("vm", "web")["status"].clone();
    assert_eq!(status["processId"], before, "{status}");
    assert_eq!(status["placement"]["state"], "Leased", "{status}");

    // Without failover it goes on without the lease, and the guard has nothing more to do.
    let manifest = manifest.replace("failover: Restart", "failover: Never");
    fleet.hosts[0].apply(&manifest).done();
    fleet.hosts[0].wait_for_status("web", "other terms", |status| {
        status["placement"]["state"] == "Held"
    });
    fleet.hosts[0].kill_agent();
    std::thread::sleep(Duration::from_secs(seconds + 1));
    assert_eq!(fleet.hosts[0].processes("keelson-vmm").len(), 1);
}

#[test]
fn a_host_name_belongs_to_one_agent() {
    let (namespaces, _cluster, urls) = cluster(1);
    let mut fleet = Fleet::start_with_leases(namespaces, 1, "cluster", &urls, 14);
    let other = Host::of_fleet(namespaces, &format!("cluster:{}", urls[0]));
    // It waits for the first one's lease, which is much longer than its own.
    other.configure(&settings("a", 3));
    let words = ["host name \"a\" is taken", "host_name"];
    other.refused_agent().refused(FAILED, &words);
    assert!(fleet.hosts[0].agent_lives());
    // Another agent on its folders, too.
    let again = fleet.hosts[0].refused_agent();
    again.refused(FAILED, &["only one agent may run"]);
    assert!(fleet.hosts[0].agent_lives());
    // Once the first is gone for good, the name is free.
    fleet.hosts[0].kill_agent();
    let mut other = other;
    other.start_agent();
}

#[test]
fn guests_are_placed_where_they_may_run() {
    let (namespaces, _cluster, urls) = cluster(1);
    let fleet = Fleet::start(namespaces, 3, "cluster", &urls);
    let guest = |name: &str| Guest::new(name, "wait-power-button:ms=600000");
    let asked = &fleet.hosts[0];
    let refused =
        |guest: Guest, words: &[&str]| asked.apply(&guest.manifest()).refused(MISSING, words);
    refused(guest("x").field("host: z"), &["spec.host", "Host/z"]);
    refused(
        guest("x").field("memory: 4096Gi"),
        &["spec.memory", "4096Gi"],
    );
    refused(
        guest("x").field("hostSelector: {host: z}"),
        &["spec.hostSelector"],
    );

    asked
        .apply(&guest("pinned").field("host: b").manifest())
        .done();
    asked
        .apply(&guest("chosen").field("hostSelector: {host: c}").manifest())
        .done();
    assert_eq!(fleet.wait_until_running(0, "pinned"), 1);
    assert_eq!(fleet.wait_until_running(0, "chosen"), 2);
    asked
        .keelson(&["logs", "pinned"])
        .refused(MISSING, &["placed on b"]);
    asked
        .apply(&guest("pinned").field("host: c").manifest())
        .refused(MISSING, &["spec.host", "stop it first"]);
    let hosts = asked.keelson(&["get", "hosts"]).done();
    assert_eq!(
        hosts.lines().filter(|line| line.contains("True")).count(),
        3,
        "{hosts}"
    );

    // Those that want to be apart are, and one too many waits.
    let apart = |name: &str| {
        let text = guest(name).field("antiAffinity: {app: db}").manifest();
        text.replace(
            &format!("metadata: {{name: {name}}}"),
            &format!("metadata: {{name: {name}, labels: {{app: db}}}}"),
        )
    };
    let names = ["db1", "db2", "db3"];
    asked.apply(&names.map(apart).concat()).done();
    let mut places: Vec<_> = names.map(|name| fleet.wait_until_running(0, name)).into();
    places.sort_unstable();
    assert_eq!(places, [0, 1, 2]);
    asked.apply(&apart("db4")).done();
    let waits = asked.wait_for_reason("db4", "NoHostFits");
    assert!(waits.contains("apart"), "{waits}");
    asked.keelson(&["delete", "vm", "db2"]).done();
    fleet.wait_until_running(0, "db4");
}

#[test]
fn a_drained_host_loses_what_can_run_elsewhere() {
    let (namespaces, _cluster, urls) = cluster(1);
    let fleet = Fleet::start(namespaces, 2, "cluster", &urls);
    let guest = |name: &str| Guest::new(name, "wait-power-button:ms=600000 power-off");
    let asked = &fleet.hosts[0];
    let local = asked.path("local.img");
    std::fs::write(&local, vec![0; 1 << 20]).expect("an image can be written");
    let manifest = format!(
        "{}{}{}",
        disk("local", &local),
        guest("stays")
            .field("disks: [{name: data, disk: local}]")
            .manifest(),
        guest("leaves").manifest(),
    );
    asked.keelson(&["cordon", "b"]).done();
    asked.apply(&manifest).done();
    for name in ["stays", "leaves"] {
        assert_eq!(fleet.wait_until_running(0, name), 0);
        asked.wait_for_console(name, "payload: wait-power-button ready");
    }
    asked.keelson(&["uncordon", "b"]).done();
    asked.keelson(&["drain", "a"]).refused(FAILED, &["stays"]);
    assert_eq!(fleet.wait_until_running(0, "leaves"), 1);
    assert_eq!(fleet.wait_until_running(0, "stays"), 0);
    assert_eq!(asked.processes("keelson-vmm").len(), 1);
    // It was shut down, not killed.
    let events = asked.keelson(&["events", "leaves"]).done();
    assert!(!events.contains("Killed"), "{events}");
    let spec = asked.object("host", "a")["spec"].clone();
    assert_eq!(spec["unschedulable"], true, "{spec}");
    asked
        .keelson(&["delete", "host", "b"])
        .refused(MISSING, &["renews its lease"]);
}
