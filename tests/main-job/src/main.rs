//! Shows the whole of Keelson work on this host: a guest from a manifest, its disk through io_uring,
//! its network through eBPF, the state in the embedded store. What `./run` runs.
//!
//! Every line is checked; the exit code is 0 only if every one is true.

mod host;
mod report;

use std::fs;
use std::net::UdpSocket;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, ensure};
use keelson_vmm_tests::{pattern_sector, payload};

use crate::host::{Host, until};
use crate::report::Report;

const GATEWAY: &str = "10.88.0.1";
const GUEST: &str = "10.88.0.10";
/// Sectors that the host writes and the guest reads, and as many the other way round.
const SECTORS: u64 = 4096;
const FORBIDDEN_PACKETS: u64 = 5;
const SPOOFED_FRAMES: u64 = 10;

fn main() -> ExitCode {
    match show() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("run: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn show() -> Result<bool> {
    let folder = tempfile::Builder::new().prefix("keelson-run-").tempdir()?;
    let stay = std::env::args().any(|argument| argument == "--stay");
    let seed = u64::from(std::process::id()) << 20;
    let mut report = Report::default();
    let mut host = Host::new(folder.path())?;
    let image = folder.path().join("data.img");
    write_image(&image, seed)?;

    report.step("the agent starts on the embedded store", || {
        let process = host.start_agent()?;
        Ok(((), format!("keelsond is process {process}")))
    });
    report.step("a manifest with a guest is applied", || {
        let manifest = folder.path().join("web.yaml");
        fs::write(&manifest, manifest_text(&image, seed))?;
        let said = host.keelson(&["apply", "-f", &manifest.to_string_lossy()])?;
        Ok(((), said.lines().collect::<Vec<_>>().join(", ")))
    });
    show_guest(&mut report, &host);
    show_network(&mut report, &host);
    show_adoption(&mut report, &mut host);
    if stay {
        stay_up(folder.path());
    }
    show_end(&mut report, &mut host, &image, seed);
    Ok(report.all_true())
}

fn show_guest(report: &mut Report, host: &Host) {
    report.step("the guest runs", || {
        let line = host.console_line("web", "payload: hello ok")?;
        Ok(((), line))
    });
    report.step("it reads what the host wrote on its disk", || {
        Ok(((), host.console_line("web", "payload: blk-verify ok")?))
    });
    report.step("it writes and flushes its disk", || {
        Ok(((), host.console_line("web", "payload: blk-write ok")?))
    });
}

fn show_network(report: &mut Report, host: &Host) {
    report.step("it pings its gateway, the host", || {
        Ok(((), host.console_line("web", "payload: net-ping ok")?))
    });
    report.step("what it sends under a false address is dropped", || {
        host.console_line("web", "payload: net-spoof ok")?;
        let ip = host.dropped("web", "fromGuest", "spoofed-ipv4")?;
        let arp = host.dropped("web", "fromGuest", "spoofed-arp")?;
        ensure!(
            ip + arp == SPOOFED_FRAMES,
            "counted {ip} IPv4 and {arp} ARP frames"
        );
        Ok((
            (),
            format!("counted as spoofed: {ip} IPv4 packets, {arp} ARP packets"),
        ))
    });
    report.step("the host pings it, as its rules allow", || {
        host.console_line("web", "payload: net-serve ready")?;
        Ok(((), ping(3)?))
    });
    report.step("a forbidden port of it is dropped", || {
        let before = host.dropped("web", "toGuest", "not-allowed")?;
        let socket = UdpSocket::bind((GATEWAY, 0))?;
        for _ in 0..FORBIDDEN_PACKETS {
            socket.send_to(b"forbidden", (GUEST, 9))?;
        }
        let mut dropped = 0;
        until("the drops are counted", || {
            dropped = host.dropped("web", "toGuest", "not-allowed")? - before;
            Ok(dropped >= FORBIDDEN_PACKETS)
        })?;
        Ok((
            (),
            format!("{dropped} packets to UDP port 9 counted as not-allowed"),
        ))
    });
}

fn show_adoption(report: &mut Report, host: &mut Host) {
    report.step("the agent is killed, the guest answers pings", || {
        host.kill_agent()?;
        Ok(((), ping(3)?))
    });
    report.step("the agent starts again and finds the guest", || {
        host.start_agent()?;
        until("the guest is adopted", || {
            Ok(host.keelson(&["events"])?.contains("Adopted"))
        })?;
        let seen = ping(2)?;
        let guest = host.json(&["get", "vm", "web"])?;
        let process = guest
            .pointer("/status/processId")
            .cloned()
            .unwrap_or_default();
        Ok(((), format!("process {process} runs on; {seen}")))
    });
}

fn show_end(report: &mut Report, host: &mut Host, image: &Path, seed: u64) {
    report.step("the power button shuts it down", || {
        host.console_line("web", "payload: wait-power-button ready")?;
        host.keelson(&["stop", "web"])?;
        Ok(((), host.console_line("web", "payload: done")?))
    });
    report.step("the host finds what it wrote in the image", || {
        let bytes = fs::read(image)?;
        let sectors = bytes.as_chunks::<512>().0;
        for sector in SECTORS..2 * SECTORS {
            let index = usize::try_from(sector)?;
            let found = sectors.get(index).context("the image is too short")?;
            ensure!(
                *found == pattern_sector(sector, seed + 1),
                "sector {sector} differs"
            );
        }
        Ok(((), format!("{SECTORS} sectors are equal")))
    });
    report.step("the state is there after a restart", || {
        host.kill_agent()?;
        host.start_agent()?;
        let guest = host.json(&["get", "vm", "web"])?;
        let phase = guest
            .pointer("/status/phase")
            .and_then(serde_json::Value::as_str);
        ensure!(phase == Some("Stopped"), "its phase is {phase:?}");
        Ok(((), "VirtualMachine/web is Stopped".into()))
    });
}

fn stay_up(folder: &Path) {
    println!("\nstaying up; talk to the agent with");
    println!(
        "  keelson --socket {}/run/keelsond.sock get vm",
        folder.display()
    );
    println!("and press Enter to go on.");
    let _ = std::io::stdin().read_line(&mut String::new());
}

fn write_image(image: &Path, seed: u64) -> Result<()> {
    let mut bytes = Vec::new();
    for sector in 0..SECTORS {
        bytes.extend(pattern_sector(sector, seed));
    }
    bytes.resize(usize::try_from(4 * SECTORS)? * 512, 0);
    fs::write(image, bytes).with_context(|| format!("write {}", image.display()))
}

fn manifest_text(image: &Path, seed: u64) -> String {
    let count = SPOOFED_FRAMES / 2;
    let steps = [
        "hello".to_owned(),
        format!("blk-verify:first=0,sectors={SECTORS},seed={seed}"),
        format!(
            "blk-write:first={SECTORS},sectors={SECTORS},seed={}",
            seed + 1
        ),
        format!("net-ping:address={GUEST},target={GATEWAY}"),
        format!("net-spoof:address=10.88.0.99,target={GATEWAY},count={count}"),
        format!("net-serve:address={GUEST},ms=8000"),
        "wait-power-button:ms=600000".into(),
    ];
    format!(
        "apiVersion: keelson.dev/v1alpha1
kind: Network
metadata: {{name: lan}}
spec: {{subnet: 10.88.0.0/24, gateway: {GATEWAY}}}
---
apiVersion: keelson.dev/v1alpha1
kind: SecurityGroup
metadata: {{name: pings-only}}
spec: {{ingress: [{{protocol: icmp}}]}}
---
apiVersion: keelson.dev/v1alpha1
kind: Disk
metadata: {{name: data}}
spec: {{path: {}}}
---
apiVersion: keelson.dev/v1alpha1
kind: VirtualMachine
metadata: {{name: web}}
spec:
  cpus: 1
  memory: 64Mi
  restartPolicy: Never
  kernel:
    image: {}
    commandLine: console=ttyS0 -- {}
  disks: [{{name: data, disk: data}}]
  interfaces: [{{name: eth0, network: lan, address: {GUEST}, securityGroups: [pings-only]}}]
",
        image.display(),
        payload().display(),
        steps.join(" "),
    )
}

/// Pings the guest; every ping must be answered.
fn ping(count: u32) -> Result<String> {
    let output = Command::new("busybox")
        .args([
            "ping",
            "-c",
            &count.to_string(),
            "-W",
            "2",
            "-i",
            "0.2",
            GUEST,
        ])
        .stdin(Stdio::null())
        .output()
        .context("run busybox ping")?;
    let said = String::from_utf8_lossy(&output.stdout);
    let summary = said
        .lines()
        .find(|line| line.contains("packets received"))
        .unwrap_or_default();
    ensure!(
        summary.contains(&format!("{count} packets received")),
        "not every ping was answered: {summary}"
    );
    Ok(summary.to_owned())
}
