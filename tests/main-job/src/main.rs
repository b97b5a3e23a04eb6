//! Shows the whole of Keelson work on this host: a guest from a manifest, its disk through io_uring,
//! its network through eBPF, the state in the embedded store or in another one. What `./run` runs.
//!
//! Every line is checked; the exit code is 0 only if every one is true.

mod console;
mod host;
mod network_show;
mod payload_guest;
mod probe;
mod report;
mod stock_guest;

use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser};

use crate::host::{Host, until};
use crate::report::Report;

/// The host's address in the guest's network.
const GATEWAY: &str = "10.88.0.1";
/// The guest's own address.
const GUEST: &str = "10.88.0.10";
/// An address that is not the guest's.
const FALSE_ADDRESS: &str = "10.88.0.99";
const FORBIDDEN_PACKETS: u64 = 5;

/// Does the main job on this host.
#[derive(Parser)]
enum Arguments {
    /// Finds out whether this host's own KVM runs a stock kernel, by trying. Exits 0 if it does.
    Probe {
        /// A stock kernel.
        #[arg(long)]
        kernel: PathBuf,
        /// Its initial RAM disk, whose init says so on the console.
        #[arg(long)]
        initrd: PathBuf,
    },
    /// Shows the whole of Keelson work. Exits 0 only if every line is true.
    Show(Show),
}

#[derive(Args)]
struct Show {
    /// A stock kernel to boot; the payload guest of this project where not given.
    #[arg(long, requires = "initrd")]
    kernel: Option<PathBuf>,
    /// The initial RAM disk of the stock kernel, with a root shell on its console.
    #[arg(long, requires = "kernel")]
    initrd: Option<PathBuf>,
    /// Where the agent keeps its state; embedded, in a folder of the show's own, where not given.
    #[arg(long)]
    state: Option<String>,
    /// Wait before the guest is shut down, and say how to talk to the agent.
    #[arg(long)]
    stay: bool,
}

fn main() -> ExitCode {
    match Arguments::parse() {
        Arguments::Probe { kernel, initrd } => match try_stock_kernel(&kernel, &initrd) {
            Ok(line) => {
                println!("this host's KVM runs a stock kernel: {line}");
                ExitCode::SUCCESS
            }
            Err(error) => {
                println!("this host's KVM doesn't run a stock kernel: {error:#}");
                ExitCode::FAILURE
            }
        },
        Arguments::Show(arguments) => match show(&arguments) {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::FAILURE,
            Err(error) => {
                eprintln!("the main job could not be done: {error:#}");
                ExitCode::FAILURE
            }
        },
    }
}

fn try_stock_kernel(kernel: &Path, initrd: &Path) -> Result<String> {
    let own = std::env::current_exe().context("find the own program file")?;
    let programs = own.parent().context("the own program has no folder")?;
    probe::stock_kernel(programs, kernel, initrd)
}

fn show(arguments: &Show) -> Result<bool> {
    let folder = tempfile::Builder::new().prefix("keelson-run-").tempdir()?;
    let mut report = Report::default();
    let embedded = format!("embedded:{}/state", folder.path().display());
    let state = arguments.state.as_deref().unwrap_or(&embedded);
    let mut host = Host::new(folder.path(), state)?;
    let (kind, _) = state.split_once(':').unwrap_or((state, ""));
    let started = report.step(&format!("the agent starts on the {kind} store"), || {
        let process = host.start_agent()?;
        Ok(((), format!("keelsond is process {process}")))
    });
    if started.is_none() {
        return Ok(report.all_true());
    }
    let stay = || {
        if arguments.stay {
            stay_up(folder.path());
        }
    };
    match (&arguments.kernel, &arguments.initrd) {
        (Some(kernel), Some(initrd)) => {
            stock_guest::show(&mut report, &mut host, folder.path(), kernel, initrd, stay)?;
        }
        _ => payload_guest::show(&mut report, &mut host, folder.path(), stay)?,
    }
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
    Ok(report.all_true())
}

/// Applies the manifest of the guest `web` with one disk of this spec, and one interface.
fn apply(report: &mut Report, host: &Host, folder: &Path, disk: &str, guest: &str) {
    report.step("a manifest with a guest is applied", || {
        let path = folder.join("web.yaml");
        let manifest = format!(
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
spec: {{{disk}}}
---
apiVersion: keelson.dev/v1alpha1
kind: VirtualMachine
metadata: {{name: web}}
spec:
  cpus: 1
  restartPolicy: Never
  disks: [{{name: data, disk: data}}]
  interfaces: [{{name: eth0, network: lan, address: {GUEST}, securityGroups: [pings-only]}}]
{guest}"
        );
        std::fs::write(&path, manifest)?;
        let said = host.keelson(&["apply", "-f", &path.to_string_lossy()])?;
        Ok(((), said.lines().collect::<Vec<_>>().join(", ")))
    });
}

/// What may reach the guest, and what may not.
fn show_ingress(report: &mut Report, host: &Host) {
    report.step("the host pings it, as its rules allow", || {
        Ok(((), ping(3)?))
    });
    report.step("the kernel moves its packets where it can", || {
        Ok(((), packet_mover(host)?))
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

/// Who moves the guest's packets, which has to be vhost-net where this host has it, the guest's jail
/// notwithstanding.
fn packet_mover(host: &Host) -> Result<String> {
    let guest = host.json(&["get", "vm", "web"])?;
    let supervisor = guest.pointer("/status/processId").context("a process")?;
    // In a jail, the VMM is the child of the process that watches over it.
    let children =
        std::fs::read_to_string(format!("/proc/{supervisor}/task/{supervisor}/children"))?;
    let mut threads = 0;
    for process in children
        .split_whitespace()
        .chain([supervisor.to_string().as_str()])
    {
        let tasks = std::fs::read_dir(format!("/proc/{process}/task"))?;
        threads += tasks
            .flatten()
            .filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok())
            .filter(|name| name.starts_with("net"))
            .count();
    }
    if Path::new("/dev/vhost-net").exists() {
        ensure!(threads == 0, "threads of the VMM do: {threads}");
        return Ok("vhost-net does".to_owned());
    }
    ensure!(threads > 0, "nobody does");
    Ok("a thread of the VMM does: this host has no /dev/vhost-net".to_owned())
}

/// The guest lives without the agent, and the next agent finds it.
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

fn stay_up(folder: &Path) {
    println!("\nstaying up; talk to the agent with");
    println!(
        "  keelson --socket {}/run/keelsond.sock get vm",
        folder.display()
    );
    println!("and press Enter to go on.");
    // Without a terminal the run goes on at once.
    let _ = std::io::stdin().read_line(&mut String::new());
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
