//! `keelson disk`

use anyhow::Context as _;
use clap::{Args, Subcommand};
use keelson_api::proto::{DiskStatistics, DiskStatisticsRequest, SnapshotDiskRequest};
use serde_json::{Value, json};

use crate::client::Client;
use crate::failure::Failure;
use crate::output::{Format, line, print_lines, print_value, table};

/// Take snapshots of disks, and show what guests do with them.
#[derive(Subcommand)]
pub enum Disk {
    /// Keep what an overlay holds now, beside it; guests go on.
    Snapshot(Snapshot),
    /// What guests did with the disks that are served to them, and how long it took.
    Stats(Stats),
}

impl Disk {
    /// Runs the command.
    pub async fn run(self, client: &mut Client) -> Result<(), Failure> {
        match self {
            Self::Snapshot(command) => command.run(client).await,
            Self::Stats(command) => command.run(client).await,
        }
    }
}

/// Keep what an overlay holds now, beside it; guests go on.
///
/// The snapshot is at the disk's path with a dot and its name appended: an overlay that nobody can
/// write to. A disk that goes back to it, or a clone, is one whose base it is, with the format
/// `overlay`.
#[derive(Args)]
pub struct Snapshot {
    /// The disk.
    name: String,
    /// What to call the snapshot.
    snapshot: String,
}

impl Snapshot {
    async fn run(self, client: &mut Client) -> Result<(), Failure> {
        let request = SnapshotDiskRequest {
            name: self.name.clone(),
            snapshot: self.snapshot,
        };
        let path = client.disks.snapshot(request).await?.into_inner().path;
        line(&format!("Disk/{}: {path} created", self.name))
    }
}

/// What guests did with the disks that are served to them, and how long it took.
///
/// MEDIAN and P99 are upper limits: times are counted in buckets that double.
#[derive(Args)]
pub struct Stats {
    /// Only this disk.
    name: Option<String>,
    /// How to print.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

impl Stats {
    async fn run(self, client: &mut Client) -> Result<(), Failure> {
        let request = DiskStatisticsRequest {
            name: self.name.unwrap_or_default(),
        };
        let answer = client.disks.statistics(request).await?.into_inner();
        let mut disks = Vec::new();
        for DiskStatistics { name, guest, json } in answer.disks {
            let served: Value =
                serde_json::from_slice(&json).context("the agent's answer is no JSON")?;
            disks.push(json!({ "name": name, "guest": guest, "served": served }));
        }
        if matches!(self.output, Format::Json | Format::Yaml) {
            return print_value(self.output, &disks);
        }
        if disks.is_empty() {
            eprintln!("no disk is being served to a guest");
            return Ok(());
        }
        let mut rows = table([
            "DISK",
            "GUEST",
            "OPERATION",
            "REQUESTS",
            "BYTES",
            "MEDIAN",
            "P99",
        ]);
        for disk in &disks {
            for [operation, requests, bytes, median, p99] in operations(&disk["served"]) {
                let text = |field: &str| disk[field].as_str().unwrap_or_default().to_owned();
                let (name, guest) = (text("name"), text("guest"));
                rows.add_row([name, guest, operation, requests, bytes, median, p99]);
            }
        }
        print_lines(&rows)
    }
}

/// What the guest asked of a disk, by operation; and errors, where there were any.
fn operations(served: &Value) -> Vec<[String; 5]> {
    let sum = |counter: &str| -> u64 {
        let queues = served["counters"].as_array().into_iter().flatten();
        queues.filter_map(|queue| queue[counter].as_u64()).sum()
    };
    let nothing = String::new;
    if let Some(error) = served["error"].as_str() {
        return vec![[error.into(), nothing(), nothing(), nothing(), nothing()]];
    }
    let mut rows = Vec::new();
    for (operation, requests, bytes) in [
        ("read", "reads", Some("bytes_read")),
        ("write", "writes", Some("bytes_written")),
        ("flush", "flushes", None),
        ("discard", "discards", None),
        ("write_zeroes", "write_zeroes", None),
    ] {
        let requests = sum(requests);
        // What no guest ever asks of it is left out; reads and writes never are.
        if requests == 0 && bytes.is_none() {
            continue;
        }
        let times = &served["latencies"][operation];
        rows.push([
            operation.replace('_', " "),
            requests.to_string(),
            bytes.map_or(String::new(), |bytes| sum(bytes).to_string()),
            time(&times["median_seconds"], requests),
            time(&times["p99_seconds"], requests),
        ]);
    }
    let errors = sum("errors");
    if errors > 0 {
        rows.push([
            "errors".into(),
            errors.to_string(),
            nothing(),
            nothing(),
            nothing(),
        ]);
    }
    rows
}

/// The limit of a bucket, or that it took longer than any.
fn time(seconds: &Value, requests: u64) -> String {
    match seconds.as_f64() {
        None if requests == 0 => String::new(),
        None => ">8.4s".into(),
        Some(seconds) if seconds < 0.001 => format!("{:.0}us", seconds * 1e6),
        Some(seconds) if seconds < 1.0 => format!("{:.0}ms", seconds * 1e3),
        Some(seconds) => format!("{seconds:.1}s"),
    }
}
