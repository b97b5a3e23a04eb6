//! Writes what is observed of a guest into its object's status.

use jiff::Timestamp;
use keelson_api::{
    ConditionStatus, DeviceState, DeviceStatus, InterfaceStatus, Kind, Phase, Placement,
    PlacementState, VirtualMachine, VirtualMachineStatus, set_condition,
};

use super::layer::GuestRuntime;
use super::plan::Plan;
use super::runtime::Problem;
use crate::fleet::{LeaseCheck, claim};
use crate::migration::transitions;
use crate::{Agent, AgentError, error::Result};

/// Writes what is observed of a guest into its object's status.
#[derive(Debug)]
pub struct StatusWriter {
    agent: Agent,
    name: String,
    /// The last failure that was told as an event.
    told: Option<(String, String)>,
}

impl StatusWriter {
    /// Writes the status of the guest `name`.
    pub fn new(agent: &Agent, name: &str) -> Self {
        Self {
            agent: agent.clone(),
            name: name.into(),
            told: None,
        }
    }

    /// It is being set up, where no other host can be meant.
    pub async fn starting(&self, guest: &VirtualMachine) -> Result<()> {
        self.write(guest, |status| {
            if status.phase != Phase::Failed {
                status.phase = Phase::Starting;
                ready(
                    status,
                    ConditionStatus::False,
                    "Starting",
                    "its devices are being set up",
                );
            }
        })
        .await
    }

    /// It is being set up, on this host and on these terms: a transaction that holds only if the guest is
    /// placed here and this lease of the host lives. Whether it does.
    pub async fn claim(
        &self,
        guest: &VirtualMachine,
        state: PlacementState,
        lease: &LeaseCheck,
    ) -> Result<bool> {
        let Some(lease) = lease.compare(&self.agent.fleet) else {
            return Ok(false);
        };
        let (host, epoch) = (self.agent.fleet.host(), claim::epoch_of(guest));
        let generation = guest.metadata.generation;
        let claim = |guest: &mut VirtualMachine| {
            guest.status.observed_generation = generation;
            claim::claim(guest, host, epoch, state)
        };
        match self
            .agent
            .objects
            .update_when(&self.name, &[lease], claim)
            .await
        {
            Ok(claimed) => Ok(claimed.is_some()),
            Err(AgentError::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// It runs on other terms from now on; whether that could be said while the host's lease lives.
    pub async fn change_terms(
        &self,
        guest: &VirtualMachine,
        state: PlacementState,
    ) -> Result<bool> {
        let lease = self.agent.fleet.lease_check();
        let Some(lease) = lease.compare(&self.agent.fleet) else {
            return Ok(false);
        };
        let (host, epoch) = (self.agent.fleet.host(), claim::epoch_of(guest));
        let change = |guest: &mut VirtualMachine| claim::change_terms(guest, host, epoch, state);
        let changed = self
            .agent
            .objects
            .update_when(&self.name, &[lease], change)
            .await;
        Ok(changed?.is_some())
    }

    /// Nothing of it is left on this host, and it is to be placed on another one.
    pub async fn released(&self, guest: &VirtualMachine) -> Result<()> {
        self.write(guest, |status| {
            status.phase = Phase::Pending;
            not_running(status);
            status.interfaces.clear();
            if let Some(placement) = &mut status.placement {
                placement.state = PlacementState::Released;
            }
            let message = "its host is being drained; it is to be placed on another one";
            ready(status, ConditionStatus::False, "Released", message);
        })
        .await
    }

    /// It runs here since before guests were placed: this is where it is placed.
    pub async fn take_over(&self, guest: &VirtualMachine) -> Result<()> {
        let host = self.agent.fleet.host().to_owned();
        let update = |guest: &mut VirtualMachine| {
            guest.status.placement.get_or_insert_with(|| Placement {
                host: host.clone(),
                epoch: 1,
                state: PlacementState::Held,
            });
        };
        let name = &guest.metadata.name;
        self.agent.objects.update(name, update).await.map(drop)
    }

    /// It runs; `problem` is what is wrong all the same.
    pub async fn running(
        &mut self,
        guest: &VirtualMachine,
        runtime: &dyn GuestRuntime,
        plan: Option<&Plan>,
        problem: Option<Problem>,
    ) -> Result<()> {
        let host = self.agent.inventory.hostname.clone();
        let paused = runtime.is_paused().await;
        let process_id = runtime.process_id();
        let running = runtime.running();
        let restart = plan
            .zip(running)
            .map(|(plan, running)| running.needs_restart(&plan.hardware));
        let devices = runtime.devices();
        let terms = if runtime.is_leased() {
            PlacementState::Leased
        } else {
            PlacementState::Held
        };
        self.write(guest, |status| {
            if let Some(placement) = &mut status.placement {
                placement.state = terms;
            }
            status.phase = if paused {
                Phase::Paused
            } else {
                Phase::Running
            };
            status.host = Some(host.clone());
            status.process_id = process_id;
            status.running_generation = running.map(|running| running.generation);
            status.started_at = running
                .and_then(|running| Timestamp::from_millisecond(running.started_at_unix_ms).ok());
            match &problem {
                None if paused => ready(
                    status,
                    ConditionStatus::False,
                    "Paused",
                    "it stands still until it is resumed",
                ),
                None => ready(
                    status,
                    ConditionStatus::True,
                    "Running",
                    "its processors run",
                ),
                Some((reason, message)) => {
                    ready(status, ConditionStatus::False, reason, message);
                }
            }
            if let Some(plan) = plan {
                status.interfaces = interfaces(plan);
            }
            status.devices.clone_from(&devices);
            devices_pending(status);
            restart_required(status, restart.unwrap_or(false));
        })
        .await?;
        match problem {
            None => self.told = None,
            Some((reason, message)) => self.tell(reason, &message).await,
        }
        Ok(())
    }

    /// It was asked to shut down.
    pub async fn stopping(&self, guest: &VirtualMachine) -> Result<()> {
        self.write(guest, |status| {
            status.phase = Phase::Stopping;
            ready(
                status,
                ConditionStatus::False,
                "Stopping",
                "the power button is pressed",
            );
        })
        .await
    }

    /// It does not run, and will not by itself.
    pub async fn stopped(&self, guest: &VirtualMachine, reason: &str, message: &str) -> Result<()> {
        // A reason that was given when it ended says more than that it does not run.
        if guest.status.phase == Phase::Stopped
            && guest.status.observed_generation == guest.metadata.generation
        {
            return Ok(());
        }
        self.write(guest, |status| {
            status.phase = Phase::Stopped;
            not_running(status);
            ready(status, ConditionStatus::False, reason, message);
        })
        .await
    }

    /// It ended by itself and will be started again.
    pub async fn restarting(
        &self,
        guest: &VirtualMachine,
        reason: &str,
        message: &str,
    ) -> Result<()> {
        self.write(guest, |status| {
            status.phase = Phase::Failed;
            status.restarts = status.restarts.saturating_add(1);
            not_running(status);
            ready(status, ConditionStatus::False, reason, message);
        })
        .await
    }

    /// It was killed since the host's lease was about to end; whatever its restart policy, it is to run.
    pub async fn fenced(&self, guest: &VirtualMachine, reason: &str, message: &str) -> Result<()> {
        self.write(guest, |status| {
            status.phase = Phase::Pending;
            status.restarts = status.restarts.saturating_add(1);
            not_running(status);
            ready(status, ConditionStatus::False, reason, message);
        })
        .await
    }

    /// It can't be started, or ended by a failure and is left so.
    pub async fn failed(
        &mut self,
        guest: &VirtualMachine,
        reason: &str,
        message: &str,
    ) -> Result<()> {
        self.write(guest, |status| {
            status.phase = Phase::Failed;
            not_running(status);
            ready(status, ConditionStatus::False, reason, message);
        })
        .await?;
        self.tell(reason, message).await;
        Ok(())
    }

    async fn tell(&mut self, reason: &str, message: &str) {
        let failure = (reason.to_owned(), message.to_owned());
        if self.told.as_ref() != Some(&failure) {
            let events = &self.agent.events;
            events
                .warning(Kind::VirtualMachine, &self.name, reason, message)
                .await;
            self.told = Some(failure);
        }
    }

    async fn write(
        &self,
        guest: &VirtualMachine,
        mut change: impl FnMut(&mut VirtualMachineStatus) + Send,
    ) -> Result<()> {
        let generation = guest.metadata.generation;
        let placed = |guest: &VirtualMachine| {
            let placement = guest.status.placement.as_ref();
            placement.map(|placement| (placement.host.clone(), placement.epoch))
        };
        let given = placed(guest);
        let update = |guest: &mut VirtualMachine| {
            // It was placed elsewhere meanwhile: what is observed here counts no more.
            if placed(guest) != given {
                return;
            }
            guest.status.observed_generation = generation;
            change(&mut guest.status);
        };
        match self.agent.objects.update(&self.name, update).await {
            // It was deleted meanwhile, so that nobody wants to know.
            Ok(_) | Err(AgentError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

fn ready(status: &mut VirtualMachineStatus, value: ConditionStatus, reason: &str, message: &str) {
    set_condition(&mut status.conditions, "Ready", value, reason, message);
}

/// Says which devices are to come and go, and why they don't.
fn devices_pending(status: &mut VirtualMachineStatus) {
    let devices = status.devices.iter();
    let pending: Vec<_> = devices.filter(|device| is_pending(device)).collect();
    let Some(first) = pending.first() else {
        let conditions = &mut status.conditions;
        return conditions.retain(|condition| condition.kind != "DevicesPending");
    };
    let reason = first.reason.as_deref().unwrap_or("UnderWay").to_owned();
    let message = pending.iter().map(|device| {
        let under_way = || format!("{:?} {} is {:?}", device.kind, device.name, device.state);
        device.message.clone().unwrap_or_else(under_way)
    });
    let message = message.collect::<Vec<_>>().join("; ");
    set_condition(
        &mut status.conditions,
        "DevicesPending",
        ConditionStatus::True,
        &reason,
        &message,
    );
}

/// Whether a device is to come or go.
pub fn is_pending(device: &DeviceStatus) -> bool {
    device.state != DeviceState::Attached || device.reason.is_some()
}

fn restart_required(status: &mut VirtualMachineStatus, required: bool) {
    let known = status
        .conditions
        .iter()
        .any(|condition| condition.kind == "RestartRequired");
    let mut devices = status.devices.iter();
    let memory = |device: &DeviceStatus| device.reason.as_deref() == Some("MemoryNotShared");
    if required || devices.any(memory) {
        let message = "the spec changed in what a running guest keeps; stop and start it";
        let conditions = &mut status.conditions;
        set_condition(
            conditions,
            "RestartRequired",
            ConditionStatus::True,
            "SpecChanged",
            message,
        );
    } else if known {
        status
            .conditions
            .retain(|condition| condition.kind != "RestartRequired");
    }
}

fn not_running(status: &mut VirtualMachineStatus) {
    transitions::fail(status, "the guest does not run any more");
    status.process_id = None;
    status.started_at = None;
    status.running_generation = None;
    if let Some(placement) = &mut status.placement {
        placement.state = PlacementState::Assigned;
    }
    status.devices.clear();
    devices_pending(status);
    restart_required(status, false);
}

fn interfaces(plan: &Plan) -> Vec<InterfaceStatus> {
    let status = |port: &crate::host::GuestPort| InterfaceStatus {
        name: port.interface.clone(),
        device: port.device(),
        address: port.address,
        address_v6: port.address_v6,
        mac: port.mac,
    };
    plan.ports.iter().map(status).collect()
}
