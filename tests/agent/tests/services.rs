//! Services: admission, whom they are for, their health, what is said about them. How packets are
//! balanced is tested with the eBPF programs.

use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use keelson_agent_tests::{Guest, Host, metrics, network, security_group};
use keelson_vmm_tests::wait_until;
use serde_json::Value;

/// The exit code for a manifest that is wrong by itself.
const WRONG: i32 = 4;
/// The exit code for what isn't there.
const UNKNOWN: i32 = 3;
/// The exit code for a manifest that needs what is missing or taken.
const MISSING: i32 = 5;

/// Where the agent serves metrics, in the host's own namespace.
const METRICS: &str = "127.0.0.1:9754";

fn base() -> String {
    network("lan", "10.90.0.0/24", "10.90.0.1")
        + &security_group("web", "{protocol: icmp}, {protocol: tcp, ports: [8080]}")
}

fn guest(number: u8, labels: &str) -> String {
    let address = format!("10.90.0.{number}");
    let steps = format!("net-serve:address={address},ms=600000");
    let manifest = Guest::new(&format!("web-{number}"), &steps)
        .field(&format!(
            "interfaces: [{{name: eth0, network: lan, address: {address}, securityGroups: [web]}}]"
        ))
        .field("stopTimeout: 1s")
        .manifest();
    let name = format!("name: web-{number}");
    manifest.replace(&name, &format!("{name}, labels: {{{labels}}}"))
}

fn service(name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: keelson.dev/v1alpha1\nkind: Service\nmetadata: {{name: {name}}}\n\
         spec: {{network: lan, {spec}}}\n"
    )
}

fn healths(status: &Value) -> Vec<(String, String)> {
    let backends = status["backends"].as_array().expect("a list");
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let healths = backends.iter();
    healths
        .map(|backend| (text(&backend["guest"]), text(&backend["health"])))
        .collect()
}

fn wait_for_healths(host: &Host, expected: &[(&str, &str)]) -> Value {
    let expected: Vec<_> = expected
        .iter()
        .map(|(guest, health)| ((*guest).to_owned(), (*health).to_owned()))
        .collect();
    let what = format!("guests as in {expected:?}");
    host.wait_for_object("svc", "web", &what, |status| {
        status["conditions"][0] != Value::Null && healths(status) == expected
    })
}

#[test]
fn mistakes_name_their_fields() {
    let host = Host::new();
    host.apply(
        &(base()
            + &guest(5, "app: web")
            + &service(
                "there",
                "address: 10.90.0.80, ports: [{port: 80}], guests: [web-5]",
            )),
    )
    .done();
    for (code, spec, words) in [
        (
            WRONG,
            "ports: [{port: 80}]",
            &["spec.selector", "spec.guests"][..],
        ),
        (
            WRONG,
            "ports: [], guests: [web-5]",
            &["spec.ports", "at least one"],
        ),
        (
            WRONG,
            "ports: [{port: 0}], guests: [web-5]",
            &["spec.ports[0].port", "1 to 65535"],
        ),
        (
            WRONG,
            "ports: [{port: 70000}], guests: [web-5]",
            &["spec.ports[0].port", "70000"],
        ),
        (
            WRONG,
            "ports: [{port: 80}, {port: 80, targetPort: 81}], guests: [web-5]",
            &["spec.ports[1].port", "80/tcp", "twice"],
        ),
        (
            WRONG,
            "ports: [{port: 53, protocol: udp}], guests: [web-5], healthCheck: {}",
            &["spec.healthCheck.port", "no TCP port"],
        ),
        (
            WRONG,
            "ports: [{port: 80}], guests: [web-5], healthCheck: {interval: 1ms}",
            &["spec.healthCheck.interval", "100ms"],
        ),
        (
            MISSING,
            "ports: [{port: 80}], guests: [web-6]",
            &["spec.guests[0]", "VirtualMachine/web-6"],
        ),
        (
            MISSING,
            "address: 10.90.0.80, ports: [{port: 80}], guests: [web-5]",
            &["spec.address", "10.90.0.80 is taken by Service/there"],
        ),
        (
            MISSING,
            "address: 10.90.0.5, ports: [{port: 80}], guests: [web-5]",
            &["spec.address", "10.90.0.5 is taken by VirtualMachine/web-5"],
        ),
        (
            MISSING,
            "address: 10.90.0.1, ports: [{port: 80}], guests: [web-5]",
            &["spec.address", "gateway"],
        ),
        (
            MISSING,
            "address: 10.91.0.1, ports: [{port: 80}], guests: [web-5]",
            &["spec.address", "outside"],
        ),
        (
            MISSING,
            "addressV6: 'fd77::80', ports: [{port: 80}], guests: [web-5]",
            &["spec.addressV6", "no IPv6 subnet"],
        ),
    ] {
        host.apply(&service("web", spec)).refused(code, words);
    }
    let mac = guest(9, "").replace("name: eth0,", "name: eth0, mac: '02:4b:45:45:4c:53',");
    host.apply(&mac)
        .refused(MISSING, &["spec.interfaces[0].mac", "all services"]);
    // Nor is a guest given what a service has, nor does a network go that it is in.
    let taken = guest(80, "");
    host.apply(&taken)
        .refused(MISSING, &["10.90.0.80 is taken by Service/there"]);
    host.keelson(&["delete", "vm", "web-5"]).done();
    host.keelson(&["delete", "net", "lan"])
        .refused(MISSING, &["Network/lan", "Service/there"]);
    host.keelson(&["delete", "svc", "there"]).done();
    host.keelson(&["delete", "net", "lan"]).done();
}

#[test]
fn addresses_are_allocated_beside_those_of_guests() {
    let host = Host::new();
    let spec = "ports: [{port: 80}], selector: {app: web}";
    host.apply(&(base() + &service("web", spec) + &guest(2, "app: web")))
        .done();
    assert_eq!(host.object("svc", "web")["spec"]["address"], "10.90.0.3");
    // It keeps the address.
    host.apply(&service("web", "ports: [{port: 81}], selector: {app: web}"))
        .done();
    assert_eq!(host.object("svc", "web")["spec"]["address"], "10.90.0.3");
}

#[test]
fn a_service_follows_its_guests() {
    let host = Host::new();
    let spec = "address: 10.90.0.80, ports: [{port: 80, targetPort: 8080}], selector: {app: web}";
    host.apply(&(base() + &service("web", spec))).done();
    let status = wait_for_healths(&host, &[]);
    assert_eq!(status["conditions"][0]["reason"], "NoGuests");
    host.apply(&(guest(5, "app: web") + &guest(6, "app: web") + &guest(7, "app: other")))
        .done();
    let status = wait_for_healths(&host, &[("web-5", "Healthy"), ("web-6", "Healthy")]);
    assert_eq!(status["conditions"][0]["status"], "True");
    let table = host.keelson(&["get", "svc"]).done();
    assert!(
        table.contains("10.90.0.80") && table.contains("2/2"),
        "{table}"
    );

    let said = host.keelson(&["net", "trace", "web-7", "web", "80"]).done();
    for line in [
        "tcp port 80 from web-7/eth0 (10.90.0.7) to 10.90.0.80",
        "Service/web 80/tcp: goes to port 8080 of one of 2 guests",
        "ingress of web-5/eth0: allowed by SecurityGroup/web spec.ingress[1]",
        "ingress of web-6/eth0: allowed by SecurityGroup/web spec.ingress[1]",
        "passes",
    ] {
        assert!(said.contains(line), "{line:?} is said:\n{said}");
    }
    let said = host.keelson(&["net", "trace", "web-7", "10.90.0.80", "443"]);
    assert_eq!(said.code, Some(1), "{}", said.output);
    assert!(said.output.contains("no-service"), "{}", said.output);

    host.keelson(&["stop", "web-5", "--force"]).done();
    wait_for_healths(&host, &[("web-5", "Stopped"), ("web-6", "Healthy")]);
    host.keelson(&["delete", "vm", "web-5"]).done();
    wait_for_healths(&host, &[("web-6", "Healthy")]);
    host.keelson(&["delete", "vm", "web-6"]).done();
    let status = wait_for_healths(&host, &[]);
    assert_eq!(status["conditions"][0]["status"], "False");
}

fn connects(to: (&str, u16)) -> bool {
    let address = SocketAddr::new(to.0.parse().expect("valid"), to.1);
    TcpStream::connect_timeout(&address, Duration::from_secs(2)).is_ok()
}

/// One guest takes connections for a while, the other for good: clients of the host get whoever does.
#[test]
fn health_follows_what_guests_do() {
    let mut host = Host::without_agent();
    host.configure(&format!("metrics_listen = \"{METRICS}\"\n"));
    host.start_agent();
    let listening = |number: u8, milliseconds: u32| {
        let serve = format!("net-serve:address=10.90.0.{number},ms=600000");
        let listen = format!("net-serve:address=10.90.0.{number},tcp=8080,ms={milliseconds} hang");
        guest(number, "app: web").replace(&serve, &listen)
    };
    let check = "healthCheck: {interval: 200ms, timeout: 1s, unhealthyThreshold: 2}";
    let spec = "address: 10.90.0.80, ports: [{port: 80, targetPort: 8080}], selector: {app: web}";
    host.apply(&(base() + &service("web", &format!("{spec}, {check}"))))
        .done();
    host.apply(&listening(5, 20_000)).done();
    wait_for_healths(&host, &[("web-5", "Healthy")]);
    wait_until("the service takes connections", || {
        connects(("10.90.0.80", 80)).then_some(())
    });
    host.apply(&listening(6, 600_000)).done();
    wait_for_healths(&host, &[("web-5", "Unhealthy"), ("web-6", "Healthy")]);
    for _ in 0..10 {
        assert!(connects(("10.90.0.80", 80)), "the other one takes them");
    }
    assert!(!connects(("10.90.0.80", 81)), "no service has the port");
    check_what_is_counted(&host);
}

/// At least ten connections were taken by web-6, of four packets or more to it.
fn check_what_is_counted(host: &Host) {
    let shown = host
        .keelson(&["net", "services", "web", "-o", "json"])
        .done();
    let shown: Value = serde_json::from_str(&shown).expect("the client prints JSON");
    let of = |guest: &str| {
        let mut traffic = shown.as_array().expect("a list").iter();
        let found = traffic.find(|traffic| traffic["backend"] == guest);
        let found = found.unwrap_or_else(|| panic!("{guest} is in {shown}"));
        assert_eq!(found["address"], "10.90.0.80", "{shown}");
        (
            found["port"].as_u64(),
            found["toBackend"]["packets"].as_u64(),
        )
    };
    // As unhealthy it is no backend any more: what it had is the service's.
    let (port, packets) = of("web-6");
    assert_eq!(port, Some(80));
    assert!(packets >= Some(30), "{shown}");
    let nobodys = shown.as_array().expect("a list").iter();
    let mut nobodys = nobodys.filter(|traffic| traffic["backend"].is_null());
    let had = |traffic: &Value| traffic["fromBackend"]["bytes"].as_u64() > Some(50);
    assert!(nobodys.any(had), "what web-5 had is counted: {shown}");
    let table = host.keelson(&["net", "services"]).done();
    assert!(
        table.contains("80/tcp") && table.contains("from backend"),
        "{table}"
    );
    host.keelson(&["net", "services", "other"])
        .refused(UNKNOWN, &["Service/other"]);
    let page = metrics(METRICS);
    let line = "keelson_network_service_packets_total{backend=\"web-6\",direction=\"to-backend\",port=\"80/tcp\",service=\"web\"}";
    let value = page.lines().find_map(|found| found.strip_prefix(line));
    let value: f64 = value.expect(&page).trim().parse().expect("a number");
    assert!(value >= 30.0, "{page}");
}

/// The guest's payload answers no TCP: checks say so, and what to look at.
#[test]
fn a_guest_that_takes_no_connections_is_unhealthy() {
    let mut host = Host::new();
    let check = "healthCheck: {interval: 100ms, timeout: 50ms, unhealthyThreshold: 2}";
    let spec = format!("ports: [{{port: 8080}}], guests: [web-5], {check}");
    host.apply(&(base() + &guest(5, "") + &service("web", &spec)))
        .done();
    let status = wait_for_healths(&host, &[("web-5", "Unhealthy")]);
    assert_eq!(status["conditions"][0]["reason"], "NoneHealthy");
    let message = status["backends"][0]["message"].to_string();
    for words in ["10.90.0.5:8080", "tcp 8080", "10.90.0.1"] {
        assert!(message.contains(words), "{words:?} is said: {message}");
    }
    let said = host.keelson(&["net", "trace", "10.90.0.1", "web", "8080"]);
    assert_eq!(said.code, Some(1), "{}", said.output);
    assert!(said.output.contains("no-backend"), "{}", said.output);
    // The next agent finds the same, and may say otherwise.
    host.kill_agent();
    host.start_agent();
    wait_for_healths(&host, &[("web-5", "Unhealthy")]);
    host.apply(&service("web", "ports: [{port: 8080}], guests: [web-5]"))
        .done();
    wait_for_healths(&host, &[("web-5", "Healthy")]);
}
