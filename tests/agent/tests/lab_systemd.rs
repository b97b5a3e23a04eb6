//! The agent as a service of a real systemd, on a lab host: `Type=notify`, guests in scopes of their
//! own that outlive it, restarts, and the watchdog; and limits where cgroup v2 is there without systemd.

#![allow(clippy::unwrap_used)] // A test ends where its steps, functions here, fail.

use std::fs;
use std::path::{Path, PathBuf};

use keelson_agent_tests::Guest;
use keelson_lab::{FileCopy, Lab, LabOptions};
use keelson_vmm_tests::{binary, payload, wait_until};
use tempfile::TempDir;

const PROGRAMS: &[&str] = &["keelson", "keelsond", "keelson-vmm", "keelson-blk"];
/// Debian's systemd; its executor is a program of its own since version 254.
const SYSTEMD: &[&str] = &[
    "/usr/lib/systemd/systemd",
    "/usr/lib/systemd/systemd-executor",
    "/usr/bin/systemctl",
    "/usr/bin/systemd-run",
];
const TARGETS: &[&str] = &[
    "basic",
    "local-fs",
    "multi-user",
    "network",
    "paths",
    "shutdown",
    "slices",
    "sockets",
    "swap",
    "sysinit",
    "timers",
    "umount",
];
/// `spec.limits` of a guest, one after the other, and what its control group's `cpu.max` and `memory.max`
/// are then.
const LIMITS: [(&str, &str); 3] = [
    ("{cpu: 500m, memory: 128Mi}", "50000 100000 134217728"),
    ("{cpu: 1250m}", "125000 100000 max"),
    ("{}", "max 100000 max"),
];
/// Shorter than the unit's own, so that the test is.
const WATCHDOG: &str = "[Service]\nWatchdogSec=4s\n";

/// Starts systemd as the first process of a container that has the lab's devices and network.
const START: &str = r"
set -e
echo 0123456789abcdef0123456789abcdef >/etc/machine-id
mkdir -p /sys/fs/cgroup/lab /var/log /var/lib
echo $$ >/sys/fs/cgroup/lab/cgroup.procs
container=lab /usr/sbin/unshare --pid --fork --mount --cgroup --mount-proc sh -c '
    mount -t tmpfs tmpfs /run; mkdir /run/lock
    umount /sys/fs/cgroup; mount -t cgroup2 cgroup2 /sys/fs/cgroup
    exec /usr/lib/systemd/systemd --system --log-target=console --show-status=0
' >/tmp/systemd.log 2>&1 </dev/null &
";

/// Runs the rest of the command line beside systemd.
const BESIDE: &str = r#"#!/bin/sh
for process in /proc/[0-9]*; do
    if [ "$(cat "$process/comm" 2>/dev/null)" = systemd ]; then
        exec /usr/sbin/nsenter -t "${process#/proc/}" -m -p -C "$@"
    fi
done
echo "there is no systemd" >&2
exit 1
"#;

#[test]
fn guests_outlive_a_service_that_is_stopped_killed_or_hangs() {
    let lab = boot();
    run(
        &lab,
        "mkdir -p /var/log /var/lib; keelsond >/tmp/systemd.log 2>&1 </dev/null &",
    );
    run(
        &lab,
        "for i in $(seq 180); do keelson get vm && exit; sleep 1; done; exit 1",
    );
    limits_are_kept(&lab);
    run(&lab, "killall keelsond; rm -rf /var/lib/keelson");

    run(&lab, START);
    wait_until("systemd", || {
        let state = shell(&lab, "beside systemctl is-system-running");
        (state.trim() == "running").then_some(())
    });
    // It returns when the agent says that it is ready.
    run(&lab, "beside systemctl start keelsond");
    run(&lab, "beside keelson apply -f /lab/guest.yaml");
    run(&lab, "beside keelson wait vm web --for phase=Running");
    run(
        &lab,
        "beside systemctl is-active keelson-vm-web.scope keelson-guests.slice",
    );
    let guest = machine(&lab);

    run(&lab, "beside systemctl stop keelsond");
    assert_eq!(machine(&lab), guest, "stopping the service");
    run(&lab, "beside systemctl start keelsond");
    wait_for_adoptions(&lab, 1);

    run(&lab, "beside systemctl kill --signal=KILL keelsond");
    wait_for_adoptions(&lab, 2);
    assert_eq!(machine(&lab), guest, "killing the service");

    // An agent that hangs feeds no watchdog.
    run(&lab, "beside systemctl kill --signal=STOP keelsond");
    wait_for_adoptions(&lab, 3);
    assert_eq!(machine(&lab), guest, "the watchdog");
    let restarts = shell(&lab, "beside systemctl show --property=NRestarts keelsond");
    assert_eq!(restarts.trim(), "NRestarts=2");

    run(&lab, "beside keelson delete vm web");
    assert_eq!(machine(&lab), "");
    let scopes = shell(
        &lab,
        "beside systemctl list-units --no-legend 'keelson-vm-*'",
    );
    assert_eq!(scopes.trim(), "");
    lab.shut_down().unwrap();
}

/// Without systemd, a guest's limits are those of its control group of cgroup v2, and change under it.
fn limits_are_kept(lab: &Lab) {
    let mut guest = String::new();
    for (index, (limits, kept)) in LIMITS.iter().enumerate() {
        run(lab, &format!("keelson apply -f /lab/limits-{index}.yaml"));
        if index == 0 {
            run(lab, "keelson wait vm limited --for phase=Running");
            let all = machine(lab);
            all.lines().next().unwrap().clone_into(&mut guest);
        }
        let group = format!("/sys/fs/cgroup$(cut -d: -f3 /proc/{guest}/cgroup)");
        let script = format!("cd {group} && echo $(cat cpu.max memory.max)");
        wait_until(&format!("limits {limits}"), || {
            (shell(lab, &script).trim() == *kept).then_some(())
        });
    }
    run(lab, "keelson delete vm limited");
    assert_eq!(machine(lab), "");
}

/// The process id of the guest's keelson-vmm.
fn machine(lab: &Lab) -> String {
    let found = shell(lab, "ps | awk '/[k]eelson-vmm --config/ {print $1}'");
    found.trim().to_owned()
}

fn wait_for_adoptions(lab: &Lab, count: usize) {
    wait_until("its adoption", || {
        let events = shell(lab, "beside keelson events web");
        (events.matches("Adopted").count() >= count || events.contains(&format!("x{count}")))
            .then_some(())
    });
}

fn run(lab: &Lab, script: &str) {
    let output = lab.shell(script).unwrap();
    assert!(
        output.status.success(),
        "{script}: {output:?}\n{}",
        shell(
            lab,
            "cat /tmp/systemd.log; beside systemctl status --no-pager keelsond"
        )
    );
}

fn shell(lab: &Lab, script: &str) -> String {
    lab.shell(script).unwrap().text()
}

fn boot() -> Lab {
    let folder = TempDir::new().unwrap();
    let mut files: Vec<_> = PROGRAMS
        .iter()
        .map(|program| copy(&binary(program), &format!("/usr/bin/{program}")))
        .collect();
    assert!(
        Path::new(SYSTEMD[0]).is_file(),
        "this test needs systemd, which setup/debian-packages installs"
    );
    let programs = SYSTEMD.iter().map(Path::new).filter(|path| path.is_file());
    files.extend(programs.map(|path| copy(path, &path.to_string_lossy())));
    for target in TARGETS {
        let unit = format!("/usr/lib/systemd/system/{target}.target");
        files.push(copy(Path::new(&unit), &unit));
    }
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging/keelsond.service");
    files.push(copy(&unit, "/etc/systemd/system/keelsond.service"));
    let mut written = |name: &str, content: &str, to: &str| {
        let path: PathBuf = folder.path().join(name);
        fs::write(&path, content).unwrap();
        files.push(copy(&path, to));
        path
    };
    written(
        "watchdog",
        WATCHDOG,
        "/etc/systemd/system/keelsond.service.d/watchdog.conf",
    );
    let default = "[Unit]\nRequires=basic.target\nAfter=basic.target\n";
    written("default", default, "/etc/systemd/system/default.target");
    let guest = Guest::new("web", "hang")
        .image("/lab/payload".as_ref())
        .manifest();
    written("guest", &guest, "/lab/guest.yaml");
    for (index, (limits, _)) in LIMITS.iter().enumerate() {
        let guest = Guest::new("limited", "hang").image("/lab/payload".as_ref());
        let guest = guest.field(&format!("limits: {limits}")).manifest();
        let name = format!("limits-{index}.yaml");
        written(&name, &guest, &format!("/lab/{name}"));
    }
    let beside = written("beside", BESIDE, "/usr/bin/beside");
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&beside, executable).unwrap();
    files.push(copy(payload(), "/lab/payload"));
    let options = LabOptions {
        files,
        tools: ["unshare", "nsenter"].map(String::from).into(),
        ..LabOptions::default()
    };
    Lab::boot(&options).unwrap_or_else(|error| panic!("{error}"))
}

fn copy(from: &Path, to: &str) -> FileCopy {
    FileCopy {
        from: from.into(),
        to: to.into(),
    }
}
