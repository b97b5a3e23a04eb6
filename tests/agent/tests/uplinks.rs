//! Uplinks: guests behind source NAT, ports that are forwarded to them, and what is said about both. A
//! machine outside, in a network namespace of its own, knows nothing of the guests' network.

use std::fs::File;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::thread;
use std::time::Duration;

use keelson_agent_tests::{Guest, Host, metrics, security_group};
use keelson_vmm_tests::wait_until;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;

/// The exit code for a manifest that is wrong by itself.
const WRONG: i32 = 4;
/// The exit code for a manifest that needs what is missing or taken.
const MISSING: i32 = 5;
/// Where the host is to the machine outside.
const EXTERNAL: &str = "192.0.2.1";
/// Where the agent serves metrics, in the host's own namespace.
const METRICS: &str = "127.0.0.1:9753";

/// A host with an uplink, whose agent does not run yet.
fn host() -> Host {
    let host = Host::without_agent();
    host.configure(&format!("metrics_listen = \"{METRICS}\"\n"));
    // Namespaces by name are this test's own.
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "tmpfs", "/run"])
        .status();
    assert!(mounted.expect("mount runs").success());
    host.namespaces.ip(&["netns", "add", "outside"]);
    plug_in(&host);
    host
}

/// Makes the uplink, with the machine outside at its other end.
fn plug_in(host: &Host) {
    let ip = |command: &str| {
        let words: Vec<_> = command.split(' ').collect();
        host.namespaces.ip(&words);
    };
    ip("link add up0 type veth peer name out0 netns outside");
    for address in ["192.0.2.1/24", "2001:db8::1/64"] {
        ip(&format!("address add {address} dev up0 nodad"));
    }
    ip("link set up0 up");
    for address in ["192.0.2.2/24", "2001:db8::2/64"] {
        ip(&format!("-n outside address add {address} dev out0 nodad"));
    }
    ip("-n outside link set out0 up");
}

fn network(name: &str, subnets: &str, uplink: &str) -> String {
    format!(
        "---\napiVersion: keelson.dev/v1alpha1\nkind: Network\nmetadata: {{name: {name}}}\n\
         spec: {{{subnets}, uplink: {uplink}}}\n"
    )
}

fn lan() -> String {
    let subnets = "subnet: 10.91.0.0/24, subnetV6: \"fd91::/64\"";
    network("lan", subnets, "{device: up0}")
        + &security_group(
            "web",
            "{protocol: icmp}, {protocol: tcp, ports: [8080-8090]}",
        )
}

/// A guest that pings the machine outside until a line comes on its console, and takes connections.
fn guest(number: u8) -> String {
    let address = format!("10.91.0.{number}");
    let steps =
        format!("net-stream:address={address},via=10.91.0.1,target=192.0.2.2,tcp=8080,ms=600000");
    Guest::new(&format!("web-{number}"), &steps)
        .field(&format!(
            "interfaces: [{{name: eth0, network: lan, address: {address}, securityGroups: [web]}}]"
        ))
        .field("stopTimeout: 1s")
        .manifest()
}

fn forward(name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: keelson.dev/v1alpha1\nkind: PortForward\nmetadata: {{name: {name}}}\n\
         spec: {{network: lan, {spec}}}\n"
    )
}

fn condition<'a>(status: &'a Value, kind: &str) -> Option<&'a Value> {
    let conditions = status["conditions"].as_array()?;
    conditions
        .iter()
        .find(|condition| condition["type"] == kind)
}

fn wait_for(host: &Host, object: (&str, &str), kind: &str, reason: &str) -> Value {
    let what = format!("{kind} of {} is {reason}", object.1);
    host.wait_for_object(object.0, object.1, &what, |status| {
        condition(status, kind).is_some_and(|condition| condition["reason"] == reason)
    })
}

/// A guest reaches what is forwarded to another as whoever is outside does.
fn check_from_inside(host: &Host) {
    let steps = format!(
        "net-connect:address=10.91.0.7,via=10.91.0.1,target={EXTERNAL},port=8080,count=3 hang"
    );
    let caller = Guest::new("caller", &steps)
        .field("restartPolicy: Never")
        .field("stopTimeout: 1s")
        .field("interfaces: [{name: eth0, network: lan, address: 10.91.0.7}]");
    host.apply(&caller.manifest()).done();
    host.wait_for_console("caller", "payload: net-connect ok asked=3 granted=3");
    let said = host
        .keelson(&["net", "trace", "caller", EXTERNAL, "8080"])
        .done();
    for line in [
        "uplink: PortForward/http 8080/tcp: leads to port 8080 of web-5/eth0",
        "ingress of web-5/eth0: allowed by SecurityGroup/web spec.ingress[1]",
        "passes",
    ] {
        assert!(said.contains(line), "{line:?} is said:\n{said}");
    }
    host.keelson(&["delete", "vm", "caller"]).done();
}

/// Whether the machine outside gets a connection to a port of the host.
fn reaches(port: u16) -> bool {
    let address: SocketAddr = format!("{EXTERNAL}:{port}").parse().expect("an address");
    let connected = thread::spawn(move || {
        let namespace = File::open("/run/netns/outside").expect("it was made");
        let kind = LinkNameSpaceType::Network;
        move_into_link_name_space(namespace.as_fd(), Some(kind)).expect("root may");
        TcpStream::connect_timeout(&address, Duration::from_secs(2)).is_ok()
    });
    connected.join().expect("no panic")
}

fn wait_until_reached(port: u16) {
    wait_until(&format!("connection to port {port}"), || {
        reaches(port).then_some(())
    });
}

#[test]
fn mistakes_name_their_fields() {
    let mut host = host();
    host.start_agent();
    host.apply(&(lan() + &guest(5) + &guest(6) + &forward("http", "ports: 8080, guest: web-5")))
        .done();
    let listener = std::net::TcpListener::bind("0.0.0.0:8090").expect("the port is free");
    for (code, spec, words) in [
        (
            WRONG,
            "ports: 0, guest: web-5",
            &["spec.ports", "no port"][..],
        ),
        (
            WRONG,
            "ports: 1000-9000, guest: web-5",
            &["spec.ports", "more than 4096"],
        ),
        (
            WRONG,
            "ports: 8000-8001, targetPort: 65535, guest: web-5",
            &["spec.targetPort", "no room"],
        ),
        (
            MISSING,
            "ports: 81, guest: web-7",
            &["spec.guest", "VirtualMachine/web-7"],
        ),
        (
            MISSING,
            "ports: 81, guest: web-5, interface: eth1",
            &["spec.interface", "no interface eth1 in Network/lan"],
        ),
        (
            MISSING,
            "ports: 8070-8085, guest: web-6",
            &["spec.ports", "8080/tcp of up0", "PortForward/http"],
        ),
        (
            MISSING,
            "ports: 81, targetPort: 8080, guest: web-5",
            &["spec.targetPort", "PortForward/http", "one forward"],
        ),
        (
            MISSING,
            "ports: 40000, guest: web-6",
            &["spec.ports", "net.ipv4.ip_local_port_range"],
        ),
        (
            MISSING,
            "ports: 8090, guest: web-6",
            &["spec.ports", "the host listens on 8090/tcp"],
        ),
    ] {
        host.apply(&forward("other", spec)).refused(code, words);
    }
    drop(listener);
    for (code, uplink, words) in [
        (
            WRONG,
            "{device: up0/1}",
            &["spec.uplink.device", "no name of a network device"][..],
        ),
        (
            WRONG,
            "{device: up0, sourceNat: {portsPerInterface: 1}}",
            &["spec.uplink.sourceNat.portsPerInterface", "64 to 65536"],
        ),
        (
            MISSING,
            "{device: up0, sourceNat: {ports: 61000-62000}}",
            &["spec.uplink.sourceNat.ports", "Network/lan", "the same"],
        ),
        (
            MISSING,
            "{device: up1, sourceNat: {ports: 20000-40000}}",
            &["spec.uplink.sourceNat.ports", "ip_local_port_range"],
        ),
    ] {
        let other = network("other", "subnet: 10.92.0.0/24", uplink);
        host.apply(&other).refused(code, words);
    }
    // UDP and TCP have ports of their own.
    host.apply(&forward("udp", "protocol: udp, ports: 8080, guest: web-6"))
        .done();
    let bare = network("lan", "subnet: 10.91.0.0/24", "null");
    host.apply(&bare)
        .refused(MISSING, &["spec.uplink", "PortForward/http"]);
    host.keelson(&["delete", "net", "lan"])
        .refused(MISSING, &["PortForward/http"]);
}

/// What a guest sends outside is answered, though nobody there knows its network; what is forwarded
/// reaches it. Both follow the objects and the uplink.
#[test]
fn guests_reach_outside_and_are_reached_through_forwards() {
    let mut host = host();
    host.start_agent();
    host.apply(&lan()).done();
    let status = wait_for(&host, ("net", "lan"), "UplinkReady", "Up");
    let message = condition(&status, "UplinkReady").expect("it was there")["message"].to_string();
    for words in ["192.0.2.1 and 2001:db8::1", "61000-65535"] {
        assert!(message.contains(words), "{words:?} is said: {message}");
    }
    host.apply(&(guest(5) + &guest(6))).done();
    for guest in ["web-5", "web-6"] {
        host.wait_for_console(guest, "net-stream ready lost=0");
    }
    assert!(!reaches(8080), "nothing is forwarded yet");

    host.apply(&forward("http", "ports: 8080, guest: web-5"))
        .done();
    let status = wait_for(&host, ("pf", "http"), "Ready", "Forwarding");
    assert_eq!(status["addresses"][0], "192.0.2.1:8080", "{status}");
    wait_until_reached(8080);
    let table = host.keelson(&["get", "pf"]).done();
    assert!(
        table.contains("8080/tcp") && table.contains("web-5:8080"),
        "{table}"
    );

    check_from_inside(&host);
    let counters = host.keelson(&["net", "counters", "-o", "json"]).done();
    let counters: Value = serde_json::from_str(&counters).expect("the client prints JSON");
    assert_eq!(counters[0]["device"], "up0", "{counters}");
    for direction in ["toUplink", "fromUplink"] {
        let packets = |at: usize| counters[at][direction]["packets"].as_u64().unwrap_or(0);
        assert!(packets(0) + packets(1) > 2, "{direction}: {counters}");
    }
    let table = host.keelson(&["net", "counters"]).done();
    assert!(
        table.contains("to uplink") && table.contains(EXTERNAL),
        "{table}"
    );
    let page = metrics(METRICS);
    let line = "keelson_network_uplink_packets_total{address=\"192.0.2.1\",direction=\"to-uplink\",uplink=\"up0\"}";
    let value = page.lines().find_map(|found| found.strip_prefix(line));
    let value: f64 = value.expect(&page).trim().parse().expect("a number");
    assert!(value > 1.0, "{page}");
    let said = host
        .keelson(&["net", "trace", "web-5", "192.0.2.2", "443"])
        .done();
    for line in [
        "uplink: Network/lan by up0: translated to 192.0.2.1",
        "passes",
    ] {
        assert!(said.contains(line), "{line:?} is said:\n{said}");
    }
    let said = host
        .keelson(&["net", "trace", "192.0.2.2", EXTERNAL, "8080"])
        .done();
    for line in [
        "uplink: PortForward/http 8080/tcp: leads to port 8080 of web-5/eth0",
        "ingress of web-5/eth0: allowed by SecurityGroup/web spec.ingress[1]",
        "passes",
    ] {
        assert!(said.contains(line), "{line:?} is said:\n{said}");
    }

    let changed = forward("http", "ports: 8081-8082, targetPort: 8080, guest: web-6");
    host.apply(&changed).done();
    wait_until_reached(8081);
    assert!(!reaches(8080), "it is another port now");
    assert!(!reaches(8082), "the guest does not listen there");

    host.namespaces.ip(&["link", "delete", "up0"]);
    wait_for(&host, ("net", "lan"), "UplinkReady", "UplinkMissing");
    wait_for(&host, ("pf", "http"), "Ready", "UplinkMissing");
    plug_in(&host);
    wait_for(&host, ("net", "lan"), "UplinkReady", "Up");
    wait_until_reached(8081);

    host.keelson(&["stop", "web-6", "--force"]).done();
    wait_for(&host, ("pf", "http"), "Ready", "GuestNotRunning");
    host.keelson(&["start", "web-6"]).done();
    wait_for(&host, ("pf", "http"), "Ready", "Forwarding");
    wait_until_reached(8081);

    host.keelson(&["delete", "pf", "http"]).done();
    wait_until("end of the forward", || (!reaches(8081)).then_some(()));
}

/// Flows go on while no agent runs, and beside one that starts.
#[test]
fn a_restarted_agent_keeps_what_guests_have_at_the_uplink() {
    let mut host = host();
    host.start_agent();
    host.apply(&lan()).done();
    wait_for(&host, ("net", "lan"), "UplinkReady", "Up");
    host.apply(&(guest(5) + &forward("http", "ports: 8080, guest: web-5")))
        .done();
    host.wait_for_console("web-5", "net-stream ready lost=0");
    wait_for(&host, ("pf", "http"), "Ready", "Forwarding");
    wait_until_reached(8080);
    host.kill_agent();
    assert!(reaches(8080), "the programs are in force without an agent");
    host.start_agent();
    for _ in 0..20 {
        assert!(reaches(8080), "an agent that starts disturbs nothing");
    }
    wait_for(&host, ("net", "lan"), "UplinkReady", "Up");
    host.type_line("web-5", "end");
    host.wait_for_console("web-5", "net-stream ok");
    let log = host.keelson(&["logs", "web-5"]).output;
    assert!(
        log.contains("lost=0\n") || log.contains("lost=0\r"),
        "{log}"
    );
}
