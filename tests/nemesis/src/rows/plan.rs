use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;

use super::table::Table;
use super::{Case, Name, Row, RowFlags, make};
use crate::program::Program;

/// Where rows are written.
#[derive(Debug, Clone, Args)]
pub struct Files {
    /// Where to write them as JSON; it is written anew after each row.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Where to write them as a table in Markdown.
    #[arg(long)]
    markdown: Option<PathBuf>,
}

/// The rows that are to be made.
pub struct Plan {
    rows: Vec<(Case, Program)>,
    seed: u64,
}

impl Plan {
    /// Rows of these names, each for each of the programs; those about much data for each amount.
    pub fn of(names: &[Name], programs: &[Program], flags: &RowFlags) -> Self {
        let mut rows = Vec::new();
        for name in names {
            let cases = match name {
                Name::Restart => flags.gigabytes.iter().map(|gb| Some(*gb)).collect(),
                _ => vec![None],
            };
            for gigabytes in cases {
                let case = Case {
                    name: *name,
                    gigabytes,
                };
                rows.extend(programs.iter().map(|program| (case, *program)));
            }
        }
        Self {
            rows,
            seed: flags.seed,
        }
    }

    /// Makes them. One that can't be made is noted as such, and the next one is made. True if each
    /// could be; what they show is for people to judge.
    pub async fn make(self, folder: &Path, files: &Files) -> anyhow::Result<bool> {
        let begin = Instant::now();
        let mut table = Table::default();
        let count = self.rows.len();
        for (number, (case, program)) in self.rows.into_iter().enumerate() {
            println!(
                "[{}/{count}, after {:.0?}] {case} of {}",
                number + 1,
                begin.elapsed(),
                program.name()
            );
            let limit = case.time_limit();
            let made = tokio::time::timeout(limit, make(folder, case, program, self.seed));
            let row = match made.await {
                Ok(Ok(row)) => row,
                Ok(Err(error)) => Row::failed(case, program, &format!("{error:#}")),
                Err(_) => Row::failed(case, program, &format!("not done within {limit:.0?}")),
            };
            if let Some(why) = &row.failed {
                println!("  it could not be made: {why}");
            }
            table.add(row);
            files.write(&table)?;
        }
        println!("{count} rows in {:.0?}", begin.elapsed());
        for row in table.failed() {
            println!("  {} of {} could not be made", row.case, row.program.name());
        }
        Ok(table.failed().next().is_none())
    }
}

impl Files {
    fn write(&self, table: &Table) -> anyhow::Result<()> {
        let write = |file: &Path, text: String| {
            std::fs::write(file, text).with_context(|| format!("write {}", file.display()))
        };
        if let Some(file) = &self.json {
            write(file, table.json()?)?;
        }
        if let Some(file) = &self.markdown {
            write(file, table.markdown())?;
        }
        Ok(())
    }
}

impl Case {
    /// After which it is given up: on a slow machine it takes a tenth of that.
    fn time_limit(self) -> Duration {
        match self.gigabytes {
            Some(gigabytes) => Duration::from_mins(10 + 6 * gigabytes),
            None => Duration::from_mins(30),
        }
    }
}
