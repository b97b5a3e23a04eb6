//! Services whose guests are on several hosts: each host finds out whether its own serve and says so in the service's
//! status, and the others go by that, for as long as that host has its lease.

use std::time::Duration;

use keelson_agent_tests::{Fleet, Guest, Host, cluster, security_group};
use serde_json::Value;

fn base() -> String {
    "---\napiVersion: keelson.dev/v1alpha1\nkind: Network\nmetadata: {name: lan}\n\
     spec: {subnet: 10.90.0.0/24, gateway: 10.90.0.1, mtu: 1450, overlay: {}}\n"
        .to_owned()
        + &security_group("web", "{protocol: tcp, ports: [8080]}")
}

/// A guest that serves, which takes connections if it is to.
fn guest(host: &str, number: u8, listens: bool) -> String {
    let address = format!("10.90.0.{number}");
    let tcp = if listens { ",tcp=8080" } else { "" };
    let steps = format!("net-serve:address={address}{tcp},ms=600000");
    let name = format!("web-{host}");
    let manifest = Guest::new(&name, &steps)
        .field(&format!("host: {host}"))
        .field(&format!(
            "interfaces: [{{name: eth0, network: lan, address: {address}, securityGroups: [web]}}]"
        ))
        .field("stopTimeout: 1s")
        .manifest();
    let name = format!("name: {name}");
    manifest.replace(&name, &format!("{name}, labels: {{app: web}}"))
}

fn client(name: &str, host: &str, address: &str) -> String {
    let steps = format!("net-connect:address={address},target=10.90.0.80,port=80,count=8 hang");
    Guest::new(name, &steps)
        .field("restartPolicy: Never")
        .field(&format!("host: {host}"))
        .field(&format!(
            "interfaces: [{{name: eth0, network: lan, address: {address}}}]"
        ))
        .manifest()
}

fn service() -> String {
    let check = "{interval: 200ms, timeout: 500ms, unhealthyThreshold: 2}";
    format!(
        "---\napiVersion: keelson.dev/v1alpha1\nkind: Service\nmetadata: {{name: web}}\n\
         spec: {{network: lan, address: 10.90.0.80, ports: [{{port: 80, targetPort: 8080}}], \
         selector: {{app: web}}, healthCheck: {check}}}\n"
    )
}

/// Waits until the guests' health is said by these hosts.
fn wait_for(host: &Host, expected: &[(&str, &str, &str)]) -> Value {
    let what = format!("guests as in {expected:?}");
    host.wait_for_object("svc", "web", &what, |status| {
        let backends = status["backends"].as_array().cloned().unwrap_or_default();
        let said = backends.iter().map(|backend| {
            let text = |field: &str| backend[field].as_str().unwrap_or_default().to_owned();
            (text("guest"), text("health"), text("host"))
        });
        let expected = expected.iter().map(|(guest, health, host)| {
            (
                (*guest).to_owned(),
                (*health).to_owned(),
                (*host).to_owned(),
            )
        });
        said.eq(expected)
    })
}

#[test]
fn hosts_go_by_what_each_says_of_its_guests() {
    let (namespaces, _cluster, urls) = cluster(1);
    let mut fleet = Fleet::start_apart(namespaces, 2, "cluster", &urls);
    let [a, b] = &fleet.hosts[..] else {
        unreachable!("there are two");
    };
    let manifest = base() + &service() + &guest("a", 5, true) + &guest("b", 6, false);
    a.apply(&manifest).done();
    let found = [("web-a", "Healthy", "a"), ("web-b", "Unhealthy", "b")];
    let status = wait_for(b, &found);
    assert_eq!(status["conditions"][0]["reason"], "Serving", "{status}");

    // They do not contradict each other: without news nothing is written.
    let revision = || a.object("svc", "web")["metadata"]["resourceVersion"].clone();
    let before = revision();
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(revision(), before);

    // All clients get the one that serves, wherever they are.
    for (host, name, address) in [(a, "near", "10.90.0.11"), (b, "far", "10.90.0.12")] {
        host.apply(&client(name, name_of(host, a), address)).done();
        host.wait_for_console(name, "payload: net-connect ok asked=8 granted=8");
        let shown = host.keelson(&["net", "services", "web", "-o", "json"]);
        let shown: Value = serde_json::from_str(&shown.done()).expect("the client prints JSON");
        let mut traffic = shown.as_array().expect("a list").iter();
        let of_a = traffic.find(|traffic| traffic["backend"] == "web-a");
        let of_a = of_a.unwrap_or_else(|| panic!("web-a is in {shown}"));
        assert!(of_a["toBackend"]["packets"].as_u64() >= Some(8), "{shown}");
        assert!(
            of_a["fromBackend"]["packets"].as_u64() >= Some(8),
            "{shown}"
        );
    }

    // A host that is lost has no backends.
    fleet.hosts[0].kill_agent();
    let found = [("web-a", "Stopped", "b"), ("web-b", "Unhealthy", "b")];
    let status = wait_for(&fleet.hosts[1], &found);
    let message = status["backends"][0]["message"].to_string();
    assert!(message.contains("lease of its host a"), "{message}");
    assert_eq!(status["conditions"][0]["reason"], "NoneHealthy", "{status}");
    let said = fleet.hosts[1].keelson(&["net", "trace", "far", "web", "80"]);
    assert!(said.output.contains("no-backend"), "{}", said.output);

    fleet.hosts[0].start_agent();
    let found = [("web-a", "Healthy", "a"), ("web-b", "Unhealthy", "b")];
    wait_for(&fleet.hosts[1], &found);
    let again = client("again", "b", "10.90.0.13");
    fleet.hosts[1].apply(&again).done();
    fleet.hosts[1].wait_for_console("again", "payload: net-connect ok asked=8 granted=8");
}

fn name_of(host: &Host, a: &Host) -> &'static str {
    if std::ptr::eq(host, a) { "a" } else { "b" }
}
