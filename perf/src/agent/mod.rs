//! `perf agent`: guests applied and idle on one host, a host that dies, and fleets of many.

mod applied;
mod client;
mod counting_store;
mod failover;
mod host;
mod memory;
mod simulated;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use comfy_table::{Table, presets};
use keelson_vmm_tests::Namespaces;
use tracing_subscriber::EnvFilter;

use self::memory::Memory;
use self::simulated::Size;
use crate::command::{Common, own_program, print_goals, progress, rounded, version_of};
use crate::report::{Goal, Report, Sample};
use crate::state::server::{Cluster, Peer, Programs};

/// A real agent with real guests.
const AGENT: &str = "keelsond";
/// A guest without an agent.
const ALONE: &str = "keelson-vmm alone";
const PEERS: [&str; 4] = [AGENT, ALONE, "keelson-state", "etcd"];

/// Takes a measurement: who, what, which round, figures.
type Add<'a> = dyn FnMut(&'static str, &str, u32, &BTreeMap<&'static str, f64>) + Send + 'a;

/// Measures keelsond: with payload guests on this machine's KVM, and a hundred agents with simulated
/// guests on each kind of state store.
#[derive(Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// keelsond [default: the one beside this program].
    #[arg(long)]
    keelsond: Option<PathBuf>,
    /// keelson-state [default: the one beside this program].
    #[arg(long)]
    keelson_state: Option<PathBuf>,
    /// etcd [default: that of `setup/etcd`].
    #[arg(long)]
    etcd: Option<PathBuf>,
    /// Where agents and members keep their data.
    #[arg(long, default_value = "/var/tmp")]
    directory: PathBuf,
}

pub fn run(options: &Options) -> anyhow::Result<()> {
    let common = &options.common;
    let keelsond = own_program(options.keelsond.as_ref(), "keelsond")?;
    let programs = crate::state::programs(options.keelson_state.as_ref(), options.etcd.as_ref())?;
    // What the agents in this process have to say, with RUST_LOG=info.
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let mut report = Report {
        area: "agent",
        time: jiff::Timestamp::now().to_string(),
        machine: crate::machine::describe(),
        versions: BTreeMap::from([
            ("keelsond".to_owned(), version_of(&keelsond)?),
            ("keelson-state".to_owned(), version_of(&programs.keelson)?),
            ("etcd".to_owned(), version_of(&programs.etcd)?),
        ]),
        method: METHOD.to_owned(),
        samples: Vec::new(),
        goals: Vec::new(),
    };
    // Bridges, devices and eBPF maps are in these; so are the threads that are started from here on.
    let _namespaces = Namespaces::enter_for_agent();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(measure(options, &keelsond, &programs, &mut report))?;
    add_goals(&mut report);
    print_medians(&report);
    print_goals(&report.goals, &report.versions);
    let plots = [
        ("ms", "Milliseconds"),
        (
            "elsewhere_s",
            "Seconds until guests of a dead host run elsewhere",
        ),
        ("all_run_s", "Seconds until all guests of a fleet run"),
        (
            "requests_per_guest",
            "Requests to the state store for each guest",
        ),
        (
            "requests_per_guest_change",
            "Requests to the state store after one change",
        ),
        (
            "cpu_ms_per_guest_change",
            "CPU of all agents together after one change, ms",
        ),
    ];
    common.write(&report, &PEERS, &plots)
}

const METHOD: &str = "Applied: an agent of its own for each round, on an embedded state store, is given 1, 10 and 100 \
    payload guests (one processor, 32 MiB) in one request; the time ends when the last object says that it runs. A \
    guest's own start is keelson-vmm without an agent, until its processor runs, and without a jail where none is \
    named; cpu_ms_until_rest is what it and its guest take until that halts. A machine that is itself virtual may \
    have to get free memory from its host, which is slow: memory at hand was touched just before, the other one was \
    free for 5 s. Idle: the agent's resident memory \
    and processor time beside 100 guests that do nothing. A host that dies: three agents on one member of \
    keelson-state; agent, guests and guard of one of them are killed at once. Fleets: real agents in this process, \
    each with connections of its own to one member, over simulated guests that take 20 ms to start; objects are \
    applied through one agent. A change is one of 20, made in the store by hand; it is over when nothing has been \
    asked of the store for 500 ms. CPU is that of all agents together. An embedded store has no fleet.";

async fn measure(
    options: &Options,
    keelsond: &Path,
    programs: &Programs,
    report: &mut Report,
) -> anyhow::Result<()> {
    let common = &options.common;
    let rounds = if common.quick { 1 } else { common.rounds() };
    let idle = common.duration_of(3.0, 20.0)?;
    let sizes: &[usize] = if common.quick {
        &[200, 1000]
    } else {
        &[1000, 10_000]
    };
    let hosts = if common.quick { 20 } else { 100 };
    let steps = u64::from(rounds) * 2 + 2 * sizes.len() as u64;
    let bar = progress(steps)?;
    let samples = &mut report.samples;
    let mut add =
        |peer: &'static str, work: &str, round: u32, figures: &BTreeMap<&'static str, f64>| {
            samples.push(Sample {
                peer,
                work: work.to_owned(),
                round,
                figures: figures.clone(),
            });
        };
    let root = options.directory.as_path();
    for round in 1..=rounds {
        if common.wants("apply") {
            applied::measure(keelsond, root, idle, round, &mut add).await?;
        }
        bar.inc(1);
        if common.wants(failover::WORK) {
            let lease_seconds = if common.quick { 3 } else { 10 };
            let cluster = Cluster::start(Peer::Keelson, programs, 1, root).await?;
            let state = format!("cluster:{}", cluster.urls().join(","));
            failover::measure(keelsond, root, &state, lease_seconds, round, &mut add).await?;
        }
        bar.inc(1);
    }
    let network = simulated::network().await?;
    for (peer, scheme) in [(Peer::Keelson, "cluster"), (Peer::Etcd, "etcd")] {
        for &objects in sizes {
            let size = Size { hosts, objects };
            if common.wants(&size.work()) {
                let cluster = Cluster::start(peer, programs, 1, root).await?;
                let url = format!("{scheme}:{}?timeout_ms=30000", cluster.urls().join(","));
                let network = network.clone();
                let fleet = move || simulated::measure(&url, &network, size, idle);
                let figures = tokio::task::spawn_blocking(fleet).await??;
                add(peer.name(), &size.work(), 1, &figures);
            }
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    Ok(())
}

/// Prints every figure: those of different work have little in common.
fn print_medians(report: &Report) {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["work", "peer", "figure", "median"]);
    for work in report.works() {
        for peer in PEERS {
            let samples = report.samples.iter();
            let figures: BTreeSet<&str> = samples
                .filter(|sample| sample.work == work && sample.peer == peer)
                .flat_map(|sample| sample.figures.keys().copied())
                .collect();
            for figure in figures {
                let median = rounded(report.figure(peer, work, figure));
                table.add_row([work, peer, figure, &median]);
            }
        }
    }
    println!("{table}");
}

fn add_goals(report: &mut Report) {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    for memory in Memory::ALL {
        let own = report.figure(ALONE, &applied::own_start(memory, false), "ms");
        let work = applied::work(100, memory);
        if let (Some(own), Some((median, least, most))) = (own, report.spread(AGENT, &work, "ms")) {
            #[allow(clippy::cast_precision_loss)] // few
            let ideal = own * 100.0 / cores as f64;
            report.goals.push(Goal {
                name: format!(
                    "100 guests applied, beside the sum of their own start times divided by the \
                     cores{}",
                    memory.suffix()
                ),
                goal: "at most 1.5".into(),
                measured: median / ideal,
                unit: "times",
                spread: (least / ideal, most / ideal),
                met: median <= 1.5 * ideal,
            });
        }
    }
    for (name, figure, limit, unit) in [
        (
            "agent's memory beside 100 idle guests",
            "memory_mib",
            50.0,
            "MiB",
        ),
        (
            "agent's processor beside 100 idle guests",
            "cpu_percent",
            1.0,
            "%",
        ),
    ] {
        let what = (AGENT, "100 idle guests", figure);
        report.goal_at_most(name.into(), what, limit, unit);
    }
    report.goal_at_most(
        "guests of a dead host run elsewhere, beyond its lease".into(),
        (AGENT, failover::WORK, "beyond_lease_s"),
        10.0,
        "s",
    );
    for peer in [Peer::Keelson.name(), Peer::Etcd.name()] {
        add_fleet_goals(report, peer);
    }
}

/// No polling, and work for a change that does not grow with the number of objects.
fn add_fleet_goals(report: &mut Report, peer: &'static str) {
    let works = report.works();
    let fleets: Vec<String> = works
        .iter()
        .filter(|work| work.contains("objects, "))
        .filter(|work| report.figure(peer, work, "all_run_s").is_some())
        .map(|work| (*work).to_owned())
        .collect();
    let (Some(small), Some(large)) = (fleets.first(), fleets.last()) else {
        return;
    };
    let name = format!("requests of a fleet at rest, {large}, {peer}");
    report.goal_at_most(name, (peer, large, "idle_requests_per_s"), 0.0, "a second");
    if small == large {
        return;
    }
    for (what, figure, limit) in [
        (
            "requests after a guest's change",
            "requests_per_guest_change",
            1.1,
        ),
        ("CPU after a guest's change", "cpu_ms_per_guest_change", 1.5),
        (
            "requests after a disk's change",
            "requests_per_disk_change",
            1.1,
        ),
        ("CPU after a disk's change", "cpu_ms_per_disk_change", 1.5),
    ] {
        let of = |work: &str| report.figure(peer, work, figure);
        let (Some(before), Some(after)) = (of(small), of(large)) else {
            continue;
        };
        // Nothing at all is as constant as it gets.
        let ratio = if after > 0.0 { after / before } else { 0.0 };
        report.goals.push(Goal {
            name: format!("{what}, {large} beside {small}, {peer}"),
            goal: format!("at most {limit}"),
            measured: ratio,
            unit: "times",
            spread: (ratio, ratio),
            met: ratio <= limit,
        });
    }
}
