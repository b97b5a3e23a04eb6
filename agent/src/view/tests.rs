//! The view beside one that is made anew of all objects after each change.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use keelson_api::{ConditionStatus, Kind, Object, set_condition};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::{Affected, View};

/// Few names, so that they meet.
const NAMES: [&str; 3] = ["a", "b", "c"];

type Objects = BTreeMap<(Kind, String), Object>;

#[derive(Clone, Debug)]
enum Step {
    Set(Box<Object>),
    Remove(Kind, String),
}

fn object(kind: &str, name: &str, spec: &Value, labels: &Value) -> Object {
    let value = json!({
        "apiVersion": keelson_api::API_VERSION,
        "kind": kind,
        "metadata": {"name": name, "labels": labels},
        "spec": spec,
    });
    Object::from_json(&value).expect("an object")
}

fn name() -> impl Strategy<Value = &'static str> {
    prop::sample::select(&NAMES)
}

fn names() -> impl Strategy<Value = Vec<&'static str>> {
    prop::sample::subsequence(&NAMES, 0..3)
}

/// Guests on this host have the label `here`, so that they can come and go.
fn guest() -> impl Strategy<Value = Object> {
    (name(), name(), name(), names(), 2..6_u8, any::<bool>()).prop_map(
        |(name, disk, network, groups, address, here)| {
            let interface = json!({"name": "eth0", "network": network,
                "address": format!("10.0.0.{address}"), "mac": "02:00:00:00:00:01",
                "securityGroups": groups});
            let spec = json!({"cpus": 1, "memory": "64Mi", "kernel": {"image": "/k", "commandLine": ""},
                "disks": [{"name": "data", "disk": disk}], "interfaces": [interface]});
            let labels = if here { json!({"here": "1"}) } else { json!({}) };
            object("VirtualMachine", name, &spec, &labels)
        },
    )
}

fn step() -> impl Strategy<Value = Step> {
    let none = json!({});
    let network = (name(), 1000..1003_u16, any::<bool>()).prop_map({
        let none = none.clone();
        move |(name, mtu, has_uplink)| {
            let uplink = has_uplink.then(|| json!({"device": "eth0"}));
            object(
                "Network",
                name,
                &json!({"subnet": "10.0.0.0/24", "mtu": mtu, "uplink": uplink}),
                &none,
            )
        }
    });
    let disk = (name(), name()).prop_map({
        let none = none.clone();
        move |(name, path)| object("Disk", name, &json!({"path": format!("/{path}")}), &none)
    });
    let group = (name(), names()).prop_map({
        let none = none.clone();
        move |(name, from)| {
            let rules: Vec<_> = from
                .iter()
                .map(|group| json!({"protocol": "tcp", "fromGroups": [group]}))
                .collect();
            object("SecurityGroup", name, &json!({"ingress": rules}), &none)
        }
    });
    let forward = (name(), name(), name()).prop_map({
        let none = none.clone();
        move |(name, network, guest)| {
            let spec = json!({"network": network, "guest": guest, "ports": 80});
            object("PortForward", name, &spec, &none)
        }
    });
    let service = (name(), name()).prop_map(move |(name, network)| {
        let spec = json!({"network": network, "selector": {"here": "1"}, "address": "10.0.0.9",
            "ports": [{"port": 80, "protocol": "tcp"}]});
        object("Service", name, &spec, &none)
    });
    let kinds = [
        Kind::VirtualMachine,
        Kind::Network,
        Kind::Disk,
        Kind::SecurityGroup,
        Kind::Service,
        Kind::PortForward,
    ];
    let set =
        prop_oneof![4 => guest(), 1 => network, 1 => disk, 2 => group, 1 => service, 2 => forward];
    prop_oneof![
        4 => set.prop_map(|object| Step::Set(Box::new(object))),
        1 => (prop::sample::select(kinds.to_vec()), name())
            .prop_map(|(kind, name)| Step::Remove(kind, name.into())),
    ]
}

fn is_here(object: &Object) -> bool {
    match object {
        Object::VirtualMachine(guest) => guest.metadata.labels.contains_key("here"),
        _ => true,
    }
}

fn members(objects: &Objects, group: &str) -> BTreeSet<IpAddr> {
    let mut members = BTreeSet::new();
    for object in objects.values() {
        if let Object::VirtualMachine(guest) = object {
            for interface in &guest.spec.interfaces {
                if interface.security_groups.iter().any(|one| one == group) {
                    members.extend(interface.address.map(IpAddr::from));
                }
            }
        }
    }
    members
}

/// All that a guest's plan is made of, but the guest itself.
fn inputs(objects: &Objects, name: &str) -> Option<String> {
    let guest = objects.get(&(Kind::VirtualMachine, name.into()))?;
    let Object::VirtualMachine(spec) = guest else {
        return None;
    };
    if !is_here(guest) {
        return None;
    }
    let mut inputs = Vec::new();
    for attachment in &spec.spec.disks {
        inputs.push(format!(
            "{:?}",
            objects.get(&(Kind::Disk, attachment.disk.clone()))
        ));
    }
    for interface in &spec.spec.interfaces {
        let network = objects.get(&(Kind::Network, interface.network.clone()));
        inputs.push(format!("{network:?}"));
        for group in &interface.security_groups {
            let group = objects.get(&(Kind::SecurityGroup, group.clone()));
            inputs.push(format!("{group:?}"));
            if let Some(Object::SecurityGroup(group)) = group {
                for (_, named) in group.spec.references() {
                    inputs.push(format!("{:?}", members(objects, named)));
                }
            }
        }
    }
    Some(inputs.join("\n"))
}

/// What services are made of.
fn backends(view: &View) -> String {
    let services = view.services().values();
    let found = services.map(|service| {
        let candidates = crate::services::candidates(service, view);
        let network = view.networks().get(&service.spec.network);
        format!("{:?} {network:?} {candidates:?}", service.spec)
    });
    found.collect()
}

/// What uplinks and forwards are made of.
fn uplinks(view: &View) -> String {
    let networks = view
        .networks()
        .values()
        .filter(|network| network.spec.uplink.is_some());
    let networks: Vec<_> = networks.map(|network| &network.spec).collect();
    let forwards = view.forwards().values().map(|forward| {
        let guest = view.guest(&forward.spec.guest);
        let guest = guest.map(|guest| (guest.is_here(), guest.runs, &guest.interfaces));
        format!("{:?} {guest:?}", forward.spec)
    });
    format!("{networks:?} {:?}", forwards.collect::<Vec<_>>())
}

proptest! {
    #[test]
    fn a_change_reaches_those_that_depend_on_it(steps in prop::collection::vec(step(), 1..60)) {
        let mut objects = Objects::new();
        let mut view = View::default();
        for step in steps {
            let before: Vec<_> = NAMES.iter().map(|name| inputs(&objects, name)).collect();
            let backends_before = backends(&view);
            let uplinks_before = uplinks(&view);
            let (affected, changed) = match step {
                Step::Set(object) => {
                    let key = (object.kind(), object.metadata().name.clone());
                    objects.insert(key.clone(), (*object).clone());
                    (view.set(*object.clone(), is_here(&object)), key)
                }
                Step::Remove(kind, name) => {
                    objects.remove(&(kind, name.clone()));
                    (view.remove(kind, &name), (kind, name))
                }
            };
            for (name, before) in NAMES.iter().zip(before) {
                let itself = changed == (Kind::VirtualMachine, (*name).to_owned());
                let now = inputs(&objects, name);
                if now.is_some() && now != before && !itself {
                    prop_assert!(affected.guests.contains(*name), "{name} is not told of {changed:?}");
                }
                if now.is_none() && !itself {
                    prop_assert!(!affected.guests.contains(*name), "{name} is not here");
                }
                let found: BTreeSet<_> = view.members(name).collect();
                prop_assert_eq!(found, members(&objects, name));
            }
            prop_assert!(affected.services || backends(&view) == backends_before, "{changed:?}");
            prop_assert!(affected.uplinks || uplinks(&view) == uplinks_before, "{changed:?}");
        }
    }
}

#[test]
fn what_an_agent_observes_of_an_object_concerns_nobody() {
    let none = json!({});
    let spec = json!({"subnet": "10.0.0.0/24"});
    let mut view = View::default();
    let network = object("Network", "a", &spec, &none);
    view.set(network.clone(), true);
    let Object::Network(mut network) = network else {
        panic!("a network");
    };
    network.status.device = Some("kbr-a".into());
    let affected = view.set(Object::Network(network), true);
    assert_eq!(affected, Affected::default());
}

#[test]
fn a_guest_of_another_host_is_where_that_hosts_tunnel_ends() {
    let none = json!({});
    let mut view = View::default();
    let place = |host: &str| {
        let spec = json!({"cpus": 1, "memory": "64Mi", "kernel": {"image": "/k"}});
        let Object::VirtualMachine(mut guest) = object("VirtualMachine", "web", &spec, &none)
        else {
            panic!("a guest");
        };
        guest.status.host = Some(host.into());
        Object::VirtualMachine(guest)
    };
    let host = |name: &str, address: &str| {
        let Object::Host(mut host) = object("Host", name, &none, &none) else {
            panic!("a host");
        };
        host.status.tunnel_address = Some(address.parse().expect("valid"));
        Object::Host(host)
    };
    let tunnel = |view: &View| {
        view.remote_guest("web")
            .map(|(_, address)| address.to_string())
    };
    let web = BTreeSet::from(["web".to_owned()]);
    assert_eq!(view.set(place("a"), false).remote, web);
    assert_eq!(tunnel(&view), None, "nothing is known of its host");
    assert_eq!(view.set(host("a", "10.0.0.1"), true).remote, web);
    assert_eq!(tunnel(&view).as_deref(), Some("10.0.0.1"));
    assert!(view.set(host("a", "10.0.0.1"), true).remote.is_empty());
    assert!(view.set(host("b", "10.0.0.2"), true).remote.is_empty());
    assert_eq!(view.set(place("b"), false).remote, web);
    assert_eq!(tunnel(&view).as_deref(), Some("10.0.0.2"));
    assert!(view.set(host("a", "10.0.0.3"), true).remote.is_empty());
    assert_eq!(view.remove(Kind::Host, "b").remote, web);
    assert_eq!(tunnel(&view), None);
    // It comes here.
    assert_eq!(view.set(place("c"), true).remote, web);
    assert_eq!(view.remote_guests().count(), 0);
}

/// Services hear of the end of a lease of a host with guests in their networks, and of its return, once.
#[test]
fn services_follow_the_leases_of_hosts() {
    let none = json!({});
    let mut view = View::default();
    let interface = json!({"name": "eth0", "network": "lan", "address": "10.0.0.2"});
    let spec = json!({"cpus": 1, "memory": "64Mi", "kernel": {"image": "/k"},
        "interfaces": [interface]});
    let Object::VirtualMachine(mut guest) = object("VirtualMachine", "web", &spec, &none) else {
        panic!("a guest");
    };
    guest.status.host = Some("a".into());
    let service = json!({"network": "lan", "ports": [{"port": 80}], "guests": ["web"]});
    view.set(Object::VirtualMachine(guest), false);
    view.set(object("Service", "web", &service, &none), false);
    let host = |name: &str, status: ConditionStatus| {
        let Object::Host(mut host) = object("Host", name, &none, &none) else {
            panic!("a host");
        };
        set_condition(&mut host.status.conditions, "Ready", status, "Test", "");
        Object::Host(host)
    };
    assert!(view.is_lost("a"), "it is no host yet");
    let (there, ended) = (ConditionStatus::True, ConditionStatus::Unknown);
    for (name, status, expected) in [
        ("a", there, true),
        ("a", there, false),
        ("b", there, false),
        ("a", ended, true),
        ("a", ended, false),
        ("a", there, true),
    ] {
        let affected = view.set(host(name, status), false);
        assert_eq!(affected.services, expected, "{name} {status:?}");
        assert_eq!(view.is_lost(name), status == ended);
    }
    assert!(view.remove(Kind::Host, "a").services);
    assert!(view.is_lost("a"));
}
