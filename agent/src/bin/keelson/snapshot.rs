//! `keelson pause`, `resume`, `snapshot` and `restore`

use clap::{Args, Subcommand};
use jiff::Timestamp;
use keelson_api::TimeLimit;
use keelson_api::proto::{
    DeleteSnapshotRequest, ListSnapshotsRequest, PauseRequest, RestoreRequest, ResumeRequest,
    Snapshot, TakeSnapshotRequest,
};
use serde_json::json;

use crate::client::Client;
use crate::failure::Failure;
use crate::output::{Format, line, print_lines, print_value, table, time};
use crate::power::{wait_until_runs, wait_until_stopped};

/// Let a guest stand still.
#[derive(Args)]
pub struct Pause {
    /// The guest.
    name: String,
}

/// Let a guest that stands still go on.
#[derive(Args)]
pub struct Resume {
    /// The guest.
    name: String,
}

/// Take guests' snapshots and look after them.
#[derive(Subcommand)]
pub enum SnapshotCommand {
    /// Take a snapshot of a running or paused guest's memory and devices.
    ///
    /// A guest that writes to disks must be shut off with it (--stop), and can go on from it as long as it
    /// was not started otherwise.
    Take(Take),
    /// List a guest's snapshots.
    List(List),
    /// Delete a snapshot.
    Delete(Delete),
}

/// Take a snapshot.
#[derive(Args)]
pub struct Take {
    /// The guest.
    name: String,
    /// The snapshot's name.
    snapshot: String,
    /// Only what changed since the snapshot before, which must be kept then.
    #[arg(long)]
    differential: bool,
    /// Shut the guest off afterwards, with its disks as they are in the snapshot.
    #[arg(long)]
    stop: bool,
    /// With --stop, how long to wait until it is shut off.
    #[arg(long, default_value = "2m")]
    timeout: TimeLimit,
    /// How to print what was taken.
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

/// List a guest's snapshots.
#[derive(Args)]
pub struct List {
    /// The guest.
    name: String,
    /// How to print them.
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

/// Delete a snapshot.
#[derive(Args)]
pub struct Delete {
    /// The guest.
    name: String,
    /// The snapshot's name.
    snapshot: String,
}

/// Start a guest from a snapshot.
#[derive(Args)]
pub struct Restore {
    /// The guest, which doesn't run.
    name: String,
    /// The snapshot's name.
    snapshot: String,
    /// Do not wait until it runs.
    #[arg(long)]
    no_wait: bool,
    /// How long to wait.
    #[arg(long, default_value = "1m")]
    timeout: TimeLimit,
}

impl Pause {
    /// Runs the command.
    pub async fn run(self, client: &mut Client) -> Result<(), Failure> {
        let name = self.name.clone();
        client.guests.pause(PauseRequest { name }).await?;
        line(&format!("VirtualMachine/{} is paused", self.name))
    }
}

impl Resume {
    /// Runs the command.
    pub async fn run(self, client: &mut Client) -> Result<(), Failure> {
        let name = self.name.clone();
        client.guests.resume(ResumeRequest { name }).await?;
        line(&format!("VirtualMachine/{} goes on", self.name))
    }
}

impl SnapshotCommand {
    /// Runs the command.
    pub async fn run(self, client: &mut Client) -> Result<(), Failure> {
        match self {
            Self::Take(command) => command.run(client).await,
            Self::List(command) => command.run(client).await,
            Self::Delete(command) => command.run(client).await,
        }
    }
}

impl Take {
    async fn run(self, client: &mut Client) -> Result<(), Failure> {
        let request = TakeSnapshotRequest {
            name: self.name.clone(),
            snapshot: self.snapshot.clone(),
            differential: self.differential,
            stop: self.stop,
        };
        let taken = client.guests.take_snapshot(request).await?.into_inner();
        if self.stop {
            wait_until_stopped(client, &self.name, 0, self.timeout.duration()).await?;
        }
        match self.output {
            Format::Name => line(&self.snapshot),
            Format::Table => line(&format!(
                "VirtualMachine/{}: snapshot {} has {} MiB of memory; the guest {}",
                self.name,
                self.snapshot,
                taken.memory_bytes >> 20,
                if self.stop {
                    "is shut off".into()
                } else {
                    format!("stood still for {} ms", taken.paused_microseconds / 1000)
                }
            )),
            format => print_value(
                format,
                &json!({
                    "name": self.snapshot,
                    "directory": taken.directory,
                    "memoryBytes": taken.memory_bytes,
                    "pausedMicroseconds": taken.paused_microseconds,
                    "stopped": self.stop,
                }),
            ),
        }
    }
}

impl List {
    async fn run(self, client: &mut Client) -> Result<(), Failure> {
        let name = self.name.clone();
        let response = client.guests.list_snapshots(ListSnapshotsRequest { name });
        let snapshots = response.await?.into_inner().snapshots;
        match self.output {
            Format::Table => print_table(&snapshots),
            Format::Name => snapshots
                .iter()
                .try_for_each(|snapshot| line(&snapshot.name)),
            format => {
                let items: Vec<_> = snapshots.iter().map(as_json).collect();
                print_value(format, &json!({"kind": "List", "items": items}))
            }
        }
    }
}

impl Delete {
    async fn run(self, client: &mut Client) -> Result<(), Failure> {
        let request = DeleteSnapshotRequest {
            name: self.name.clone(),
            snapshot: self.snapshot.clone(),
        };
        client.guests.delete_snapshot(request).await?;
        line(&format!(
            "VirtualMachine/{}: snapshot {} is deleted",
            self.name, self.snapshot
        ))
    }
}

impl Restore {
    /// Runs the command.
    pub async fn run(self, client: &mut Client) -> Result<(), Failure> {
        let request = RestoreRequest {
            name: self.name.clone(),
            snapshot: self.snapshot.clone(),
        };
        let object = client.guests.restore(request).await?.into_inner();
        if self.no_wait {
            return line(&format!(
                "VirtualMachine/{} is starting from snapshot {}",
                self.name, self.snapshot
            ));
        }
        let generation = crate::client::decode(&object)?.metadata().generation;
        wait_until_runs(client, &self.name, generation, self.timeout.duration()).await?;
        line(&format!(
            "VirtualMachine/{} runs from snapshot {}",
            self.name, self.snapshot
        ))
    }
}

fn taken_at(snapshot: &Snapshot) -> Option<Timestamp> {
    let known = snapshot.problem.is_empty();
    known
        .then(|| Timestamp::from_millisecond(snapshot.unix_milliseconds).ok())
        .flatten()
}

fn as_json(snapshot: &Snapshot) -> serde_json::Value {
    let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    json!({
        "name": snapshot.name,
        "takenAt": taken_at(snapshot).map(time),
        "differential": snapshot.differential,
        "base": text(&snapshot.base),
        "diskBytes": snapshot.disk_bytes,
        "problem": text(&snapshot.problem),
    })
}

fn print_table(snapshots: &[Snapshot]) -> Result<(), Failure> {
    if snapshots.is_empty() {
        eprintln!("nothing found");
        return Ok(());
    }
    let mut table = table(["NAME", "TAKEN", "KIND", "DISK", "USABLE"]);
    for snapshot in snapshots {
        table.add_row([
            snapshot.name.clone(),
            taken_at(snapshot).map_or("-".into(), time),
            match &snapshot.base[..] {
                "" => "full".into(),
                base => format!("difference to {base}"),
            },
            format!("{}Mi", snapshot.disk_bytes.div_ceil(1 << 20)),
            match &snapshot.problem[..] {
                "" => "yes".into(),
                problem => format!("no: {problem}"),
            },
        ]);
    }
    print_lines(&table)
}
