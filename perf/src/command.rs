//! What every area's command line and printed report have alike.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use comfy_table::{Table, presets};
use indicatif::{ProgressBar, ProgressStyle};

use crate::report::{Goal, Report};

/// The options of every area.
#[derive(Debug, clap::Args)]
pub struct Common {
    /// Few rounds of few kinds of work, in under a minute.
    #[arg(long)]
    pub quick: bool,
    /// Write every sample here.
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// Write a page with plots here.
    #[arg(long)]
    pub html: Option<PathBuf>,
    /// Rounds of each kind of work [default: 5, with --quick 2].
    #[arg(long)]
    rounds: Option<u32>,
    /// Seconds of each measurement [default: up to 3, with --quick less].
    #[arg(long)]
    seconds: Option<f64>,
    /// Only work whose name contains this.
    #[arg(long)]
    pub only: Option<String>,
}

impl Common {
    /// Rounds of each kind of work.
    pub fn rounds(&self) -> u32 {
        self.rounds.unwrap_or(if self.quick { 2 } else { 5 }).max(1)
    }

    /// How long each measurement takes, `quick` seconds with `--quick`.
    pub fn duration(&self, quick: f64) -> anyhow::Result<Duration> {
        self.duration_of(quick, 3.0)
    }

    /// The same for an area whose full run takes `full` seconds for each measurement.
    pub fn duration_of(&self, quick: f64, full: f64) -> anyhow::Result<Duration> {
        let seconds = self
            .seconds
            .unwrap_or(if self.quick { quick } else { full });
        Duration::try_from_secs_f64(seconds).context("--seconds")
    }

    /// Whether to do this work.
    pub fn wants(&self, work: &str) -> bool {
        self.only
            .as_ref()
            .is_none_or(|only| work.contains(only.as_str()))
    }

    /// Writes the report wherever it is wanted.
    pub fn write(
        &self,
        report: &Report,
        peers: &[&str],
        plots: &[(&str, &str)],
    ) -> anyhow::Result<()> {
        if let Some(path) = &self.json {
            report.write_json(path)?;
        }
        if let Some(path) = &self.html {
            report.write_html(path, peers, plots)?;
        }
        Ok(())
    }
}

/// The program of ours to measure: the one that was given, else the one beside this program.
pub fn own_program(given: Option<&PathBuf>, name: &str) -> anyhow::Result<PathBuf> {
    let beside = std::env::current_exe()?.with_file_name(name);
    let program = given.cloned().unwrap_or(beside);
    anyhow::ensure!(
        program.exists(),
        "{} is missing: run cargo build --release -p {name} -p keelson-perf",
        program.display()
    );
    Ok(program)
}

/// What a program says of its version: the first word with a digit at its start, of its first line.
pub fn version_of(program: &Path) -> anyhow::Result<String> {
    let output = Command::new(program).arg("--version").output();
    let output = output.with_context(|| format!("run {}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut words = text.lines().next().unwrap_or_default().split_whitespace();
    let version = words.find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
    Ok(version.unwrap_or_default().to_owned())
}

/// How far the measurements are, on a terminal.
pub fn progress(steps: u64) -> anyhow::Result<ProgressBar> {
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} {eta}")?;
    Ok(ProgressBar::new(steps).with_style(style))
}

/// Prints the medians of figures under their headings, a row for each kind of work and each peer that
/// has the first of them.
pub fn print_figures(report: &Report, peers: &[&str], columns: &[(&str, &str)]) {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    let headings = columns.iter().map(|(_, heading)| *heading);
    table.set_header(["", ""].into_iter().chain(headings));
    for work in report.works() {
        let mut name = work;
        for peer in peers {
            let figure = |(figure, _): &(&str, &str)| report.figure(peer, work, figure);
            if columns.first().and_then(figure).is_none() {
                continue;
            }
            let figures = columns.iter().map(|column| rounded(figure(column)));
            let names = [std::mem::take(&mut name), peer].map(str::to_owned);
            table.add_row(names.into_iter().chain(figures));
        }
    }
    println!("{table}");
}

/// Prints the goals and what was run.
pub fn print_goals(goals: &[Goal], versions: &BTreeMap<String, String>) {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["goal", "wanted", "measured", "spread", "met"]);
    for goal in goals {
        table.add_row([
            goal.name.clone(),
            goal.goal.clone(),
            format!("{:.2}", goal.measured),
            format!("{:.2}–{:.2}", goal.spread.0, goal.spread.1),
            if goal.met { "yes" } else { "no" }.to_owned(),
        ]);
    }
    println!("{table}");
    for (program, version) in versions {
        println!("{program} {version}");
    }
}

/// A figure for a table.
pub fn rounded(value: Option<f64>) -> String {
    match value {
        None => String::new(),
        Some(value) if value >= 100.0 => format!("{value:.0}"),
        Some(value) if value >= 1.0 => format!("{value:.1}"),
        Some(value) => format!("{value:.2}"),
    }
}
