//! Reports: every sample and every goal, as JSON and as a page.

use std::collections::BTreeMap;
use std::fmt::Write as _;
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

    /// The median of a figure over the rounds.
    pub fn figure(&self, peer: &str, work: &str, figure: &str) -> Option<f64> {
        let samples = self
            .samples
            .iter()
            .filter(|sample| sample.peer == peer && sample.work == work);
        let mut values: Vec<f64> = samples
            .filter_map(|sample| sample.figures.get(figure).copied())
            .collect();
        values.sort_by(f64::total_cmp);
        median(&values)
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
        std::fs::write(path, self.html(peers, plots))
            .with_context(|| format!("write {}", path.display()))
    }

    fn html(&self, peers: &[&str], plots: &[(&str, &str)]) -> String {
        let mut page = String::from(
            "<!doctype html><meta charset=utf-8><title>perf</title><style>body{font:15px sans-serif;max-width:60em;\
             margin:2em auto;padding:0 1em}table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:right;\
             border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}svg text{font:12px sans-serif}\
             </style>",
        );
        let _ = write!(
            page,
            "<h1>perf {}</h1><p>{}, {}</p><p>{}</p>",
            self.area, self.time, self.machine, self.method
        );
        for (program, version) in &self.versions {
            let _ = write!(page, "<p>{program}: {version}</p>");
        }
        page.push_str(
            "<h2>Goals</h2><table><tr><th>goal<th>wanted<th>measured<th>spread<th>met</tr>",
        );
        for goal in &self.goals {
            let _ = write!(
                page,
                "<tr><td>{}<td>{}<td>{:.2}<td>{:.2}–{:.2}<td>{}</tr>",
                goal.name,
                goal.goal,
                goal.measured,
                goal.spread.0,
                goal.spread.1,
                if goal.met { "yes" } else { "no" }
            );
        }
        page.push_str("</table>");
        for (figure, title) in plots {
            let _ = write!(page, "<h2>{title}</h2>{}", self.bars(peers, figure));
        }
        page
    }

    /// Horizontal bars, one group for each kind of work, one bar for each peer.
    fn bars(&self, peers: &[&str], figure: &str) -> String {
        let mut rows = Vec::new();
        for work in self.works() {
            for (at, peer) in peers.iter().enumerate() {
                if let Some(value) = self.figure(peer, work, figure) {
                    rows.push((if at == 0 { work } else { "" }, *peer, at, value));
                }
            }
        }
        let most = rows
            .iter()
            .map(|row| row.3)
            .fold(f64::MIN_POSITIVE, f64::max);
        let mut svg = format!("<svg width=900 height={}>", rows.len() * 20 + 10);
        for (row, (work, peer, color, value)) in rows.iter().enumerate() {
            let (y, width) = (row * 20, value / most * 400.0);
            let fill = ["#3266a8", "#c9822b", "#777777"]
                .get(*color)
                .unwrap_or(&"#777777");
            let _ = write!(
                svg,
                "<text x=0 y={0}>{work}</text><rect x=330 y={1} width={width:.1} height=16 fill='{fill}'/>\
                 <text x={2:.1} y={0}>{peer} {value:.1}</text>",
                y + 15,
                y + 2,
                335.0 + width
            );
        }
        svg + "</svg>"
    }
}

fn median(sorted: &[f64]) -> Option<f64> {
    match sorted.len() {
        0 => None,
        length if length % 2 == 1 => Some(sorted[length / 2]),
        length => Some(f64::midpoint(sorted[length / 2 - 1], sorted[length / 2])),
    }
}
