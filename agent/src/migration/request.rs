//! What people ask for: that a guest moves, or stays.

use jiff::Timestamp;
use keelson_api::{
    ConditionStatus, Kind, Migration, MigrationLimits, MigrationPhase, Phase, PlacementState,
    PowerState, VirtualMachine,
};
use keelson_controlplane::Compare;

use super::transitions;
use crate::fleet::{choose_destination, host_key};
use crate::objects::Stored;
use crate::{Agent, AgentError, error::Result};

/// Has a guest move to the host `wanted`, or to the one that it would be placed on.
///
/// # Errors
/// [`AgentError::Precondition`] that says why it can't move, or why no host takes it.
pub async fn request(
    agent: &Agent,
    name: &str,
    wanted: Option<&str>,
    limits: MigrationLimits,
) -> Result<Stored<VirtualMachine>> {
    if agent.fleet.is_exclusive() {
        return Err(refused(
            name,
            "this agent's state store belongs to its host alone: there is no other host (docs/fleet.md)",
        ));
    }
    let guest: VirtualMachine = agent.objects.get_typed(name).await?.object;
    let source = check(&guest).map_err(|reason| refused(name, &reason))?;
    let destination = choose_destination(agent, name, wanted)
        .await?
        .map_err(|reason| refused(name, &reason))?;
    let migration = Migration {
        id: uuid::Uuid::new_v4().to_string(),
        source: source.clone(),
        destination: destination.clone(),
        phase: MigrationPhase::Requested,
        requested_at: Timestamp::now(),
        ended_at: None,
        limits,
        terms: None,
        progress: None,
        downtime_milliseconds: None,
        flows_moved: None,
        flows_left: None,
        message: String::new(),
    };
    let begin = |guest: &mut VirtualMachine| {
        let unchanged = check(guest).is_ok_and(|now| now == source);
        if unchanged {
            guest.status.migration = Some(migration.clone());
        }
        unchanged
    };
    let alive = [&source, &destination].map(|host| Compare::exists(host_key(host)));
    let stored = agent.objects.update_when(name, &alive, begin).await?;
    let stored = stored.ok_or_else(|| AgentError::Conflict(format!("VirtualMachine/{name}")))?;
    let message = format!("it is to move from {source} to {destination}");
    let events = &agent.events;
    events
        .normal(Kind::VirtualMachine, name, "MigrationRequested", message)
        .await;
    Ok(stored)
}

/// Lets a guest that is moving stay.
///
/// # Errors
/// [`AgentError::Precondition`] where it is not moving, or has moved.
pub async fn cancel(agent: &Agent, name: &str) -> Result<Stored<VirtualMachine>> {
    let mut canceled = false;
    let update = |guest: &mut VirtualMachine| {
        let id = transitions::active(guest).map(|active| active.id.clone());
        canceled = id.is_some_and(|id| {
            transitions::stay(guest, &id, MigrationPhase::Canceled, "it was canceled")
        });
    };
    let stored = agent.objects.update(name, update).await?;
    if !canceled {
        return Err(refused(name, "it is not moving, or has moved already"));
    }
    let message = "it stays where it is, as somebody asked for";
    let events = &agent.events;
    events
        .normal(Kind::VirtualMachine, name, "MigrationCanceled", message)
        .await;
    Ok(stored)
}

/// The host that the guest is on, if it can leave it now.
fn check(guest: &VirtualMachine) -> std::result::Result<String, String> {
    if let Some(active) = transitions::active(guest) {
        return Err(format!("it is moving to {} already", active.destination));
    }
    let runs = guest.metadata.deletion_timestamp.is_none()
        && guest.spec.power_state == PowerState::Running
        && guest.status.phase == Phase::Running;
    let placement = guest.status.placement.as_ref();
    let held = |state| matches!(state, PlacementState::Held | PlacementState::Leased);
    let host = placement.filter(|placement| runs && held(placement.state));
    let Some(placement) = host else {
        return Err(format!("it does not run; it is {}", guest.status.phase));
    };
    let conditions = &guest.status.conditions;
    if conditions.iter().any(|condition| {
        condition.kind == "RestartRequired" && condition.status == ConditionStatus::True
    }) {
        return Err(
            "its spec changed in what a running guest keeps; stop and start it, or undo that"
                .into(),
        );
    }
    Ok(placement.host.clone())
}

fn refused(name: &str, reason: &str) -> AgentError {
    AgentError::Precondition(vec![format!(
        "VirtualMachine/{name} can't be moved: {reason}"
    )])
}
