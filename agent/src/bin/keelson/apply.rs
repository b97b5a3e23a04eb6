//! `keelson apply`

use std::io::Read;
use std::path::PathBuf;

use anyhow::{Context, anyhow};
use clap::Args;
use keelson_api::manifest;
use keelson_api::proto::apply_result::Action;
use keelson_api::proto::{ApplyRequest, ApplyResult};
use serde_json::Value;

use crate::client::{Client, decode};
use crate::failure::Failure;
use crate::output::{Format, line, print_objects};

/// Create or change all objects of a manifest, or none of them.
///
/// More than 100 objects are applied in steps of 100, those first that others refer to; each step as a
/// whole or not at all.
#[derive(Args)]
pub struct Apply {
    /// The manifest, YAML or JSON; - for standard input.
    #[arg(short, long)]
    filename: PathBuf,
    /// Check everything, change nothing.
    #[arg(long)]
    dry_run: bool,
    /// How to print what was applied.
    #[arg(short, long, value_enum)]
    output: Option<Format>,
}

impl Apply {
    /// Runs the command.
    pub async fn run(self, client: &mut Client) -> Result<(), Failure> {
        let documents = manifest::parse(&read(&self.filename)?)?;
        let results = self.apply(client, documents).await?;
        if let Some(format) = self.output {
            let objects = results.iter().filter_map(|result| result.object.as_ref());
            let objects = objects.map(decode).collect::<Result<Vec<_>, _>>()?;
            return print_objects(format, &objects, objects.len() == 1);
        }
        for result in &results {
            let action = match result.action() {
                Action::Created => "created",
                Action::Configured => "configured",
                Action::Unchanged => "unchanged",
                Action::Unspecified => "applied",
            };
            let object = result.object.as_ref();
            let (kind, name) = object.map_or(("?", "?"), |o| (o.kind.as_str(), o.name.as_str()));
            let note = if self.dry_run { " (dry run)" } else { "" };
            line(&format!("{kind}/{name} {action}{note}"))?;
        }
        Ok(())
    }

    async fn apply(
        &self,
        client: &mut Client,
        documents: Vec<Value>,
    ) -> Result<Vec<ApplyResult>, Failure> {
        let all = documents.len();
        let steps = manifest::steps(documents)?;
        if self.dry_run && steps.len() > 1 {
            return Err(anyhow!(
                "a dry run can't check {all} objects, which are applied in {} steps: what a later one \
                 refers to would not be there",
                steps.len()
            )
            .into());
        }
        let mut results = Vec::new();
        for documents in steps {
            let request = ApplyRequest {
                documents,
                dry_run: self.dry_run,
            };
            match client.objects.apply(request).await {
                Ok(response) => results.extend(response.into_inner().results),
                Err(status) => {
                    if !results.is_empty() && !self.dry_run {
                        let done = results.len();
                        eprintln!("keelson: {done} of {all} objects were applied before this:");
                    }
                    return Err(status.into());
                }
            }
        }
        Ok(results)
    }
}

/// Reads a manifest, of at most the size that is accepted and a byte more, which then says so.
pub fn read(path: &PathBuf) -> Result<String, Failure> {
    let limit = manifest::SIZE_LIMIT as u64 + 1;
    let mut text = String::new();
    if path.as_os_str() == "-" {
        std::io::stdin()
            .take(limit)
            .read_to_string(&mut text)
            .context("read the manifest from standard input")?;
    } else {
        std::fs::File::open(path)
            .and_then(|file| file.take(limit).read_to_string(&mut text))
            .with_context(|| format!("read the manifest {}", path.display()))?;
    }
    Ok(text)
}
