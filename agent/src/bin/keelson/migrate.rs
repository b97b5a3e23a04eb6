//! `keelson migrate`

use std::io::IsTerminal as _;
use std::time::Duration;

use clap::{Args, Subcommand};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use keelson_api::proto::{CancelMigrationRequest, MigrateRequest};
use keelson_api::{Kind, MemorySize, Migration, MigrationPhase, Object, TimeLimit};

use crate::client::{Client, decode};
use crate::failure::Failure;
use crate::output::{Format, line, print_value};
use crate::wait;

/// Move a running guest to another host, without shutting it down.
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Migrate {
    #[command(flatten)]
    begin: Begin,
    #[command(subcommand)]
    command: Option<MigrateCommand>,
}

#[derive(Args)]
struct Begin {
    /// The guest; all of its disks are shared ones.
    #[arg(required = true)]
    name: Option<String>,
    /// The host that it is to move to; if not given, the one that it would be placed on.
    host: Option<String>,
    /// How much may be sent in a second while the guest runs, such as 100Mi; as much as can be if not given.
    #[arg(long)]
    bandwidth: Option<MemorySize>,
    /// How long the guest may stand still while the rest of its memory is sent, in milliseconds, as far as
    /// that can be foreseen.
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 300)]
    downtime: u64,
    /// Do not wait until it has moved.
    #[arg(long)]
    no_wait: bool,
    /// How long to wait; the guest goes on moving when this is over.
    #[arg(long, default_value = "1h")]
    timeout: TimeLimit,
    /// How to print what came of it.
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

#[derive(Subcommand)]
enum MigrateCommand {
    /// Let a guest that is moving stay where it is.
    Cancel(Cancel),
}

#[derive(Args)]
struct Cancel {
    /// The guest.
    name: String,
}

impl Migrate {
    /// Runs the command.
    pub async fn run(self, client: &mut Client) -> Result<(), Failure> {
        match self.command {
            Some(MigrateCommand::Cancel(Cancel { name })) => {
                let request = CancelMigrationRequest { name: name.clone() };
                client.guests.cancel_migration(request).await?;
                line(&format!("VirtualMachine/{name} stays where it is"))
            }
            None => self.begin.run(client).await,
        }
    }
}

impl Begin {
    async fn run(self, client: &mut Client) -> Result<(), Failure> {
        let name = self.name.unwrap_or_default();
        let request = MigrateRequest {
            name: name.clone(),
            host: self.host.unwrap_or_default(),
            bytes_per_second: self.bandwidth.map_or(0, MemorySize::bytes),
            downtime_milliseconds: self.downtime,
        };
        let object = decode(&client.guests.migrate(request).await?.into_inner())?;
        let begun = migration_of(Some(&object))
            .ok_or_else(|| anyhow::anyhow!("the agent's answer has no migration"))?;
        if self.no_wait {
            return match self.output {
                Format::Json | Format::Yaml => print_value(self.output, &begun),
                _ => line(&format!(
                    "VirtualMachine/{name} is moving from {} to {}",
                    begun.source, begun.destination
                )),
            };
        }
        let ended = follow(client, &name, &begun, self.timeout.duration()).await?;
        report(self.output, &name, &ended)
    }
}

/// Shows how a move gets on until it is over; how it ended.
async fn follow(
    client: &mut Client,
    name: &str,
    begun: &Migration,
    limit: Duration,
) -> Result<Migration, Failure> {
    let bar = bar(begun);
    let mut ended = None;
    let over = |object: Option<&Object>| {
        let migration = migration_of(object).filter(|migration| migration.id == begun.id);
        let Some(migration) = migration else {
            return true;
        };
        show(&bar, &migration);
        let over = !migration.phase.is_active();
        ended = over.then_some(migration);
        over
    };
    let kind = Kind::VirtualMachine;
    let waited = wait::until(client, kind, name, limit, "moved", over).await;
    bar.finish_and_clear();
    waited?;
    ended.ok_or_else(|| {
        let message = "it was deleted, or is moving again, before it was seen how this move ended";
        Failure::Other(anyhow::anyhow!("VirtualMachine/{name}: {message}"))
    })
}

/// A bar for people; nothing where standard error is no terminal.
fn bar(begun: &Migration) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{prefix} {bar:30} {percent:>3}%  {msg}");
    let bar = ProgressBar::new(1);
    bar.set_prefix(format!("{} → {}", begun.source, begun.destination));
    style.map_or(bar.clone(), |style| bar.with_style(style))
}

fn show(bar: &ProgressBar, migration: &Migration) {
    let Some(progress) = &migration.progress else {
        return bar.set_message(migration.phase.to_string());
    };
    let done = progress
        .memory_bytes
        .saturating_sub(progress.remaining_bytes);
    bar.set_length(progress.memory_bytes);
    bar.set_position(done);
    bar.set_message(format!(
        "round {}, {} sent, {} left, {}/s",
        progress.rounds + 1,
        HumanBytes(progress.sent_bytes),
        HumanBytes(progress.remaining_bytes),
        HumanBytes(progress.bytes_per_second),
    ));
}

fn report(format: Format, name: &str, ended: &Migration) -> Result<(), Failure> {
    if matches!(format, Format::Json | Format::Yaml) {
        print_value(format, ended)?;
    }
    if ended.phase != MigrationPhase::Completed {
        let source = &ended.source;
        return Err(Failure::Other(anyhow::anyhow!(
            "VirtualMachine/{name} did not move to {}: {}; `keelson get vm {name}` says whether it \
             goes on on {source}",
            ended.destination,
            ended.message
        )));
    }
    match format {
        Format::Json | Format::Yaml => Ok(()),
        Format::Name => line(&format!("VirtualMachine/{name}")),
        Format::Table => line(&match ended.downtime_milliseconds {
            Some(downtime) => format!(
                "VirtualMachine/{name} runs on {}; it stood still for {downtime} ms",
                ended.destination
            ),
            None => format!("VirtualMachine/{name} runs on {}", ended.destination),
        }),
    }
}

fn migration_of(object: Option<&Object>) -> Option<Migration> {
    match object? {
        Object::VirtualMachine(guest) => guest.status.migration.clone(),
        _ => None,
    }
}
