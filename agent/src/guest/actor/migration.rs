//! What the task that keeps a guest does while the guest moves to another host, or comes from one.

use std::sync::Arc;
use std::time::Duration;

use keelson_api::{
    Disk, Kind, Migration, MigrationLimits, MigrationPhase, PlacementState, PowerState,
    VirtualMachine,
};
use tokio::time::Instant;

use super::super::movable::Stage;
use super::super::plan::{Plan, RunningPlan};
use super::{BACKOFF_FIRST, GuestActor, Next, interface_names};
use crate::failpoint::failpoint;
use crate::fleet::claim::epoch_of;
use crate::migration::{
    Arrival, ArrivalState, Departure, DepartureState, Ring, Ticket, transitions,
};
use crate::{AgentError, error::Result};

/// How often it is looked whether the destination is still there while it is waited for.
const LOOK_FOR_DESTINATION: Duration = Duration::from_secs(3);
/// How long a guest waits for its turn to come here.
const TURN: Duration = Duration::from_secs(1);

/// What of a move is under way here.
#[derive(Debug, Default)]
pub(super) struct Moving {
    departure: Option<Departure>,
    arrival: Option<Arrival>,
    /// The virtual machine was asked, and is in no move.
    settled: bool,
    /// The move that was asked for since the host is drained.
    asked_for: Option<String>,
}

impl GuestActor {
    /// Does what there is to do for a guest that is placed here and leaves, or has come; `None` if it is to
    /// be kept like any other.
    pub(super) async fn migrate(&mut self, guest: &VirtualMachine) -> Result<Option<Next>> {
        if !self.runtime.is_running() {
            self.moving = Moving::default();
            return Ok(None);
        }
        let stage = self.stage().await?;
        match stage {
            Stage::Arrived => return self.land(guest).await.map(Some),
            Stage::Released => {
                let reason = "the source's agent ended, or could not say where the guest is to run";
                return self.take_back(guest, reason).await.map(Some);
            }
            // It was placed here though it has no guest, which no agent does.
            Stage::Waiting => {
                self.runtime.kill().await;
                return Ok(Some(Next::After(Duration::ZERO)));
            }
            Stage::Switching | Stage::Ordinary => {}
        }
        let Some(migration) = transitions::active(guest).cloned() else {
            return self.stop_sending(stage).await;
        };
        if migration.phase == MigrationPhase::Moved {
            // It went on here, and the agent ended before it could say so.
            self.completed(guest, &migration, None).await?;
            return Ok(Some(Next::After(Duration::ZERO)));
        }
        let wanted = guest.metadata.deletion_timestamp.is_none()
            && guest.spec.power_state == PowerState::Running;
        if !wanted {
            return self.stay(&migration, "the guest is to be shut down").await;
        }
        self.send(guest, &migration, stage).await
    }

    /// Has a guest moved that is to leave this host, which is drained; `None` if it has to be shut down for
    /// that.
    pub(super) async fn move_away(&mut self, guest: &VirtualMachine) -> Result<Option<Next>> {
        let may = self.agent.fleet.drains_live() && self.stopping_since.is_none();
        if !may || !self.runtime.is_running() || guest.spec.power_state != PowerState::Running {
            return Ok(None);
        }
        if transitions::active(guest).is_some() {
            return self.maintain(guest).await.map(Some);
        }
        let latest = guest.status.migration.as_ref();
        if self.moving.asked_for.is_some()
            && latest.map(|latest| &latest.id) == self.moving.asked_for.as_ref()
        {
            // It was tried, and the guest is still here.
            return Ok(None);
        }
        let limits = MigrationLimits::default();
        match crate::migration::request(&self.agent, &self.name, None, limits).await {
            Ok(begun) => {
                let migration = begun.object.status.migration;
                self.moving.asked_for = migration.map(|migration| migration.id);
                Ok(Some(Next::After(Duration::ZERO)))
            }
            Err(error @ AgentError::State(_)) => Err(error),
            Err(error) => {
                tracing::info!(guest = self.name, %error, "it is shut down to leave this host");
                Ok(None)
            }
        }
    }

    /// Sends the guest as far as it is ready for that.
    async fn send(
        &mut self,
        guest: &VirtualMachine,
        migration: &Migration,
        stage: Stage,
    ) -> Result<Option<Next>> {
        let departure = self.moving.departure.as_ref();
        let progress = match departure.filter(|departure| departure.id == migration.id) {
            Some(departure) => departure.state(),
            None if migration.phase == MigrationPhase::Requested => {
                return self.wait_for_destination(guest, migration).await;
            }
            None => return self.depart(migration).await,
        };
        match progress {
            // The rest is being sent; whatever comes of it wakes this task.
            DepartureState::Copying if stage == Stage::Switching => Ok(Some(Next::Changed)),
            DepartureState::Copying => Ok(None),
            DepartureState::Loaded(stopped) => {
                self.hand_over(guest, migration, stopped).await.map(Some)
            }
            DepartureState::Failed(reason) => self.stay(migration, &reason).await,
        }
    }

    async fn wait_for_destination(
        &mut self,
        guest: &VirtualMachine,
        migration: &Migration,
    ) -> Result<Option<Next>> {
        let destination = &migration.destination;
        if !self.agent.fleet.is_registered(destination).await? {
            let reason = format!("the lease of Host/{destination} has ended");
            return self.stay(migration, &reason).await;
        }
        self.maintain(guest).await?;
        Ok(Some(Next::After(LOOK_FOR_DESTINATION)))
    }

    async fn depart(&mut self, migration: &Migration) -> Result<Option<Next>> {
        let Some(movable) = self.runtime.as_movable() else {
            return self
                .stay(migration, "guests of this host can't be moved")
                .await;
        };
        let api_socket = movable.api_socket();
        let found = Ticket::find(&self.agent.fleet, &self.name, &migration.id).await?;
        let Some(ticket) = found else {
            return self
                .stay(migration, "the destination does not wait for it any more")
                .await;
        };
        failpoint(&self.name, "leave-begun");
        self.moving.settled = false;
        self.moving.departure = Some(Departure::start(
            self.agent.objects.clone(),
            &self.name,
            migration,
            ticket,
            api_socket,
            self.ring(),
        ));
        Ok(None)
    }

    /// The other side has all of the guest, which stands still: makes it the other side's.
    async fn hand_over(
        &mut self,
        guest: &VirtualMachine,
        migration: &Migration,
        stopped: Duration,
    ) -> Result<Next> {
        failpoint(&self.name, "leave-loaded");
        let Some(movable) = self.runtime.as_movable() else {
            return Ok(Next::Changed);
        };
        if let Err(error) = movable.release().await {
            // Its virtual machine goes on by itself.
            self.stay(migration, &error.to_string()).await?;
            return Ok(Next::After(Duration::ZERO));
        }
        let departure = self.moving.departure.as_ref();
        let connected =
            departure.filter(|departure| matches!(departure.state(), DepartureState::Loaded(_)));
        let compares = connected.and_then(|departure| {
            let ours = self.agent.fleet.lease_check().compare(&self.agent.fleet)?;
            Some([ours, departure.ticket.compare()?])
        });
        let Some(compares) = compares else {
            return self
                .take_back(guest, "the destination, or this host's lease, was lost")
                .await;
        };
        let (host, epoch) = (self.agent.fleet.host().to_owned(), epoch_of(guest));
        let stopped = u64::try_from(stopped.as_millis()).unwrap_or(u64::MAX);
        let change = |guest: &mut VirtualMachine| {
            transitions::hand_over(guest, &host, epoch, &migration.id, stopped)
        };
        // Where the answer is lost, the next look at the object tells: see `take_back`.
        let moved = self
            .agent
            .objects
            .update_when(&self.name, &compares, change)
            .await?;
        if moved.is_none() {
            let reason = "the guest, or the lease of one of both hosts, changed meanwhile";
            return self.take_back(guest, reason).await;
        }
        failpoint(&self.name, "leave-moved");
        self.runtime.kill().await;
        self.moving = Moving::default();
        self.runtime.tear_down(&interface_names(guest)).await?;
        failpoint(&self.name, "leave-gone");
        Ok(Next::Gone)
    }

    /// Lets a guest go on here that was released, once it is sure that it is nobody else's: the object is
    /// changed, so that no transaction that was sent before can hold.
    async fn take_back(&mut self, guest: &VirtualMachine, reason: &str) -> Result<Next> {
        let id = transitions::active(guest).map(|active| active.id.clone());
        let staying = |guest: &mut VirtualMachine| {
            if let Some(id) = &id {
                transitions::stay(guest, id, MigrationPhase::Failed, reason);
            }
        };
        let now = self.agent.objects.update(&self.name, staying).await?.object;
        if !self.agent.fleet.is_here(&now) {
            // It was handed over after all.
            return Ok(Next::After(Duration::ZERO));
        }
        failpoint(&self.name, "stay-said");
        self.moving.departure = None;
        let Some(movable) = self.runtime.as_movable() else {
            return Ok(Next::Changed);
        };
        if let Err(error) = movable.take_back().await {
            let problem = Some((error.reason(), error.to_string()));
            self.status
                .running(&now, self.runtime.as_ref(), None, problem)
                .await?;
            return Ok(Next::After(BACKOFF_FIRST));
        }
        if let Some(id) = id {
            self.tell_failure(&id, reason).await;
        }
        Ok(Next::After(Duration::ZERO))
    }

    /// Gives a move up before the guest was released.
    async fn stay(&mut self, migration: &Migration, reason: &str) -> Result<Option<Next>> {
        self.say_that_it_stays(&migration.id, reason).await?;
        self.moving.departure = None;
        if let Some(movable) = self.runtime.as_movable() {
            movable.cancel().await;
        }
        Ok(Some(Next::After(Duration::ZERO)))
    }

    /// The object does not know of a move any more: whatever is sent is in vain.
    async fn stop_sending(&mut self, stage: Stage) -> Result<Option<Next>> {
        let sending = self.moving.departure.take().is_some();
        if (sending || stage == Stage::Switching)
            && let Some(movable) = self.runtime.as_movable()
        {
            movable.cancel().await;
            return Ok(Some(Next::After(Duration::ZERO)));
        }
        self.moving.settled = true;
        Ok(None)
    }

    /// Does what there is to do for a guest that is to come here; `None` if nothing of it is to be here.
    pub(super) async fn receive(&mut self, guest: &VirtualMachine) -> Result<Option<Next>> {
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
        let ticket = Ticket::new(&migration.id, host, address.to_string());
        let api_socket = movable.api_socket();
        let ring = self.ring();
        let arrival = self
            .agent
            .arrivals
            .expect(&self.name, &ticket, api_socket, ring);
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
    async fn land(&mut self, guest: &VirtualMachine) -> Result<Next> {
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
    async fn completed(
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

    async fn say_that_it_stays(&self, id: &str, reason: &str) -> Result<()> {
        let mut said = false;
        let update = |guest: &mut VirtualMachine| {
            said = transitions::stay(guest, id, MigrationPhase::Failed, reason);
        };
        self.agent.objects.update(&self.name, update).await?;
        if said {
            self.tell_failure(id, reason).await;
        }
        Ok(())
    }

    async fn tell_failure(&self, id: &str, reason: &str) {
        tracing::warn!(guest = self.name, migration = id, reason, "the guest stays");
        self.agent
            .events
            .warning(Kind::VirtualMachine, &self.name, "MigrationFailed", reason)
            .await;
    }

    async fn stage(&mut self) -> Result<Stage> {
        match self.runtime.as_movable() {
            Some(movable) if !self.moving.settled => movable.stage().await,
            _ => Ok(Stage::Ordinary),
        }
    }

    fn ring(&self) -> Ring {
        let bell = Arc::clone(&self.bell);
        Arc::new(move || {
            // Nobody is left to hear it if it has ended.
            let _ = bell.ring();
        })
    }
}
