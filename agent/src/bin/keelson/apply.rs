//! `keelson apply`

use std::io::Read;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use keelson_api::manifest;
use keelson_api::proto::ApplyRequest;
use keelson_api::proto::apply_result::Action;

use crate::client::{Client, decode};
use crate::failure::Failure;
use crate::output::{Format, line, print_objects};

/// Create or change all objects of a manifest, or none of them.
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
        let documents = documents
            .iter()
            .map(serde_json::to_vec)
            .collect::<Result<_, _>>()?;
        let request = ApplyRequest {
            documents,
            dry_run: self.dry_run,
        };
        let response = client.objects.apply(request).await?.into_inner();
        if let Some(format) = self.output {
            let objects = response
                .results
                .iter()
                .filter_map(|result| result.object.as_ref());
            let objects = objects.map(decode).collect::<Result<Vec<_>, _>>()?;
            return print_objects(format, &objects, objects.len() == 1);
        }
        for result in &response.results {
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
