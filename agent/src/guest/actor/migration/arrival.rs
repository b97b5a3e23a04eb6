//! A guest that comes to this host.

use std::time::Duration;

use keelson_api::{Disk, Kind, Migration, MigrationPhase, PlacementState, VirtualMachine};
use tokio::time::Instant;

use super::super::super::movable::Stage;
use super::super::super::plan::{Plan, RunningPlan};
use super::super::{BACKOFF_FIRST, GuestActor, Next, interface_names};
use super::Moving;
use crate::AgentError;
use crate::error::Result;
use crate::failpoint::failpoint;
use crate::migration::{Arrival, ArrivalState, Ticket, transitions};

/// How long a guest waits for its turn to come here.
const TURN: Duration = Duration::from_secs(1);

impl GuestActor {
    /// Does what there is to do for a guest that is to come here; `None` if nothing of it is to be here.
    pub(in crate::guest::actor) async fn receive(
        &mut self,
        guest: &VirtualMachine,
    ) -> Result<Option<Next>> {
        let expected = transitions::active(guest).filter(|_| self.agent.fleet.is_expected(guest));
        let Some(migration) = expected.cloned() else {
            self.moving = Moving::default();
            self.discard_what_waits().await?;
            return Ok(None);
        };
        let arrival = self.moving.arrival.as_ref();
        let Some(arrival) = arrival.filter(|arrival| arrival.id == migration.id) else {
            self.moving.arrival = None;
            if migration.phase == MigrationPhase::Requested {
                return self.expect(guest, &migration).await.map(Some);
            }
            // An earlier agent prepared it; its ticket has ended with its lease.
            let reason = "the destination's agent ended";
            self.say_that_it_stays(&migration.id, reason).await?;
            self.discard_what_waits().await?;
            return Ok(None);
        };
        let ended = arrival.state() == ArrivalState::Ended;
        let reason = match self.runtime.take_exit().await {
            Some(exit) => exit.message,
            None if ended => "the connection to the source ended".into(),
            None => return Ok(Some(Next::Changed)),
        };
        failpoint(&self.name, "arrive-ended");
        // Unless it was placed here meanwhile, which the next look shows, nothing can place it here any
        // more.
        self.say_that_it_stays(&migration.id, &reason).await?;
        Ok(Some(Next::After(Duration::ZERO)))
    }

    /// Removes a virtual machine that waits for a guest, or whose guest went elsewhere, which is of the
    /// expected course.
    async fn discard_what_waits(&mut self) -> Result<()> {
        if !self.runtime.is_running() {
            return Ok(());
        }
        // One that doesn't answer is killed with a warning.
        let stage = self.stage().await.unwrap_or(Stage::Ordinary);
        if matches!(stage, Stage::Waiting | Stage::Arrived | Stage::Released) {
            self.runtime.kill().await;
            self.runtime.tear_down(&[]).await?;
        }
        Ok(())
    }

    async fn expect(&mut self, guest: &VirtualMachine, migration: &Migration) -> Result<Next> {
        if self.agent.arrivals.is_full() {
            return Ok(Next::After(TURN));
        }
        // What an earlier agent prepared, or left when the guest went away, would be waited for.
        self.runtime.kill().await;
        match self.prepare(guest, migration).await {
            Ok(arrival) => {
                self.moving.arrival = Some(arrival);
                Ok(Next::Changed)
            }
            Err(error @ AgentError::State(_)) => Err(error),
            Err(error) => {
                self.runtime.kill().await;
                self.runtime.tear_down(&interface_names(guest)).await?;
                let reason = format!("{} can't take it: {error}", migration.destination);
                self.say_that_it_stays(&migration.id, &reason).await?;
                Ok(Next::After(Duration::ZERO))
            }
        }
    }

    /// Sets up what waits for the guest, and says so.
    async fn prepare(&mut self, guest: &VirtualMachine, migration: &Migration) -> Result<Arrival> {
        let refused = |reason, message: &str| AgentError::Process {
            reason,
            message: message.into(),
        };
        let address = self.agent.config.migration_address();
        let address = address.ok_or_else(|| {
            refused(
                "MigrationNotConfigured",
                "it has no migration_listen in its configuration",
            )
        })?;
        self.check_disks(guest).await?;
        let leased = self.is_leasable(guest).await?;
        if leased {
            self.agent.fleet.arm_guard().await?;
        }
        // The very lease on which the guest is handed over.
        let lease = self.agent.fleet.lease_check();
        let ended = || refused("HostLeaseEnded", "its lease is not renewed");
        let lease_id = self.agent.fleet.lease_id().ok_or_else(ended)?;
        let plan = Plan::resolve(&self.agent, guest).await?;
        let interfaces = plan.ports.iter().map(|port| port.interface.clone());
        let interfaces = interfaces.collect();
        let mut running = RunningPlan::begin(&plan, guest.status.restarts);
        if let Some(started) = guest.status.started_at {
            running.started_at_unix_ms = started.as_millisecond();
        }
        let movable = self.runtime.as_movable();
        let movable =
            movable.ok_or_else(|| refused("NotMovable", "guests of this host can't be moved"))?;
        self.moving.settled = false;
        movable
            .prepare(&plan, running, leased.then(|| lease.clone()))
            .await?;
        let host = self.agent.fleet.host();
        let tls = self.agent.migration_tls.is_some();
        let ticket = Ticket::new(&migration.id, host, address.to_string(), tls);
        let api_socket = movable.api_socket();
        let ring = self.ring();
        let arrival = self
            .agent
            .arrivals
            .expect(&self.name, &ticket, interfaces, api_socket, ring);
        ticket
            .leave(&self.agent.fleet, &self.name, lease_id)
            .await?;
        failpoint(&self.name, "arrive-ticket-left");
        let terms = if leased {
            PlacementState::Leased
        } else {
            PlacementState::Held
        };
        let alive = lease.compare(&self.agent.fleet).ok_or_else(ended)?;
        let said = self
            .agent
            .objects
            .update_when(&self.name, &[alive], |guest: &mut VirtualMachine| {
                transitions::prepare(guest, &migration.id, terms)
            })
            .await?;
        failpoint(&self.name, "arrive-said");
        said.map(|_| arrival).ok_or_else(ended)
    }

    /// Whether the images of a guest's disks are there.
    async fn check_disks(&self, guest: &VirtualMachine) -> Result<()> {
        for attachment in &guest.spec.disks {
            let disk = self
                .agent
                .objects
                .get_typed::<Disk>(&attachment.disk)
                .await?;
            let spec = disk.object.spec;
            if !spec.shared {
                let message = format!(
                    "Disk/{} is on its host alone (spec.shared)",
                    attachment.disk
                );
                return Err(AgentError::Precondition(vec![message]));
            }
            let what = format!(
                "find the image {} of Disk/{}",
                spec.path.display(),
                attachment.disk
            );
            tokio::fs::metadata(&spec.path)
                .await
                .map_err(AgentError::io(what))?;
        }
        Ok(())
    }

    /// The guest is placed here and all of it is there: it goes on.
    pub(super) async fn land(&mut self, guest: &VirtualMachine) -> Result<Next> {
        failpoint(&self.name, "land-begun");
        let arrived = match self.moving.arrival.as_ref().map(Arrival::state) {
            Some(ArrivalState::Arrived(at)) => Some(at),
            _ => None,
        };
        let plan = Plan::resolve(&self.agent, guest).await?;
        let Some(movable) = self.runtime.as_movable() else {
            return Ok(Next::Changed);
        };
        if let Err(error) = movable.land(&plan).await {
            let problem = Some((error.reason(), error.to_string()));
            self.status
                .running(guest, self.runtime.as_ref(), None, problem)
                .await?;
            return Ok(Next::After(BACKOFF_FIRST));
        }
        let stood_still = arrived.map(|at| Instant::now().duration_since(at));
        self.moving = Moving::default();
        if let Some(migration) = transitions::active(guest) {
            self.completed(guest, migration, stood_still).await?;
        }
        Ok(Next::After(Duration::ZERO))
    }

    /// Says that the guest runs here.
    pub(super) async fn completed(
        &mut self,
        guest: &VirtualMachine,
        migration: &Migration,
        stood_still: Option<Duration>,
    ) -> Result<()> {
        let here = stood_still.and_then(|time| u64::try_from(time.as_millis()).ok());
        let downtime = migration
            .downtime_milliseconds
            .zip(here)
            .map(|(there, here)| there + here);
        let update =
            |guest: &mut VirtualMachine| transitions::complete(guest, &migration.id, downtime);
        self.agent.objects.update(&self.name, update).await?;
        failpoint(&self.name, "land-said");
        if let Err(error) = Ticket::withdraw(&self.agent.fleet, &self.name).await {
            tracing::debug!(guest = self.name, %error, "a ticket is left to end with the host's lease");
        }
        let message = match downtime {
            Some(downtime) => format!(
                "it came from {} and stood still for {downtime} ms",
                migration.source
            ),
            None => format!("it came from {}", migration.source),
        };
        self.agent
            .events
            .normal(
                Kind::VirtualMachine,
                &guest.metadata.name,
                "Migrated",
                message,
            )
            .await;
        Ok(())
    }
}
