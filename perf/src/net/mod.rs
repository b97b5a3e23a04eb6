//! `perf net`: the eBPF network beside a Linux bridge with nftables, and beside no policy at all.

mod frames;
mod hosts;
mod load;
mod nftables;
mod packet_socket;

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use comfy_table::{Table, presets};
use keelson_ebpf::Direction;

use self::hosts::{Hosts, Peer};
use self::load::{Target, Work};
use crate::command::{Common, print_goals, rounded};
use crate::report::{Goal, Report, Sample, Wanted};

/// Rules toward the server's guest.
const RULES: [u32; 4] = [0, 10, 1_000, 100_000];
/// Runs of a program on one frame.
const PROGRAM_RUNS: u32 = 500_000;
/// The programs, as kinds of work in the report.
const PROGRAMS: [(&str, Direction); 2] = [
    ("program from guest", Direction::FromGuest),
    ("program to guest", Direction::ToGuest),
];
/// Those that a packet to a service passes on its way from a guest, another kind of work.
const SERVICE_PROGRAMS: &str = "programs to a service";
/// With so many rules what is the service's own is measured, which has no rules.
const SERVICE_RULES: u32 = 1_000;
/// Nanoseconds that a program may take for a packet of an established flow.
const PROGRAM_GOAL_NS: f64 = 150.0;

/// Compares the eBPF network with a Linux bridge with nftables and with a bridge without any policy,
/// between two network namespaces that stand for guests, on this machine's kernel.
#[derive(Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    common: Common,
}

/// Runs the comparison and reports it.
pub fn run(options: &Options) -> anyhow::Result<()> {
    anyhow::ensure!(
        rustix::process::geteuid().is_root(),
        "perf net makes network namespaces and loads eBPF programs: run it as root"
    );
    let common = &options.common;
    let (rounds, duration) = (common.rounds(), common.duration(0.2)?);
    let mut report = Report {
        area: "net",
        time: jiff::Timestamp::now().to_string(),
        machine: crate::machine::describe(),
        versions: versions(),
        method: method(rounds, duration),
        samples: Vec::new(),
        goals: Vec::new(),
    };
    for round in 0..rounds {
        for rules in RULES {
            let mut peers = Peer::ALL;
            if round % 2 == 1 {
                peers.reverse();
            }
            for peer in peers {
                // Nothing that could have rules.
                if peer == Peer::Bridge && rules != 0 {
                    continue;
                }
                let plan = Plan::new(common, peer, rules);
                measure(&mut report, &plan, round, duration)
                    .with_context(|| format!("{} with {rules} rules", peer.name()))?;
            }
        }
    }
    add_goals(&mut report);
    print(&report);
    let plots = [
        ("packets_per_s", "Packets per second"),
        ("cpu_ns_per_packet", "CPU per packet, ns"),
        ("gigabits_per_s", "TCP throughput, Gbit/s"),
        ("transactions_per_s", "Request and response, per second"),
        ("connections_per_s", "Connections per second"),
        ("program_ns", "Program, ns per packet"),
    ];
    common.write(&report, &Peer::ALL.map(Peer::name), &plots)
}

/// What is measured of one peer with some number of rules.
struct Plan {
    peer: Peer,
    rules: u32,
    works: Vec<Work>,
    programs: Vec<(&'static str, Direction)>,
    service_programs: bool,
}

impl Plan {
    fn new(common: &Common, peer: Peer, rules: u32) -> Self {
        let wants = |work| common.wants(&label(work, rules));
        let mut works = Work::ALL.to_vec();
        let has_service = peer == Peer::Keelson && rules == SERVICE_RULES;
        works.retain(|work| wants(work.name()) && (has_service || *work != Work::ServicePackets));
        let mut programs = PROGRAMS.to_vec();
        programs.retain(|(name, _)| peer == Peer::Keelson && wants(name));
        Self {
            peer,
            rules,
            works,
            programs,
            service_programs: has_service && wants(SERVICE_PROGRAMS),
        }
    }
}

fn method(rounds: u32, duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    format!(
        "Rounds: {rounds}, {seconds} s of each work for each peer, alternating who is first. Two namespaces stand for \
         guests, a third for the host, joined by veth. All peers have the same bridge. With policy: stateful, the \
         rules are networks and ports that may reach the server, its client's among them, and nobody may send in \
         another's name. Packets: 60-byte frames (64 with their checksum) of 64 established flows, sent by one \
         thread through a packet socket, counted where they reach the server's device; its CPU time, and that of \
         the kernel's softirq threads, is the CPU per packet, so it has the sender's own cost in it, the same for \
         all. Programs: {PROGRAM_RUNS} runs of BPF_PROG_TEST_RUN on a frame of an established flow, and the \
         kernel's statistics of the programs' runs under the load of packets, which add some 20 ns to each; to a \
         service, those of the three programs that a packet passes are counted as one. \
         nftables: {}. Open vSwitch: {}.",
        nftables::METHOD,
        if std::path::Path::new("/sys/module/openvswitch").exists() {
            "its module is here, but it is not measured"
        } else {
            "its kernel module is not on this machine"
        }
    )
}

fn versions() -> BTreeMap<String, String> {
    let nft = Command::new("nft").arg("--version").output();
    let nft = nft.map_or_else(
        |_| "missing".to_owned(),
        |output| String::from_utf8_lossy(&output.stdout).trim().to_owned(),
    );
    BTreeMap::from([
        ("keelson".into(), env!("CARGO_PKG_VERSION").into()),
        ("nftables".into(), nft),
    ])
}

fn measure(report: &mut Report, plan: &Plan, round: u32, duration: Duration) -> anyhow::Result<()> {
    if plan.works.is_empty() && plan.programs.is_empty() && !plan.service_programs {
        return Ok(());
    }
    let (peer, rules) = (plan.peer, plan.rules);
    let mut hosts = Hosts::new(peer, rules)?;
    let mut sample = |name, figures| {
        report.samples.push(Sample {
            peer: peer.name(),
            work: label(name, rules),
            round,
            figures,
        });
    };
    for work in &plan.works {
        sample(work.name(), work.run(&mut hosts, duration)?);
    }
    for (name, direction) in &plan.programs {
        let figures = hosts.program_cost(*direction, PROGRAM_RUNS, duration)?;
        sample(name, figures);
    }
    if plan.service_programs {
        let (direction, target) = (Direction::FromGuest, Target::Service);
        let counted_ns = hosts.counted_cost(direction, target, duration)?;
        sample(
            SERVICE_PROGRAMS,
            BTreeMap::from([("counted_ns", counted_ns)]),
        );
    }
    Ok(())
}

fn label(work: &str, rules: u32) -> String {
    format!("{work}, {rules} rules")
}

fn add_goals(report: &mut Report) {
    let ours = Peer::Keelson.name();
    for rules in [1_000, 100_000] {
        report.goal(
            format!("packets per second of bridge and nftables, {rules} rules"),
            (ours, Peer::Nftables.name()),
            &label(Work::Packets.name(), rules),
            "packets_per_s",
            Wanted::AtLeast(2.0),
        );
    }
    add_flatness(report);
    for (name, _) in PROGRAMS {
        for figure in ["program_ns", "counted_ns"] {
            let of = |report: &Report| report.figure(ours, &label(name, 1_000), figure);
            if let Some(measured) = of(report) {
                report.goals.push(Goal {
                    name: format!("{name}, established flow, {figure}"),
                    goal: format!("under {PROGRAM_GOAL_NS:.0}"),
                    measured,
                    unit: "ns",
                    spread: (measured, measured),
                    met: measured < PROGRAM_GOAL_NS,
                });
            }
        }
    }
    add_throughput(report);
}

/// From 10 to 100,000 rules: the ratio of the slowest to the fastest in packets per second.
fn add_flatness(report: &mut Report) {
    let ours = Peer::Keelson.name();
    for (figure, name) in [
        ("packets_per_s", "packets per second"),
        ("cpu_ns_per_packet", "CPU per packet"),
    ] {
        let values: Vec<f64> = RULES[1..]
            .iter()
            .filter_map(|rules| report.figure(ours, &label(Work::Packets.name(), *rules), figure))
            .collect();
        let least = values.iter().copied().fold(f64::INFINITY, f64::min);
        let most = values.iter().copied().fold(0.0, f64::max);
        if values.len() == RULES.len() - 1 && most > 0.0 {
            report.goals.push(Goal {
                name: format!("{name}, smallest to largest from 10 to 100,000 rules"),
                goal: "at least 0.95".into(),
                measured: least / most,
                unit: "of the largest",
                spread: (least / most, least / most),
                met: least / most >= 0.95,
            });
        }
    }
}

/// Our throughput with 1,000 rules beside that of the bridge without policy, which has no rules.
fn add_throughput(report: &mut Report) {
    let of = |peer: Peer, rules| {
        report.figure(
            peer.name(),
            &label(Work::Throughput.name(), rules),
            "gigabits_per_s",
        )
    };
    if let (Some(ours), Some(limit)) = (of(Peer::Keelson, 1_000), of(Peer::Bridge, 0)) {
        report.goals.push(Goal {
            name: "TCP throughput of no policy, 1,000 rules".into(),
            goal: "at least 0.90".into(),
            measured: ours / limit,
            unit: "times the peer's",
            spread: (ours / limit, ours / limit),
            met: ours / limit >= 0.9,
        });
    }
}

fn print(report: &Report) {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header([
        "",
        "",
        "per s",
        "Gbit/s",
        "CPU ns",
        "p50 µs",
        "p99 µs",
        "ns",
        "counted ns",
    ]);
    for work in report.works() {
        for peer in Peer::ALL {
            let figure = |names: &[&str]| {
                let value = names
                    .iter()
                    .find_map(|name| report.figure(peer.name(), work, name));
                rounded(value)
            };
            let rates = ["packets_per_s", "transactions_per_s", "connections_per_s"];
            let row = [
                figure(&rates),
                figure(&["gigabits_per_s"]),
                figure(&["cpu_ns_per_packet"]),
                figure(&["p50_us"]),
                figure(&["p99_us"]),
                figure(&["program_ns"]),
                figure(&["counted_ns"]),
            ];
            if row.iter().all(String::is_empty) {
                continue;
            }
            table.add_row(
                [work.to_owned(), peer.name().to_owned()]
                    .into_iter()
                    .chain(row),
            );
        }
    }
    println!("{table}\n");
    print_goals(&report.goals, &report.versions);
}
