//! Run after run, and what they came to.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use clap::ValueEnum as _;
use keelson_checker::Verdict;

use crate::faults::Kind;
use crate::run::{self, Outcome, RunFlags};

/// Runs until `time` is over, each time with the next seed, and prints what it came to: whether every
/// run held.
pub async fn soak(folder: &Path, flags: &RunFlags, time: Duration) -> anyhow::Result<bool> {
    let begin = Instant::now();
    let mut flags = flags.clone();
    let mut tally = Tally::default();
    while begin.elapsed() < time {
        println!(
            "run {} with seed {}, after {} of {} minutes",
            tally.runs + 1,
            flags.seed,
            begin.elapsed().as_secs() / 60,
            time.as_secs() / 60
        );
        let scratch = tempfile::tempdir_in(folder)?;
        match run::run(scratch.path(), &flags).await {
            Ok(outcome) => {
                tell(&outcome);
                tally.add(flags.seed, &outcome);
            }
            Err(error) => {
                println!("FAILED: seed {}: {error:#}", flags.seed);
                tally.add_failure(flags.seed, &format!("{error:#}"));
            }
        }
        println!(
            "so far: {} runs, {} operations, {} faults, {} runs that don't hold",
            tally.runs,
            tally.operations.iter().sum::<usize>(),
            tally.faults.values().sum::<usize>(),
            tally.failures.len()
        );
        flags.seed += 1;
    }
    println!(
        "\n{} for {:.0?}:\n{tally}",
        flags.program.name(),
        begin.elapsed()
    );
    Ok(tally.failures.is_empty())
}

fn tell(outcome: &Outcome) {
    let word = if outcome.report.holds() {
        "holds"
    } else {
        "BROKEN"
    };
    println!("{word}: {}", outcome.summary);
    for (rule, verdict) in &outcome.report.verdicts {
        if *verdict != Verdict::Holds {
            println!("  {rule}: {verdict}");
        }
    }
}

/// What runs came to.
#[derive(Debug, Default)]
struct Tally {
    runs: usize,
    /// Done, refused, failed, unknown.
    operations: [usize; 4],
    watches_and_leases: [usize; 2],
    faults: BTreeMap<Kind, usize>,
    /// By rule: in how many runs it held, was broken, could not be decided.
    verdicts: BTreeMap<&'static str, [usize; 3]>,
    longest_gap: Duration,
    /// Seeds of runs that don't hold, and why.
    failures: Vec<(u64, String)>,
}

impl Tally {
    fn add(&mut self, seed: u64, outcome: &Outcome) {
        self.runs += 1;
        add(&mut self.operations, &outcome.operations);
        add(&mut self.watches_and_leases, &outcome.watches_and_leases);
        for (kind, count) in &outcome.faults {
            *self.faults.entry(*kind).or_default() += count;
        }
        self.longest_gap = self.longest_gap.max(outcome.longest_gap);
        for (rule, verdict) in &outcome.report.verdicts {
            let place = match verdict {
                Verdict::Holds => 0,
                Verdict::Broken(_) => 1,
                Verdict::Undecided(_) => 2,
            };
            self.verdicts.entry(rule).or_default()[place] += 1;
        }
        if !outcome.report.holds() {
            let verdicts = outcome.report.verdicts.iter();
            let rules: Vec<_> = verdicts
                .filter(|(_, verdict)| *verdict != Verdict::Holds)
                .map(|(rule, _)| *rule)
                .collect();
            self.failures.push((seed, rules.join(", ")));
        }
    }

    /// A run that did not get to its end: its cluster did not come back, for one.
    fn add_failure(&mut self, seed: u64, why: &str) {
        self.runs += 1;
        let why = why.lines().next().unwrap_or_default();
        self.failures.push((seed, why.chars().take(200).collect()));
    }
}

fn add<const N: usize>(sum: &mut [usize; N], more: &[usize; N]) {
    for (sum, more) in sum.iter_mut().zip(more) {
        *sum += more;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [done, refused, failed, unknown] = self.operations;
        let [watches, leases] = self.watches_and_leases;
        writeln!(
            f,
            "runs: {}, of which {} don't hold",
            self.runs,
            self.failures.len()
        )?;
        writeln!(
            f,
            "operations: {done} done, {refused} refused, {failed} failed, {unknown} with an unknown outcome"
        )?;
        writeln!(f, "watches: {watches}; leases: {leases}")?;
        writeln!(f, "longest time without a write: {:.1?}", self.longest_gap)?;
        writeln!(f, "faults:")?;
        for (kind, count) in &self.faults {
            let name = kind.to_possible_value();
            let name = name.as_ref().map_or("", |value| value.get_name());
            writeln!(f, "  {count:5}  {name}")?;
        }
        writeln!(
            f,
            "verdicts, as runs that hold, are broken, can't be decided:"
        )?;
        for (rule, [holds, broken, undecided]) in &self.verdicts {
            writeln!(f, "  {holds:5} {broken:3} {undecided:3}  {rule}")?;
        }
        for (seed, why) in &self.failures {
            writeln!(f, "seed {seed}: {why}")?;
        }
        Ok(())
    }
}
