//! `perf net`: the eBPF network beside a Linux bridge with nftables, beside Open vSwitch, and beside no policy
//! at all.

mod frames;
mod goals;
mod hosts;
mod injector;
mod keelson;
mod lab;
mod load;
mod namespaces;
mod nftables;
mod openvswitch;
mod packet_socket;
mod xdp;

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use comfy_table::{Table, presets};
use keelson_ebpf::Direction;

use self::hosts::{Hosts, Peer};
use self::keelson::Keelson;
use self::load::{Target, Work};
use crate::command::{Common, print_goals, rounded};
use crate::report::{Report, Sample, lines};

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
/// What is measured.
const FIGURES: [&str; 10] = [
    "packets_per_s",
    "cpu_ns_per_packet",
    "gigabits_per_s",
    "transactions_per_s",
    "connections_per_s",
    "p50_us",
    "p99_us",
    "program_ns",
    "counted_ns",
    "counting_ns",
];

/// Compares the eBPF network with a Linux bridge with nftables, with Open vSwitch where the kernel has its module
/// and Debian's package openvswitch-switch is installed, and with a bridge without any policy, between two
/// network namespaces that stand for guests: on this machine's kernel, and then in the lab.
#[derive(Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// Leave out the lab, as --quick does.
    #[arg(long)]
    no_lab: bool,
    /// Measure in the lab only, also with --quick.
    #[arg(long, conflicts_with = "no_lab")]
    only_lab: bool,
    /// Print the samples of this machine's kernel as lines of JSON, and nothing else: what runs in the lab.
    #[arg(long, hide = true)]
    only_samples: bool,
}

/// Runs the comparison and reports it.
pub fn run(options: &Options) -> anyhow::Result<()> {
    anyhow::ensure!(
        rustix::process::geteuid().is_root(),
        "perf net makes network namespaces and loads eBPF programs: run it as root"
    );
    let common = &options.common;
    let (rounds, duration) = (common.rounds(), common.duration_of(0.2, 1.0)?);
    if options.only_samples {
        return lines::print(&measure_here(common, rounds, duration)?);
    }
    let in_lab = options.only_lab || !(options.no_lab || common.quick);
    let mut report = Report {
        area: "net",
        time: jiff::Timestamp::now().to_string(),
        machine: crate::machine::describe(),
        versions: versions(),
        method: method(rounds, duration, in_lab),
        samples: Vec::new(),
        goals: Vec::new(),
    };
    if !options.only_lab {
        report.samples = measure_here(common, rounds, duration)?;
    }
    if in_lab {
        // What was measured here is told, whatever becomes of the lab.
        match lab::measure(common.only.as_deref()) {
            Ok(samples) => report.samples.extend(samples),
            Err(error) => {
                eprintln!("perf: nothing is measured in the lab: {error:#}");
                let note = format!(" Nothing was measured in the lab: {error:#}.");
                report.method.push_str(&note);
            }
        }
    }
    goals::add_goals(&mut report);
    print(&report);
    let plots = [
        ("packets_per_s", "Packets per second"),
        ("cpu_ns_per_packet", "CPU per packet, ns"),
        ("gigabits_per_s", "TCP throughput, Gbit/s"),
        ("transactions_per_s", "Request and response, per second"),
        ("p99_us", "Request and response, p99, µs"),
        ("connections_per_s", "Connections per second"),
        ("program_ns", "Program, ns per packet"),
    ];
    common.write(&report, &Peer::ALL.map(Peer::name), &plots)
}

/// Measures all peers on this machine's kernel.
fn measure_here(common: &Common, rounds: u32, duration: Duration) -> anyhow::Result<Vec<Sample>> {
    let has_openvswitch = openvswitch::hindrance().is_none();
    let mut keelson = None;
    let mut samples = Vec::new();
    for round in 0..rounds {
        for rules in RULES {
            let mut peers = Peer::ALL;
            if round % 2 == 1 {
                peers.reverse();
            }
            for peer in peers {
                // Nothing that could have rules.
                let is_idle = peer == Peer::Bridge && rules != 0;
                if is_idle || peer == Peer::OpenVswitch && !has_openvswitch {
                    continue;
                }
                let plan = Plan::new(common, peer, rules);
                let measured = measure(&plan, round, duration, &mut keelson);
                samples.extend(
                    measured.with_context(|| format!("{} with {rules} rules", peer.name()))?,
                );
            }
        }
    }
    Ok(samples)
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

fn method(rounds: u32, duration: Duration, in_lab: bool) -> String {
    let openvswitch_here = openvswitch::hindrance().unwrap_or("measured here, too");
    let lab = if in_lab {
        format!(
            "In the lab, {} rounds of {} s: a stock Debian kernel that QEMU emulates on one processor, so that time \
             is not a machine's and only ratios of peers mean something.",
            lab::ROUNDS,
            lab::DURATION.as_secs_f64()
        )
    } else {
        "Not measured in the lab.".to_owned()
    };
    format!(
        "Rounds: {rounds}, {seconds} s of each work for each peer, alternating who is first. Two namespaces stand for \
         guests, a third for the host, joined by veth. All peers have a bridge, Open vSwitch its own. With policy: \
         stateful, the rules are networks and ports that may reach the server, its client's among them, and nobody \
         may send in another's name. Packets: 60-byte frames (64 with their checksum) of 64 established flows, \
         given to the host's side of the client's device from inside the kernel, as a driver would or pktgen \
         (BPF_PROG_RUN of an XDP program with live frames), on one processor, and counted where they reach the \
         server's device, where a rule drops them; the CPU time of that, and of the kernel's softirq threads, is the \
         CPU per packet, so it has what making and dropping a packet costs in it, the same for all. From a socket: the \
         same frames, sent by one thread of the client through a packet socket, most of whose time is the sender's own. \
         Programs: {PROGRAM_RUNS} runs of BPF_PROG_TEST_RUN on a frame of an established flow, and the \
         kernel's statistics of the programs' runs under the load of packets, which add to each what they say of an \
         empty program (counting_ns); to a \
         service, those of the three programs that a packet passes are counted as one. \
         nftables: {nftables}. Open vSwitch: {openvswitch}; on this machine's kernel: {openvswitch_here}. {lab}",
        seconds = duration.as_secs_f64(),
        nftables = nftables::METHOD,
        openvswitch = openvswitch::METHOD,
    )
}

fn versions() -> BTreeMap<String, String> {
    let nft = Command::new("nft").arg("--version").output();
    let nft = nft.map_or_else(
        |_| "missing".to_owned(),
        |output| String::from_utf8_lossy(&output.stdout).trim().to_owned(),
    );
    let openvswitch = openvswitch::version().unwrap_or_else(|| "missing".to_owned());
    BTreeMap::from([
        ("keelson".into(), env!("CARGO_PKG_VERSION").into()),
        ("nftables".into(), nft),
        ("Open vSwitch".into(), openvswitch),
    ])
}

fn measure(
    plan: &Plan,
    round: u32,
    duration: Duration,
    keelson: &mut Option<Keelson>,
) -> anyhow::Result<Vec<Sample>> {
    let mut samples = Vec::new();
    if plan.works.is_empty() && plan.programs.is_empty() && !plan.service_programs {
        return Ok(samples);
    }
    let (peer, rules) = (plan.peer, plan.rules);
    let mut hosts = Hosts::new(peer, rules, keelson)?;
    let mut sample = |name, figures| {
        samples.push(Sample {
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
    Ok(samples)
}

fn label(work: &str, rules: u32) -> String {
    format!("{work}, {rules} rules")
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
