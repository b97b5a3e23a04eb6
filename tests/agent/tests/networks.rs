//! Guests of one network reach each other as far as their security groups allow.

use std::process::{Command, Stdio};

use keelson_agent_tests::{Guest, Host, metrics, network, security_group};
use keelson_vmm_tests::{binary, wait_until};
use rustix::process::{Pid, Signal, kill_process};

fn server(groups: &str) -> String {
    Guest::new("server", "net-serve:address=10.90.0.2,ms=600000")
        .field(&format!(
            "interfaces: [{{name: eth0, network: lan, address: 10.90.0.2, securityGroups: [{groups}]}}]"
        ))
        .manifest()
}

fn client() -> String {
    let steps = "net-ping:address=10.90.0.3,target=10.90.0.2 hang";
    Guest::new("client", steps)
        .field("restartPolicy: Never")
        .field("interfaces: [{name: eth0, network: lan, address: 10.90.0.3}]")
        .manifest()
}

fn base() -> String {
    network("lan", "10.90.0.0/24", "10.90.0.1") + &security_group("pings", "{protocol: icmp}")
}

#[test]
fn a_guest_pings_another() {
    let host = Host::new();
    host.apply(&format!("{}{}", base(), server("pings"))).done();
    host.wait_for_console("server", "payload: net-serve ready");
    host.apply(&client()).done();
    host.wait_for_console("client", "payload: net-ping ok");
    assert_eq!(host.dropped("server", "toGuest", "not-allowed"), 0);
}

#[test]
fn without_a_rule_it_does_not() {
    let host = Host::new();
    host.apply(&format!("{}{}", base(), server(""))).done();
    host.wait_for_console("server", "payload: net-serve ready");
    host.apply(&client()).done();
    host.wait_for_console("client", "payload: FAIL");
    assert!(host.dropped("server", "toGuest", "not-allowed") > 0);
}

#[test]
fn a_changed_group_holds_at_once() {
    let host = Host::new();
    host.apply(&format!("{}{}", base(), server("pings"))).done();
    host.wait_for_console("server", "payload: net-serve ready");
    let process = host.wait_for_phase("server", "Running")["processId"].clone();
    host.apply(&security_group("pings", "{protocol: tcp, ports: [22]}"))
        .done();
    host.apply(&client()).done();
    host.wait_for_console("client", "payload: FAIL");
    assert!(host.dropped("server", "toGuest", "not-allowed") > 0);
    host.apply(&security_group("pings", "{protocol: icmp}"))
        .done();
    host.keelson(&["stop", "client", "--force"]).done();
    host.keelson(&["start", "client"]).done();
    host.wait_for_console("client", "payload: net-ping ok");
    assert_eq!(host.object("vm", "server")["status"]["processId"], process);
}

#[test]
fn a_rule_may_name_a_group_and_follows_its_members() {
    let host = Host::new();
    let from_clients = security_group("pings", "{protocol: icmp, fromGroups: [clients]}");
    let clients = security_group("clients", "");
    host.apply(&format!(
        "{}{clients}{from_clients}{}",
        network("lan", "10.90.0.0/24", "10.90.0.1"),
        server("pings")
    ))
    .done();
    host.wait_for_console("server", "payload: net-serve ready");
    host.apply(&client()).done();
    host.wait_for_console("client", "payload: FAIL");
    assert!(host.dropped("server", "toGuest", "not-allowed") > 0);
    host.keelson(&["delete", "vm", "client"]).done();
    host.apply(&client().replace(
        "address: 10.90.0.3}",
        "address: 10.90.0.3, securityGroups: [clients]}",
    ))
    .done();
    host.wait_for_console("client", "payload: net-ping ok");
}

#[test]
fn a_trace_names_the_rule_that_decides() {
    let host = Host::new();
    let groups = "---
apiVersion: keelson.dev/v1alpha1
kind: SecurityGroup
metadata: {name: web}
spec:
  ingress:
    - {protocol: icmp}
    - {protocol: tcp, ports: [80, 8000-8100], fromGroups: [clients]}
---
apiVersion: keelson.dev/v1alpha1
kind: SecurityGroup
metadata: {name: clients}
spec:
  egress:
    - {protocol: tcp, to: [10.90.0.0/24]}
";
    let client = client().replace(
        "address: 10.90.0.3}",
        "address: 10.90.0.3, securityGroups: [clients]}",
    );
    let network = network("lan", "10.90.0.0/24", "10.90.0.1");
    host.apply(&format!("{network}{groups}{}{client}", server("web")))
        .done();
    let allowed = host.keelson(&["net", "trace", "client", "server", "8080"]);
    let said = allowed.done();
    for line in [
        "tcp port 8080 from client/eth0 (10.90.0.3) to server/eth0 (10.90.0.2)",
        "egress of client/eth0: allowed by SecurityGroup/clients spec.egress[0]",
        "ingress of server/eth0: allowed by SecurityGroup/web spec.ingress[1]",
        "passes",
    ] {
        assert!(said.contains(line), "{line:?} is said:\n{said}");
    }
    for (arguments, reason) in [
        (
            ["client", "server", "22", "--protocol=tcp"],
            "ingress of server/eth0: dropped, since no ingress rule of its groups allows it (web)",
        ),
        (
            ["client", "server", "8", "--protocol=icmp"],
            "egress of client/eth0: dropped, since no egress rule of its groups allows it (clients)",
        ),
        (
            ["10.90.0.1", "client/eth0", "53", "--protocol=udp"],
            "ingress of client/eth0: dropped, since no ingress rule of its groups allows it (clients)",
        ),
    ] {
        let said = host.keelson(&[&["net", "trace"][..], &arguments].concat());
        assert_eq!(said.code, Some(1), "{}{}", said.output, said.errors);
        assert!(
            said.output.contains(reason),
            "{reason:?} is said:\n{}",
            said.output
        );
    }
}

#[test]
fn drops_and_flows_can_be_watched() {
    let host = Host::new();
    host.apply(&format!("{}{}", base(), server(""))).done();
    host.wait_for_console("server", "payload: net-serve ready");
    host.following(
        &["net", "drops", "server"],
        || drop(host.apply(&client()).done()),
        &[
            "to server/eth0",
            "dropped: not-allowed",
            "icmp type 8 10.90.0.3 -> 10.90.0.2",
        ],
    );
    host.apply(&security_group("pings", "{protocol: icmp}"))
        .done();
    host.apply(&server("pings")).done();
    host.keelson(&["stop", "client", "--force"]).done();
    host.following(
        &["net", "flows", "--follow", "--output=json"],
        || drop(host.keelson(&["start", "client"]).done()),
        &["\"opened\"", "\"toGuest\"", "\"icmpType\":8"],
    );
    host.wait_for_console("client", "payload: net-ping ok");
    let flows = host.keelson(&["net", "flows", "server"]).done();
    assert!(flows.contains("10.90.0.3"), "{flows}");
    assert!(flows.contains("established"), "{flows}");
}

#[test]
fn rules_interfaces_and_flows_are_counted_for_prometheus() {
    let mut host = Host::without_agent();
    host.configure("metrics_listen = \"127.0.0.1:9469\"\n");
    host.start_agent();
    let groups = security_group("pings", "{protocol: icmp}")
        + &security_group("closed", "{protocol: tcp, ports: [22]}");
    let network = network("lan", "10.90.0.0/24", "10.90.0.1");
    host.apply(&format!("{network}{groups}{}", server("closed, pings")))
        .done();
    host.wait_for_console("server", "payload: net-serve ready");
    host.apply(&client()).done();
    host.wait_for_console("client", "payload: net-ping ok");
    let shown = host.keelson(&["net", "counters", "server"]).done();
    for line in [
        "allowed: SecurityGroup/closed spec.ingress[0]",
        "allowed: SecurityGroup/pings spec.ingress[0]",
    ] {
        assert!(shown.contains(line), "{line:?} is shown:\n{shown}");
    }
    let page = metrics("127.0.0.1:9469");
    let server = "guest=\"server\",interface=\"eth0\"";
    let to_server = format!("direction=\"to-guest\",{server}");
    for line in [
        format!(
            "keelson_network_rule_allowed_packets_total{{{to_server},rule=\"SecurityGroup/pings spec.ingress[0]\"}} 1"
        ),
        format!(
            "keelson_network_rule_allowed_packets_total{{{to_server},rule=\"SecurityGroup/closed spec.ingress[0]\"}} 0"
        ),
        format!("keelson_network_flows{{{server},state=\"established\"}} 1"),
        format!("keelson_network_flows_limit{{{server},state=\"established\"}} 16384"),
        format!("keelson_network_packets_total{{{to_server}}}"),
        "# TYPE keelson_network_bytes_total counter".to_owned(),
        "keelson_build_info{network_hook=\"".to_owned(),
        "process_resident_memory_bytes".to_owned(),
    ] {
        assert!(page.contains(&line), "{line:?} is served:\n{page}");
    }
    let not_allowed = format!("{to_server},reason=\"not-allowed\"");
    assert!(!page.contains(&not_allowed), "pings are allowed:\n{page}");
}

#[test]
fn limits_are_shown_and_change_under_a_running_guest() {
    let host = Host::new();
    host.apply(&format!("{}{}", base(), server("pings"))).done();
    host.wait_for_console("server", "payload: net-serve ready");
    let process = host.wait_for_phase("server", "Running")["processId"].clone();
    let limited = |limits: &str| {
        server("pings").replace(
            "securityGroups:",
            &format!("limits: {limits}, securityGroups:"),
        )
    };
    let refused = host.apply(&limited(
        "{toGuest: {bitsPerSecond: 1k, packetsPerSecond: 0}}",
    ));
    refused.refused(
        4,
        &[
            "spec.interfaces[0].limits.toGuest.bitsPerSecond: is 1000; give 8000 to",
            "spec.interfaces[0].limits.toGuest.packetsPerSecond: is 0; give 1 to",
        ],
    );
    // What a ping needs costs minutes.
    let nearly_nothing = "{toGuest: {bitsPerSecond: 8k, packetsPerSecond: 1, burst: 1ms}}";
    host.apply(&limited(nearly_nothing)).done();
    wait_until("limit in force", || {
        let guest = host.object("vm", "server");
        let generation = &guest["metadata"]["generation"];
        (guest["status"]["observedGeneration"] == *generation).then_some(())
    });
    let shown = host.keelson(&["net", "counters", "server"]).done();
    for part in ["limit, burst 1ms", "1/s", "8kbit/s"] {
        assert!(shown.contains(part), "{part:?} is shown:\n{shown}");
    }
    host.apply(&client()).done();
    wait_until("drop for the limit", || {
        (host.dropped("server", "toGuest", "rate-limited") > 0).then_some(())
    });
    host.apply(&server("pings")).done();
    host.keelson(&["stop", "client", "--force"]).done();
    host.keelson(&["start", "client"]).done();
    host.wait_for_console("client", "payload: net-ping ok");
    assert_eq!(host.object("vm", "server")["status"]["processId"], process);
}

#[test]
fn packets_are_captured_with_their_verdicts() {
    let host = Host::new();
    host.apply(&format!("{}{}", base(), server(""))).done();
    host.wait_for_console("server", "payload: net-serve ready");
    host.following(
        &["net", "capture", "server", "--count", "1000"],
        || drop(host.apply(&client()).done()),
        &[
            "to guest",
            "dropped: not-allowed",
            "icmp type 8 10.90.0.3 -> 10.90.0.2",
            "98 bytes",
        ],
    );
    host.keelson(&["net", "capture", "server/eth1"])
        .refused(3, &["no interface \"eth1\""]);
    host.keelson(&["stop", "client", "--force"]).done();

    // The guest starts anew under a capture, and its first packets are in it.
    let path = host.path("packets.pcapng");
    let mut capture = Command::new(binary("keelson"))
        .env("KEELSON_SOCKET", host.path("run/keelsond.sock"))
        .args(["net", "capture", "client/eth0", "--write"])
        .arg(&path)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("keelson runs");
    wait_until("file of the capture", || path.exists().then_some(()));
    host.apply(&server("pings")).done();
    host.keelson(&["start", "client"]).done();
    host.wait_for_console("client", "payload: net-ping ok");
    let read = || {
        let read = Command::new("tcpdump")
            .args(["-Z", "root", "-n", "-r"])
            .arg(&path)
            .output()
            .expect("setup/debian-packages installs tcpdump");
        String::from_utf8_lossy(&read.stdout).into_owned()
    };
    wait_until("both directions of three pings in the file", || {
        let said = read();
        let requests = said
            .matches("10.90.0.3 > 10.90.0.2: ICMP echo request")
            .count();
        let replies = said
            .matches("10.90.0.2 > 10.90.0.3: ICMP echo reply")
            .count();
        (requests == 3 && replies == 3).then_some(())
    });
    let id = i32::try_from(capture.id()).expect("small");
    let id = Pid::from_raw(id).expect("not zero");
    kill_process(id, Signal::INT).expect("it runs");
    assert!(capture.wait().expect("it ends").success());
    let file = std::fs::read(&path).expect("the file is there");
    assert!(file.windows(6).any(|part| part == b"passed"));
}
