//! A host of several is lost: what the tests of fleets do on this machine and in the lab.

use std::time::Instant;

use keelson_vmm_tests::wait_until;
use rustix::process::{Pid, Signal, kill_process};

use crate::{Fleet, Guest, cluster, shared_disk};

/// Three hosts, each with a member of the store; one of them dies with all that it has, and comes back.
///
/// # Panics
/// If its guest does not run elsewhere, on its disk, or another one was not left alone.
pub fn lose_a_host(lease_seconds: u64) {
    let (namespaces, mut cluster, urls) = cluster(3);
    let mut fleet = Fleet::start_with_leases(namespaces, 3, "cluster", &urls, lease_seconds);
    let mut manifest = String::new();
    for name in ["one", "two", "three"] {
        manifest += &shared_disk(name, &fleet.shared_image(name));
        manifest += &counting(name).manifest();
    }
    fleet.hosts[0].apply(&manifest).done();
    let places: Vec<_> = ["one", "two", "three"]
        .iter()
        .map(|name| fleet.wait_until_running(0, name))
        .collect();
    // One each, since hosts are equal.
    let mut spread = places.clone();
    spread.sort_unstable();
    assert_eq!(spread, [0, 1, 2]);

    let dead = places[0];
    let asked = other_than(dead);
    cluster.kill(dead);
    fleet.hosts[dead].kill_agent();
    let died = Instant::now();
    for program in ["keelsond", "keelson-vmm", "keelson-blk"] {
        fleet.hosts[dead]
            .processes(program)
            .into_iter()
            .for_each(kill);
    }
    fleet.wait_for_event(asked, "one", "FailedOver");
    let now = fleet.wait_until_running(asked, "one");
    let took = died.elapsed();
    println!("it ran elsewhere after {took:?}, with a lease of {lease_seconds} s");
    assert_ne!(now, dead);
    // The same disk.
    fleet.hosts[now].wait_for_console("one", "payload: blk-boot-count ok boots=2");
    let name = ["a", "b", "c"][dead];
    let ready = fleet.host_condition(asked, name, "Ready");
    assert_eq!(ready["reason"], "LeaseEnded", "{ready}");
    // The others were left alone.
    for (guest, place) in ["two", "three"].iter().zip(&places[1..]) {
        let status = fleet.hosts[asked].object("vm", guest)["status"].clone();
        assert_eq!(status["placement"]["epoch"], 1, "{status}");
        assert_eq!(fleet.place_of(asked, guest), Some(*place));
    }
    // The host comes back, and leaves the guest where it is.
    cluster.run(dead);
    fleet.hosts[dead].start_agent();
    wait_until("the host's lease", || {
        let ready = fleet.host_condition(asked, name, "Ready");
        (ready["reason"] == "AgentRuns").then_some(())
    });
    assert!(fleet.hosts[dead].processes("keelson-vmm").is_empty());
    assert_eq!(fleet.place_of(asked, "one"), Some(now));
}

/// A guest that counts its boots on its disk, and fails over.
pub fn counting(name: &str) -> Guest {
    Guest::new(name, "blk-boot-count:until=1 hang")
        .field("failover: Restart")
        .field(&format!("disks: [{{name: data, disk: {name}}}]"))
}

fn kill(id: u32) {
    let id = i32::try_from(id).ok().and_then(Pid::from_raw);
    // It may have ended.
    let _ = kill_process(id.expect("a process id"), Signal::KILL);
}

/// One that asks for the others.
fn other_than(host: usize) -> usize {
    usize::from(host == 0)
}
