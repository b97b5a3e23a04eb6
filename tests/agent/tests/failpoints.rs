//! The agent is killed at each step of a guest's life. The next one brings the guest to where it should
//! be; nothing of it is left when it is deleted, and another guest runs on as if nothing had happened.
//!
//! Where it is killed, `FAILPOINTS` says (the crate `fail`). The agent has to be built with them, as it is
//! together with this package: `./test`, or `cargo build -p keelson-agent -p keelson-agent-tests --bins`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use keelson_agent_tests::{Guest, Host, network};
use keelson_vmm_tests::wait_until;
use serde_json::Value;

/// The steps of a guest that is applied, runs, is stopped, and is deleted; and the how many-th time.
const POINTS: [(&str, u32); 30] = [
    ("victim:apply-committed", 1),
    ("victim:start-said", 1),
    ("victim:start-folder-made", 1),
    ("victim:disk-image-prepared", 1),
    ("keelson-disk-victim-data:forked", 1),
    ("keelson-disk-victim-data:placed", 1),
    ("keelson-disk-victim-data:recorded", 1),
    ("keelson-disk-victim-data:executed", 1),
    ("victim:disk-backend-ready", 1),
    ("victim:port-device-made", 1),
    ("victim:port-policy-attached", 1),
    ("victim:port-up", 1),
    ("victim:start-ports-made", 1),
    ("victim:start-jail-owned", 1),
    ("keelson-vm-victim:forked", 1),
    ("keelson-vm-victim:placed", 1),
    ("keelson-vm-victim:recorded", 1),
    ("victim:machine-launched", 1),
    ("victim:machine-ready", 1),
    ("victim:start-plan-written", 1),
    ("victim:running-said", 1),
    ("victim:stop-said", 1),
    ("victim:stop-button-pressed", 1),
    ("victim:end-seen", 1),
    // The first time is before the start.
    ("victim:teardown-disks-ended", 2),
    ("victim:teardown-port-gone", 1),
    ("victim:teardown-folder-gone", 2),
    ("victim:teardown-folder-gone", 3),
    ("victim:delete-torn-down", 1),
    ("victim:delete-logs-gone", 1),
];
/// Those of an agent that finds a guest.
const ADOPTION_POINTS: [&str; 3] = [
    "adoptee:adopt-begun",
    "adoptee:adopt-disks-found",
    "adoptee:adopt-machine-found",
];

/// Those of an agent whose running guest gets a disk and an interface.
const PLUG_POINTS: [(&str, u32); 17] = [
    ("plugged:plug-noted", 1),
    ("plugged:disk-image-prepared", 1),
    ("keelson-disk-plugged-data:forked", 1),
    ("keelson-disk-plugged-data:placed", 1),
    ("keelson-disk-plugged-data:recorded", 1),
    ("keelson-disk-plugged-data:executed", 1),
    ("plugged:disk-backend-ready", 1),
    ("plugged:plug-backend-ready", 1),
    ("plugged:plug-machine-has", 1),
    ("plugged:plug-settled", 1),
    ("plugged:plug-noted", 2),
    ("plugged:port-device-made", 1),
    ("plugged:port-policy-attached", 1),
    ("plugged:port-up", 1),
    ("plugged:plug-port-made", 1),
    ("plugged:plug-machine-has", 2),
    ("plugged:plug-settled", 2),
];
/// Those of one whose guest has to let go of them.
const UNPLUG_POINTS: [(&str, u32); 9] = [
    ("plugged:unplug-noted", 1),
    ("plugged:unplug-released", 1),
    ("plugged:unplug-backend-ended", 1),
    ("plugged:unplug-forgotten", 1),
    ("plugged:unplug-noted", 2),
    ("plugged:unplug-silenced", 1),
    ("plugged:unplug-released", 2),
    ("plugged:unplug-port-gone", 1),
    ("plugged:unplug-forgotten", 2),
];

const BYSTANDER: &str = "bystander";

struct Matrix {
    host: Host,
    /// The guest that comes and goes. Control groups are the machine's, so no two tests may share a name.
    victim: &'static str,
    bystander: Value,
    image: PathBuf,
    base: PathBuf,
    /// What there is on the host beside the guest that comes and goes.
    devices: BTreeSet<String>,
    pins: BTreeSet<PathBuf>,
}

impl Matrix {
    fn new(victim: &'static str) -> Self {
        let host = Host::new();
        let base = host.path("base.img");
        fs::write(&base, vec![7; 1 << 20]).expect("an image can be written");
        let lan = network("lan", "10.66.0.0/24", "10.66.0.1");
        let guest = Guest::new(BYSTANDER, "hang")
            .field("interfaces: [{name: eth0, network: lan}]")
            .manifest();
        host.apply(&format!("{lan}{guest}")).done();
        host.wait_for_console(BYSTANDER, "payload: hang ok");
        let bystander = host.wait_for_phase(BYSTANDER, "Running");
        let mut matrix = Self {
            victim,
            image: host.path("data.img"),
            base,
            bystander,
            devices: BTreeSet::new(),
            pins: BTreeSet::new(),
            host,
        };
        matrix.devices = matrix.devices_now();
        matrix.pins = files_below(matrix.host.pins());
        matrix
    }

    fn devices_now(&self) -> BTreeSet<String> {
        self.host.devices().into_iter().collect()
    }

    fn disk(&self) -> String {
        format!(
            "---\napiVersion: keelson.dev/v1alpha1\nkind: Disk\nmetadata: {{name: data}}\n\
             spec: {{path: {}, base: {{path: {}}}}}\n",
            self.image.display(),
            self.base.display()
        )
    }

    fn manifest(&self) -> String {
        let disk = self.disk();
        let guest = Guest::new(self.victim, "wait-power-button:ms=600000 power-off")
            .field("disks: [{name: data, disk: data}]")
            .field("interfaces: [{name: eth0, network: lan}]")
            .manifest();
        format!("{disk}{guest}")
    }

    /// Lets an agent that is killed at `point` lead the guest through its life, as far as it comes.
    fn die_at(&mut self, point: &str, time: u32) {
        self.host.kill_agent();
        let points = match time {
            1 => format!("{point}=return"),
            time => format!("{point}={}*off->return", time - 1),
        };
        // It may be killed before it answers.
        if self.host.start_agent_with(&[("FAILPOINTS", &points)]) {
            self.host.apply(&self.manifest());
            let mut at = 0;
            wait_until(&format!("the agent's end at {point}"), || {
                if !self.host.agent_lives() {
                    return Some(());
                }
                let phase = self.phase();
                match (at, phase.as_deref()) {
                    (0, Some("Running")) if self.is_up() => {
                        self.host.keelson(&["stop", self.victim, "--no-wait"]);
                        at = 1;
                    }
                    (1, Some("Stopped")) => {
                        self.host
                            .keelson(&["delete", "vm", self.victim, "--no-wait"]);
                        at = 2;
                    }
                    (2, None) if self.host.keelson(&["host"]).code == Some(0) => {
                        panic!(
                            "{point} is on no guest's way, or keelsond is built without failpoints"
                        )
                    }
                    _ => {}
                }
                None
            });
        }
        self.host.kill_agent();
    }

    /// A guest that takes devices and lets go of them, with a disk and an interface or without.
    fn pluggable(&self, with_devices: bool) -> String {
        let steps = "plug-serve power-off";
        let mut guest = Guest::new(self.victim, steps).field("sharedMemory: true");
        if with_devices {
            guest = guest.field("disks: [{name: data, disk: data}]");
            guest = guest.field("interfaces: [{name: eth0, network: lan}]");
        }
        self.disk() + &guest.manifest()
    }

    /// Lets an agent that is killed at `point` change the devices of the guest; the next one goes on.
    fn replug(&mut self, point: &str, time: u32, with_devices: bool) {
        self.host.kill_agent();
        let points = match time {
            1 => format!("{point}=return"),
            time => format!("{point}={}*off->return", time - 1),
        };
        if self.host.start_agent_with(&[("FAILPOINTS", &points)]) {
            // It may be killed before it answers.
            self.host.apply(&self.pluggable(with_devices));
            wait_until(&format!("the agent's end at {point}"), || {
                (!self.host.agent_lives()).then_some(())
            });
        }
        self.host.kill_agent();
        while !self.host.start_agent_with(&[]) {}
        self.host.apply(&self.pluggable(with_devices)).done();
        self.wait_for_devices(with_devices);
    }

    /// Waits until the guest has its devices, or none; its process is the same all the time.
    fn wait_for_devices(&self, with_devices: bool) -> Value {
        let what = format!("devices: {with_devices}");
        let status = self.host.wait_for_status(self.victim, &what, |status| {
            let none = Vec::new();
            let devices = status["devices"].as_array().unwrap_or(&none);
            let attached = devices.iter().all(|device| device["state"] == "Attached");
            let count = if with_devices { 2 } else { 0 };
            let pending = status["conditions"].to_string().contains("DevicesPending");
            status["phase"] == "Running" && attached && devices.len() == count && !pending
        });
        let backends = usize::from(with_devices);
        assert_eq!(self.processes("keelson-blk").len(), backends, "{status}");
        assert_eq!(self.processes("keelson-vmm").len(), 1, "{status}");
        status["processId"].clone()
    }

    fn phase(&self) -> Option<String> {
        let said = self.host.keelson(&["get", "vm", self.victim, "-o", "json"]);
        let object: Value = serde_json::from_str(&said.output).ok()?;
        object["status"]["phase"].as_str().map(str::to_owned)
    }

    fn is_up(&self) -> bool {
        let log = self.host.keelson(&["logs", self.victim]).output;
        log.contains("payload: wait-power-button ready")
    }

    /// The next agent brings the guest to where its object says, and then to its end.
    fn converge(&mut self, point: &str) {
        // What the killed agent had forked holds its locks for a moment.
        while !self.host.start_agent_with(&[]) {}
        let said = self.host.keelson(&["get", "vm", self.victim, "-o", "json"]);
        if said.code == Some(0) {
            let object: Value = serde_json::from_str(&said.output).expect("JSON");
            let deleting = !object["metadata"]["deletionTimestamp"].is_null();
            if object["spec"]["powerState"] == "Running" && !deleting {
                self.host.wait_for_phase(self.victim, "Running");
                wait_until("the guest", || self.is_up().then_some(()));
                assert_eq!(self.processes("keelson-vmm").len(), 1, "after {point}");
                assert_eq!(self.processes("keelson-blk").len(), 1, "after {point}");
            }
            if !deleting {
                self.host.keelson(&["stop", self.victim]).done();
                self.host.wait_for_phase(self.victim, "Stopped");
            }
            let deleted = self.host.keelson(&["delete", "vm", self.victim]);
            assert!(matches!(deleted.code, Some(0 | 3)), "{deleted:?}");
        }
        wait_until("the guest's end", || self.phase().is_none().then_some(()));
        self.check_nothing_is_left(point);
    }

    fn processes(&self, program: &str) -> Vec<u32> {
        let line = |id: &u32| fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
        let of_victim = |id: &u32| {
            let line = line(id);
            String::from_utf8_lossy(&line).contains(&format!("vms/{}", self.victim))
        };
        let all = self.host.processes(program);
        all.into_iter().filter(of_victim).collect()
    }

    /// The guest's control groups on this machine.
    fn groups_now(&self) -> BTreeSet<PathBuf> {
        let mounts = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
        let folders = mounts.map(|mount| Path::new(mount).join("keelson-guests.slice"));
        let entries = folders
            .into_iter()
            .flat_map(|folder| fs::read_dir(folder).into_iter().flatten());
        entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.to_string_lossy().contains(self.victim))
            .collect()
    }

    fn check_nothing_is_left(&self, point: &str) {
        for program in ["keelson-vmm", "keelson-blk"] {
            let left = self.processes(program);
            assert!(left.is_empty(), "{program} is left after {point}: {left:?}");
        }
        for folder in ["run/vms", "log"].map(|folder| format!("{folder}/{}", self.victim)) {
            assert!(
                !self.host.path(&folder).exists(),
                "{folder} is left after {point}"
            );
        }
        assert_eq!(self.devices_now(), self.devices, "devices after {point}");
        let pins = files_below(self.host.pins());
        assert_eq!(pins, self.pins, "pinned maps and links after {point}");
        let groups = self.groups_now();
        assert!(
            groups.is_empty(),
            "control groups after {point}: {groups:?}"
        );
        // Its lock is free and the overlay whole.
        let check = self.host.blk(&["image", "check"], &self.image);
        assert!(
            check.code == Some(0) || !self.image.exists(),
            "{check:?} after {point}"
        );
        let bystander = self.host.object("vm", BYSTANDER)["status"].clone();
        for field in ["processId", "startedAt", "restarts"] {
            assert_eq!(
                bystander[field], self.bystander[field],
                "{field} after {point}"
            );
        }
    }
}

fn files_below(folder: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            found.append(&mut files_below(&entry.path()));
        } else {
            found.insert(entry.path());
        }
    }
    found
}

#[test]
fn an_agent_that_is_killed_at_any_step_leaves_nothing_and_harms_nobody() {
    let mut matrix = Matrix::new("victim");
    for (point, time) in POINTS {
        matrix.die_at(point, time);
        matrix.converge(point);
    }
}

#[test]
fn an_agent_that_is_killed_while_it_adopts_harms_nobody() {
    let mut matrix = Matrix::new("adoptee");
    for point in ADOPTION_POINTS {
        matrix.host.apply(&matrix.manifest()).done();
        let before = matrix.host.wait_for_phase("adoptee", "Running")["processId"].clone();
        wait_until("the guest", || matrix.is_up().then_some(()));
        matrix.host.kill_agent();
        let points = format!("{point}=return");
        if matrix.host.start_agent_with(&[("FAILPOINTS", &points)]) {
            wait_until(&format!("the agent's end at {point}"), || {
                (!matrix.host.agent_lives()).then_some(())
            });
        }
        matrix.host.kill_agent();
        matrix.host.start_agent();
        let after = matrix.host.wait_for_phase("adoptee", "Running")["processId"].clone();
        assert_eq!(before, after, "after {point}");
        matrix.host.kill_agent();
        matrix.converge(point);
    }
}

#[test]
fn an_agent_that_is_killed_while_devices_come_and_go_leaves_nothing_and_harms_no_guest() {
    let mut matrix = Matrix::new("plugged");
    matrix.host.apply(&matrix.pluggable(false)).done();
    matrix
        .host
        .wait_for_console("plugged", "payload: plug-serve ready");
    let process = matrix.wait_for_devices(false);
    let with = PLUG_POINTS.map(|(point, time)| (point, time, true));
    let without = UNPLUG_POINTS.map(|(point, time)| (point, time, false));
    for (point, time, with_devices) in with.into_iter().chain(without) {
        // Where it starts from.
        matrix.host.apply(&matrix.pluggable(!with_devices)).done();
        matrix.wait_for_devices(!with_devices);
        matrix.replug(point, time, with_devices);
        matrix.host.apply(&matrix.pluggable(false)).done();
        assert_eq!(matrix.wait_for_devices(false), process, "after {point}");
        assert_eq!(
            matrix.devices_now(),
            matrix.devices,
            "devices after {point}"
        );
        let pins = files_below(matrix.host.pins());
        assert_eq!(pins, matrix.pins, "pinned maps and links after {point}");
        let groups = matrix.groups_now();
        let of_disk = |group: &PathBuf| group.to_string_lossy().contains("keelson-disk");
        let none_is_left = !groups.iter().any(of_disk);
        assert!(none_is_left, "control groups after {point}: {groups:?}");
        let check = matrix.host.blk(&["image", "check"], &matrix.image);
        assert!(
            check.code == Some(0) || !matrix.image.exists(),
            "{check:?} after {point}"
        );
    }
    matrix.host.keelson(&["stop", "plugged"]).done();
    matrix.host.keelson(&["delete", "vm", "plugged"]).done();
    wait_until("the guest's end", || matrix.phase().is_none().then_some(()));
    matrix.check_nothing_is_left("all of them");
}
