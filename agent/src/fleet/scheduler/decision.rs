//! What the scheduler makes of a guest.

use keelson_api::{
    ConditionStatus, Phase, Placement, PlacementState, VirtualMachine, set_condition,
};

use crate::migration::transitions;

/// What is to be done for a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Nothing.
    Nothing,
    /// It is placed on this host.
    Place {
        /// The host.
        host: String,
        /// The host that it was on, whose lease has ended.
        lost: Option<String>,
    },
    /// It is to run, and no host takes it.
    Wait {
        /// Why.
        message: String,
        /// The host that it was on, whose lease has ended.
        lost: Option<String>,
    },
    /// Its host's lease has ended, and it is not moved.
    Stay {
        /// The host.
        host: String,
        /// Why.
        message: String,
    },
    /// It is to be shut down and is nowhere.
    Rest,
    /// It is being deleted, and nothing of it is anywhere.
    Remove {
        /// The host that it was on, whose lease has ended.
        lost: Option<String>,
    },
}

impl Decision {
    /// The guest as the decision makes it.
    pub fn carry_out(&self, guest: &VirtualMachine) -> VirtualMachine {
        let mut guest = guest.clone();
        let generation = guest.metadata.generation;
        let status = &mut guest.status;
        let mut condition = |kind: &str, value, reason: &str, message: &str| {
            set_condition(&mut status.conditions, kind, value, reason, message);
        };
        let (yes, no) = (ConditionStatus::True, ConditionStatus::False);
        match self {
            Self::Nothing | Self::Remove { .. } => {}
            Self::Place { host, lost } => {
                condition(
                    "Scheduled",
                    yes,
                    "Placed",
                    &format!("it is placed on {host}"),
                );
                if let Some(lost) = lost {
                    let message = format!("its host {lost} is lost; it is started on {host}");
                    condition("Ready", no, "FailedOver", &message);
                }
                transitions::fail(status, "the guest was placed anew");
                status.phase = Phase::Pending;
                status.process_id = None;
                status.started_at = None;
                status.running_generation = None;
                status.interfaces.clear();
                status.devices.clear();
                let epoch = status
                    .placement
                    .as_ref()
                    .map_or(0, |placement| placement.epoch);
                status.placement = Some(Placement {
                    host: host.clone(),
                    epoch: epoch + 1,
                    state: PlacementState::Assigned,
                });
            }
            Self::Wait { message, lost } => {
                condition("Scheduled", no, "NoHostFits", message);
                if let Some(lost) = lost {
                    let message = format!("its host {lost} is lost; {message}");
                    condition("Ready", no, "HostLost", &message);
                    status.phase = Phase::Pending;
                } else {
                    condition("Ready", no, "NoHostFits", message);
                }
            }
            Self::Stay { message, .. } => {
                condition("Ready", ConditionStatus::Unknown, "HostLost", message);
            }
            Self::Rest => {
                if status.phase != Phase::Stopped || status.observed_generation != generation {
                    condition("Ready", no, "PoweredOff", "it is shut down, as desired");
                    status.phase = Phase::Stopped;
                    status.observed_generation = generation;
                }
            }
        }
        guest
    }

    /// What to tell as an event: whether it is of the expected course, a word, and a sentence.
    pub fn event(&self) -> Option<(bool, &'static str, String)> {
        match self {
            Self::Place { host, lost: None } => {
                Some((true, "Scheduled", format!("it is placed on {host}")))
            }
            Self::Place {
                host,
                lost: Some(lost),
            } => Some((
                false,
                "FailedOver",
                format!("the lease of its host {lost} has ended; it is placed on {host}"),
            )),
            Self::Wait { message, .. } => Some((false, "NoHostFits", message.clone())),
            Self::Stay { message, .. } => Some((false, "HostLost", message.clone())),
            Self::Nothing | Self::Rest | Self::Remove { .. } => None,
        }
    }
}
