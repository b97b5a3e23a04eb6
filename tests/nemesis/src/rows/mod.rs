//! The rows of docs/reliability.md: one thing that goes wrong each, the same for both programs, and
//! what was seen.

mod compaction;
mod damage;
mod data;
mod defragment;
mod flipped_bits;
mod full_disk;
mod huge_range;
mod lease_time;
mod plan;
mod prober;
mod process;
mod restart;
mod slow_watcher;
mod stalled_disk;
mod table;
mod torn_log;

use std::fmt;
use std::path::Path;
use std::time::Instant;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use self::plan::{Files, Plan};
pub use self::table::Table;
use crate::cluster::Setup;
use crate::program::Program;

/// One thing that goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Name {
    /// One bit of one member's files is another.
    FlippedBits,
    /// The end or the middle of one member's log is cut or zeroed.
    TornLog,
    /// The leader's disk is full, then everybody's.
    FullDisk,
    /// The leader's disk does not answer.
    StalledDisk,
    /// The leader dies while a lease is half over.
    LeaseTime,
    /// Somebody asks for everything at once.
    HugeRange,
    /// Somebody watches and does not read.
    SlowWatcher,
    /// A member is defragmented.
    Defragment,
    /// A long history is compacted.
    Compaction,
    /// A member with much data is killed and starts again.
    Restart,
}

/// How a row is made.
#[derive(Debug, Clone, Args)]
pub struct RowFlags {
    /// What the members are.
    #[arg(long, value_enum, default_value = "keelson-state")]
    pub program: Program,
    /// How much data there is where it matters: a row for each, comma-separated.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 4, 10],
        value_parser = clap::value_parser!(u64).range(1..=100))]
    pub gigabytes: Vec<u64>,
    /// Where bits are flipped is drawn from it.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// What is done in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Case {
    name: Name,
    /// How much data there is, where it matters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    gigabytes: Option<u64>,
}

/// What was seen.
#[derive(Debug, Serialize, Deserialize)]
pub struct Row {
    #[serde(flatten)]
    case: Case,
    program: Program,
    seconds: f64,
    /// In the order in which it was seen.
    seen: Vec<(String, Value)>,
    /// Why it could not be made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    failed: Option<String>,
}

/// What a row notes, printed at once.
pub struct Notes {
    seen: Vec<(String, Value)>,
    fates: damage::Fates,
}

impl Notes {
    fn note(&mut self, what: &str, value: impl Into<Value>) {
        let value = value.into();
        println!("  {what}: {value}");
        self.seen.push((what.to_owned(), value));
    }

    /// Notes how many damages ended how.
    fn note_fates(&mut self) -> anyhow::Result<()> {
        let fates = serde_json::to_value(&self.fates)?;
        self.note("all", fates);
        Ok(())
    }

    /// Notes a time, in seconds.
    fn seconds(&mut self, what: &str, time: std::time::Duration) {
        self.note(what, (time.as_secs_f64() * 1000.0).round() / 1000.0);
    }

    /// Notes an amount of memory, in MiB.
    fn mebibytes(&mut self, what: &str, bytes: u64) {
        self.note(what, bytes >> 20);
    }
}

impl Case {
    /// As `keelson-nemesis row` takes it.
    fn flags(self) -> String {
        let value = self.name.to_possible_value();
        let name = value.as_ref().map_or("", |value| value.get_name());
        match self.gigabytes {
            Some(gigabytes) => format!("{name} --gigabytes {gigabytes}"),
            None => name.to_owned(),
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.flags())
    }
}

impl Row {
    fn failed(case: Case, program: Program, why: &str) -> Self {
        Self {
            case,
            program,
            seconds: 0.0,
            seen: Vec::new(),
            failed: Some(why.to_owned()),
        }
    }
}

/// Makes a row and prints what is seen.
async fn make(folder: &Path, case: Case, program: Program, seed: u64) -> anyhow::Result<Row> {
    let begin = Instant::now();
    let mut notes = Notes {
        seen: Vec::new(),
        fates: damage::Fates::new(),
    };
    let setup = Setup::of(program, seed);
    let scratch = tempfile::tempdir_in(folder)?;
    let folder = scratch.path();
    match case.name {
        Name::FlippedBits => flipped_bits::make(folder, setup, &mut notes).await?,
        Name::TornLog => torn_log::make(folder, setup, &mut notes).await?,
        Name::FullDisk => full_disk::make(folder, setup, &mut notes).await?,
        Name::StalledDisk => stalled_disk::make(folder, setup, &mut notes).await?,
        Name::LeaseTime => lease_time::make(folder, setup, &mut notes).await?,
        Name::HugeRange => huge_range::make(folder, setup, &mut notes).await?,
        Name::SlowWatcher => slow_watcher::make(folder, setup, &mut notes).await?,
        Name::Defragment => defragment::make(folder, setup, &mut notes).await?,
        Name::Compaction => compaction::make(folder, setup, &mut notes).await?,
        Name::Restart => {
            let gigabytes = case.gigabytes.unwrap_or(1);
            restart::make(folder, setup, gigabytes, &mut notes).await?;
        }
    }
    Ok(Row {
        case,
        program,
        seconds: begin.elapsed().as_secs_f64(),
        seen: notes.seen,
        failed: None,
    })
}
