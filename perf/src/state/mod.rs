//! `perf state`: keelson-state beside etcd.

mod load;
pub mod server;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;

use self::load::Work;
use self::server::{Cluster, Peer, Programs};
use crate::command::{Common, own_program, print_figures, print_goals, progress, version_of};
use crate::machine;
use crate::report::{Report, Sample, Wanted};

/// Compares keelson-state with etcd: the same client code, the same disk, the same durability,
/// alternating.
#[derive(Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// The etcd to compare with [default: that of `setup/etcd`].
    #[arg(long)]
    etcd: Option<PathBuf>,
    /// The keelson-state to measure [default: beside this program].
    #[arg(long)]
    keelson_state: Option<PathBuf>,
    /// Folder on the disk to measure on.
    #[arg(long, default_value = ".")]
    folder: PathBuf,
}

/// Kinds of work, with the numbers of clients and of members.
type Plan = Vec<(Work, usize, usize)>;

pub fn run(options: &Options) -> anyhow::Result<()> {
    let programs = programs(options.keelson_state.as_ref(), options.etcd.as_ref())?;
    let common = &options.common;
    let mut plan = if common.quick { quick() } else { full() };
    plan.retain(|(work, clients, members)| common.wants(&label(*work, *clients, *members)));
    let rounds = common.rounds();
    let duration = common.duration(1.0)?;
    let seconds = duration.as_secs_f64();
    let mut report = Report {
        area: "state",
        time: jiff::Timestamp::now().to_string(),
        machine: machine::describe(),
        versions: versions(&programs)?,
        method: format!(
            "Rounds: {rounds}, {seconds} s of each work for each peer, alternating who is first. 256-byte values, \
             10,000 keys, up to 8 connections to the leader. Clients and servers share the machine. Both sync \
             every write to disk before they answer."
        ),
        samples: Vec::new(),
        goals: Vec::new(),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(measure(
        &mut report,
        &plan,
        &programs,
        rounds,
        duration,
        &options.folder,
    ))?;
    add_goals(&mut report, &plan);
    let peers = Peer::ALL.map(Peer::name);
    let columns = [
        ("operations_per_s", "op/s"),
        ("p50_us", "p50 µs"),
        ("p99_us", "p99 µs"),
        ("p99.9_us", "p99.9 µs"),
        ("cpu_us_per_operation", "CPU µs/op"),
        ("written_bytes_per_value_byte", "written/put"),
        ("peak_memory_mib", "memory MiB"),
    ];
    print_figures(&report, &peers, &columns);
    print_goals(&report.goals, &report.versions);
    let plots = [
        ("operations_per_s", "Operations per second"),
        ("p99_us", "99th percentile, µs"),
        ("cpu_us_per_operation", "Server's CPU per operation, µs"),
        ("peak_memory_mib", "Peak memory so far, MiB"),
    ];
    common.write(&report, &peers, &plots)
}

fn quick() -> Plan {
    vec![
        (Work::Put, 1, 1),
        (Work::Put, 64, 1),
        (Work::Put, 1000, 1),
        (Work::Range, 64, 1),
        (Work::SerializableRange, 64, 1),
        (Work::Kubernetes, 64, 1),
        (Work::WatchFanOut(100), 8, 1),
        (Work::Put, 64, 3),
        (Work::Range, 64, 3),
    ]
}

fn full() -> Plan {
    let mut plan = Vec::new();
    for members in [1, 3] {
        for clients in [1, 16, 64, 256, 1000] {
            plan.push((Work::Put, clients, members));
        }
        for work in [
            Work::TxnPut,
            Work::TxnMixed,
            Work::Kubernetes,
            Work::KeepAlive,
        ] {
            plan.push((work, 64, members));
        }
        for clients in [1, 64, 1000] {
            plan.push((Work::Range, clients, members));
            plan.push((Work::SerializableRange, clients, members));
        }
        plan.push((Work::WatchLatency, 1, members));
        for watches in [10, 100, 1000] {
            plan.push((Work::WatchFanOut(watches), 8, members));
        }
    }
    plan
}

fn label(work: Work, clients: usize, members: usize) -> String {
    let plural =
        |count: usize, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
    format!(
        "{}, {}, {}",
        work.name(),
        plural(clients, "client"),
        plural(members, "member")
    )
}

async fn measure(
    report: &mut Report,
    plan: &Plan,
    programs: &Programs,
    rounds: u32,
    duration: Duration,
    folder: &Path,
) -> anyhow::Result<()> {
    let steps = plan.len() as u64 * u64::from(rounds) * 2;
    let progress = progress(steps)?;
    for round in 0..rounds {
        for members in [1, 3] {
            let works: Vec<_> = plan.iter().filter(|(_, _, of)| *of == members).collect();
            if works.is_empty() {
                continue;
            }
            // New clusters for each round: none gains from what another left behind.
            let mut clusters = Vec::new();
            for peer in Peer::ALL {
                clusters.push((peer, Cluster::start(peer, programs, members, folder).await?));
            }
            for (at, (work, clients, _)) in works.into_iter().enumerate() {
                if (at + round as usize) % 2 == 1 {
                    clusters.reverse();
                }
                for (peer, cluster) in &clusters {
                    let label = label(*work, *clients, members);
                    progress.set_message(format!("{} {label}", peer.name()));
                    let figures = load::measure(cluster, *work, *clients, duration)
                        .await
                        .with_context(|| format!("{}: {label}", peer.name()))?;
                    report.samples.push(Sample {
                        peer: peer.name(),
                        work: label,
                        round,
                        figures,
                    });
                    progress.inc(1);
                }
            }
        }
    }
    progress.finish_and_clear();
    Ok(())
}

fn add_goals(report: &mut Report, plan: &Plan) {
    let peers = (Peer::Keelson.name(), Peer::Etcd.name());
    let mut last = BTreeMap::new();
    for (work, clients, members) in plan {
        let label = label(*work, *clients, *members);
        last.insert(*members, label.clone());
        let (throughput, p50, p99) = ("operations_per_s", "p50_us", "p99_us");
        match work {
            Work::Put if *clients >= 64 => {
                report.goal(
                    format!("throughput: {label}"),
                    peers,
                    &label,
                    throughput,
                    Wanted::AtLeast(3.0),
                );
                report.goal(
                    format!("p99: {label}"),
                    peers,
                    &label,
                    p99,
                    Wanted::AtMost(1.0 / 3.0),
                );
            }
            Work::Put if *clients == 1 => {
                report.goal(
                    format!("median latency: {label}"),
                    peers,
                    &label,
                    p50,
                    Wanted::AtMost(0.8),
                );
            }
            Work::Range => {
                report.goal(
                    format!("throughput: {label}"),
                    peers,
                    &label,
                    throughput,
                    Wanted::AtLeast(2.0),
                );
            }
            Work::WatchFanOut(_) => {
                report.goal(
                    format!("deliveries: {label}"),
                    peers,
                    &label,
                    throughput,
                    Wanted::AtLeast(3.0),
                );
            }
            _ => {}
        }
    }
    for (members, label) in last {
        let plural = if members == 1 { "" } else { "s" };
        let name = format!("peak memory, {members} member{plural}, after all of this");
        report.goal(
            name,
            peers,
            &label,
            "peak_memory_mib",
            Wanted::AtMost(1.0 / 3.0),
        );
    }
}

/// The servers to measure: those that were given, else ours beside this program and the etcd of
/// `setup/etcd`.
pub fn programs(
    keelson_state: Option<&PathBuf>,
    etcd: Option<&PathBuf>,
) -> anyhow::Result<Programs> {
    let cache = std::env::var_os("KEELSON_CACHE").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/keelson"),
        PathBuf::from,
    );
    let programs = Programs {
        keelson: own_program(keelson_state, "keelson-state")?,
        etcd: etcd.cloned().unwrap_or_else(|| cache.join("etcd/etcd")),
    };
    anyhow::ensure!(
        programs.etcd.exists(),
        "{} is missing: run setup/etcd",
        programs.etcd.display()
    );
    Ok(programs)
}

fn versions(programs: &Programs) -> anyhow::Result<BTreeMap<String, String>> {
    Ok(BTreeMap::from([
        ("keelson-state".to_owned(), version_of(&programs.keelson)?),
        ("etcd".to_owned(), version_of(&programs.etcd)?),
    ]))
}
