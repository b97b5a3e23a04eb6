//! What the plan makes of objects and devices.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use keelson_api::{ConditionStatus, Network, Object};
use serde_json::{Value, json};

use super::plan::{Plan, Surroundings, Target, WantedForward};
use crate::host::{HostPorts, UplinkDevice};

fn object(kind: &str, name: &str, spec: &Value) -> Object {
    let value = json!({
        "apiVersion": keelson_api::API_VERSION,
        "kind": kind,
        "metadata": {"name": name},
        "spec": spec,
    });
    let object = Object::from_json(&value).expect("an object");
    assert!(object.validate().is_empty(), "{:?}", object.validate());
    object
}

fn network(name: &str, subnets: &[&str], uplink: &Value) -> Network {
    let mut spec = json!({"uplink": uplink});
    for subnet in subnets {
        let field = if subnet.contains(':') {
            "subnetV6"
        } else {
            "subnet"
        };
        spec[field] = json!(subnet);
    }
    let Object::Network(network) = object("Network", name, &spec) else {
        unreachable!("that kind was asked for");
    };
    network
}

fn forward(name: &str, ports: &str, target_port: u16) -> WantedForward {
    let spec = json!({"network": "lan", "guest": "web", "ports": ports, "targetPort": target_port});
    let Object::PortForward(object) = object("PortForward", name, &spec) else {
        unreachable!("that kind was asked for");
    };
    let target = Target {
        device: "ktap-1".into(),
        has_ipv4: true,
        has_ipv6: false,
        runs: true,
    };
    WantedForward {
        object,
        target: Some(target),
    }
}

fn host(addresses: &[&str]) -> Surroundings {
    let device = UplinkDevice {
        index: 7,
        is_ethernet: true,
        addresses: addresses.iter().map(|address| ip(address)).collect(),
    };
    Surroundings {
        devices: BTreeMap::from([("eth0".into(), device)]),
        in_use: BTreeSet::new(),
        ports: HostPorts::only_local(32_768..=60_999),
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

#[test]
fn addresses_are_the_devices_first_ones_unless_given() {
    let both = ["10.0.0.0/24", "fd00::/64"];
    let host = host(&["192.0.2.1", "192.0.2.2", "2001:db8::1"]);
    let plan = Plan::new(
        &[network("lan", &both, &json!({"device": "eth0"}))],
        &[],
        &host,
    );
    let nat = &plan.source_nat[0];
    assert_eq!(nat.ipv4.map(IpAddr::from), Some(ip("192.0.2.1")));
    assert_eq!(nat.ipv6.map(IpAddr::from), Some(ip("2001:db8::1")));
    let given = json!({"device": "eth0", "address": "192.0.2.2"});
    let plan = Plan::new(&[network("lan", &both, &given)], &[], &host);
    assert_eq!(
        plan.source_nat[0].ipv4.map(IpAddr::from),
        Some(ip("192.0.2.2"))
    );
    let absent = json!({"device": "eth0", "address": "192.0.2.3"});
    let plan = Plan::new(&[network("lan", &both, &absent)], &[], &host);
    assert_eq!(plan.source_nat[0].ipv4, None);
    assert_eq!(plan.networks["lan"].reason, "AddressMissing");
}

#[test]
fn global_ipv6_is_routed_as_it_is_unless_asked_for() {
    let host = host(&["192.0.2.1", "2001:db8::1"]);
    let global = ["2001:db8:7::/64"];
    let plan = Plan::new(
        &[network("lan", &global, &json!({"device": "eth0"}))],
        &[],
        &host,
    );
    assert!(plan.source_nat.is_empty());
    assert_eq!(plan.routed, ["lan"]);
    assert_eq!(plan.networks["lan"].status, ConditionStatus::True);
    let asked = json!({"device": "eth0", "sourceNat": {"ipv6": true}});
    let plan = Plan::new(&[network("lan", &global, &asked)], &[], &host);
    assert_eq!(
        plan.source_nat[0].ipv6.map(IpAddr::from),
        Some(ip("2001:db8::1"))
    );
}

#[test]
fn what_guests_have_stays_theirs_while_the_uplink_is_gone() {
    let lan = [network("lan", &["10.0.0.0/24"], &json!({"device": "eth0"}))];
    let mut host = host(&["192.0.2.1"]);
    let wanted = [forward("http", "80", 8080)];
    let before = Plan::new(&lan, &wanted, &host);
    host.devices.clear();
    let plan = Plan::new(&lan, &wanted, &host);
    assert!(
        plan.source_nat.is_empty() && plan.forwards.is_empty(),
        "nobody has any"
    );
    host.in_use.insert(("eth0".into(), ip("192.0.2.1")));
    host.in_use.insert(("eth1".into(), ip("198.51.100.1")));
    let plan = Plan::new(&lan, &wanted, &host);
    assert_eq!(plan.source_nat, before.source_nat);
    assert_eq!(plan.forwards, before.forwards);
    assert!(plan.routed.is_empty());
    assert_eq!(plan.networks["lan"].reason, "UplinkMissing");
    assert_eq!(plan.port_forwards["http"].reason, "UplinkMissing");
}

#[test]
fn ports_that_are_wanted_twice_are_the_firsts() {
    let lan = [
        network("lan", &["10.0.0.0/24"], &json!({"device": "eth0"})),
        network(
            "other",
            &["10.0.1.0/24"],
            &json!({"device": "eth0", "sourceNat": {"ports": "20000-21000"}}),
        ),
        network(
            "third",
            &["10.0.2.0/24"],
            &json!({"device": "eth0", "sourceNat": {"ports": "40000-41000"}}),
        ),
    ];
    let wanted = [
        forward("a", "80-81", 8080),
        forward("b", "81", 9000),
        forward("c", "82", 8081),
        forward("d", "83", 8082),
        forward("e", "50000", 8083),
    ];
    let plan = Plan::new(&lan, &wanted, &host(&["192.0.2.1"]));
    assert_eq!(plan.source_nat.len(), 1);
    for name in ["other", "third"] {
        assert_eq!(plan.networks[name].reason, "PortsInUse", "{name}");
    }
    let ports: Vec<_> = plan
        .forwards
        .iter()
        .map(|f| (f.port, f.guest_port))
        .collect();
    assert_eq!(ports, [(80, 8080), (81, 8081), (83, 8082)]);
    for (name, reason) in [
        ("a", "Forwarding"),
        ("b", "PortsInUse"),
        ("c", "PortsInUse"),
        ("d", "Forwarding"),
        ("e", "PortsInUse"),
    ] {
        assert_eq!(plan.port_forwards[name].reason, reason, "{name}");
    }
}
