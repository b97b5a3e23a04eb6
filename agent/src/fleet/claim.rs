//! What a host writes into a guest's object before it starts the guest, or changes on which terms it
//! runs. Each is part of a transaction that compares the host's lease.

use keelson_api::{ConditionStatus, Phase, PlacementState, VirtualMachine, set_condition};

/// Whether a guest is placed on a host.
pub fn is_placed_on(guest: &VirtualMachine, host: &str) -> bool {
    guest.status.placement.as_ref().is_some_and(|placement| {
        placement.host == host && placement.state != PlacementState::Released
    })
}

/// How often the guest has been placed.
pub fn epoch_of(guest: &VirtualMachine) -> Option<u64> {
    guest
        .status
        .placement
        .as_ref()
        .map(|placement| placement.epoch)
}

/// Says that the host starts the guest on these terms; `false`, and nothing is changed, if the guest is
/// not placed there any more, or was placed anew since `epoch`.
pub fn claim(
    guest: &mut VirtualMachine,
    host: &str,
    epoch: Option<u64>,
    state: PlacementState,
) -> bool {
    if !change_terms(guest, host, epoch, state) {
        return false;
    }
    let status = &mut guest.status;
    status.host = Some(host.into());
    if status.phase != Phase::Failed {
        status.phase = Phase::Starting;
        let message = "its devices are being set up";
        let no = ConditionStatus::False;
        set_condition(&mut status.conditions, "Ready", no, "Starting", message);
    }
    true
}

/// Says that the guest goes on on these terms; `false` as [`claim`].
pub fn change_terms(
    guest: &mut VirtualMachine,
    host: &str,
    epoch: Option<u64>,
    state: PlacementState,
) -> bool {
    if !is_placed_on(guest, host) || epoch_of(guest) != epoch {
        return false;
    }
    if let Some(placement) = &mut guest.status.placement {
        placement.state = state;
    }
    true
}
