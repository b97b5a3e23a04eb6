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
mod prober;
mod process;
mod restart;
mod slow_watcher;
mod stalled_disk;
mod torn_log;

use std::path::Path;
use std::time::Instant;

use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::program::Program;

/// One thing that goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
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
    /// How much data there is where it matters.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=100))]
    pub gigabytes: u64,
    /// Where bits are flipped is drawn from it.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// What was seen.
#[derive(Debug, Serialize)]
pub struct Row {
    name: Name,
    program: Program,
    seconds: f64,
    seen: Map<String, Value>,
}

/// What a row notes, printed at once.
pub struct Notes {
    seen: Map<String, Value>,
    fates: damage::Fates,
}

impl Notes {
    fn note(&mut self, what: &str, value: impl Into<Value>) {
        let value = value.into();
        println!("  {what}: {value}");
        self.seen.insert(what.to_owned(), value);
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

/// Makes a row and prints it.
pub async fn make(folder: &Path, name: Name, flags: &RowFlags) -> anyhow::Result<Row> {
    let begin = Instant::now();
    let title = name
        .to_possible_value()
        .map(|value| value.get_name().to_owned());
    println!("{} of {}", title.unwrap_or_default(), flags.program.name());
    let mut notes = Notes {
        seen: Map::new(),
        fates: damage::Fates::new(),
    };
    let scratch = tempfile::tempdir_in(folder)?;
    let folder = scratch.path();
    match name {
        Name::FlippedBits => flipped_bits::make(folder, flags, &mut notes).await?,
        Name::TornLog => torn_log::make(folder, flags, &mut notes).await?,
        Name::FullDisk => full_disk::make(folder, flags, &mut notes).await?,
        Name::StalledDisk => stalled_disk::make(folder, flags, &mut notes).await?,
        Name::LeaseTime => lease_time::make(folder, flags, &mut notes).await?,
        Name::HugeRange => huge_range::make(folder, flags, &mut notes).await?,
        Name::SlowWatcher => slow_watcher::make(folder, flags, &mut notes).await?,
        Name::Defragment => defragment::make(folder, flags, &mut notes).await?,
        Name::Compaction => compaction::make(folder, flags, &mut notes).await?,
        Name::Restart => restart::make(folder, flags, &mut notes).await?,
    }
    Ok(Row {
        name,
        program: flags.program,
        seconds: begin.elapsed().as_secs_f64(),
        seen: notes.seen,
    })
}
