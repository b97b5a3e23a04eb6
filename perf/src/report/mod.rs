//! Reports: every sample and every goal, as JSON and as a page.

pub mod lines;
mod page;

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context as _;
use serde::Serialize;

/// What a run of one area measured.
#[derive(Debug, Serialize)]
pub struct Report {
    /// `state`, `blk`, …
    pub area: &'static str,
    /// When it began (RFC 3339).
    pub time: String,
    /// What was run on.
    pub machine: String,
    /// Programs and their versions.
    pub versions: BTreeMap<String, String>,
    /// How, in words.
    pub method: String,
    /// Every measurement.
    pub samples: Vec<Sample>,
    /// Each goal, with what follows from the samples.
    pub goals: Vec<Goal>,
}

/// One measurement.
#[derive(Debug, Clone, Serialize)]
pub struct Sample {
    /// Who was measured.
    pub peer: &'static str,
    /// What was done.
    pub work: String,
    /// Which round.
    pub round: u32,
    /// Figures by name, each with its unit in the name.
    pub figures: BTreeMap<&'static str, f64>,
}

/// A goal of the project.
#[derive(Debug, Serialize)]
#[allow(clippy::struct_field_names)] // the names are those of the reports' form
pub struct Goal {
    /// What is compared.
    pub name: String,
    /// What is wanted.
    pub goal: String,
    /// Median ratio over the rounds.
    pub measured: f64,
    /// Unit of both.
    pub unit: &'static str,
    /// Smallest and largest ratio of a round.
    pub spread: (f64, f64),
    /// Whether it is met.
    pub met: bool,
}

/// Whether a ratio is to be large or small.
#[derive(Debug, Clone, Copy)]
pub enum Wanted {
    /// At least this.
    AtLeast(f64),
    /// At most this.
    AtMost(f64),
}

impl Report {
    /// Compares `figure` of `ours` with that of `theirs` in each round of `work`; `None` if it was
    /// not measured.
    pub fn ratio(
        &self,
        ours: &str,
        theirs: &str,
        work: &str,
        figure: &str,
    ) -> Option<(f64, f64, f64)> {
        let of = |peer: &str| -> Vec<f64> {
            let samples = self
                .samples
                .iter()
                .filter(|sample| sample.peer == peer && sample.work == work);
            samples
                .filter_map(|sample| sample.figures.get(figure).copied())
                .collect()
        };
        let mut ratios: Vec<f64> = of(ours)
            .iter()
            .zip(of(theirs))
            .map(|(a, b)| a / b)
            .collect();
        ratios.retain(|ratio| ratio.is_finite());
        ratios.sort_by(f64::total_cmp);
        Some((median(&ratios)?, *ratios.first()?, *ratios.last()?))
    }

    /// Adds a goal that compares us with a peer, if both were measured.
    pub fn goal(
        &mut self,
        name: String,
        peers: (&str, &str),
        work: &str,
        figure: &str,
        wanted: Wanted,
    ) {
        let Some((measured, least, most)) = self.ratio(peers.0, peers.1, work, figure) else {
            return;
        };
        let (goal, met) = match wanted {
            Wanted::AtLeast(limit) => (format!("at least {limit:.2}"), measured >= limit),
            Wanted::AtMost(limit) => (format!("at most {limit:.2}"), measured <= limit),
        };
        self.goals.push(Goal {
            name,
            goal,
            measured,
            unit: "times the peer's",
            spread: (least, most),
            met,
        });
    }

    /// Adds a goal for a figure by itself, if it was measured.
    pub fn goal_at_most(
        &mut self,
        name: String,
        (peer, work, figure): (&str, &str, &str),
        limit: f64,
        unit: &'static str,
    ) {
        let Some((measured, least, most)) = self.spread(peer, work, figure) else {
            return;
        };
        self.goals.push(Goal {
            name,
            goal: format!("at most {limit}"),
            measured,
            unit,
            spread: (least, most),
            met: measured <= limit,
        });
    }

    /// The median of a figure over the rounds.
    pub fn figure(&self, peer: &str, work: &str, figure: &str) -> Option<f64> {
        self.spread(peer, work, figure).map(|(median, ..)| median)
    }

    /// The median, the least and the most of a figure over the rounds.
    pub fn spread(&self, peer: &str, work: &str, figure: &str) -> Option<(f64, f64, f64)> {
        let samples = self
            .samples
            .iter()
            .filter(|sample| sample.peer == peer && sample.work == work);
        let mut values: Vec<f64> = samples
            .filter_map(|sample| sample.figures.get(figure).copied())
            .collect();
        values.sort_by(f64::total_cmp);
        Some((median(&values)?, *values.first()?, *values.last()?))
    }

    /// Every kind of work, in the order of its first sample.
    pub fn works(&self) -> Vec<&str> {
        let mut works: Vec<&str> = Vec::new();
        for sample in &self.samples {
            if !works.contains(&sample.work.as_str()) {
                works.push(&sample.work);
            }
        }
        works
    }

    /// Writes the report as JSON.
    pub fn write_json(&self, path: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        std::fs::write(path, text + "\n").with_context(|| format!("write {}", path.display()))
    }

    /// Writes the report as a page with plots.
    pub fn write_html(
        &self,
        path: &Path,
        peers: &[&str],
        plots: &[(&str, &str)],
    ) -> anyhow::Result<()> {
        std::fs::write(path, page::page(self, peers, plots))
            .with_context(|| format!("write {}", path.display()))
    }
}

fn median(sorted: &[f64]) -> Option<f64> {
    match sorted.len() {
        0 => None,
        length if length % 2 == 1 => Some(sorted[length / 2]),
        length => Some(f64::midpoint(sorted[length / 2 - 1], sorted[length / 2])),
    }
}
