//! Guests' other devices, and what of the host their virtual machines may use.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use keelson_agent_tests::{Guest, Host};

const WRONG: i32 = 4;

#[test]
fn devices_are_there_and_what_they_tell_becomes_events() {
    let host = Host::new();
    let guest = Guest::new("web", "vsock-serve:ms=600000 panic watchdog:ms=200 hang").field(
        "devices: {balloon: {size: 8Mi}, vsock: {cid: 9}, panic: {}, watchdog: {action: End}}",
    );
    let guest = guest.field("restartPolicy: Never").manifest();
    host.apply(&guest).done();
    host.wait_for_console("web", "payload: vsock-serve ready cid=9");
    let socket = UnixStream::connect(host.path("run/vms/web/vsock.sock"));
    let mut socket = socket.expect("root reaches the guest");
    writeln!(socket, "CONNECT 52").expect("it takes a line");
    let mut answer = String::new();
    BufReader::new(&socket)
        .read_line(&mut answer)
        .expect("an answer");
    assert!(answer.starts_with("OK "), "{answer:?}");
    drop(socket);
    host.wait_for_phase("web", "Failed");
    let events = host.keelson(&["events", "web"]).done();
    for word in ["GuestPanicked", "WatchdogExpired"] {
        assert!(events.contains(word), "no {word}: {events}");
    }
}

#[test]
fn wrong_devices_and_limits_name_their_fields() {
    let host = Host::new();
    for (field, words) in [
        (
            "devices: {balloon: {size: 60Mi}}",
            ["spec.devices.balloon.size", "16Mi"],
        ),
        (
            "devices: {vsock: {cid: 2}}",
            ["spec.devices.vsock.cid", "3 to"],
        ),
        (
            "devices: {console: {size: 3}}",
            ["spec.devices.console", "size"],
        ),
        (
            "devices: {watchdog: {action: Explode}}",
            ["spec.devices.watchdog.action", "Explode"],
        ),
        ("limits: {cpu: 5m}", ["spec.limits.cpu", "10m"]),
        ("limits: {cpu: much}", ["spec.limits.cpu", "1500m"]),
        (
            "limits: {memory: 64Mi}",
            ["spec.limits.memory", "32Mi more"],
        ),
    ] {
        let guest = Guest::new("web", "hang").field(field).manifest();
        host.apply(&guest).refused(WRONG, &words);
    }
}

/// A file of a guest's virtual machine's control group, of cgroup v2, or of cgroup v1 where the host
/// has the controller there.
fn limit(host: &Host, controller: &str, files: [&str; 2]) -> String {
    let process = host.processes("keelson-vmm")[0];
    let groups = fs::read_to_string(format!("/proc/{process}/cgroup")).expect("it runs");
    let mounts = fs::read_to_string("/proc/self/mounts").expect("there are mounts");
    let [unified, legacy] = files;
    let old = groups.lines().find_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        let here = controllers.split(',').any(|name| name == controller);
        here.then_some(path)
    });
    let new = groups.lines().find_map(|line| line.strip_prefix("0::"));
    let mount = |kind: &str, option: &str| {
        let mut mounts = mounts
            .lines()
            .map(|line| line.split(' ').collect::<Vec<_>>());
        let found = mounts.find(|fields| {
            fields[2] == kind && (option.is_empty() || fields[3].split(',').any(|o| o == option))
        });
        found.expect("it is mounted")[1].to_owned()
    };
    let file = match (old, new) {
        (Some(path), _) => format!("{}{path}/{legacy}", mount("cgroup", controller)),
        (None, Some(path)) => format!("{}{path}/{unified}", mount("cgroup2", "")),
        (None, None) => panic!("no control groups: {groups}"),
    };
    let text = fs::read_to_string(&file).unwrap_or_else(|error| panic!("{file}: {error}"));
    text.trim().to_owned()
}

#[test]
fn limits_are_kept_and_change_while_the_guest_runs() {
    let host = Host::new();
    let guest = |limits: &str| {
        Guest::new("web", "busy:ms=600000")
            .field(&format!("limits: {limits}"))
            .manifest()
    };
    host.apply(&guest("{cpu: 100m, memory: 128Mi}")).done();
    host.wait_for_phase("web", "Running");
    let cpu = || limit(&host, "cpu", ["cpu.max", "cpu.cfs_quota_us"]);
    let memory = || limit(&host, "memory", ["memory.max", "memory.limit_in_bytes"]);
    assert!(["10000 100000", "10000"].contains(&&cpu()[..]), "{}", cpu());
    assert_eq!(memory(), (128u64 << 20).to_string());
    keelson_vmm_tests::wait_until("throttled guest", || {
        let counts = limit(&host, "cpu", ["cpu.stat", "cpu.stat"]);
        let mut counts = counts.lines();
        let throttled = counts.find_map(|line| line.strip_prefix("nr_throttled "))?;
        (throttled != "0").then_some(())
    });
    host.apply(&guest("{cpu: 2}")).done();
    keelson_vmm_tests::wait_until("changed limits", || {
        let unlimited = memory() == "max" || memory().parse::<u64>().ok()? > 1 << 50;
        (["200000 100000", "200000"].contains(&&cpu()[..]) && unlimited).then_some(())
    });
    let status = host.object("vm", "web")["status"].clone();
    assert!(
        !status.to_string().contains("RestartRequired"),
        "{status:#}"
    );
}
