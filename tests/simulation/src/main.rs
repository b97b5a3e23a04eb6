//! `keelson-simulation`: runs seeds, and says which of them fails.

use std::ops::RangeInclusive;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context as _;
use clap::Parser;
use keelson_simulation::{Plant, run};

/// Runs clusters of keelson-state's members on simulated network, disks and clocks. Every run follows
/// from its seed.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// The seeds, one or a range: 7, 1..1000 (both among them).
    #[arg(long, value_parser = seeds, default_value = "1..100")]
    seeds: RangeInclusive<u64>,
    /// Prints every event: for one seed.
    #[arg(long)]
    trace: bool,
    /// Plants a bug, which should be found.
    #[arg(long, value_enum)]
    plant: Option<Plant>,
    /// Goes on after a seed that fails.
    #[arg(long)]
    keep_going: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let mut failed = 0_u64;
    let mut totals = Totals::default();
    let started = Instant::now();
    let count = options.seeds.end() - options.seeds.start() + 1;
    for seed in options.seeds.clone() {
        announce_panics(seed, options.plant);
        let ran = std::panic::catch_unwind(|| run(seed, options.plant, options.trace));
        let Ok(outcome) = ran else {
            failed += 1;
            totals.runs += 1;
            if options.keep_going {
                continue;
            }
            break;
        };
        totals.add(&outcome);
        if let Some(failure) = &outcome.failure {
            failed += 1;
            eprintln!("seed {seed} FAILED: {failure}");
            eprintln!("replay: {}", replay(seed, options.plant));
            if !options.keep_going {
                break;
            }
        }
        if options.trace {
            eprintln!("{outcome:#?}");
        }
        if totals.runs % 100 == 0 {
            eprintln!("{} of {count} seeds, {}", totals.runs, totals.rate(started));
        }
    }
    println!(
        "{} seeds, {failed} failed; {}; {totals:?}",
        totals.runs,
        totals.rate(started)
    );
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

#[derive(Debug, Default)]
struct Totals {
    runs: u64,
    undecided: u64,
    requests: usize,
    events: u64,
    seconds: u64,
    crashes: u64,
    faults: u64,
    snapshots: u64,
    changes: u64,
    flips: u64,
    rebuilds: u64,
}

impl Totals {
    fn add(&mut self, outcome: &keelson_simulation::Outcome) {
        self.runs += 1;
        self.undecided += u64::from(outcome.undecided);
        self.requests += outcome.requests;
        self.events += outcome.events;
        self.seconds += outcome.time / 1_000_000;
        self.crashes += outcome.counts.crashes;
        self.faults += outcome.counts.faults;
        self.snapshots += outcome.counts.snapshots;
        self.changes += outcome.counts.changes;
        self.flips += outcome.counts.flips;
        self.rebuilds += outcome.counts.rebuilds;
    }

    #[allow(clippy::cast_precision_loss)] // for people
    fn rate(&self, started: Instant) -> String {
        format!(
            "{:.1} seeds per second",
            self.runs as f64 / started.elapsed().as_secs_f64()
        )
    }
}

/// A panic tells the seed as well.
fn announce_panics(seed: u64, plant: Option<Plant>) {
    std::panic::set_hook(Box::new(move |panic| {
        eprintln!("seed {seed} FAILED: {panic}");
        eprintln!("{}", std::backtrace::Backtrace::force_capture());
        eprintln!("replay: {}", replay(seed, plant));
    }));
}

fn replay(seed: u64, plant: Option<Plant>) -> String {
    use clap::ValueEnum as _;
    let planted = plant
        .and_then(|plant| plant.to_possible_value())
        .map_or(String::new(), |value| {
            format!(" --plant {}", value.get_name())
        });
    format!("cargo run --release -p keelson-simulation -- --seeds {seed}{planted} --trace")
}

fn seeds(text: &str) -> anyhow::Result<RangeInclusive<u64>> {
    let number = |text: &str| {
        text.parse::<u64>()
            .with_context(|| format!("{text:?} is no seed"))
    };
    let seeds = match text.split_once("..") {
        Some((first, last)) => number(first)?..=number(last.trim_start_matches('='))?,
        None => number(text)?..=number(text)?,
    };
    anyhow::ensure!(!seeds.is_empty(), "{text} has no seeds");
    Ok(seeds)
}
