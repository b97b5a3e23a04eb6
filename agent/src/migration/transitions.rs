//! What a move makes of a guest's object. Each is part of a transaction that holds only if the object has
//! not changed since it was read.

use jiff::Timestamp;
use keelson_api::{
    ConditionStatus, Migration, MigrationPhase, Phase, Placement, PlacementState, PowerState,
    VirtualMachine, VirtualMachineStatus, set_condition,
};

use super::FlowCount;
use crate::fleet::claim::{epoch_of, is_placed_on};

/// The move that is under way.
pub fn active(guest: &VirtualMachine) -> Option<&Migration> {
    let migration = guest.status.migration.as_ref();
    migration.filter(|migration| migration.phase.is_active())
}

/// Whether the guest is to come to `host`, and is not placed there yet.
pub fn is_expected_on(guest: &VirtualMachine, host: &str) -> bool {
    active(guest).is_some_and(|migration| {
        migration.destination == host && migration.phase != MigrationPhase::Moved
    })
}

/// The destination waits for the guest, which would run there on these terms; `false`, and nothing is
/// changed, if nobody wants that any more.
pub fn prepare(guest: &mut VirtualMachine, id: &str, terms: PlacementState) -> bool {
    let Some(migration) = current(guest, id) else {
        return false;
    };
    if migration.phase != MigrationPhase::Requested {
        return false;
    }
    migration.phase = MigrationPhase::Prepared;
    migration.terms = Some(terms);
    true
}

/// The guest is the destination's from now on; `false`, and nothing is changed, if it is not for
/// `source` any more to say so, or if the guest is to be shut down.
pub fn hand_over(
    guest: &mut VirtualMachine,
    source: &str,
    epoch: Option<u64>,
    id: &str,
    stopped_milliseconds: u64,
    flows: FlowCount,
) -> bool {
    let wanted = guest.metadata.deletion_timestamp.is_none()
        && guest.spec.power_state == PowerState::Running;
    if !wanted || !is_placed_on(guest, source) || epoch_of(guest) != epoch {
        return false;
    }
    let Some(migration) = current(guest, id) else {
        return false;
    };
    let (MigrationPhase::Prepared, Some(terms)) = (migration.phase, migration.terms) else {
        return false;
    };
    migration.phase = MigrationPhase::Moved;
    migration.downtime_milliseconds = Some(stopped_milliseconds);
    migration.flows_moved = Some(flows.moved);
    migration.flows_left = Some(flows.left);
    let host = migration.destination.clone();
    let status = &mut guest.status;
    let message = format!("it was moved to {host}");
    let yes = ConditionStatus::True;
    set_condition(
        &mut status.conditions,
        "Scheduled",
        yes,
        "Migrated",
        &message,
    );
    status.placement = Some(Placement {
        host: host.clone(),
        epoch: epoch.unwrap_or(0) + 1,
        state: terms,
    });
    status.host = Some(host);
    status.phase = Phase::Running;
    status.process_id = None;
    true
}

/// The guest runs on the destination.
pub fn complete(guest: &mut VirtualMachine, id: &str, downtime_milliseconds: Option<u64>) {
    if let Some(migration) = current(guest, id)
        && migration.phase == MigrationPhase::Moved
    {
        migration.downtime_milliseconds = downtime_milliseconds;
        end(migration, MigrationPhase::Completed, "");
    }
}

/// The guest stays where it is; `false`, and nothing is changed, if it has moved or is not moving.
/// Whatever transaction was to hand it over can't hold any more, since its object changes.
pub fn stay(guest: &mut VirtualMachine, id: &str, phase: MigrationPhase, message: &str) -> bool {
    match current(guest, id) {
        Some(migration) if migration.phase != MigrationPhase::Moved => {
            end(migration, phase, message);
            true
        }
        _ => false,
    }
}

/// The guest's move is over, since the guest does not run.
pub fn fail(status: &mut VirtualMachineStatus, message: &str) {
    if let Some(migration) = &mut status.migration
        && migration.phase.is_active()
    {
        end(migration, MigrationPhase::Failed, message);
    }
}

fn current<'a>(guest: &'a mut VirtualMachine, id: &str) -> Option<&'a mut Migration> {
    let migration = guest.status.migration.as_mut();
    migration.filter(|migration| migration.id == id && migration.phase.is_active())
}

fn end(migration: &mut Migration, phase: MigrationPhase, message: &str) {
    migration.phase = phase;
    migration.ended_at = Some(Timestamp::now());
    migration.progress = migration
        .progress
        .filter(|_| phase == MigrationPhase::Completed);
    message.clone_into(&mut migration.message);
}
