//! The show of guests among each other: two in one network, a third outside, a service in front of two,
//! and rules that change under traffic.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keelson_vmm_tests::payload;

use crate::host::{Host, until};
use crate::report::Report;

/// The guests of this show, beside `web`.
pub const GUESTS: [&str; 4] = ["front-1", "front-2", "client", "outsider"];
const FRONT: [&str; 2] = ["10.88.0.21", "10.88.0.22"];
const SERVICE: &str = "10.88.0.80";
const CONNECTIONS: u32 = 40;
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// Times that the rules are changed under traffic, to and fro.
const CHANGES: usize = 6;
/// Pings of the guests' own network, and connections to the service.
const INSIDE: &str = "{protocol: icmp, from: [10.88.0.0/24]}, {protocol: tcp, ports: [8080]}";
/// Pings of the other network as well.
const BOTH: &str =
    "{protocol: icmp, from: [10.88.0.0/24, 10.89.0.0/24]}, {protocol: tcp, ports: [8080]}";

/// Shows what guests can reach of each other. The network `lan` is there already.
pub fn show(report: &mut Report, host: &Host, folder: &Path) {
    report.step("two guests come up behind a service", || {
        // Of this network namespace: the host routes between its networks.
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("let the host route")?;
        apply(
            host,
            folder,
            &(group(INSIDE) + &fronts() + SERVICE_MANIFEST),
        )?;
        for name in ["front-1", "front-2"] {
            host.console_line(name, "payload: net-serve ready")?;
        }
        Ok(((), format!("{} and {}", FRONT[0], FRONT[1])))
    });
    report.step("the service gives both of them connections", || {
        balance(host)
    });
    report.step("a guest pings another of its network", || {
        let steps = "net-ping:address=10.88.0.30,target=10.88.0.21 \
                     net-stream:address=10.88.0.30,target=10.88.0.21 wait-power-button:ms=600000";
        apply(
            host,
            folder,
            &guest("client", "lan", "10.88.0.30", "", steps),
        )?;
        Ok(((), host.console_line("client", "payload: net-ping ok")?))
    });
    report.step("one of another network is kept out", || {
        let steps = "net-stream:address=10.89.0.40,via=10.89.0.1,target=10.88.0.21 \
                     wait-power-button:ms=600000";
        let outsider = guest("outsider", "dmz", "10.89.0.40", "", steps);
        apply(host, folder, &(DMZ.to_owned() + &outsider))?;
        let line = host.console_line("outsider", "payload: net-stream ready")?;
        ensure!(
            line.ends_with("lost=1"),
            "its first ping came through: {line}"
        );
        let dropped = host.dropped("front-1", "toGuest", "not-allowed")?;
        ensure!(dropped > 0, "nothing was dropped as not-allowed");
        Ok(((), format!("{dropped} packets counted as not-allowed")))
    });
    report.step("rules change under traffic, to and fro", || {
        host.console_line("client", "payload: net-stream ready")?;
        for change in 0..CHANGES {
            let rules = if change % 2 == 0 { BOTH } else { INSIDE };
            apply(host, folder, &group(rules))?;
        }
        apply(host, folder, &group(BOTH))?;
        Ok(((), format!("{} changes", CHANGES + 1)))
    });
    report.step("the one of the other network is let in", || {
        let mut before = passed(host, "outsider", "toGuest")?;
        until("its pings are answered", || {
            let now = passed(host, "outsider", "toGuest")?;
            let answered = now > before + 2;
            before = before.min(now);
            Ok(answered)
        })?;
        let (sent, lost) = end_stream(host, folder, "outsider")?;
        ensure!(0 < lost && lost < sent, "{lost} of {sent} pings were lost");
        Ok(((), format!("{} of {sent} pings answered", sent - lost)))
    });
    report.step("what all of the rules allowed was delivered", || {
        let (sent, lost) = end_stream(host, folder, "client")?;
        ensure!(lost == 0, "{lost} of {sent} pings were lost");
        Ok(((), format!("{sent} of {sent} pings answered")))
    });
    report.step("the guests are shut off", || {
        for name in GUESTS {
            host.keelson(&["stop", name, "--force"])?;
        }
        Ok(((), GUESTS.join(", ")))
    });
}

const SERVICE_MANIFEST: &str = "---
apiVersion: keelson.dev/v1alpha1
kind: Service
metadata: {name: front}
spec:
  network: lan
  address: 10.88.0.80
  ports: [{port: 80, targetPort: 8080}]
  guests: [front-1, front-2]
";
const DMZ: &str = "---
apiVersion: keelson.dev/v1alpha1
kind: Network
metadata: {name: dmz}
spec: {subnet: 10.89.0.0/24, gateway: 10.89.0.1}
";

fn group(rules: &str) -> String {
    format!(
        "---\napiVersion: keelson.dev/v1alpha1\nkind: SecurityGroup\nmetadata: {{name: front}}\n\
         spec: {{ingress: [{rules}]}}\n"
    )
}

fn fronts() -> String {
    let names = ["front-1", "front-2"];
    let guests = names.iter().zip(FRONT).map(|(name, address)| {
        let steps = format!("net-serve:address={address},tcp=8080,ms=600000");
        guest(name, "lan", address, "front", &steps)
    });
    guests.collect()
}

fn guest(name: &str, network: &str, address: &str, groups: &str, steps: &str) -> String {
    format!(
        "---
apiVersion: keelson.dev/v1alpha1
kind: VirtualMachine
metadata: {{name: {name}}}
spec:
  cpus: 1
  memory: 64Mi
  restartPolicy: Never
  kernel: {{image: {}, commandLine: \"console=ttyS0 -- {steps}\"}}
  interfaces: [{{name: eth0, network: {network}, address: {address}, securityGroups: [{groups}]}}]
",
        payload().display()
    )
}

fn apply(host: &Host, folder: &Path, manifest: &str) -> Result<()> {
    let path = folder.join("network.yaml");
    std::fs::write(&path, manifest)?;
    host.keelson(&["apply", "-f", &path.to_string_lossy()])
        .map(drop)
}

/// Connects to the service until its table is in force, and then counts who gets connections.
fn balance(host: &Host) -> Result<((), String)> {
    let service = SocketAddr::new(SERVICE.parse()?, 80);
    until("the service takes connections", || {
        Ok(TcpStream::connect_timeout(&service, CONNECT_LIMIT).is_ok())
    })?;
    let shares = || -> Result<[u64; 2]> {
        Ok([
            passed(host, "front-1", "toGuest")?,
            passed(host, "front-2", "toGuest")?,
        ])
    };
    let before = shares()?;
    for _ in 0..CONNECTIONS {
        TcpStream::connect_timeout(&service, CONNECT_LIMIT).context("connect to the service")?;
    }
    let after = shares()?;
    let [first, second] = [after[0] - before[0], after[1] - before[1]];
    ensure!(
        first > 0 && second > 0,
        "of {CONNECTIONS} connections, packets to the guests: {first} and {second}"
    );
    let message = format!("{CONNECTIONS} of {CONNECTIONS}; packets: {first} and {second}");
    Ok(((), message))
}

/// Packets that passed a guest's interface.
fn passed(host: &Host, guest: &str, direction: &str) -> Result<u64> {
    let counters = host.json(&["net", "counters", guest])?;
    let packets = counters.pointer(&format!("/0/{direction}/passed/packets"));
    packets
        .and_then(serde_json::Value::as_u64)
        .with_context(|| format!("no counters of {guest}: {counters}"))
}

/// Ends a guest's stream of pings; how many it sent, and how many of them were lost.
///
/// # Errors
/// If the guest doesn't say so.
pub fn end_stream(host: &Host, folder: &Path, guest: &str) -> Result<(u64, u64)> {
    let socket = folder.join(format!("run/vms/{guest}/console.sock"));
    let mut console = UnixStream::connect(&socket).context("connect to the console")?;
    console.write_all(b"enough\n")?;
    let line = host.console_line(guest, "payload: net-stream ok")?;
    let number = |name: &str| {
        let mut words = line.split_whitespace();
        let value = words.find_map(|word| word.strip_prefix(name));
        value
            .and_then(|value| value.parse().ok())
            .with_context(|| format!("no {name} in {line:?}"))
    };
    Ok((number("sent=")?, number("lost=")?))
}
