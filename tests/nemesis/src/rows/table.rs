use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context as _;
use serde_json::Value;

use super::{Case, Row};
use crate::program::Program;

/// Rows that were made.
#[derive(Debug, Default)]
pub struct Table {
    rows: Vec<Row>,
}

impl Table {
    /// Adds a row, in place of the same one that was made before.
    pub fn add(&mut self, row: Row) {
        let same = |other: &&mut Row| (other.case, other.program) == (row.case, row.program);
        match self.rows.iter_mut().find(same) {
            Some(before) => *before = row,
            None => self.rows.push(row),
        }
    }

    /// Adds rows that were written as JSON.
    pub fn read(&mut self, file: &Path) -> anyhow::Result<()> {
        let what = || format!("read rows from {}", file.display());
        let text = std::fs::read_to_string(file).with_context(what)?;
        let rows: Vec<Row> = serde_json::from_str(&text).with_context(what)?;
        for row in rows {
            self.add(row);
        }
        Ok(())
    }

    /// Rows that could not be made.
    pub fn failed(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(|row| row.failed.is_some())
    }

    /// All of it, for [`Table::read`].
    pub fn json(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string_pretty(&self.rows)?)
    }

    /// What was seen, the programs side by side, and the command that shows it again.
    pub fn markdown(&self) -> String {
        let mut cases: Vec<Case> = Vec::new();
        for row in &self.rows {
            if !cases.contains(&row.case) {
                cases.push(row.case);
            }
        }
        let mut text =
            "| row | what was seen | keelson-state | etcd |\n| --- | --- | --- | --- |\n"
                .to_owned();
        for case in cases {
            let cells = [Program::KeelsonState, Program::Etcd].map(|program| {
                self.rows
                    .iter()
                    .find(|row| row.case == case && row.program == program)
            });
            let command = format!("`keelson-nemesis row {}`", case.flags());
            let mut first = command.as_str();
            for what in Self::seen_by_any(&cells) {
                let [keelson, etcd] =
                    cells.map(|row| row.map_or(String::new(), |row| row.cell(&what)));
                let _ = writeln!(
                    text,
                    "| {first} | {} | {keelson} | {etcd} |",
                    escaped(&what)
                );
                first = "";
            }
        }
        text
    }

    /// What either row noted, in the order in which it was.
    fn seen_by_any(rows: &[Option<&Row>]) -> Vec<String> {
        let mut all = Vec::new();
        for row in rows.iter().flatten() {
            let seen = row.seen.iter().map(|(what, _)| what.clone());
            for what in seen.chain(row.failed.as_ref().map(|_| FAILED.to_owned())) {
                if !all.contains(&what) {
                    all.push(what);
                }
            }
        }
        all
    }
}

const FAILED: &str = "could not be made";

impl Row {
    fn cell(&self, what: &str) -> String {
        if what == FAILED {
            return self.failed.as_deref().map(escaped).unwrap_or_default();
        }
        let seen = self.seen.iter().find(|(name, _)| name == what);
        let text = match seen.map(|(_, value)| value) {
            None => String::new(),
            Some(Value::String(text)) => text.clone(),
            Some(Value::Object(counts)) if counts.is_empty() => "none".to_owned(),
            Some(Value::Object(counts)) => {
                let counts = counts
                    .iter()
                    .map(|(name, count)| format!("{name}: {count}"));
                counts.collect::<Vec<_>>().join("; ")
            }
            Some(Value::Bool(is)) => if *is { "yes" } else { "no" }.to_owned(),
            Some(other) => other.to_string(),
        };
        escaped(&text)
    }
}

fn escaped(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // A test that can't go on panics.
mod tests {
    use super::super::Name;
    use super::*;

    fn row(program: Program, seen: &[(&str, Value)], failed: Option<&str>) -> Row {
        Row {
            case: Case {
                name: Name::Restart,
                gigabytes: Some(4),
            },
            program,
            seconds: 1.0,
            seen: seen
                .iter()
                .map(|(what, value)| ((*what).to_owned(), value.clone()))
                .collect(),
            failed: failed.map(str::to_owned),
        }
    }

    #[test]
    fn programs_are_side_by_side() {
        let mut table = Table::default();
        table.add(row(Program::KeelsonState, &[("b, s", 9.into())], None));
        // Made again.
        table.add(row(
            Program::KeelsonState,
            &[("b, s", 0.5.into()), ("a", true.into())],
            None,
        ));
        table.add(row(Program::Etcd, &[("b, s", 7.into())], Some("no | room")));
        let written = table.json().unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), written).unwrap();
        let mut again = Table::default();
        again.read(file.path()).unwrap();
        let expected = "\
| row | what was seen | keelson-state | etcd |
| --- | --- | --- | --- |
| `keelson-nemesis row restart --gigabytes 4` | b, s | 0.5 | 7 |
|  | a | yes |  |
|  | could not be made |  | no \\| room |
";
        assert_eq!(again.markdown(), expected);
        assert_eq!(again.failed().count(), 1);
    }
}
