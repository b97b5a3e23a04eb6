//! Pausing guests, and their snapshots.

use keelson_api::proto::{Snapshot, TakeSnapshotRequest, TakeSnapshotResponse};
use keelson_api::{DeviceState, Object, Phase, PowerState, VirtualMachine, validate_name};
use keelson_vmm::api::{AfterSnapshot, SnapshotKind, SnapshotRequest};

use crate::guest::{GuestPaths, GuestSnapshots, Machine, SnapshotEntry};
use crate::objects::set_power_state;
use crate::{Agent, AgentError, error::Result};

/// The running virtual machine of a guest.
fn machine(agent: &Agent, name: &str) -> Result<Machine> {
    let paths = GuestPaths::new(&agent.config, name);
    match Machine::find(&paths)? {
        Some(Ok(machine)) => Ok(machine),
        _ => Err(precondition(format!(
            "VirtualMachine/{name} does not run; `keelson start {name}` starts it"
        ))),
    }
}

/// Lets a guest stand still.
pub async fn pause(agent: &Agent, name: &str) -> Result<Object> {
    machine(agent, name)?.pause().await?;
    observed(agent, name, Phase::Paused).await
}

/// Lets a guest that stands still go on.
pub async fn resume(agent: &Agent, name: &str) -> Result<Object> {
    let machine = machine(agent, name)?;
    // Its disks change from here on.
    GuestSnapshots::new(&agent.config, name).forget_disks()?;
    machine.resume().await?;
    observed(agent, name, Phase::Running).await
}

/// Writes the phase at once; the guest's actor looks itself when it sees the change.
async fn observed(agent: &Agent, name: &str, phase: Phase) -> Result<Object> {
    let update = |guest: &mut VirtualMachine| {
        if matches!(guest.status.phase, Phase::Running | Phase::Paused) {
            guest.status.phase = phase;
        }
    };
    let stored = agent.objects.update(name, update).await?;
    Ok(Object::VirtualMachine(stored.object))
}

/// Takes a snapshot.
pub async fn take(agent: &Agent, request: TakeSnapshotRequest) -> Result<TakeSnapshotResponse> {
    let TakeSnapshotRequest {
        name,
        snapshot,
        differential,
        stop,
    } = request;
    let guest = agent.objects.get_typed::<VirtualMachine>(&name).await?;
    validate_name(&snapshot)
        .map_err(|message| AgentError::Invalid(vec![format!("the snapshot's name {message}")]))?;
    let machine = machine(agent, &name)?;
    let snapshots = GuestSnapshots::new(&agent.config, &name);
    let directory = snapshots.directory(&snapshot);
    if directory.exists() {
        let message = format!("VirtualMachine/{name} has a snapshot {snapshot:?} already");
        return Err(precondition(message));
    }
    let mut devices = guest.object.status.devices.iter();
    if let Some(device) = devices.find(|device| device.state != DeviceState::Attached) {
        return Err(precondition(format!(
            "VirtualMachine/{name}: {:?} {} is {:?}, and what a snapshot has of it could not be restored; \
             `keelson describe vm {name}` says what it waits for",
            device.kind, device.name, device.state
        )));
    }
    if !stop && writes_disks(agent, &guest.object).await? {
        return Err(precondition(format!(
            "VirtualMachine/{name} writes to disks, which would not be as the snapshot's memory has \
             them later: take it with --stop, which shuts the guest off with its disks as they are"
        )));
    }
    let taken = machine
        .snapshot(SnapshotRequest {
            directory: snapshots.create()?.join(&snapshot),
            kind: if differential {
                SnapshotKind::Differential
            } else {
                SnapshotKind::Full
            },
            then: if stop {
                AfterSnapshot::Pause
            } else {
                AfterSnapshot::Resume
            },
        })
        .await?;
    if stop {
        snapshots.keep_disks(&snapshot)?;
        set_power_state(&agent.objects, &name, PowerState::Stopped).await?;
    }
    Ok(TakeSnapshotResponse {
        directory: directory.display().to_string(),
        memory_bytes: taken.memory_bytes,
        paused_microseconds: taken.paused_us,
    })
}

/// The snapshots of a guest.
pub async fn list(agent: &Agent, name: &str) -> Result<Vec<Snapshot>> {
    agent.objects.get_typed::<VirtualMachine>(name).await?;
    let snapshots = GuestSnapshots::new(&agent.config, name);
    let listing = tokio::task::spawn_blocking(move || snapshots.list()).await;
    let list = listing
        .map_err(|error| AgentError::io("list snapshots")(std::io::Error::other(error)))??;
    Ok(list.into_iter().map(entry).collect())
}

fn entry(entry: SnapshotEntry) -> Snapshot {
    Snapshot {
        name: entry.name,
        unix_milliseconds: entry.taken_at_unix_ms,
        differential: entry.base.is_some(),
        base: entry.base.unwrap_or_default(),
        disk_bytes: entry.disk_bytes,
        problem: entry.problem.unwrap_or_default(),
    }
}

/// Deletes a snapshot.
pub async fn delete(agent: &Agent, name: &str, snapshot: &str) -> Result<()> {
    agent.objects.get_typed::<VirtualMachine>(name).await?;
    check_name(snapshot)?;
    GuestSnapshots::new(&agent.config, name).remove(snapshot)
}

/// Starts a guest that doesn't run from a snapshot.
pub async fn restore(agent: &Agent, name: &str, snapshot: &str) -> Result<Object> {
    let guest = agent
        .objects
        .get_typed::<VirtualMachine>(name)
        .await?
        .object;
    check_name(snapshot)?;
    let off = matches!(guest.status.phase, Phase::Stopped | Phase::Failed);
    if !off || machine(agent, name).is_ok() {
        return Err(precondition(format!(
            "VirtualMachine/{name} is {}; `keelson stop {name}` first: what it does now is lost by \
             going on from a snapshot",
            guest.status.phase
        )));
    }
    let snapshots = GuestSnapshots::new(&agent.config, name);
    if writes_disks(agent, &guest).await? && snapshots.disks_as_of().as_deref() != Some(snapshot) {
        return Err(precondition(format!(
            "VirtualMachine/{name} has disks that are not as they were in snapshot {snapshot:?}: it \
             has run since, or was not shut off with it"
        )));
    }
    snapshots.restore_next(snapshot)?;
    set_power_state(&agent.objects, name, PowerState::Running).await
}

/// A name that leaves the guest's folder names nothing in it.
fn check_name(snapshot: &str) -> Result<()> {
    validate_name(snapshot)
        .map_err(|message| AgentError::Invalid(vec![format!("the snapshot's name {message}")]))
}

async fn writes_disks(agent: &Agent, guest: &VirtualMachine) -> Result<bool> {
    for attachment in &guest.spec.disks {
        let disk = agent
            .objects
            .get_typed::<keelson_api::Disk>(&attachment.disk)
            .await?;
        if !disk.object.spec.read_only {
            return Ok(true);
        }
    }
    Ok(false)
}

fn precondition(message: String) -> AgentError {
    AgentError::Precondition(vec![message])
}
