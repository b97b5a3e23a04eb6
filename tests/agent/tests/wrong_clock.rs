//! Hosts whose wall clocks are hours off each other, and jump while they run: leases, guests and the guard go by clocks
//! that nobody sets.

use std::env::current_exe;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;

use jiff::Timestamp;
use keelson_agent_tests::{Fleet, LEASE_SECONDS, cluster, counting, shared_disk};
use keelson_vmm_tests::wait_until;
use tempfile::TempDir;

const HOUR: i64 = 3600;
const HOSTS: [&str; 3] = ["a", "b", "c"];

/// A wall clock that programs follow.
struct Clock {
    file: File,
    path: PathBuf,
}

impl Clock {
    fn new(folder: &TempDir, name: &str, seconds: i64) -> Self {
        let path = folder.path().join(name);
        fs::write(&path, seconds.to_ne_bytes()).expect("a file can be written");
        let file = File::options().write(true).open(&path);
        let file = file.expect("it can be opened");
        Self { file, path }
    }

    fn set(&self, seconds: i64) {
        let written = self.file.write_all_at(&seconds.to_ne_bytes(), 0);
        written.expect("it can be written to");
    }

    fn variables(&self) -> [(OsString, OsString); 2] {
        let test = current_exe().expect("a test knows its own path");
        // target/<profile>/deps/<test>
        let profile = test.ancestors().nth(2).expect("a test is in such a folder");
        let library = profile.join("examples/libwrong_clock.so");
        assert!(
            library.is_file(),
            "{} is not built: examples are, unless tests are chosen by targets (--test)",
            library.display()
        );
        [
            ("LD_PRELOAD".into(), library.into()),
            ("KEELSON_CLOCK".into(), self.path.clone().into()),
        ]
    }
}

/// A fleet of which each host's agent, guests and member of the store have one wrong clock.
fn fleet_with_clocks(
    folder: &TempDir,
    hours: [i64; 3],
) -> (Fleet, keelson_state_tests::Cluster, Vec<Clock>) {
    let (namespaces, mut cluster, urls) = cluster(HOSTS.len());
    let clocks: Vec<_> = HOSTS
        .iter()
        .zip(hours)
        .map(|(name, hours)| Clock::new(folder, name, hours * HOUR))
        .collect();
    for (member, clock) in clocks.iter().enumerate() {
        cluster.kill(member);
        cluster.set_variables(member, &clock.variables());
        cluster.run(member);
    }
    let mut fleet = Fleet::start(namespaces, HOSTS.len(), "cluster", &urls);
    for (host, clock) in fleet.hosts.iter_mut().zip(&clocks) {
        host.kill_agent();
        host.set_variables(&clock.variables());
        host.start_agent();
    }
    (fleet, cluster, clocks)
}

#[test]
fn wrong_wall_clocks_end_no_lease_and_no_guest_and_put_no_end_off() {
    let folder = TempDir::new().expect("there is a place for temporary files");
    let hours = [5, 0, -3];
    let (mut fleet, _cluster, clocks) = fleet_with_clocks(&folder, hours);
    let mut manifest = String::new();
    for host in HOSTS {
        manifest += &shared_disk(host, &fleet.shared_image(host));
        // One each, since hosts are equal.
        manifest += &counting(host).manifest();
    }
    fleet.hosts[1].apply(&manifest).done();
    let places = HOSTS.map(|guest| fleet.wait_until_running(1, guest));
    let mut spread = places;
    spread.sort_unstable();
    assert_eq!(spread, [0, 1, 2]);
    let statuses =
        |fleet: &Fleet| HOSTS.map(|guest| fleet.hosts[1].object("vm", guest)["status"].clone());
    let before = statuses(&fleet);
    for (status, place) in before.iter().zip(places) {
        let started = status["startedAt"].as_str().unwrap_or_default();
        let started: Timestamp = started.parse().expect("it says when it was started");
        let wrong = started.duration_since(Timestamp::now()).as_secs();
        assert!(
            (wrong - hours[place] * HOUR).abs() < 600,
            "the clock of {} is {wrong} s off: is the program linked statically?",
            HOSTS[place]
        );
    }

    // There, back, and by a day; one host alone, then all, with their members.
    for jumps in [[1, 0, 0], [-1, 0, 0], [1, 1, 1], [-24, 24, -24], [0, 0, 0]] {
        for ((clock, hours), jump) in clocks.iter().zip(hours).zip(jumps) {
            clock.set((hours + jump) * HOUR);
        }
        sleep(Duration::from_secs(LEASE_SECONDS) * 7 / 10);
    }
    for (host, name) in fleet.hosts.iter_mut().zip(HOSTS) {
        assert!(host.agent_lives(), "{}", host.agent_log());
        assert!(!host.agent_log().contains("lease ended"), "{name}");
    }
    for (before, now) in before.iter().zip(statuses(&fleet)) {
        assert_eq!(before["processId"], now["processId"], "{now}");
        assert_eq!(now["placement"]["epoch"], 1, "{now}");
        assert_eq!(now["phase"], "Running", "{now}");
    }

    // The clock of a host that is cut off goes back: its guest is killed no later for that.
    let guest = HOSTS[places
        .iter()
        .position(|place| *place == 0)
        .expect("it has one")];
    let runs = |host: usize| {
        let folder = format!("vms/{guest}");
        let machines = fleet.hosts[host].processes("keelson-vmm").into_iter();
        let mut lines = machines.map(|id| fs::read(format!("/proc/{id}/cmdline")));
        lines.any(|line| String::from_utf8_lossy(&line.unwrap_or_default()).contains(&folder))
    };
    assert!(runs(0));
    fleet.links[0].cut(true);
    clocks[0].set((hours[0] - 1) * HOUR);
    wait_until("the end of the guest on the host that is cut off", || {
        let gone = !runs(0);
        assert!(gone || !(runs(1) || runs(2)), "it runs twice");
        gone.then_some(())
    });
    fleet.wait_for_event(1, guest, "FailedOver");
    let now = fleet.wait_until_running(1, guest);
    assert_ne!(now, 0);
    fleet.hosts[now].wait_for_console(guest, "payload: blk-boot-count ok boots=2");
    fleet.links[0].cut(false);
    fleet.wait_for_event(1, guest, "Fenced");
}
