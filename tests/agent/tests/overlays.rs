//! Networks that span hosts: agents on one state store, each in a network namespace of its own, linked by
//! Ethernet.

use keelson_agent_tests::{Fleet, Guest, cluster, security_group};
use keelson_state_tests::Cluster;
use keelson_vmm_tests::wait_until;
use serde_json::Value;

fn fleet(hosts: u8) -> (Fleet, Cluster) {
    let (namespaces, cluster, urls) = cluster(1);
    let fleet = Fleet::start_apart(namespaces, hosts, "cluster", &urls);
    (fleet, cluster)
}

fn network(name: &str, mtu: u16, overlay: &str) -> String {
    format!(
        "---\napiVersion: keelson.dev/v1alpha1\nkind: Network\nmetadata: {{name: {name}}}\n\
         spec: {{subnet: 10.90.0.0/24, gateway: 10.90.0.1, mtu: {mtu}, overlay: {overlay}}}\n"
    )
}

fn server() -> String {
    Guest::new("server", "net-serve:address=10.90.0.2,ms=600000")
        .field("host: a")
        .field(
            "interfaces: [{name: eth0, network: lan, address: 10.90.0.2, securityGroups: [pings]}]",
        )
        .manifest()
}

fn client(name: &str, address: &str, groups: &str) -> String {
    let steps = format!("net-ping:address={address},target=10.90.0.2 hang");
    Guest::new(name, &steps)
        .field("restartPolicy: Never")
        .field("host: b")
        .field(&format!(
            "interfaces: [{{name: eth0, network: lan, address: {address}, securityGroups: [{groups}]}}]"
        ))
        .manifest()
}

fn condition(network: &Value) -> (String, String) {
    let conditions = network["status"]["conditions"].as_array();
    let first = conditions.and_then(|conditions| conditions.first());
    let text = |field: &str| {
        let value = first.and_then(|condition| condition[field].as_str());
        value.unwrap_or_default().to_owned()
    };
    (text("reason"), text("message"))
}

#[test]
fn guests_of_two_hosts_reach_each_other_as_groups_allow() {
    let (mut fleet, _cluster) = fleet(2);
    let groups = security_group("clients", "")
        + &security_group("pings", "{protocol: icmp, fromGroups: [clients]}");
    let manifest = format!("{}{groups}{}", network("lan", 1450, "{}"), server());
    fleet.hosts[0].apply(&manifest).done();
    fleet.hosts[0].wait_for_console("server", "payload: net-serve ready");
    assert_eq!(
        fleet.hosts[1].object("host", "a")["status"]["tunnelAddress"],
        "10.50.0.1",
        "the address by which it reaches the state store"
    );
    let overlay = &fleet.hosts[0].object("network", "lan")["spec"]["overlay"];
    assert_eq!(overlay["vni"], 1, "the lowest free one");
    // Members of the group on another host are members.
    let members = client("member", "10.90.0.3", "clients");
    fleet.hosts[1].apply(&members).done();
    fleet.hosts[1].wait_for_console("member", "payload: net-ping ok");
    assert_eq!(
        fleet.hosts[0].dropped("server", "toGuest", "not-allowed"),
        0
    );
    fleet.hosts[1]
        .apply(&client("stranger", "10.90.0.4", ""))
        .done();
    fleet.hosts[1].wait_for_console("stranger", "payload: FAIL");
    assert!(fleet.hosts[0].dropped("server", "toGuest", "not-allowed") > 0);
    // Agents come and go, the tunnel stays.
    for host in &mut fleet.hosts {
        host.kill_agent();
        host.start_agent();
    }
    let later = client("later", "10.90.0.5", "clients");
    fleet.hosts[1].apply(&later).done();
    fleet.hosts[1].wait_for_console("later", "payload: net-ping ok");
}

/// What a guest says that it has heard, as the host `at` has its console: the number of the latest datagram.
fn heard(fleet: &Fleet, at: usize) -> Option<u64> {
    let log = fleet.hosts[at].keelson(&["logs", "hearer"]).output;
    let line = log.lines().rfind(|line| line.contains("net-hear heard="))?;
    line.rsplit_once("number=")?.1.trim().parse().ok()
}

/// The hearer lets nobody begin anything, and sends nothing once it hears: without its flows it would hear
/// nothing more.
#[test]
fn a_guest_that_moves_hears_on_from_whom_it_asked() {
    let (fleet, _cluster) = fleet(2);
    let asked = &fleet.hosts[0];
    let groups = security_group("asked", "{protocol: udp, ports: [9000]}");
    let feeder = Guest::new("feeder", "net-feed:address=10.90.0.2,pause=5")
        .field("host: b")
        .field(
            "interfaces: [{name: eth0, network: lan, address: 10.90.0.2, securityGroups: [asked]}]",
        );
    let manifest = network("lan", 1450, "{}") + &groups + &feeder.manifest();
    asked.apply(&manifest).done();
    fleet.hosts[1].wait_for_console("feeder", "payload: net-feed ready");
    asked.keelson(&["cordon", "b"]).done();
    let hearer = Guest::new("hearer", "net-hear:address=10.90.0.3,target=10.90.0.2")
        .field("interfaces: [{name: eth0, network: lan, address: 10.90.0.3}]");
    asked.apply(&hearer.manifest()).done();
    asked.wait_for_console("hearer", "payload: net-hear ready");
    asked.keelson(&["uncordon", "b"]).done();
    for (host, name) in [(1, "b"), (0, "a")] {
        let before = heard(&fleet, 1 - host).unwrap_or(0);
        let text = asked
            .keelson(&["migrate", "hearer", name, "-o", "json"])
            .done();
        let moved: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(moved["phase"], "Completed", "{moved:#}");
        assert_eq!(moved["flowsMoved"], 1, "{moved:#}");
        assert_eq!(moved["flowsLeft"], 0, "{moved:#}");
        println!("it stood still for {} ms", moved["downtimeMilliseconds"]);
        // Well behind what was on its way.
        wait_until(&format!("datagrams on {name}"), || {
            (heard(&fleet, host)? > before + 500).then_some(())
        });
        assert_eq!(
            fleet.hosts[host].dropped("hearer", "toGuest", "not-allowed"),
            0
        );
        let flows = fleet.hosts[host]
            .keelson(&["net", "flows", "hearer"])
            .done();
        assert!(flows.contains("10.90.0.2"), "{flows}");
    }
}

/// A service's datagrams come from the same guest wherever their hearer and that guest are: neither sends anything but
/// what is fed, so that nothing can begin anew.
#[test]
fn flows_through_a_service_go_on_when_either_end_moves() {
    let (fleet, _cluster) = fleet(2);
    let asked = &fleet.hosts[0];
    let feeder = |number: u8| {
        let address = format!("10.90.0.{number}");
        Guest::new(&format!("feeder-{number}"), &format!("net-feed:address={address},pause=5"))
            .field(&format!(
                "interfaces: [{{name: eth0, network: lan, address: {address}, securityGroups: [asked]}}]"
            ))
            .manifest()
    };
    let service = "---\napiVersion: keelson.dev/v1alpha1\nkind: Service\nmetadata: {name: feeds}\n\
                   spec: {network: lan, address: 10.90.0.80, ports: [{protocol: udp, port: 9000}], \
                   guests: [feeder-4, feeder-5]}\n";
    asked.keelson(&["cordon", "b"]).done();
    let groups = security_group("asked", "{protocol: udp, ports: [9000]}");
    let manifest = network("lan", 1450, "{}") + &groups + &feeder(4) + &feeder(5) + service;
    asked.apply(&manifest).done();
    for feeder in ["feeder-4", "feeder-5"] {
        asked.wait_for_console(feeder, "payload: net-feed ready");
    }
    let serving = |status: &Value| {
        let backends = status["backends"].as_array().cloned().unwrap_or_default();
        let healthy = backends
            .iter()
            .filter(|backend| backend["health"] == "Healthy");
        healthy.count() == 2
    };
    asked.wait_for_object("svc", "feeds", "guests that serve", serving);
    let hearer = Guest::new("hearer", "net-hear:address=10.90.0.3,target=10.90.0.80")
        .field("interfaces: [{name: eth0, network: lan, address: 10.90.0.3}]");
    asked.apply(&hearer.manifest()).done();
    asked.wait_for_console("hearer", "payload: net-hear ready");
    let flows = asked.keelson(&["net", "flows", "hearer"]).done();
    let (backend, other) = if flows.contains("10.90.0.4") {
        ("feeder-4", "10.90.0.5")
    } else {
        ("feeder-5", "10.90.0.4")
    };
    asked.keelson(&["uncordon", "b"]).done();
    let mut hearer_at = 0;
    for (guest, to, name) in [
        ("hearer", 1, "b"),
        (backend, 1, "b"),
        ("hearer", 0, "a"),
        (backend, 0, "a"),
    ] {
        let before = heard(&fleet, hearer_at).unwrap_or(0);
        let text = asked
            .keelson(&["migrate", guest, name, "-o", "json"])
            .done();
        let moved: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(moved["phase"], "Completed", "{moved:#}");
        assert_eq!(
            (&moved["flowsMoved"], &moved["flowsLeft"]),
            (&1.into(), &0.into()),
            "{moved:#}"
        );
        if guest == "hearer" {
            hearer_at = to;
        }
        wait_until(&format!("datagrams after {guest} went to {name}"), || {
            (heard(&fleet, hearer_at)? > before + 500).then_some(())
        });
        let flows = fleet.hosts[hearer_at]
            .keelson(&["net", "flows", "hearer"])
            .done();
        assert!(!flows.contains(other), "{flows}");
    }
}

#[test]
fn without_a_network_that_spans_hosts_there_is_no_tunnel() {
    let (fleet, _cluster) = fleet(1);
    let host = &fleet.hosts[0];
    let has_device = || host.within("ip", &["link"]).contains("kvx-4789");
    assert!(!has_device());
    host.apply(&network("lan", 1500, "{vni: 7}")).done();
    wait_until("condition that says what MTU fits", || {
        let (reason, message) = condition(&host.object("network", "lan"));
        (reason == "MtuTooLarge" && message.contains("1450")).then_some(())
    });
    assert!(has_device(), "large packets are sent in pieces");
    host.apply(&network("other", 1450, "{vni: 7}"))
        .refused(5, &["spec.overlay.vni", "Network/lan"]);
    host.apply(&network("other", 1450, "{vni: 16777216}"))
        .refused(4, &["spec.overlay.vni", "16777215"]);
    host.apply(&network("lan", 1450, "{}")).done();
    wait_until("network that is ready", || {
        let (reason, _) = condition(&host.object("network", "lan"));
        (reason == "Up").then_some(())
    });
    assert_eq!(
        host.object("network", "lan")["spec"]["overlay"]["vni"],
        7,
        "it keeps its identifier"
    );
    host.keelson(&["delete", "network", "lan"]).done();
    wait_until("end of the tunnel", || (!has_device()).then_some(()));
}
