//! Breaks clusters of real processes on purpose, keelson-state's and etcd's alike, and checks what
//! their clients saw.

mod admin;
mod cluster;
mod convert;
mod disk;
mod faults;
mod network;
mod program;
mod record;
mod rows;
mod run;
mod sandbox;
mod workload;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{Parser, Subcommand, ValueEnum as _};
use keelson_checker::{History, Limits, check};

use crate::program::Program;
use crate::rows::RowFlags;
use crate::run::RunFlags;
use crate::sandbox::Side;

/// Breaks clusters of real processes on purpose, and checks what their clients saw.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs once.
    Run(RunFlags),
    /// Runs again and again, each time with the next seed.
    Soak {
        /// How long.
        #[arg(long, default_value_t = 60)]
        minutes: u64,
        #[command(flatten)]
        run: RunFlags,
    },
    /// Makes one row of docs/reliability.md.
    Row {
        /// Which.
        #[arg(value_enum)]
        name: rows::Name,
        #[command(flatten)]
        flags: RowFlags,
        /// Where to write it as JSON.
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// Makes all rows, for both programs.
    Rows {
        /// Those of both programs; or --program alone.
        #[arg(long)]
        all: bool,
        #[command(flatten)]
        flags: RowFlags,
        /// Where to write them as JSON.
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// Checks a history that was kept.
    Check {
        /// history.json
        file: PathBuf,
    },
}

fn main() -> ExitCode {
    let options = Options::parse();
    match start(&options) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("keelson-nemesis: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn start(options: &Options) -> anyhow::Result<ExitCode> {
    if let Command::Check { file } = &options.command {
        let file = std::io::BufReader::new(std::fs::File::open(file)?);
        let history: History = serde_json::from_reader(file).context("read the history")?;
        let report = check(&history, &Limits::default());
        print!("{report}");
        return Ok(code(report.holds()));
    }
    let folder = match sandbox::enter()? {
        Side::Inside(folder) => folder,
        Side::Outside(code) => return Ok(code),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let holds = runtime.block_on(async {
        match &options.command {
            Command::Run(flags) => once(&folder, flags).await,
            Command::Soak { minutes, run } => soak(&folder, run, *minutes).await,
            Command::Row { name, flags, json } => {
                make_rows(&folder, &[*name], &[flags.program], flags, json.as_deref()).await
            }
            Command::Rows { all, flags, json } => {
                let programs = if *all {
                    Program::value_variants()
                } else {
                    &[flags.program]
                };
                let names = rows::Name::value_variants();
                make_rows(&folder, names, programs, flags, json.as_deref()).await
            }
            Command::Check { .. } => Ok(false),
        }
    })?;
    Ok(code(holds))
}

async fn once(folder: &Path, flags: &RunFlags) -> anyhow::Result<bool> {
    let outcome = run::run(folder, flags).await?;
    print!("{}", outcome.report);
    println!("{}", outcome.summary);
    Ok(outcome.report.holds())
}

async fn soak(folder: &Path, flags: &RunFlags, minutes: u64) -> anyhow::Result<bool> {
    let begin = Instant::now();
    let mut failed = Vec::new();
    let mut flags = flags.clone();
    let mut runs = 0;
    while begin.elapsed() < Duration::from_secs(60 * minutes) {
        let scratch = tempfile::tempdir_in(folder)?;
        let outcome = run::run(scratch.path(), &flags).await;
        runs += 1;
        match &outcome {
            Ok(outcome) => {
                let word = if outcome.report.holds() {
                    "holds"
                } else {
                    "BROKEN"
                };
                println!("{word}: {}", outcome.summary);
                for (rule, verdict) in &outcome.report.verdicts {
                    if *verdict != keelson_checker::Verdict::Holds {
                        println!("  {rule}: {verdict}");
                    }
                }
            }
            Err(error) => println!("FAILED: seed {}: {error:#}", flags.seed),
        }
        if !outcome.is_ok_and(|outcome| outcome.report.holds()) {
            failed.push(flags.seed);
        }
        flags.seed += 1;
    }
    println!("{runs} runs in {:.0?}; failed: {failed:?}", begin.elapsed());
    Ok(failed.is_empty())
}

/// True if each could be made; what they show is for people to judge.
async fn make_rows(
    folder: &Path,
    names: &[rows::Name],
    programs: &[Program],
    flags: &RowFlags,
    json: Option<&Path>,
) -> anyhow::Result<bool> {
    let mut made = Vec::new();
    let mut all = true;
    for name in names {
        for program in programs {
            let mut flags = flags.clone();
            flags.program = *program;
            match rows::make(folder, *name, &flags).await {
                Ok(row) => made.push(row),
                Err(error) => {
                    println!("  it could not be made: {error:#}");
                    all = false;
                }
            }
        }
    }
    if let Some(json) = json {
        let file =
            std::fs::File::create(json).with_context(|| format!("write {}", json.display()))?;
        serde_json::to_writer_pretty(file, &made)?;
    }
    Ok(all)
}

fn code(holds: bool) -> ExitCode {
    if holds {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
