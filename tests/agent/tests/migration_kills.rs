//! Virtual machines that are killed at each step of a move, while the agent of one side is held there: in
//! the end the guest runs on one host, and never two had its disk.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use keelson_agent_tests::{DESTINATION_POINTS, Fleet, Guest, SOURCE_POINTS, cluster, shared_disk};
use keelson_state_tests::Cluster;
use keelson_vmm_tests::wait_until;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::Value;

const GUEST: &str = "moves";

/// Where the source's agent is held that takes the guest back, since the destination's virtual machine was
/// killed when it had all of the guest.
const RETURN_POINTS: [&str; 3] = ["stay-said", "stay-backends-started", "stay-resumed"];

/// A guest that counts its boots on its disk, and then checks and writes its memory all the time.
fn fleet() -> (Fleet, Cluster) {
    let (namespaces, cluster, urls) = cluster(1);
    // Longer than an agent is gone on a machine that is busy.
    let fleet = Fleet::start_with_leases(namespaces, 2, "cluster", &urls, 90);
    let guest = Guest::new(GUEST, "blk-boot-count:until=1 scribble:mib=4")
        .field("failover: Restart")
        .field("restartPolicy: Always")
        .field("disks: [{name: data, disk: moves}]");
    let manifest = shared_disk(GUEST, &fleet.shared_image(GUEST)) + &guest.manifest();
    fleet.hosts[0].apply(&manifest).done();
    fleet.wait_until_running(0, GUEST);
    (fleet, cluster)
}

fn process(id: u32) -> Pid {
    let id = i32::try_from(id).ok().and_then(Pid::from_raw);
    id.expect("a process id")
}

/// Looks all the time whether both hosts serve the disk at once.
struct Watch {
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<Option<[u32; 2]>>>,
}

impl Watch {
    fn begin(folders: [String; 2]) -> Self {
        let ended = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&ended);
        let thread = std::thread::spawn(move || {
            while !until.load(Ordering::SeqCst) {
                let [one, other] = folders.each_ref().map(|folder| backend(folder));
                // One that lived before the other was seen, and still does, lived beside it.
                if let (Some(one), Some(other)) = (one, other)
                    && backend(&folders[0]) == Some(one)
                    && test_kill_process(process(other)).is_ok()
                {
                    return Some([one, other]);
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            None
        });
        Self {
            ended,
            thread: Some(thread),
        }
    }

    fn end(mut self) {
        self.ended.store(true, Ordering::SeqCst);
        let thread = self.thread.take().expect("it runs");
        let both = thread.join().expect("it doesn't panic");
        assert_eq!(both, None, "two backends had the disk at once");
    }
}

/// The process that has the disk's image open, of the host with this folder.
fn backend(folder: &str) -> Option<u32> {
    let entries = std::fs::read_dir("/proc").expect("/proc can be read");
    entries.flatten().find_map(|entry| {
        let id: u32 = entry.file_name().to_str()?.parse().ok()?;
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line);
        let is_backend = line.split('\0').next()?.ends_with("keelson-blk");
        (is_backend && line.contains(folder) && has_image(&entry.path())).then_some(id)
    })
}

fn has_image(process: &Path) -> bool {
    let descriptors = std::fs::read_dir(process.join("fd"));
    let mut descriptors = descriptors.into_iter().flatten().flatten();
    descriptors.any(|descriptor| {
        let target = std::fs::read_link(descriptor.path()).unwrap_or_default();
        target.file_name().is_some_and(|name| name == GUEST) && target.is_absolute()
    })
}

/// How often the guest was booted, as it last said on either host.
fn boots(fleet: &Fleet, host: usize) -> Option<u64> {
    let log = fleet.hosts[host].keelson(&["logs", GUEST]).output;
    let line = log.lines().rfind(|line| line.contains("boots="))?;
    let number = line.rsplit_once("boots=")?.1;
    let number: String = number.chars().take_while(char::is_ascii_digit).collect();
    number.parse().ok()
}

/// Restarts both agents, one of which is to be held at points, each of which makes a file.
fn hold_at(fleet: &mut Fleet, held: usize, points: &[(&str, &Path)]) {
    let points: Vec<_> = points
        .iter()
        .map(|(point, file)| format!("{GUEST}:{point}=1*return({})", file.display()))
        .collect();
    let points = points.join(";");
    for at in 0..2 {
        fleet.hosts[at].kill_agent();
        let variables = [("FAILPOINTS", points.as_str())];
        let variables = &variables[..usize::from(at == held)];
        // What the killed agent had forked holds its locks for a moment.
        while !fleet.hosts[at].start_agent_with(variables) {}
    }
}

fn kill_machines(fleet: &Fleet, host: usize) -> usize {
    let machines = fleet.hosts[host].processes("keelson-vmm");
    for id in &machines {
        // It may have ended by itself.
        let _ = kill_process(process(*id), Signal::KILL);
    }
    machines.len()
}

/// The guest runs on the host that it is placed on, and nothing of it is on the other one.
fn check(fleet: &Fleet, after: &str) -> usize {
    let host = wait_until(
        &format!("one virtual machine and one backend after {after}"),
        || {
            let place = fleet.place_of(0, GUEST)?;
            let status = fleet.hosts[0].object("vm", GUEST)["status"].clone();
            let is_one = |program: &str| {
                let counts = [0, 1].map(|at: usize| fleet.hosts[at].processes(program).len());
                counts[place] == 1 && counts[1 - place] == 0
            };
            let settled = status["phase"] == "Running"
                && !matches!(
                    status["migration"]["phase"].as_str(),
                    Some("Requested" | "Prepared" | "Moved")
                );
            (settled && is_one("keelson-vmm") && is_one("keelson-blk")).then_some(place)
        },
    );
    let log = || fleet.hosts[host].keelson(&["logs", GUEST]).output;
    let before = log().len();
    wait_until(&format!("further sweeps after {after}"), || {
        (log().len() > before).then_some(())
    });
    assert!(!log().contains("FAIL"), "after {after}: {}", log());
    let folder = fleet.hosts[1 - host].path(&format!("run/vms/{GUEST}"));
    wait_until(
        &format!("end of {} after {after}", folder.display()),
        || (!folder.exists()).then_some(()),
    );
    host
}

fn restarts(fleet: &Fleet) -> u64 {
    let status = &fleet.hosts[0].object("vm", GUEST)["status"];
    status["restarts"].as_u64().expect("a number")
}

/// What is killed, and where, while an agent is held.
struct Fault<'a> {
    point: &'a str,
    source_is_held: bool,
    of_source: bool,
    /// Kills the destination's virtual machine when it has all of the guest, so that the point is reached.
    returning: bool,
}

/// Kills the destination's virtual machine when the source's agent has released the guest, and is held.
fn kill_the_arrived(fleet: &Fleet, source: usize, released: &Path) {
    wait_until("the source, which has released the guest", || {
        released.exists().then_some(())
    });
    assert_eq!(kill_machines(fleet, 1 - source), 1);
    fleet.hosts[1 - source].wait_for_status(GUEST, "failed move", |status| {
        status["migration"]["phase"] == "Failed"
    });
    std::fs::remove_file(released).expect("it is held");
}

/// One move with a fault; whether there was a virtual machine to be killed.
fn kill_at(fleet: &mut Fleet, fault: &Fault<'_>) -> bool {
    let source = fleet.place_of(0, GUEST).expect("it is placed");
    let destination = 1 - source;
    let held = if fault.source_is_held {
        source
    } else {
        destination
    };
    let killed = if fault.of_source { source } else { destination };
    let file = fleet.hosts[held].path("held");
    let released = fleet.hosts[held].path("released");
    let mut points = vec![(fault.point, file.as_path())];
    if fault.returning {
        points.push(("leave-backends-ended", &released));
    }
    hold_at(fleet, held, &points);
    let restarted = restarts(fleet);
    let folders = [0, 1].map(|at: usize| fleet.hosts[at].folder().display().to_string());
    let watch = Watch::begin(folders);
    let to = ["a", "b"][destination];
    fleet.hosts[source]
        .keelson(&["migrate", GUEST, to, "--no-wait", "--downtime", "10000"])
        .done();
    if fault.returning {
        kill_the_arrived(fleet, source, &released);
    }
    let what = format!(
        "{} with the {}'s virtual machine killed",
        fault.point,
        if fault.of_source {
            "source"
        } else {
            "destination"
        }
    );
    wait_until(&format!("the agent at {what}"), || {
        file.exists().then_some(())
    });
    let count = kill_machines(fleet, killed);
    // Those that are free see it first.
    std::thread::sleep(Duration::from_millis(300));
    std::fs::remove_file(&file).expect("it is held");
    let host = check(fleet, &what);
    watch.end();
    let status: Value = fleet.hosts[0].object("vm", GUEST)["status"].clone();
    let again = restarts(fleet) - restarted;
    println!(
        "{what}: {count} killed; {} {}; on {}, started anew {again} times, {:?} boots",
        status["migration"]["phase"],
        status["migration"]["message"],
        ["source", "destination"][usize::from(host == destination)],
        boots(fleet, host),
    );
    assert!(again <= 1, "after {what}: {status:#}");
    count > 0
}

/// Nothing but what belongs to no guest is left of it.
fn check_nothing_is_left(fleet: &Fleet) {
    let place = fleet.place_of(0, GUEST).expect("it is placed");
    let asked = &fleet.hosts[place];
    asked.keelson(&["cordon", ["a", "b"][1 - place]]).done();
    asked.keelson(&["stop", GUEST, "--force"]).done();
    asked.keelson(&["delete", "vm", GUEST]).done();
    let left: BTreeSet<u32> = fleet
        .hosts
        .iter()
        .flat_map(|host| {
            let machines = host.processes("keelson-vmm").into_iter();
            machines.chain(host.processes("keelson-blk"))
        })
        .collect();
    assert!(left.is_empty(), "{left:?}");
    for host in &fleet.hosts {
        let folders = std::fs::read_dir(host.path("run/vms"))
            .into_iter()
            .flatten();
        assert_eq!(folders.count(), 0);
    }
}

/// Whether the source's virtual machine is killed at a step, or the destination's: by turns, or both where
/// `KEELSON_ALL_STEPS` is set, which takes ten minutes.
fn sides(step: usize) -> Vec<bool> {
    if std::env::var_os("KEELSON_ALL_STEPS").is_some() {
        vec![true, false]
    } else {
        vec![step.is_multiple_of(2)]
    }
}

#[test]
fn machines_are_killed_while_the_sources_agent_is_held() {
    let (mut fleet, _cluster) = fleet();
    for (index, point) in SOURCE_POINTS.into_iter().enumerate() {
        for of_source in sides(index) {
            let fault = Fault {
                point,
                source_is_held: true,
                of_source,
                returning: false,
            };
            let killed = kill_at(&mut fleet, &fault);
            // The source's is gone when it has been given up.
            assert!(killed || of_source && point == "leave-gone", "{point}");
        }
    }
    check_nothing_is_left(&fleet);
}

#[test]
fn machines_are_killed_while_the_destinations_agent_is_held() {
    let (mut fleet, _cluster) = fleet();
    for (index, point) in DESTINATION_POINTS.into_iter().enumerate() {
        for of_source in sides(index) {
            let fault = Fault {
                point,
                source_is_held: false,
                of_source,
                returning: false,
            };
            let killed = kill_at(&mut fleet, &fault);
            // There is none yet, or none any more.
            let none = if of_source {
                point.starts_with("land-")
            } else {
                point == "arrive-folder-made"
            };
            assert!(killed || none, "{point}");
        }
    }
    check_nothing_is_left(&fleet);
}

#[test]
fn machines_are_killed_while_the_source_takes_its_guest_back() {
    let (mut fleet, _cluster) = fleet();
    for point in RETURN_POINTS {
        let fault = Fault {
            point,
            source_is_held: true,
            of_source: true,
            returning: true,
        };
        assert!(kill_at(&mut fleet, &fault), "{point}");
    }
    check_nothing_is_left(&fleet);
}
