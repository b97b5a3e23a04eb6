//! What the agent says of its host and guests: metrics, the dashboard that shows them, and `keelson top`.

use std::collections::BTreeSet;

use keelson_agent_tests::{Guest, Host, disk, metrics, network};
use keelson_vmm_tests::wait_until;

const ADDRESS: &str = "127.0.0.1:9469";
const DASHBOARD: &str = include_str!("../../../packaging/grafana/keelson-hosts.json");

/// The names of metrics in the dashboard's queries.
fn shown() -> BTreeSet<String> {
    let words = DASHBOARD.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    let words = words.filter(|word| word.starts_with("keelson_") || word.starts_with("process_"));
    words.map(str::to_owned).collect()
}

#[test]
fn the_dashboard_shows_metrics_that_there_are() {
    let mut host = Host::without_agent();
    host.configure(&format!("metrics_listen = \"{ADDRESS}\"\n"));
    host.start_agent();
    let image = host.path("data.img");
    std::fs::write(&image, vec![0; 1 << 20]).expect("an image can be written");
    let guest = Guest::new("web", "blk-write:sectors=64 wait-power-button:ms=600000")
        .field("disks: [{name: data, disk: data}]")
        .field("interfaces: [{name: eth0, network: lan}]")
        .manifest();
    let lan = network("lan", "10.71.0.0/24", "10.71.0.1");
    let service = "---\napiVersion: keelson.dev/v1alpha1\nkind: Service\nmetadata: {name: web}\n\
                   spec: {network: lan, ports: [{port: 80}], guests: [web]}\n";
    host.apply(&format!("{}{lan}{guest}{service}", disk("data", &image)))
        .done();
    host.wait_for_phase("web", "Running");
    host.wait_for_console("web", "payload: blk-write ok");
    // Only hosts that share their store have leases.
    let expected = shown();
    assert!(expected.len() > 12, "{expected:?}");
    let expected = expected.iter().filter(|name| !name.contains("lease"));
    let expected: Vec<_> = expected.collect();
    let text = wait_until("a page with all metrics", || {
        let page = metrics(ADDRESS);
        let missing = expected
            .iter()
            // Nothing was dropped yet.
            .filter(|name| !name.contains("dropped"))
            .any(|name| !page.contains(&format!("\n{name}")));
        (!missing).then_some(page)
    });
    for line in [
        "keelson_guests{phase=\"Running\"} 1",
        "keelson_host_resource{kind=\"promised\",resource=\"memory_bytes\"} 67108864",
        "keelson_guest_restarts{guest=\"web\"} 0",
    ] {
        assert!(text.contains(line), "no {line} in {text}");
    }

    let top = host.keelson(&["top", "--once", "--sort", "memory"]).done();
    let row = top.lines().find(|line| line.starts_with("web "));
    let row = row.unwrap_or_else(|| panic!("no guest in {top}"));
    assert!(row.contains("Running"), "{row}");
    // 64 MiB of guest memory, of which the payload touches little.
    let memory = row.split_ascii_whitespace().nth(4).unwrap_or_default();
    assert_ne!(memory, "0B", "{row}");
}
