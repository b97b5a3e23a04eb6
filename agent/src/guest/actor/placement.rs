//! Whether a guest may run on this host, on which terms, and how it is given up.

use std::time::Duration;

use keelson_api::{Disk, Failover, Kind, PlacementState, VirtualMachine};

use super::{GuestActor, Next, interface_names};
use crate::fleet::{LeaseCheck, is_movable};
use crate::{AgentError, error::Result};

/// Whether a guest may be started.
#[derive(Clone, Debug)]
pub(super) enum Permit {
    /// Whatever becomes of the host's lease.
    Free,
    /// As long as this lease lasts.
    Leased(LeaseCheck),
    /// It may not.
    NotNow,
}

impl GuestActor {
    /// Whether the guest may be started here, and on which terms, once that is said in its object.
    pub(super) async fn may_start(&self, guest: &VirtualMachine) -> Result<Permit> {
        if self.agent.fleet.is_exclusive() {
            self.status.starting(guest).await?;
            return Ok(Permit::Free);
        }
        let leased = self.is_leasable(guest).await?;
        let state = if leased {
            self.agent.fleet.arm_guard().await?;
            PlacementState::Leased
        } else {
            PlacementState::Held
        };
        // The very lease that is compared: if the host has another one later, much may have happened.
        let lease = self.agent.fleet.lease_check();
        if !self.status.claim(guest, state, &lease).await? {
            tracing::info!(
                guest = self.name,
                "not started: it is placed elsewhere, or this host's lease ended"
            );
            return Ok(Permit::NotNow);
        }
        Ok(if leased {
            Permit::Leased(lease)
        } else {
            Permit::Free
        })
    }

    /// Whether the guest is to run on the host's lease, so that it can be started elsewhere.
    pub(super) async fn is_leasable(&self, guest: &VirtualMachine) -> Result<bool> {
        Ok(guest.spec.failover == Failover::Restart && self.is_movable(guest).await?)
    }

    pub(super) async fn is_movable(&self, guest: &VirtualMachine) -> Result<bool> {
        let mut disks = Vec::new();
        for attachment in &guest.spec.disks {
            match self.agent.objects.get_typed::<Disk>(&attachment.disk).await {
                Ok(disk) => disks.push(disk.object),
                Err(AgentError::NotFound { .. }) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(is_movable(guest, disks.iter().map(|disk| &disk.spec)))
    }

    /// Whether the guest is to leave this host, which is drained.
    pub(super) async fn is_leaving(&self, guest: &VirtualMachine) -> Result<bool> {
        Ok(self.agent.fleet.is_draining() && self.is_movable(guest).await?)
    }

    /// Gives up a guest of which nothing runs, so that it is placed elsewhere.
    pub(super) async fn release(&mut self, guest: &VirtualMachine) -> Result<Next> {
        self.runtime.tear_down(&interface_names(guest)).await?;
        self.stopping_since = None;
        self.status.released(guest).await?;
        let message = "nothing of it is left on this host, which is being drained";
        let events = &self.agent.events;
        events
            .normal(Kind::VirtualMachine, &self.name, "Released", message)
            .await;
        Ok(Next::Gone)
    }

    /// Removes what is here of a guest that is placed elsewhere.
    pub(super) async fn leave(&mut self, guest: &VirtualMachine) -> Result<Next> {
        let status = &guest.status;
        let is_ours = status.host.as_deref() == Some(self.agent.fleet.host());
        if status.placement.is_none() && is_ours && self.runtime.is_running() {
            self.status.take_over(guest).await?;
            return Ok(Next::After(Duration::ZERO));
        }
        if let Some(exit) = self.runtime.take_exit().await {
            let events = &self.agent.events;
            events
                .warning(Kind::VirtualMachine, &self.name, exit.reason, &exit.message)
                .await;
        }
        if self.runtime.is_running() {
            let message = "it runs here, but was placed elsewhere";
            let events = &self.agent.events;
            events
                .warning(Kind::VirtualMachine, &self.name, "Killed", message)
                .await;
            self.runtime.kill().await;
        }
        self.runtime.tear_down(&interface_names(guest)).await?;
        Ok(Next::Gone)
    }

    /// Puts a running guest on the host's lease or takes it off, as its object desires.
    pub(super) async fn adjust_terms(&mut self, guest: &VirtualMachine) -> Result<()> {
        if self.agent.fleet.is_exclusive() {
            return Ok(());
        }
        match (self.is_leasable(guest).await?, self.runtime.is_leased()) {
            (true, false) => {
                self.agent.fleet.arm_guard().await?;
                // The object says so with the next status, after what makes it true.
                self.runtime.put_on_lease(self.agent.fleet.lease_check())
            }
            (false, true)
                if self
                    .status
                    .change_terms(guest, PlacementState::Held)
                    .await? =>
            {
                self.runtime.take_off_lease()
            }
            _ => Ok(()),
        }
    }
}
