//! What is done to disks, whether guests use them or not.

use std::path::PathBuf;
use std::time::Duration;

use keelson_api::{Disk, DiskSpec, Kind, Object};
use keelson_blk::Error;
use keelson_blk::control::Request;
use keelson_blk::overlay::{OverlayError, snapshot as overlay};
use serde_json::Value;

use super::{GuestPaths, disk_backend, disk_image};
use crate::host::ProcessHandle;
use crate::{Agent, AgentError, error::Result};

/// How long a keelson-blk may take to answer what it only reads.
const READ_LIMIT: Duration = Duration::from_secs(3);

/// A disk that is being served to a guest of this host.
#[derive(Clone, Debug)]
pub struct ServedDisk {
    /// The disk's name.
    pub disk: String,
    /// The guest's.
    pub guest: String,
    /// The name by which the guest knows it.
    pub attachment: String,
    paths: GuestPaths,
}

impl ServedDisk {
    /// What its keelson-blk says about it, and its counters.
    ///
    /// # Errors
    /// [`AgentError::Process`] if it doesn't answer.
    pub async fn statistics(&self) -> Result<Value> {
        let mut answer = self.read(Request::List).await?;
        Ok(answer["disks"][0].take())
    }

    /// Its page for Prometheus.
    ///
    /// # Errors
    /// [`AgentError::Process`] if it doesn't answer.
    pub async fn metrics(&self) -> Result<String> {
        let answer = self.read(Request::Metrics).await?;
        let text = answer["text"].as_str().unwrap_or_default();
        Ok(text.to_owned())
    }

    async fn read(&self, request: Request) -> Result<Value> {
        let answer = disk_backend::control(&self.paths, &self.attachment, request);
        let late = |_| AgentError::Process {
            reason: "DiskBackendLate",
            message: format!("disk {}: keelson-blk doesn't answer", self.disk),
        };
        let answer = tokio::time::timeout(READ_LIMIT, answer).await;
        answer.map_err(late)?
    }
}

/// The disks whose keelson-blk runs, ordered by guest.
///
/// # Errors
/// If objects or records can't be read.
pub async fn served_disks(agent: &Agent) -> Result<Vec<ServedDisk>> {
    let world = agent.objects.world().await?;
    let mut served = Vec::new();
    for stored in world.of_kind(Kind::VirtualMachine) {
        let Object::VirtualMachine(guest) = &stored.object else {
            continue;
        };
        let paths = GuestPaths::new(&agent.config, &guest.metadata.name);
        for attachment in &guest.spec.disks {
            let record = paths.disk_record(&attachment.name);
            let process = ProcessHandle::find(&record)?;
            if matches!(process, Some(Ok(process)) if process.has_ended().is_none()) {
                served.push(ServedDisk {
                    disk: attachment.disk.clone(),
                    guest: guest.metadata.name.clone(),
                    attachment: attachment.name.clone(),
                    paths: paths.clone(),
                });
            }
        }
    }
    Ok(served)
}

/// Makes a snapshot of a disk, beside its image. Returns where it is.
///
/// # Errors
/// [`AgentError::NotFound`], [`AgentError::Invalid`] for the snapshot's name,
/// [`AgentError::Precondition`] if this disk can't have it.
pub async fn snapshot(agent: &Agent, name: &str, snapshot: &str) -> Result<PathBuf> {
    let disk = agent.objects.get_typed::<Disk>(name).await?.object;
    overlay::check_name(snapshot).map_err(|reason| AgentError::Invalid(vec![reason.into()]))?;
    let refuse = |reason: &str| {
        let reason = format!("Disk/{name}: {reason}");
        Err(AgentError::Precondition(vec![reason]))
    };
    if !disk.spec.is_overlay() {
        return refuse("only overlays have snapshots; this is a raw image");
    }
    if disk.spec.read_only {
        return refuse("it is read-only, so it holds what its image holds");
    }
    if let Some(reason) = elsewhere(agent, &disk).await? {
        return refuse(&reason);
    }
    let served = served_disks(agent).await?;
    let path = match served.into_iter().find(|served| served.disk == name) {
        Some(served) => {
            let request = Request::Snapshot {
                id: served.attachment.clone(),
                name: snapshot.to_owned(),
            };
            let answer = disk_backend::control(&served.paths, &served.attachment, request).await?;
            PathBuf::from(answer["path"].as_str().unwrap_or_default())
        }
        None => snapshot_unused(disk.spec, snapshot.to_owned()).await?,
    };
    let message = format!("{} holds what the disk held", path.display());
    let events = &agent.events;
    events
        .normal(Kind::Disk, name, "SnapshotTaken", message)
        .await;
    Ok(path)
}

// What is on another host, or in use there, is not to be opened here.
async fn elsewhere(agent: &Agent, disk: &Disk) -> Result<Option<String>> {
    if agent.fleet.is_exclusive() {
        return Ok(None);
    }
    let ask =
        |host: &str| format!("it is on the host {host}, and this is another one; ask its agent");
    if let Some(host) = disk
        .spec
        .host
        .as_deref()
        .filter(|host| *host != agent.fleet.host())
    {
        return Ok(Some(ask(host)));
    }
    let world = agent.objects.world().await?;
    for stored in world.of_kind(Kind::VirtualMachine) {
        let Object::VirtualMachine(guest) = &stored.object else {
            continue;
        };
        let mut disks = guest.spec.disks.iter();
        let has = disks.any(|attachment| attachment.disk == disk.metadata.name);
        let placement = guest.status.placement.as_ref();
        if let Some(placement) = placement.filter(|_| has && !agent.fleet.is_here(guest)) {
            return Ok(Some(ask(&placement.host)));
        }
    }
    Ok(None)
}

// The image's lock keeps a guest that starts meanwhile from it.
async fn snapshot_unused(spec: DiskSpec, name: String) -> Result<PathBuf> {
    let failed = |message: String| AgentError::Process {
        reason: "SnapshotFailed",
        message,
    };
    let made = tokio::task::spawn_blocking(move || {
        let cipher = disk_image::cipher(&spec)?;
        overlay::snapshot(&spec.path, &name, cipher).map_err(|error| match error {
            Error::ImageInUse { .. } | Error::Overlay(OverlayError::Refused { .. }) => {
                AgentError::Precondition(vec![error.to_string()])
            }
            error => failed(error.to_string()),
        })
    });
    made.await.map_err(|error| failed(error.to_string()))?
}
