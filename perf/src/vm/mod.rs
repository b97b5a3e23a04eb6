//! `perf vm`: keelson-vmm beside QEMU with stock kernels, and by itself with the payload guest.

mod first_instruction;
mod here;
mod peers;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use comfy_table::{Table, presets};
use keelson_lab::{Exec, FileCopy, KernelFiles, Lab, LabOptions, guest_initrd};

use crate::report::{Report, Sample, Wanted, lines};

pub use peers::Peer;
use peers::Setting;

/// What names of work in the lab end with.
const IN_LAB: &str = ", in the lab";
/// What is measured beside QEMU.
const FIGURES: [&str; 2] = ["ms", "exits_per_s"];

/// Measures keelson-vmm on this machine's KVM with the payload guest, and beside QEMU with a stock
/// Debian kernel in the lab (or, with --peers-here, on this machine's KVM).
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Few rounds, in under a minute.
    #[arg(long)]
    quick: bool,
    /// Write every sample here.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Write a page with plots here.
    #[arg(long)]
    html: Option<PathBuf>,
    /// Rounds on this machine [default: 20, with --quick 5].
    #[arg(long)]
    rounds: Option<u32>,
    /// Rounds beside QEMU, each of which boots three stock kernels [default: 5, with --quick 1].
    #[arg(long)]
    peer_rounds: Option<u32>,
    /// Leave out what is measured beside QEMU.
    #[arg(long)]
    no_peers: bool,
    /// Run QEMU and stock kernels on this machine's KVM instead of in the lab: where it has VT-x or
    /// SVM.
    #[arg(long)]
    peers_here: bool,
    /// Print the samples of this many rounds beside QEMU as JSON lines, and nothing else: what runs
    /// in the lab.
    #[arg(long, hide = true, value_names = ["ROUNDS", "KERNEL", "INITRD"], num_args = 3)]
    only_peers: Option<Vec<String>>,
}

pub fn run(options: &Options) -> anyhow::Result<()> {
    if let Some([rounds, kernel, initrd]) = options.only_peers.as_deref() {
        let samples = peers::measure(
            rounds.parse()?,
            &Setting {
                peers: &Peer::ALL,
                place: IN_LAB,
                stock: Some((Path::new(kernel), Path::new(initrd))),
            },
        )?;
        return lines::print(&samples);
    }
    let rounds = options.rounds.unwrap_or(if options.quick { 5 } else { 20 });
    let peer_rounds = options
        .peer_rounds
        .unwrap_or(if options.quick { 1 } else { 5 });
    let mut report = Report {
        area: "vm",
        time: jiff::Timestamp::now().to_string(),
        machine: crate::machine::describe(),
        versions: versions(),
        method: format!(
            "{rounds} rounds with the payload guest, 256 MiB, one vCPU. Memory overhead is the resident memory of \
             all mappings of keelson-vmm but the guest's own, shared pages of programs and libraries among them. \
             A clone runs when its guest has printed a line; its time is from the process's start. Beside QEMU, \
             alternating who is first: one vCPU, 256 MiB, and a serial console into a file that is looked at \
             every 200 µs. The first instruction is that of a kernel of a few, after QEMU's firmware; it then \
             reads a port {} times, which gives the exits per second. {rounds} rounds of this are here, beside \
             QEMU microvm; {peer_rounds} are, with q35 and a stock Debian kernel (uncompressed, with the same \
             initramfs), in the lab, where KVM itself is emulated and only ratios mean something, or with \
             --peers-here all of it here.",
            first_instruction::EXITS
        ),
        samples: here::measure(rounds)?,
        goals: Vec::new(),
    };
    if !options.no_peers {
        let kernel = KernelFiles::find("6.12").context("run setup/kernels first")?;
        let initrd = guest_initrd::cached(&kernel)?;
        let mut here = Setting {
            peers: &[Peer::Keelson, Peer::Microvm],
            place: "",
            stock: None,
        };
        if options.peers_here {
            here.peers = &Peer::ALL;
            here.stock = Some((&kernel.vmlinux, &initrd));
            report.samples.extend(peers::measure(peer_rounds, &here)?);
        } else {
            report.samples.extend(peers::measure(rounds, &here)?);
            report
                .samples
                .extend(in_lab(peer_rounds, &kernel, &initrd)?);
        }
    }
    add_goals(&mut report);
    print(&report);
    if let Some(path) = &options.json {
        report.write_json(path)?;
    }
    if let Some(path) = &options.html {
        let plots = [
            ("ms", "Milliseconds"),
            ("cpu_ms", "CPU, ms"),
            ("memory_mib", "Memory overhead, MiB"),
            ("exits_per_s", "Exits per second"),
        ];
        report.write_html(path, &Peer::ALL.map(Peer::name), &plots)?;
    }
    Ok(())
}

/// Runs this program in the lab.
fn in_lab(rounds: u32, kernel: &KernelFiles, initrd: &Path) -> anyhow::Result<Vec<Sample>> {
    let own = std::env::current_exe()?;
    let copy = |from: &Path, to: &str| FileCopy {
        from: from.into(),
        to: to.into(),
    };
    let lab = Lab::boot(&LabOptions {
        files: vec![
            copy(&own, "/usr/bin/perf"),
            copy(&own.with_file_name("keelson-vmm"), "/usr/bin/keelson-vmm"),
            copy(&kernel.vmlinux, "/boot/guest-kernel"),
            copy(initrd, "/boot/guest-initrd"),
            copy(Path::new("/usr/share/qemu"), "/usr/share/qemu"),
            copy(Path::new("/usr/share/seabios"), "/usr/share/seabios"),
        ],
        tools: vec!["qemu-system-x86_64".to_owned()],
        ..LabOptions::default()
    })?;
    let exec = Exec {
        arguments: [
            "perf",
            "vm",
            "--only-peers",
            &rounds.to_string(),
            "/boot/guest-kernel",
            "/boot/guest-initrd",
        ]
        .map(String::from)
        .into(),
        timeout_seconds: Some(600),
        ..Exec::default()
    };
    lines::run_in(lab, &exec, &Peer::ALL.map(Peer::name), &FIGURES)
}

fn add_goals(report: &mut Report) {
    let pair = (Peer::Keelson.name(), Peer::Microvm.name());
    for (work, limit) in [("start to first instruction", 0.25), ("start to init", 0.7)] {
        for place in ["", IN_LAB] {
            let work = format!("{work}{place}");
            let name = format!("{work}, beside QEMU microvm");
            report.goal(name, pair, &work, "ms", Wanted::AtMost(limit));
        }
    }
    let ours = Peer::Keelson.name();
    for (name, work, figure, limit, unit) in [
        (
            "memory beyond the guest's, booted",
            "booted",
            "memory_mib",
            5.0,
            "MiB",
        ),
        (
            "memory beyond the guest's, restored",
            "clone of 256 MiB",
            "memory_mib",
            7.0,
            "MiB",
        ),
        ("API ready", "API ready", "cpu_ms", 8.0, "CPU-ms"),
        (
            "a clone of a 256 MiB snapshot runs",
            "clone of 256 MiB",
            "ms",
            20.0,
            "ms",
        ),
    ] {
        report.goal_at_most(name.to_owned(), (ours, work, figure), limit, unit);
    }
}

fn print(report: &Report) {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["work", "peer", "figure", "median"]);
    for work in report.works() {
        for peer in Peer::ALL {
            let samples = report.samples.iter();
            let figures: std::collections::BTreeSet<&str> = samples
                .filter(|sample| sample.work == work && sample.peer == peer.name())
                .flat_map(|sample| sample.figures.keys().copied())
                .collect();
            for figure in figures {
                if let Some(value) = report.figure(peer.name(), work, figure) {
                    table.add_row([work, peer.name(), figure, &format!("{value:.2}")]);
                }
            }
        }
    }
    println!("{table}");
    for goal in &report.goals {
        println!(
            "{} {}: {:.2} {} ({:.2}–{:.2}), wanted {}",
            if goal.met { "met   " } else { "missed" },
            goal.name,
            goal.measured,
            goal.unit,
            goal.spread.0,
            goal.spread.1,
            goal.goal
        );
    }
}

fn versions() -> BTreeMap<String, String> {
    let first_line = |program: &Path| {
        let output = Command::new(program).arg("--version").output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Some(text.lines().next()?.to_owned())
    };
    let own = keelson_vmm_tests::binary("keelson-vmm");
    [own.as_path(), Path::new("qemu-system-x86_64")]
        .into_iter()
        .filter_map(|program| {
            let name = program.file_name()?.to_string_lossy().into_owned();
            Some((name, first_line(program)?))
        })
        .collect()
}
