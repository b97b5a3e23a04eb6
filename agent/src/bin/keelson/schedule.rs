//! `keelson cordon`, `keelson uncordon` and `keelson drain`

use std::collections::BTreeSet;
use std::time::Duration;

use clap::Args;
use futures::TryStreamExt;
use keelson_api::proto::watch_event::Type;
use keelson_api::proto::{ScheduleRequest, WatchRequest};
use keelson_api::{Kind, Object, PlacementState, TimeLimit, VirtualMachine};

use crate::client::{Client, decode};
use crate::failure::Failure;
use crate::output::line;

/// Place no further guests on a host.
#[derive(Args)]
pub struct Cordon {
    /// The host.
    name: String,
}

/// Place guests on a host again.
#[derive(Args)]
pub struct Uncordon {
    /// The host.
    name: String,
}

/// Have the guests leave a host: each is moved to another host while it runs, or if it can't be, shut down
/// and started there.
#[derive(Args)]
pub struct Drain {
    /// The host.
    name: String,
    /// Shut all of them down; move none while it runs.
    #[arg(long)]
    no_live: bool,
    /// Do not wait until they have left.
    #[arg(long)]
    no_wait: bool,
    /// How long to wait.
    #[arg(long, default_value = "10m")]
    timeout: TimeLimit,
}

impl Cordon {
    /// Runs the command.
    pub async fn run(self, client: &mut Client) -> Result<(), Failure> {
        schedule(client, &self.name, true, None).await?;
        line(&format!("Host/{} is cordoned", self.name))
    }
}

impl Uncordon {
    /// Runs the command.
    pub async fn run(self, client: &mut Client) -> Result<(), Failure> {
        schedule(client, &self.name, false, None).await?;
        line(&format!("Host/{} takes guests", self.name))
    }
}

impl Drain {
    /// Runs the command.
    pub async fn run(self, client: &mut Client) -> Result<(), Failure> {
        let drain = Draining {
            live: !self.no_live,
        };
        schedule(client, &self.name, true, Some(drain)).await?;
        if self.no_wait {
            return line(&format!("Host/{} is being drained", self.name));
        }
        let stay = self.wait(client).await?;
        if stay.is_empty() {
            return line(&format!("Host/{} is drained", self.name));
        }
        let stay: Vec<_> = stay.into_iter().collect();
        Err(Failure::Other(anyhow::anyhow!(
            "Host/{} is drained but for guests that can run on no other host, since they have a disk \
             that isn't shared, or spec.host: {}",
            self.name,
            stay.join(", ")
        )))
    }

    /// Waits until all guests that can leave have left; those that can't.
    async fn wait(&self, client: &mut Client) -> Result<BTreeSet<String>, Failure> {
        let shared = shared_disks(client).await?;
        let limit = self.timeout.duration();
        let mut leaving = BTreeSet::new();
        let mut staying = BTreeSet::new();
        let waiting = async {
            let request = WatchRequest {
                kind: Kind::VirtualMachine.to_string(),
                name: String::new(),
            };
            let mut events = client.objects.watch(request).await?.into_inner();
            let mut listed = false;
            while let Some(event) = events.try_next().await? {
                listed |= event.r#type() == Type::Bookmark;
                if let Some(object) = &event.object {
                    leaving.remove(&object.name);
                    staying.remove(&object.name);
                    let gone = event.r#type() == Type::Deleted;
                    if !gone
                        && let Object::VirtualMachine(guest) = decode(object)?
                        && self.has(&guest)
                    {
                        let set = if can_leave(&guest, &shared) {
                            &mut leaving
                        } else {
                            &mut staying
                        };
                        set.insert(guest.metadata.name);
                    }
                }
                if listed && leaving.is_empty() {
                    return Ok(());
                }
            }
            Err(Failure::Other(anyhow::anyhow!("the agent ended meanwhile")))
        };
        match tokio::time::timeout(limit.max(Duration::from_millis(1)), waiting).await {
            Ok(waited) => waited.map(|()| staying),
            Err(_) => Err(Failure::TimedOut(format!(
                "Host/{} was not drained within {}; there are still {}",
                self.name,
                self.timeout,
                leaving.into_iter().collect::<Vec<_>>().join(", ")
            ))),
        }
    }

    fn has(&self, guest: &VirtualMachine) -> bool {
        guest.status.placement.as_ref().is_some_and(|placement| {
            placement.host == self.name && placement.state != PlacementState::Released
        })
    }
}

async fn shared_disks(client: &mut Client) -> Result<BTreeSet<String>, Failure> {
    let disks = client.list(Kind::Disk).await?.into_iter();
    Ok(disks
        .filter_map(|object| match object {
            Object::Disk(disk) if disk.spec.shared => Some(disk.metadata.name),
            _ => None,
        })
        .collect())
}

fn can_leave(guest: &VirtualMachine, shared: &BTreeSet<String>) -> bool {
    let mut disks = guest.spec.disks.iter();
    guest.spec.host.is_none() && disks.all(|attachment| shared.contains(&attachment.disk))
}

/// How guests leave.
struct Draining {
    /// While they run, where they can.
    live: bool,
}

async fn schedule(
    client: &mut Client,
    name: &str,
    unschedulable: bool,
    drain: Option<Draining>,
) -> Result<(), Failure> {
    let request = ScheduleRequest {
        name: name.into(),
        unschedulable,
        drain: drain.is_some(),
        no_live_migration: drain.is_some_and(|drain| !drain.live),
    };
    client.host.schedule(request).await?;
    Ok(())
}
