//! A guest that leaves this host.

use std::time::Duration;

use keelson_api::{Migration, MigrationLimits, MigrationPhase, PowerState, VirtualMachine};

use super::super::super::movable::Stage;
use super::super::{BACKOFF_FIRST, GuestActor, Next, interface_names};
use super::Moving;
use crate::AgentError;
use crate::error::Result;
use crate::failpoint::failpoint;
use crate::fleet::claim::epoch_of;
use crate::migration::{
    Departure, DepartureState, FLOWS_TIME_LIMIT, FlowCount, Ticket, transitions,
};

/// How often it is looked whether the destination is still there while it is waited for.
const LOOK_FOR_DESTINATION: Duration = Duration::from_secs(3);

impl GuestActor {
    /// Has a guest moved that is to leave this host, which is drained; `None` if it has to be shut down for
    /// that.
    pub(in crate::guest::actor) async fn move_away(
        &mut self,
        guest: &VirtualMachine,
    ) -> Result<Option<Next>> {
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
    pub(super) async fn send(
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
            &self.agent,
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
        let flows = match self.send_flows().await {
            Ok(flows) => flows,
            Err(reason) => {
                let reason = format!("its flows could not be sent: {reason}");
                return self.take_back(guest, &reason).await;
            }
        };
        failpoint(&self.name, "leave-flows-sent");
        let (host, epoch) = (self.agent.fleet.host().to_owned(), epoch_of(guest));
        let stopped = u64::try_from(stopped.as_millis()).unwrap_or(u64::MAX);
        let change = |guest: &mut VirtualMachine| {
            transitions::hand_over(guest, &host, epoch, &migration.id, stopped, flows)
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

    /// Sends the flows of the guest, which stands still. The guest rather stays than that it loses its
    /// connections: what failed may go well another time.
    async fn send_flows(&mut self) -> std::result::Result<FlowCount, String> {
        let (Some(departure), Some(movable)) = (&self.moving.departure, self.runtime.as_movable())
        else {
            return Err("it is not being sent".into());
        };
        let sending = async {
            let read = movable.leaving_flows().await;
            let (flows, mapped_ports) = read.map_err(|error| error.to_string())?;
            let moved = departure.send_flows(&flows).await?;
            let left = mapped_ports + flows.count().saturating_sub(moved);
            Ok(FlowCount { moved, left })
        };
        tokio::time::timeout(FLOWS_TIME_LIMIT, sending)
            .await
            .unwrap_or_else(|_| Err("it takes too long".into()))
    }

    /// Lets a guest go on here that was released, once it is sure that it is nobody else's: the object is
    /// changed, so that no transaction that was sent before can hold.
    pub(super) async fn take_back(&mut self, guest: &VirtualMachine, reason: &str) -> Result<Next> {
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
    pub(super) async fn stay(
        &mut self,
        migration: &Migration,
        reason: &str,
    ) -> Result<Option<Next>> {
        self.say_that_it_stays(&migration.id, reason).await?;
        self.moving.departure = None;
        if let Some(movable) = self.runtime.as_movable() {
            movable.cancel().await;
        }
        Ok(Some(Next::After(Duration::ZERO)))
    }

    /// The object does not know of a move any more: whatever is sent is in vain.
    pub(super) async fn stop_sending(&mut self, stage: Stage) -> Result<Option<Next>> {
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
}
