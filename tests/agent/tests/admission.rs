//! Bad manifests: one clear error that names the field and the fix, and nothing half-created.

use std::fs;

use keelson_agent_tests::{Guest, Host, disk, network, security_group};

/// The exit code for a manifest that is wrong by itself.
const WRONG: i32 = 4;
/// The exit code for a manifest that needs what is missing or taken.
const MISSING: i32 = 5;

/// Applies a manifest with something good before something bad: refused, and nothing is there.
#[track_caller]
fn refused(host: &Host, code: i32, bad: &str, words: &[&str]) {
    let before = host.object_names();
    let good = network("good", "10.50.0.0/24", "10.50.0.1");
    host.apply(&format!("{good}{bad}")).refused(code, words);
    assert_eq!(host.object_names(), before, "something was half-created");
}

#[test]
fn fields() {
    let host = Host::new();
    let guest = || Guest::new("web", "hello");
    let wrong = |bad: String, words: &[&str]| refused(&host, WRONG, &bad, words);
    wrong(guest().field("colour: blue").manifest(), &["colour"]);
    wrong(
        guest().field("memory: 64MB").manifest(),
        &["memory", "64MB", "Mi"],
    );
    wrong(
        guest().field("memory: 1Mi").manifest(),
        &["spec.memory", "at least"],
    );
    wrong(
        guest().field("cpus: 0").manifest(),
        &["spec.cpus", "1 to 64"],
    );
    wrong(guest().field("cpus: 300").manifest(), &["cpus"]);
    let kind = guest()
        .manifest()
        .replace("VirtualMachine", "VirtualMachin");
    wrong(kind, &["VirtualMachin"]);
    let version = guest().manifest().replace("v1alpha1", "v9");
    wrong(version, &["apiVersion", "keelson.dev/v1alpha1"]);
    wrong(
        guest().manifest().replace("name: web", "name: Web_1"),
        &["metadata.name"],
    );
    let twice = format!("{}{}", guest().manifest(), guest().manifest());
    wrong(twice, &["VirtualMachine/web", "metadata.name", "twice"]);
    let relative = guest().image("vmlinux".as_ref()).manifest();
    wrong(relative, &["spec.kernel.image", "absolute"]);
    wrong("---\n[1, 2".into(), &["line"]);
    wrong(
        network("lan", "10.1.0.0/24", "10.2.0.1"),
        &["Network/lan", "spec.gateway", "10.1.0.0/24"],
    );
}

#[test]
fn what_the_host_lacks() {
    let host = Host::new();
    let guest = || Guest::new("web", "hello");
    let missing = |bad: String, words: &[&str]| refused(&host, MISSING, &bad, words);
    missing(
        guest().field("memory: 4096Gi").manifest(),
        &[
            "VirtualMachine/web",
            "spec.memory",
            "4096Gi",
            "this host has",
        ],
    );
    let nowhere = host.path("nowhere");
    let place = nowhere.to_string_lossy().into_owned();
    missing(
        guest().image(&nowhere).manifest(),
        &["spec.kernel.image", &place],
    );
    missing(
        guest().image(host.folder()).manifest(),
        &["spec.kernel.image", "not a file"],
    );
    missing(disk("data", &nowhere), &["Disk/data", "spec.path", &place]);
    missing(
        disk("data", host.folder()),
        &["spec.path", "is a directory"],
    );
    let empty = host.path("empty.img");
    fs::write(&empty, []).expect("a file can be written");
    missing(disk("data", &empty), &["spec.path", "at least 512"]);
    missing(
        guest()
            .field("disks: [{name: data, disk: data}]")
            .manifest(),
        &["spec.disks[0].disk", "Disk/data does not exist"],
    );
    missing(
        guest()
            .field("interfaces: [{name: eth0, network: lan}]")
            .manifest(),
        &["spec.interfaces[0].network", "Network/lan does not exist"],
    );
    missing(
        guest()
            .field("interfaces: [{name: eth0, network: good, securityGroups: [open]}]")
            .manifest(),
        &[
            "spec.interfaces[0].securityGroups[0]",
            "SecurityGroup/open does not exist",
        ],
    );
}

#[test]
fn addresses() {
    let host = Host::new();
    let at = |name: &str, address: &str| {
        Guest::new(name, "hello")
            .field("powerState: Stopped")
            .field(&format!(
                "interfaces: [{{name: eth0, network: lan, address: {address}}}]"
            ))
            .manifest()
    };
    let lan = network("lan", "10.60.0.0/29", "10.60.0.1");
    host.apply(&format!("{lan}{}", at("first", "10.60.0.2")))
        .done();
    let missing = |bad: String, words: &[&str]| refused(&host, MISSING, &bad, words);
    missing(
        at("web", "10.61.0.9"),
        &["spec.interfaces[0].address", "10.60.0.0/29"],
    );
    missing(
        at("web", "10.60.0.2"),
        &["spec.interfaces[0].address", "first"],
    );
    missing(
        at("web", "10.60.0.1"),
        &["spec.interfaces[0].address", "gateway"],
    );
    missing(
        at("web", "10.60.0.7"),
        &["spec.interfaces[0].address", "broadcast"],
    );
    missing(
        network("other", "10.60.0.0/16", "10.60.1.1"),
        &["spec.subnet", "overlaps"],
    );
    let any = |name: &str| {
        Guest::new(name, "hello")
            .field("powerState: Stopped")
            .field("interfaces: [{name: eth0, network: lan}]")
            .manifest()
    };
    for name in ["a", "b", "c", "d"] {
        host.apply(&any(name)).done();
    }
    missing(any("e"), &["spec.interfaces[0].address", "lan"]);
    let held: Vec<_> = ["first", "a", "b", "c", "d"]
        .iter()
        .map(|name| {
            let guest = host.object("vm", name);
            guest["spec"]["interfaces"][0]["address"].clone()
        })
        .collect();
    let expected: Vec<_> = (2..7).map(|last| format!("10.60.0.{last}")).collect();
    assert_eq!(held, expected);
}

#[test]
fn addresses_of_networks_with_one_version_of_ip() {
    let host = Host::new();
    let network = |name: &str, spec: &str| {
        format!(
            "---\napiVersion: keelson.dev/v1alpha1\nkind: Network\nmetadata: {{name: {name}}}\n\
             spec: {{{spec}}}\n"
        )
    };
    let at = |name: &str, network: &str, rest: &str| {
        Guest::new(name, "hello")
            .field("powerState: Stopped")
            .field(&format!(
                "interfaces: [{{name: eth0, network: {network}{rest}}}]"
            ))
            .manifest()
    };
    let six = network("six", "subnetV6: 'fd66::/64'");
    let made = network("made", "subnetV6: 'fd67::/64', slaac: true");
    host.apply(&format!("{six}{made}{}", at("allocated", "six", "")))
        .done();
    let mac = ", mac: '02:00:5e:10:00:01'";
    host.apply(&at("self-made", "made", mac)).done();
    let interface = |name: &str| host.object("vm", name)["spec"]["interfaces"][0].clone();
    assert_eq!(interface("allocated")["addressV6"], "fd66::2");
    assert_eq!(interface("self-made")["addressV6"], "fd67::5eff:fe10:1");
    for name in ["allocated", "self-made"] {
        assert!(interface(name).get("address").is_none(), "{name}");
    }
    refused(
        &host,
        MISSING,
        &at("web", "six", ", address: 10.0.0.2"),
        &["spec.interfaces[0].address", "no IPv4 subnet"],
    );
    refused(
        &host,
        MISSING,
        &at(
            "web",
            "made",
            &format!("{mac}, addressV6: 'fd67::9'").replace(":01", ":02"),
        ),
        &["spec.interfaces[0].addressV6", "fd67::5eff:fe10:2"],
    );
    // It can't begin while a guest has an address of another kind.
    refused(
        &host,
        MISSING,
        &network("six", "subnetV6: 'fd66::/64', slaac: true"),
        &["spec", "VirtualMachine/allocated holds it"],
    );
    let table = host.keelson(&["get", "net"]).done();
    assert!(
        table.contains("fd66::/64") && table.contains("fd66::1"),
        "{table}"
    );
}

#[test]
fn what_is_used_stays() {
    let host = Host::new();
    let rules = security_group("pings", "{protocol: icmp}");
    let lan = network("lan", "10.60.0.0/24", "10.60.0.1");
    let guest = Guest::new("web", "hello")
        .field("powerState: Stopped")
        .field("interfaces: [{name: eth0, network: lan, securityGroups: [pings]}]")
        .manifest();
    host.apply(&format!("{lan}{rules}{guest}")).done();
    let delete = |kind: &str, name: &str| host.keelson(&["delete", kind, name]);
    delete("net", "lan").refused(MISSING, &["Network/lan", "VirtualMachine/web"]);
    delete("sg", "pings").refused(MISSING, &["SecurityGroup/pings", "VirtualMachine/web"]);
    delete("net", "none").refused(3, &["Network/none not found"]);
    delete("vm", "web").done();
    delete("net", "lan").done();
    delete("sg", "pings").done();
    assert!(host.object_names().is_empty());
}

#[test]
fn what_is_printed_can_be_applied_again() {
    let host = Host::new();
    let lan = network("lan", "10.60.0.0/24", "10.60.0.1");
    let guest = Guest::new("web", "hello")
        .field("powerState: Stopped")
        .field("interfaces: [{name: eth0, network: lan}]")
        .manifest();
    let dry = format!("{lan}{guest}");
    let text = host.keelson(&["get", "vm"]).done();
    assert!(!text.contains("web"));
    host.apply(&dry).done();
    let printed = host.keelson(&["get", "vm", "web", "-o", "yaml"]).done();
    assert_eq!(
        host.apply(&printed).done().trim(),
        "VirtualMachine/web unchanged"
    );
    let table = host.keelson(&["get", "vm"]).done();
    assert!(
        table.contains("NAME") && table.contains("10.60.0.2"),
        "{table}"
    );
    host.wait_for_phase("web", "Stopped");
    let described = host.keelson(&["describe", "vm", "web"]).done();
    assert!(described.contains("Ready"), "{described}");
}
