//! `perf blk`: keelson-blk beside qemu-storage-daemon, and io_uring straight on the file as the
//! limit.

mod backend;
mod client;
mod figures;
mod handover;
mod placement;
mod shared_memory;
mod straight;
mod work;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use self::backend::{Backend, Peer, Scene};
use self::client::Client;
use self::figures::Times;
use self::handover::Handover;
use self::placement::Placement;
use self::straight::Straight;
use self::work::{Backing, Operations, Pattern, Work};
use crate::command::{Common, own_program, print_figures, print_goals, progress, version_of};
use crate::machine;
use crate::report::{Report, Sample, Wanted};

/// Of each measurement of a full run: its 625 fit into 20 minutes.
const FULL_SECONDS: f64 = 1.2;
/// Disks that one process serves while nobody asks anything of them.
const IDLE_DISKS: usize = 100;
/// As a kind of work in the report.
const IDLE: &str = "100 idle disks in one process";
/// How long to watch them.
const IDLE_WATCH: Duration = Duration::from_secs(3);
/// Between the connections and the watch.
const SETTLE: Duration = Duration::from_millis(500);

/// Compares keelson-blk with qemu-storage-daemon: the same client, which shares no code with
/// either, on the same file around the page cache, with one thread for the disk each; and with
/// io_uring straight on the file.
#[derive(Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// The keelson-blk to measure [default: beside this program].
    #[arg(long)]
    keelson_blk: Option<PathBuf>,
    /// The qemu-storage-daemon to compare with.
    #[arg(long, default_value = "qemu-storage-daemon")]
    qemu_storage_daemon: PathBuf,
    /// Folder on the disk to measure on.
    #[arg(long, default_value = ".")]
    folder: PathBuf,
    /// Let the scheduler place the client and the backends.
    #[arg(long)]
    unpinned: bool,
}

/// Runs the comparison and reports it.
pub fn run(options: &Options) -> anyhow::Result<()> {
    let common = &options.common;
    let mut plan = if common.quick {
        work::quick()
    } else {
        work::full()
    };
    plan.retain(|work| common.wants(&work.label()));
    let (rounds, duration) = (common.rounds(), common.duration_of(0.6, FULL_SECONDS)?);
    let folder = tempfile::TempDir::with_prefix_in("perf-blk-", &options.folder)?;
    let placement = Placement::new(options.unpinned)?;
    placement.place_client()?;
    let scene = prepare(options, folder.path(), placement)?;
    let mut report = Report {
        area: "blk",
        time: jiff::Timestamp::now().to_string(),
        machine: machine::describe(),
        versions: versions(&scene)?,
        method: method(rounds, duration, &scene.placement),
        samples: Vec::new(),
        goals: Vec::new(),
    };
    let outcome = measure(&mut report, &plan, &scene, rounds, duration);
    if let Some(device) = &scene.loop_device {
        Command::new("losetup")
            .arg("--detach")
            .arg(device)
            .status()?;
    }
    outcome?;
    if common.wants(IDLE) {
        measure_idle(&mut report, &scene)?;
    }
    add_goals(&mut report, &plan);
    let peers = Peer::ALL.map(Peer::name);
    let columns = [
        ("iops", "IOPS"),
        ("p50_us", "p50 µs"),
        ("p99_us", "p99 µs"),
        ("p99.9_us", "p99.9 µs"),
        ("cpu_us_per_io", "CPU µs/IO"),
        ("memory_mib", "MiB"),
        ("start_ms", "start ms"),
    ];
    print_figures(&report, &peers, &columns);
    print_goals(&report.goals, &report.versions);
    let plots = [
        ("iops", "Operations per second"),
        ("p50_us", "Median, µs"),
        ("p99_us", "99th percentile, µs"),
        ("p99.9_us", "99.9th percentile, µs"),
        ("cpu_us_per_io", "Backend's CPU per operation, µs"),
        ("memory_mib", "Backend's resident memory, MiB"),
        (
            "start_ms",
            "From the process's start to its first connection, ms",
        ),
    ];
    common.write(&report, &peers, &plots)
}

fn method(rounds: u32, duration: Duration, placement: &Placement) -> String {
    format!(
        "Rounds: {rounds}, {} s of each work for each peer, alternating who is first, after a tenth of that to warm \
         up. Client: the crate virtio-driver in one thread that sleeps in poll. Depth: operations under way over all \
         queues. Both backends: one thread for the disk (workers, iothread), O_DIRECT, io_uring, a new process for \
         each measurement; keelson-blk with --pin-memory. io_uring: one thread straight on the file with a registered \
         file and buffers, the client included. io_uring, handed over: the same with the client in another thread, \
         each wakes the other by an eventfd; no virtqueue, no other process. CPU: of the backend's process or thread, \
         by the scheduler's clock. Processors: {placement}.",
        duration.as_secs_f64()
    )
}

fn prepare(options: &Options, folder: &Path, placement: Placement) -> anyhow::Result<Scene> {
    let keelson = own_program(options.keelson_blk.as_ref(), "keelson-blk")?;
    let bytes: u64 = if options.common.quick {
        256 << 20
    } else {
        1 << 30
    };
    let file = folder.join("disk.img");
    // Written in full: what was never written needs no disk.
    let mut content = File::create(&file)?;
    let mut chunk = vec![0_u8; 1 << 20];
    for at in 0..bytes >> 20 {
        for (place, byte) in chunk.iter_mut().enumerate() {
            *byte = u8::try_from((place as u64 * 31 + at) % 251).unwrap_or(0);
        }
        content.write_all(&chunk)?;
    }
    content.sync_all()?;
    let root = rustix::process::geteuid().is_root();
    let loop_device = if root && !options.common.quick {
        attach_loop(&file)?
    } else {
        None
    };
    Ok(Scene {
        keelson,
        qemu: options.qemu_storage_daemon.clone(),
        folder: folder.to_path_buf(),
        file,
        loop_device,
        bytes,
        placement,
    })
}

fn attach_loop(file: &Path) -> anyhow::Result<Option<PathBuf>> {
    let output = Command::new("losetup")
        .args(["--find", "--show", "--direct-io=on"])
        .arg(file)
        .output()?;
    let name = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    Ok(output.status.success().then(|| PathBuf::from(name)))
}

fn versions(scene: &Scene) -> anyhow::Result<BTreeMap<String, String>> {
    let qemu = version_of(&scene.qemu).context("install qemu-system-common?")?;
    Ok(BTreeMap::from([
        ("keelson-blk".to_owned(), version_of(&scene.keelson)?),
        ("qemu-storage-daemon".to_owned(), qemu),
    ]))
}

fn measure(
    report: &mut Report,
    plan: &[Work],
    scene: &Scene,
    rounds: u32,
    duration: Duration,
) -> anyhow::Result<()> {
    let progress = progress(plan.len() as u64 * u64::from(rounds))?;
    for round in 0..rounds {
        for work in plan {
            let label = work.label();
            progress.set_message(label.clone());
            progress.inc(1);
            if work.backing == Backing::Loop && scene.loop_device.is_none() {
                continue;
            }
            let mut peers = Peer::ALL;
            if round % 2 == 1 {
                peers.reverse();
            }
            for peer in peers {
                let figures = match (peer, scene.disk(work.backing)) {
                    (Peer::Straight | Peer::Handover, None) => continue,
                    (Peer::Straight, Some(path)) => measure_straight(path, *work, scene, duration),
                    (Peer::Handover, Some(path)) => measure_handover(path, *work, scene, duration),
                    _ => measure_backend(peer, scene, *work, duration),
                };
                report.samples.push(Sample {
                    peer: peer.name(),
                    work: label.clone(),
                    round,
                    figures: figures.with_context(|| format!("{}: {label}", peer.name()))?,
                });
            }
        }
    }
    progress.finish_and_clear();
    Ok(())
}

fn measure_straight(
    path: &Path,
    work: Work,
    scene: &Scene,
    duration: Duration,
) -> anyhow::Result<BTreeMap<&'static str, f64>> {
    let mut operations = Operations::new(work, scene.bytes);
    let mut times = Times::new();
    let (elapsed, cpu) = scene.placement.as_backend(|| {
        let mut straight = Straight::open(path, work)?;
        straight.run(&mut operations, duration / 10, &mut Times::new())?;
        straight.run(&mut operations, duration, &mut times)
    })?;
    times.figures(elapsed, cpu)
}

fn measure_handover(
    path: &Path,
    work: Work,
    scene: &Scene,
    duration: Duration,
) -> anyhow::Result<BTreeMap<&'static str, f64>> {
    let mut operations = Operations::new(work, scene.bytes);
    let handover = Handover::new(path, work, &scene.placement)?;
    handover.run(&mut operations, duration / 10, &mut Times::new())?;
    let mut times = Times::new();
    let (elapsed, cpu) = handover.run(&mut operations, duration, &mut times)?;
    times.figures(elapsed, cpu)
}

fn measure_backend(
    peer: Peer,
    scene: &Scene,
    work: Work,
    duration: Duration,
) -> anyhow::Result<BTreeMap<&'static str, f64>> {
    let backend = Backend::start(peer, scene, work)?;
    let mut client = Client::connect(&backend.socket, work)?;
    let mut operations = Operations::new(work, scene.bytes);
    client.run(&mut operations, duration / 10, &mut Times::new())?;
    let mut times = Times::new();
    let before = backend.processor_time()?;
    let elapsed = client.run(&mut operations, duration, &mut times)?;
    let cpu = backend.processor_time()?.saturating_sub(before);
    let mut figures = times.figures(elapsed, cpu)?;
    figures.insert("memory_mib", backend.memory_mib()?);
    figures.insert("start_ms", backend.started_in.as_secs_f64() * 1e3);
    Ok(figures)
}

fn measure_idle(report: &mut Report, scene: &Scene) -> anyhow::Result<()> {
    let (backend, sockets) = Backend::start_many(scene, IDLE_DISKS)?;
    let alone = backend.memory_mib()?;
    let work = Work {
        pattern: Pattern::RandomRead,
        backing: Backing::File,
        block: 4096,
        depth: 1,
        queues: 1,
    };
    let mut clients = Vec::new();
    for socket in &sockets {
        let mut client = Client::connect(socket, work)?;
        // Each has been used before it is left alone.
        let mut operations = Operations::new(work, 64 << 20);
        client.run(&mut operations, Duration::ZERO, &mut Times::new())?;
        clients.push(client);
    }
    std::thread::sleep(SETTLE);
    let (begin, before) = (Instant::now(), backend.processor_time()?);
    std::thread::sleep(IDLE_WATCH);
    let cpu = backend.processor_time()?.saturating_sub(before);
    let memory = backend.memory_mib()?;
    #[allow(clippy::cast_precision_loss, reason = "a hundred")]
    let disks = IDLE_DISKS as f64;
    report.samples.push(Sample {
        peer: Peer::Keelson.name(),
        work: IDLE.to_owned(),
        round: 0,
        figures: BTreeMap::from([
            (
                "idle_cpu_percent",
                cpu.as_secs_f64() / begin.elapsed().as_secs_f64() * 100.0,
            ),
            ("memory_mib_per_disk", memory / disks),
            ("memory_mib", memory),
            ("memory_mib_unconnected", alone),
            ("start_ms", backend.started_in.as_secs_f64() * 1e3),
        ]),
    });
    Ok(())
}

fn add_goals(report: &mut Report, plan: &[Work]) {
    let ours = Peer::Keelson.name();
    let (qemu, limit) = (Peer::Qemu.name(), Peer::Straight.name());
    for work in plan {
        let label = work.label();
        match work.backing {
            Backing::File => {
                for (figure, within, better) in [
                    ("iops", Wanted::AtLeast(0.95), Wanted::AtLeast(1.0)),
                    ("p99_us", Wanted::AtMost(1.05), Wanted::AtMost(1.0)),
                    ("cpu_us_per_io", Wanted::AtMost(1.05), Wanted::AtMost(1.0)),
                ] {
                    let name = |peer| format!("{figure}, of {peer}'s: {label}");
                    report.goal(name(limit), (ours, limit), &label, figure, within);
                    report.goal(name(qemu), (ours, qemu), &label, figure, better);
                }
            }
            Backing::Null => {
                let wanted = Wanted::AtLeast(1.5);
                let figure = "iops_per_cpu_s";
                let name = format!("{figure}, of {qemu}'s: {label}");
                report.goal(name, (ours, qemu), &label, figure, wanted);
                if work.depth == 1 {
                    let name = format!("iops, of {qemu}'s: {label}");
                    report.goal(name, (ours, qemu), &label, "iops", wanted);
                }
            }
            Backing::Loop => {}
        }
    }
    for (figure, most, unit) in [
        ("idle_cpu_percent", 0.05, "% of one processor"),
        ("memory_mib_per_disk", 2.0, "MiB"),
    ] {
        let name = format!("{figure}: {IDLE}");
        report.goal_at_most(name, (ours, IDLE, figure), most, unit);
    }
}
