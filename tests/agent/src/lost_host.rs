//! A host of several is lost: what the tests of fleets do on this machine and in the lab.

use std::cell::Cell;
use std::time::Instant;

use keelson_state_tests::Cluster;
use keelson_vmm_tests::wait_until;
use rustix::process::{Pid, Signal, kill_process};

use crate::{Fleet, Guest, cluster_with, shared_disk};

const GUESTS: [&str; 3] = ["one", "two", "three"];

/// Under which circumstances a host is lost.
#[derive(Clone, Copy)]
pub struct Loss<'a> {
    /// How long a host's lease lasts, in seconds.
    pub lease_seconds: u64,
    /// More flags of the store's members.
    pub member_flags: &'a [&'a str],
    /// Sets the machine's wall clock so many hours on, or back. Nothing comes of it.
    pub shift_clock: fn(i64),
}

impl Loss<'_> {
    /// Three hosts, each with a member of the store; one of them dies with all that it has, and comes back.
    ///
    /// # Panics
    /// If its guest does not run elsewhere, on its disk, or another one was not left alone.
    pub fn of_one_of_three(&self) {
        let steps = Steps::begin();
        let (namespaces, mut cluster, urls) = cluster_with(GUESTS.len(), self.member_flags);
        // Hosts would have processors of their own.
        cluster.prefer();
        steps.done("the store answers");
        let mut fleet = Fleet::start_with_leases(
            namespaces,
            GUESTS.len(),
            "cluster",
            &urls,
            self.lease_seconds,
        );
        steps.done("three agents answer");
        let mut manifest = String::new();
        for name in GUESTS {
            manifest += &shared_disk(name, &fleet.shared_image(name));
            manifest += &counting(name).manifest();
        }
        fleet.hosts[0].apply(&manifest).done();
        let places = GUESTS.map(|name| fleet.wait_until_running(0, name));
        steps.done("three guests run");
        // One each, since hosts are equal.
        let mut spread = places;
        spread.sort_unstable();
        assert_eq!(spread, [0, 1, 2]);
        (self.shift_clock)(1);

        let dead = places[0];
        lose(&mut fleet, &mut cluster, dead);
        (self.shift_clock)(-2);
        let now = check_what_became_of_it(&fleet, places);
        steps.done("the guest of the lost host runs elsewhere");

        // The host comes back, and leaves the guest where it is.
        let asked = other_than(dead);
        cluster.run(dead);
        cluster.prefer();
        fleet.hosts[dead].start_agent();
        wait_until("the host's lease", || {
            let ready = fleet.host_condition(asked, host_name(dead), "Ready");
            (ready["reason"] == "AgentRuns").then_some(())
        });
        assert!(fleet.hosts[dead].processes("keelson-vmm").is_empty());
        assert_eq!(fleet.place_of(asked, GUESTS[0]), Some(now));
        steps.done("the host is back");
    }
}

/// All processes of a host end at once, with its member of the store.
fn lose(fleet: &mut Fleet, cluster: &mut Cluster, dead: usize) {
    cluster.kill(dead);
    fleet.hosts[dead].kill_agent();
    for program in ["keelsond", "keelson-vmm", "keelson-blk"] {
        fleet.hosts[dead]
            .processes(program)
            .into_iter()
            .for_each(kill);
    }
}

/// Waits until the first guest, whose host is lost, runs elsewhere; there.
fn check_what_became_of_it(fleet: &Fleet, places: [usize; 3]) -> usize {
    let dead = places[0];
    let asked = other_than(dead);
    fleet.wait_for_event(asked, GUESTS[0], "FailedOver");
    let now = fleet.wait_until_running(asked, GUESTS[0]);
    assert_ne!(now, dead);
    // The same disk.
    fleet.hosts[now].wait_for_console(GUESTS[0], "payload: blk-boot-count ok boots=2");
    let ready = fleet.host_condition(asked, host_name(dead), "Ready");
    assert_eq!(ready["reason"], "LeaseEnded", "{ready}");
    // The others were left alone.
    for (guest, place) in GUESTS.iter().zip(places).skip(1) {
        let status = fleet.hosts[asked].object("vm", guest)["status"].clone();
        assert_eq!(status["placement"]["epoch"], 1, "{status}");
        assert_eq!(fleet.place_of(asked, guest), Some(place));
    }
    now
}

/// Says how long each step took.
struct Steps(Cell<Instant>);

impl Steps {
    fn begin() -> Self {
        Self(Cell::new(Instant::now()))
    }

    fn done(&self, what: &str) {
        let took = self.0.replace(Instant::now()).elapsed();
        println!("{what}: {:.1} s", took.as_secs_f64());
    }
}

/// A guest that counts its boots on its disk, and fails over.
pub fn counting(name: &str) -> Guest {
    Guest::new(name, "blk-boot-count:until=1 hang")
        .field("failover: Restart")
        .field(&format!("disks: [{{name: data, disk: {name}}}]"))
}

fn host_name(host: usize) -> &'static str {
    ["a", "b", "c"][host]
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
