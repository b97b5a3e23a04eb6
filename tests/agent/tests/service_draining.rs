//! Guests that are to serve no longer drain: what is new goes to others, flows that they have go on for a while.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{SocketAddr, UdpSocket};

use keelson_agent_tests::{Fleet, Guest, Host, cluster, network, security_group};
use keelson_vmm_tests::wait_until;
use serde_json::Value;

/// The exit code for a manifest that is wrong by itself.
const WRONG: i32 = 4;
/// The exit code for a manifest that needs what is missing or taken.
const MISSING: i32 = 5;

const SERVICE: SocketAddr = SocketAddr::new(
    std::net::IpAddr::V4(std::net::Ipv4Addr::new(10, 90, 0, 80)),
    9000,
);
/// Datagrams by which it is found out where a flow goes.
const ASKED: u64 = 3;

fn feeder(number: u8) -> String {
    let address = format!("10.90.0.{number}");
    // It answers no power button, so that it is about to stop for as long as it may take.
    Guest::new(
        &format!("feed-{number}"),
        &format!("net-feed:address={address},pause=50"),
    )
    .field(&format!(
        "interfaces: [{{name: eth0, network: lan, address: {address}, securityGroups: [feeds]}}]"
    ))
    .field("stopTimeout: 8s")
    .manifest()
}

fn service(guests: &str, more: &str) -> String {
    format!(
        "---\napiVersion: keelson.dev/v1alpha1\nkind: Service\nmetadata: {{name: web}}\n\
         spec: {{network: lan, address: 10.90.0.80, ports: [{{protocol: udp, port: 9000}}], \
         guests: [{guests}]{more}}}\n"
    )
}

const BOTH: &str = "feed-4, feed-5";

/// A host with both guests, which serve.
fn start() -> Host {
    let host = Host::new();
    let groups = security_group("feeds", "{protocol: udp, ports: [9000]}");
    let lan = network("lan", "10.90.0.0/24", "10.90.0.1");
    let guests = feeder(4) + &feeder(5);
    host.apply(&(lan + &groups + &guests + &service(BOTH, "")))
        .done();
    for guest in ["feed-4", "feed-5"] {
        host.wait_for_console(guest, "payload: net-feed ready");
    }
    wait_for(&host, &[("feed-4", "Healthy"), ("feed-5", "Healthy")]);
    host
}

fn wait_for(host: &Host, expected: &[(&str, &str)]) -> Value {
    let what = format!("guests as in {expected:?}");
    host.wait_for_object("svc", "web", &what, |status| {
        let backends = status["backends"].as_array().cloned().unwrap_or_default();
        let said = backends.iter().map(|backend| {
            let text = |field: &str| backend[field].as_str().unwrap_or_default();
            (text("guest"), text("health"))
        });
        said.eq(expected.iter().copied())
    })
}

/// Packets to each guest, by what the host counted; under the empty name those to guests that are not the service's.
fn counted(host: &Host) -> BTreeMap<String, u64> {
    let shown = host.keelson(&["net", "services", "web", "-o", "json"]);
    let shown: Value = serde_json::from_str(&shown.done()).expect("the client prints JSON");
    let mut counted = BTreeMap::new();
    for traffic in shown.as_array().expect("a list") {
        let guest = traffic["backend"].as_str().unwrap_or_default().to_owned();
        let packets = traffic["toBackend"]["packets"].as_u64();
        *counted.entry(guest).or_default() += packets.expect("a number");
    }
    counted
}

/// A flow of the host's to the service; for as long as it is kept.
fn flow() -> UdpSocket {
    let socket = UdpSocket::bind(("0.0.0.0", 0)).expect("bound");
    socket.connect(SERVICE).expect("there is a route");
    socket
}

/// To whom these flows' datagrams go.
fn goes_to(host: &Host, flows: &[&UdpSocket]) -> BTreeSet<String> {
    let before = counted(host);
    for _ in 0..ASKED {
        for flow in flows {
            flow.send(b"feed me").expect("sent");
        }
    }
    let expected = ASKED * flows.len() as u64;
    let found = wait_until("datagrams that are counted", || {
        let now = counted(host);
        let more = now.iter().map(|(guest, packets)| {
            let had = before.get(guest).copied().unwrap_or(0);
            (guest.clone(), packets.saturating_sub(had))
        });
        let more: BTreeMap<_, _> = more.filter(|(_, more)| *more > 0).collect();
        (more.values().sum::<u64>() >= expected).then_some(more)
    });
    assert_eq!(found.values().sum::<u64>(), expected, "{found:?}");
    found.into_keys().collect()
}

fn one(name: &str) -> BTreeSet<String> {
    BTreeSet::from([name.to_owned()])
}

/// Flows, one of which at least goes to the first guest; that one, and the others.
fn flow_to_first(host: &Host) -> (UdpSocket, Vec<UdpSocket>) {
    let mut others = Vec::new();
    for _ in 0..64 {
        let flow = flow();
        if goes_to(host, &[&flow]) == one("feed-4") {
            return (flow, others);
        }
        others.push(flow);
    }
    panic!("64 flows go to feed-5");
}

/// What is new goes to the other guest. The flows are kept: guests go on sending to them, and errors would count.
#[must_use]
fn check_new_flows(host: &Host) -> Vec<UdpSocket> {
    let new: Vec<_> = (0..12).map(|_| flow()).collect();
    assert_eq!(
        goes_to(host, &new.iter().collect::<Vec<_>>()),
        one("feed-5")
    );
    new
}

#[test]
fn a_guest_that_is_named_drains_until_its_time_is_over() {
    let mut host = start();
    let (known, mut kept) = flow_to_first(&host);
    let drains = [("feed-4", "Draining"), ("feed-5", "Healthy")];
    let serve = [("feed-4", "Healthy"), ("feed-5", "Healthy")];
    host.apply(&service(BOTH, ", draining: [feed-4]")).done();
    let status = wait_for(&host, &drains);
    let message = status["backends"][0]["message"].to_string();
    assert!(
        message.contains("spec.draining") && message.contains("30s"),
        "{message}"
    );
    let listed = host.keelson(&["get", "svc"]).done();
    assert!(listed.contains("1/2"), "{listed}");
    assert_eq!(goes_to(&host, &[&known]), one("feed-4"));
    kept.extend(check_new_flows(&host));
    // The next agent goes on with it.
    host.kill_agent();
    host.start_agent();
    wait_for(&host, &drains);
    assert_eq!(goes_to(&host, &[&known]), one("feed-4"));
    kept.extend(check_new_flows(&host));
    // It serves again, as if nothing had been.
    host.apply(&service(BOTH, "")).done();
    wait_for(&host, &serve);
    assert_eq!(goes_to(&host, &[&known]), one("feed-4"));
    let (again, more) = flow_to_first(&host);
    // And drains to the end.
    host.apply(&service(BOTH, ", draining: [feed-4], drainTimeout: 1s"))
        .done();
    wait_for(&host, &[("feed-4", "Drained"), ("feed-5", "Healthy")]);
    assert_eq!(goes_to(&host, &[&known, &again]), one("feed-5"));
    drop((kept, more));
}

#[test]
fn guests_that_stop_or_are_selected_no_longer_drain() {
    let host = start();
    let (known, mut kept) = flow_to_first(&host);
    host.apply(&service("feed-5", ", drainTimeout: 6s")).done();
    wait_for(&host, &[("feed-5", "Healthy")]);
    assert_eq!(
        goes_to(&host, &[&known]),
        one(""),
        "it is no guest of the service"
    );
    kept.extend(check_new_flows(&host));
    wait_until("end of the flow", || {
        (goes_to(&host, &[&known]) == one("feed-5")).then_some(())
    });
    host.apply(&service(BOTH, "")).done();
    wait_for(&host, &[("feed-4", "Healthy"), ("feed-5", "Healthy")]);
    let (known, more) = flow_to_first(&host);
    host.keelson(&["stop", "feed-4", "--no-wait"]).done();
    wait_for(&host, &[("feed-4", "Draining"), ("feed-5", "Healthy")]);
    assert_eq!(goes_to(&host, &[&known]), one("feed-4"));
    kept.extend(check_new_flows(&host));
    wait_for(&host, &[("feed-4", "Stopped"), ("feed-5", "Healthy")]);
    assert_eq!(goes_to(&host, &[&known]), one("feed-5"));
    drop((kept, more));
}

#[test]
fn mistakes_name_their_fields() {
    let host = start();
    for (code, more, words) in [
        (
            MISSING,
            ", draining: [feed-6]",
            ["spec.draining[0]", "VirtualMachine/feed-6"],
        ),
        (
            WRONG,
            ", draining: [feed-4, feed-4]",
            ["spec.draining[1]", "feed-4 again"],
        ),
        (WRONG, ", drainTimeout: 25h", ["spec.drainTimeout", "24h"]),
    ] {
        host.apply(&service(BOTH, more)).refused(code, &words);
    }
}

fn web(number: u8) -> String {
    let address = format!("10.90.0.{number}");
    Guest::new(
        &format!("web-{number}"),
        &format!("net-serve:address={address},tcp=8080,ms=600000"),
    )
    .field("host: a")
    .field(&format!(
        "interfaces: [{{name: eth0, network: lan, address: {address}, securityGroups: [web]}}]"
    ))
    .manifest()
}

/// A guest that asks the service for connections, all of which it gets.
fn connects(host: &Host, name: &str, address: &str) {
    let steps = format!("net-connect:address={address},target=10.90.0.80,port=80,count=32 hang");
    let client = Guest::new(name, &steps)
        .field("restartPolicy: Never")
        .field("host: b")
        .field(&format!(
            "interfaces: [{{name: eth0, network: lan, address: {address}}}]"
        ));
    host.apply(&client.manifest()).done();
    host.wait_for_console(name, "payload: net-connect ok asked=32 granted=32");
}

/// The client's host goes by the object, too: of what is new there nothing goes to a guest of another host that drains.
#[test]
fn guests_of_other_hosts_drain() {
    let (namespaces, _cluster, urls) = cluster(1);
    let fleet = Fleet::start_apart(namespaces, 2, "cluster", &urls);
    let host = &fleet.hosts[1];
    let lan = "---\napiVersion: keelson.dev/v1alpha1\nkind: Network\nmetadata: {name: lan}\n\
               spec: {subnet: 10.90.0.0/24, gateway: 10.90.0.1, mtu: 1450, overlay: {}}\n";
    let service = |more: &str| {
        format!(
            "---\napiVersion: keelson.dev/v1alpha1\nkind: Service\nmetadata: {{name: web}}\n\
             spec: {{network: lan, address: 10.90.0.80, ports: [{{port: 80, targetPort: 8080}}], \
             guests: [web-4, web-5], healthCheck: {{interval: 200ms}}{more}}}\n"
        )
    };
    let groups = security_group("web", "{protocol: tcp, ports: [8080]}");
    let manifest = lan.to_owned() + &groups + &web(4) + &web(5) + &service("");
    host.apply(&manifest).done();
    wait_for(host, &[("web-4", "Healthy"), ("web-5", "Healthy")]);
    connects(host, "before", "10.90.0.11");
    let before = counted(host);
    assert!(before["web-4"] > 0 && before["web-5"] > 0, "{before:?}");
    host.apply(&service(", draining: [web-4], drainTimeout: 1h"))
        .done();
    let status = wait_for(host, &[("web-4", "Draining"), ("web-5", "Healthy")]);
    assert_eq!(status["backends"][0]["host"], "a");
    connects(host, "meanwhile", "10.90.0.12");
    let meanwhile = counted(host);
    assert_eq!(meanwhile["web-4"], before["web-4"], "{meanwhile:?}");
    assert!(meanwhile["web-5"] >= before["web-5"] + 32, "{meanwhile:?}");
    host.apply(&service(", draining: [web-4], drainTimeout: 0s"))
        .done();
    wait_for(host, &[("web-4", "Drained"), ("web-5", "Healthy")]);
    // It has to be found healthy before it serves again.
    host.apply(&service("")).done();
    wait_for(host, &[("web-4", "Healthy"), ("web-5", "Healthy")]);
    connects(host, "after", "10.90.0.13");
    let after = counted(host);
    assert!(after["web-4"] > 0, "{after:?}");
}
