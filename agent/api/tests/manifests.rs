//! Manifests as people write them, right and wrong.

use keelson_api::{Kind, Object, manifest};
use proptest::prelude::*;

const COMPLETE: &str = "
apiVersion: keelson.dev/v1alpha1
kind: Network
metadata: {name: lan}
spec: {subnet: 10.77.0.0/24, subnetV6: 'fd77::/64', isolated: true}
---
apiVersion: keelson.dev/v1alpha1
kind: SecurityGroup
metadata: {name: web}
spec:
  ingress:
    - {protocol: icmp}
    - {protocol: tcp, ports: [80, 8000-8100], from: [10.77.0.0/24]}
    - {protocol: icmpv6, icmpTypes: [128, 1/4], from: ['fd77::/64'], fromGroups: [web]}
  egress:
    - {protocol: udp, ports: [53], to: [10.77.0.1/32], toGroups: [web]}
---
apiVersion: keelson.dev/v1alpha1
kind: Disk
metadata: {name: data}
spec: {path: /srv/data.img}
---
apiVersion: keelson.dev/v1alpha1
kind: VirtualMachine
metadata: {name: web, labels: {tier: front}}
spec:
  cpus: 2
  memory: 256Mi
  kernel: {image: /boot/vmlinuz, initrd: /boot/initrd.img}
  disks: [{name: data, disk: data}]
  interfaces: [{name: eth0, network: lan, address: 10.77.0.10, addressV6: 'fd77::10', securityGroups: [web]}]
";

fn objects(text: &str) -> Result<Vec<Object>, String> {
    let documents = manifest::parse(text).map_err(|error| error.to_string())?;
    documents
        .iter()
        .map(|d| Object::from_json(d).map_err(|error| error.to_string()))
        .collect()
}

/// The first manifest of the README is one that can be applied.
#[test]
fn what_the_readme_shows_is_a_manifest() {
    let readme = include_str!("../../../README.md");
    let (_, rest) = readme.split_once("```yaml\n").expect("it has a manifest");
    let (text, _) = rest.split_once("```").expect("the manifest ends");
    let objects = objects(text).expect("objects");
    assert!(objects.len() >= 4, "{objects:?}");
    for object in objects {
        assert_eq!(object.validate(), []);
    }
}

/// The complete manifest with one piece replaced: everything that is wrong with it, as text.
fn complaints(from: &str, to: &str) -> String {
    assert!(COMPLETE.contains(from), "{from:?} stands in the manifest");
    match objects(&COMPLETE.replacen(from, to, 1)) {
        Err(error) => error,
        Ok(objects) => objects
            .iter()
            .flat_map(Object::validate)
            .map(|error| error.to_string())
            .collect::<Vec<_>>()
            .join("\n"),
    }
}

#[test]
fn a_complete_manifest_is_valid_and_survives_json() {
    let objects = objects(COMPLETE).unwrap();
    let kinds: Vec<_> = objects.iter().map(Object::kind).collect();
    assert_eq!(
        kinds,
        [
            Kind::Network,
            Kind::SecurityGroup,
            Kind::Disk,
            Kind::VirtualMachine
        ]
    );
    for object in objects {
        assert_eq!(object.validate(), []);
        let json = serde_json::to_value(&object).unwrap();
        assert_eq!(Object::from_json(&json).unwrap(), object);
    }
}

#[test]
fn a_network_may_tell_guests_all_or_have_one_version_of_ip() {
    for spec in [
        "{subnet: 10.77.0.0/24}",
        "{subnetV6: 'fd77::/64', slaac: true}",
        "{subnet: 10.77.0.0/24, subnetV6: 'fd77::/64', dhcp: false, routerAdvertisements: false, \
         defaultRoute: false, leaseTime: 2h, dns: {servers: [10.77.0.53, 'fd77::53'], searchDomains: \
         [corp.example]}, routes: [{destination: 10.0.0.0/8, via: 10.77.0.9}, {destination: 'fd00::/8'}]}",
    ] {
        let text = format!(
            "{{apiVersion: keelson.dev/v1alpha1, kind: Network, metadata: {{name: lan}}, spec: {spec}}}"
        );
        let objects = objects(&text).unwrap();
        assert_eq!(objects[0].validate(), [], "{spec}");
        let json = serde_json::to_value(&objects[0]).unwrap();
        assert_eq!(Object::from_json(&json).unwrap(), objects[0]);
        // Only what was said stands there.
        let fields = json["spec"].as_object().unwrap().len();
        assert!(fields <= spec.matches(": ").count() + 1, "{json}");
    }
}

#[test]
fn every_mistake_names_its_field_and_the_fix() {
    for (from, to, expected) in [
        ("cpus: 2", "cpus: 0", "spec.cpus: is 0; give 1 to 64"),
        ("cpus: 2", "cpus: 65", "spec.cpus: is 65"),
        ("cpus: 2", "cpus: two", "spec.cpus: invalid"),
        ("cpus: 2", "cpu: 2", "unknown field `cpu`"),
        (
            "256Mi",
            "256MB",
            "spec.memory: \"256MB\" has the unknown unit \"MB\"; write e.g. 256Mi",
        ),
        ("256Mi", "16Mi", "spec.memory: is 16Mi; give at least 32Mi"),
        (
            "256Mi",
            "257Mi\n  hugepages: 2Mi",
            "multiple of the huge page size",
        ),
        (
            "/boot/vmlinuz",
            "vmlinuz",
            "spec.kernel.image: vmlinuz is not absolute",
        ),
        ("/boot/vmlinuz", "/boot/../vmlinuz", "goes up by .."),
        (
            "10.77.0.10",
            "10.77.0.300",
            "spec.interfaces[0].address: invalid IPv4",
        ),
        (
            "10.77.0.0/24, sub",
            "10.77.0.1/24, sub",
            "write 10.77.0.0/24",
        ),
        (
            "fd77::/64', iso",
            "fd77::1/64', iso",
            "spec.subnetV6: fd77::1/64 has host bits set; write fd77::/64",
        ),
        (
            "fd77::/64', iso",
            "fe80::/64', iso",
            "spec.subnetV6: fe80::/64 holds no hosts' addresses",
        ),
        (
            "isolated: true",
            "gatewayV6: 'fd78::1'",
            "spec.gatewayV6: fd78::1 is no host address of fd77::/64",
        ),
        (
            "isolated: true",
            "mtu: 1000",
            "spec.mtu: is 1000; IPv6 needs at least 1280",
        ),
        (
            "subnet: 10.77.0.0/24, subnetV6: 'fd77::/64', ",
            "",
            "spec.subnet: is missing; give it, spec.subnetV6 or both",
        ),
        (
            "subnet: 10.77.0.0/24, sub",
            "gateway: 10.77.0.1, sub",
            "spec.gateway: is given without spec.subnet",
        ),
        (
            "isolated: true",
            "dns: {servers: [224.0.0.1]}",
            "spec.dns.servers[0]: 224.0.0.1 is no server that every guest reaches",
        ),
        (
            "isolated: true",
            "dns: {searchDomains: [corp.example, Corp.]}",
            "spec.dns.searchDomains[1]: \"Corp.\" is no domain",
        ),
        (
            "isolated: true",
            "dns: {searchDomains: [a, b, c, d, e, f, g]}",
            "spec.dns.searchDomains: has 7 domains of 7 characters; give at most 6",
        ),
        (
            "isolated: true",
            "routes: [{destination: 10.1.0.0/8}]",
            "spec.routes[0].destination: 10.1.0.0/8 has host bits set; write 10.0.0.0/8",
        ),
        (
            "isolated: true",
            "routes: [{destination: 10.0.0.0/8, via: 10.78.0.1}]",
            "spec.routes[0].via: 10.78.0.1 is no address of 10.77.0.0/24",
        ),
        (
            "isolated: true",
            "routes: [{destination: 'fd00::/8', via: 'fd77::9'}]",
            "spec.routes[0].via: IPv6's routers tell of themselves only",
        ),
        (
            "isolated: true",
            "routes: [{destination: 0.0.0.0/0}]",
            "spec.routes[0].destination: is the default route, which spec.defaultRoute",
        ),
        (
            "isolated: true",
            "leaseTime: 10s",
            "spec.leaseTime: is 10s; give whole seconds from 2m to 8760h",
        ),
        (
            "fd77::/64', isolated: true",
            "fd77::/80', slaac: true",
            "spec.slaac: needs a spec.subnetV6 with a /64 prefix",
        ),
        (
            "isolated: true",
            "slaac: true, routerAdvertisements: false",
            "spec.slaac: needs spec.routerAdvertisements",
        ),
        ("128, 1/4", "300", "\"300\" is no ICMP type"),
        (
            "protocol: icmpv6",
            "protocol: icmp",
            "spec.ingress[2].from[0]: fd77::/64 is of the other version of IP",
        ),
        (
            "protocol: udp, ports: [53]",
            "protocol: udp, icmpTypes: [8]",
            "spec.egress[0].icmpTypes: only icmp and icmpv6 have types",
        ),
        ("8000-8100", "8100-8000", "spec.ingress[1].ports[1]"),
        ("80, ", "0, ", "is no port"),
        (
            "protocol: icmp",
            "protocol: icmp, ports: [1]",
            "only tcp and udp have ports",
        ),
        (
            "name: web, ",
            "name: Web_1, ",
            "metadata.name: \"Web_1\" must consist of",
        ),
        (
            "{name: data, disk: data}",
            "{name: data, disk: data}, {name: data, disk: x}",
            "spec.disks[1].name: \"data\" is given twice",
        ),
        (
            "kind: Disk",
            "kind: Floppy",
            "kind: \"Floppy\" is not known here",
        ),
        (
            "v1alpha1\nkind: Disk",
            "v9\nkind: Disk",
            "apiVersion: \"keelson.dev/v9\"",
        ),
        ("  memory: 256Mi\n", "", "missing field `memory`"),
        ("  cpus: 2", "  cpus: 2\n  cpus: 3", "duplicate"),
        ("cpus: 2", "cpus: [", "not valid YAML"),
    ] {
        let complaints = complaints(from, to);
        assert!(complaints.contains(expected), "{to:?} gives:\n{complaints}");
    }
}

#[test]
fn an_empty_or_oversized_manifest_is_refused() {
    assert!(
        manifest::parse("---\n---\n")
            .unwrap_err()
            .to_string()
            .contains("no object")
    );
    let large = format!("# {}", "x".repeat(manifest::SIZE_LIMIT));
    assert!(
        manifest::parse(&large)
            .unwrap_err()
            .to_string()
            .contains("limit")
    );
    let many = "---\nkind: Disk\n".repeat(manifest::OBJECT_LIMIT + 1);
    assert!(
        manifest::parse(&many)
            .unwrap_err()
            .to_string()
            .contains("number of objects")
    );
}

proptest! {
    #[test]
    fn damaged_manifests_never_panic(position in 0..COMPLETE.len(), replacement in "\\PC{0,8}") {
        let mut text = COMPLETE.to_string();
        text.replace_range(position..=position, &replacement);
        if let Ok(objects) = objects(&text) {
            for object in objects {
                object.validate();
            }
        }
    }
}

#[test]
fn a_large_manifest_is_applied_in_steps_that_refer_to_earlier_ones() {
    let document = |kind: &str, name: usize, size: usize| serde_json::json!({"kind": kind, "metadata": {"name": name.to_string()}, "text": "x".repeat(size)});
    let mut documents: Vec<_> = (0..150)
        .map(|at| document("VirtualMachine", at, 10))
        .collect();
    documents.extend((0..150).map(|at| document("Disk", at, 10)));
    let steps = manifest::steps(documents).unwrap();
    let kinds = |step: &Vec<Vec<u8>>| -> Vec<String> {
        let objects = step.iter().map(|one| serde_json::from_slice(one).unwrap());
        let kinds = objects.map(|one: serde_json::Value| one["kind"].as_str().unwrap().to_owned());
        kinds.collect()
    };
    let all: Vec<_> = steps.iter().flat_map(kinds).collect();
    assert_eq!(all.len(), 300);
    assert!(all[..150].iter().all(|kind| kind == "Disk"));
    assert!(steps.iter().all(|step| step.len() <= manifest::STEP_LIMIT));
    // As they stand, where they are few.
    let few = vec![document("VirtualMachine", 0, 10), document("Disk", 0, 10)];
    let few = manifest::steps(few).unwrap();
    assert_eq!(kinds(&few[0]), ["VirtualMachine", "Disk"]);
    // What is too large together is applied one after the other.
    let large = (0..4).map(|at| document("Disk", at, 400_000)).collect();
    let large = manifest::steps(large).unwrap();
    assert_eq!(large.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2]);
}
