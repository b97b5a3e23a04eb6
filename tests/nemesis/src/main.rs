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
mod soak;
mod workload;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, Subcommand, ValueEnum as _};
use keelson_checker::{History, Limits, check};

use crate::program::Program;
use crate::rows::{Files, RowFlags, Table};
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
        #[command(flatten)]
        files: Files,
    },
    /// Makes all rows. One that can't be made is reported, and the next one is made.
    Rows {
        /// Those of both programs, one after the other; or --program alone.
        #[arg(long)]
        all: bool,
        #[command(flatten)]
        flags: RowFlags,
        #[command(flatten)]
        files: Files,
    },
    /// Prints rows that were written as JSON as a table in Markdown.
    Table {
        /// Of `row` or `rows`; of several, later ones come in place of the same earlier ones.
        #[arg(required = true)]
        files: Vec<PathBuf>,
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
    match &options.command {
        Command::Check { file } => {
            let file = std::io::BufReader::new(std::fs::File::open(file)?);
            let history: History = serde_json::from_reader(file).context("read the history")?;
            let report = check(&history, &Limits::default());
            print!("{report}");
            return Ok(code(report.holds()));
        }
        Command::Table { files } => {
            let mut table = Table::default();
            for file in files {
                table.read(file)?;
            }
            print!("{}", table.markdown());
            return Ok(ExitCode::SUCCESS);
        }
        _ => {}
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
            Command::Soak { minutes, run } => {
                soak::soak(&folder, run, Duration::from_secs(60 * minutes)).await
            }
            Command::Row { name, flags, files } => {
                let made = rows::Plan::of(&[*name], &[flags.program], flags);
                made.make(&folder, files).await
            }
            Command::Rows { all, flags, files } => {
                let programs = if *all {
                    Program::value_variants()
                } else {
                    &[flags.program]
                };
                let made = rows::Plan::of(rows::Name::value_variants(), programs, flags);
                made.make(&folder, files).await
            }
            Command::Check { .. } | Command::Table { .. } => Ok(false),
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

fn code(holds: bool) -> ExitCode {
    if holds {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
