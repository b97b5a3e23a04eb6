//! Guests of one network reach each other as far as their security groups allow.

use keelson_agent_tests::{Guest, Host, network, security_group};

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
    let process = host.object("vm", "server")["status"]["processId"].clone();
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
