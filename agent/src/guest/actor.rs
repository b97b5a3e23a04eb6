//! The task that keeps one guest as its object desires.

mod migration;
mod placement;

use std::sync::Arc;
use std::time::Duration;

use keelson_api::{Kind, Phase, PowerState, RestartPolicy, VirtualMachine};
use tokio::time::Instant;

use self::migration::Moving;
use self::placement::Permit;
use super::exit::GuestExit;
use super::layer::GuestRuntime;
use super::mailbox::{Bell, GuestMailbox};
use super::plan::Plan;
use super::status::{StatusWriter, is_pending};
use crate::failpoint::failpoint;
use crate::objects::Stored;
use crate::{Agent, AgentError, error::Result};

/// How long after something went wrong with a guest that runs it is tried again.
const TRY_AGAIN: Duration = Duration::from_secs(10);
/// How often what runs on this host is looked at, of which nobody is told. The store is not asked.
const LOOK: Duration = Duration::from_secs(10);
const BACKOFF_FIRST: Duration = Duration::from_secs(1);
const BACKOFF_LIMIT: Duration = Duration::from_mins(1);
/// Between two reconciliations of which the first failed, at most: what guests wait for after the state
/// store is back.
const RETRY_LIMIT: Duration = Duration::from_secs(10);
/// Why a guest ended that the guard killed.
pub(super) const FENCED: &str = "Fenced";
/// A guest that ran so long starts again without delay.
const STABLE_AFTER: Duration = Duration::from_mins(1);

/// The task that keeps one guest as its object desires.
#[derive(Debug)]
pub struct GuestActor {
    agent: Agent,
    name: String,
    bell: Arc<Bell>,
    runtime: Box<dyn GuestRuntime>,
    status: StatusWriter,
    stopping_since: Option<Instant>,
    /// Starts and runs in a row that failed early.
    failures: u32,
    not_before: Option<Instant>,
    moving: Moving,
}

/// When to look again, unless something happens.
enum Next {
    After(Duration),
    /// When its object changes, or something of it on this host.
    Changed,
    /// Nothing of the guest is here, or is to be.
    Gone,
}

impl GuestActor {
    /// Starts the actor of the guest `name`.
    pub fn spawn(agent: Agent, name: &str) -> GuestMailbox {
        let bell = Arc::new(Bell::default());
        let actor = Self {
            runtime: agent.guests.guest(&agent, name),
            status: StatusWriter::new(&agent, name),
            agent,
            name: name.into(),
            bell: Arc::clone(&bell),
            stopping_since: None,
            failures: 0,
            not_before: None,
            moving: Moving::default(),
        };
        GuestMailbox::new(bell, tokio::spawn(actor.run()))
    }

    async fn run(mut self) {
        self.adopt().await;
        // Reconciliations that failed since one that did not.
        let mut failed = 0_u32;
        loop {
            self.bell.looking();
            let reconciled = self.reconcile().await;
            failed = reconciled
                .as_ref()
                .map_or_else(|_| failed.saturating_add(1), |_| 0);
            let next = match reconciled {
                Ok(Next::After(delay)) => Some(delay),
                Ok(Next::Changed) => None,
                Ok(Next::Gone) if self.bell.close() => return,
                Ok(Next::Gone) => Some(Duration::ZERO),
                Err(error) => {
                    let delay = BACKOFF_FIRST * 2_u32.saturating_pow((failed - 1).min(16));
                    // Ever more seldom: a state store may be gone for hours.
                    if failed.is_power_of_two() {
                        let guest = &self.name;
                        tracing::warn!(guest, failed, %error, "reconciling failed; trying again");
                    }
                    Some(delay.min(RETRY_LIMIT))
                }
            };
            tokio::select! {
                () = self.bell.rang() => {}
                () = self.runtime.something_ended() => {}
                () = self.until(next) => {}
            }
        }
    }

    /// Waits so long, or until something has changed on this host.
    async fn until(&self, delay: Option<Duration>) {
        if let Some(delay) = delay {
            return tokio::time::sleep(delay).await;
        }
        let was_paused = self.runtime.is_paused().await;
        loop {
            tokio::time::sleep(LOOK).await;
            if self.runtime.is_running() && self.runtime.has_changed(was_paused).await {
                return;
            }
        }
    }

    async fn adopt(&mut self) {
        match self.runtime.adopt().await {
            Ok(false) => {}
            Ok(true) => {
                let message = "the guest kept running without an agent and was found again";
                self.agent
                    .events
                    .normal(Kind::VirtualMachine, &self.name, "Adopted", message)
                    .await;
            }
            Err(error) => {
                tracing::error!(guest = self.name, %error, "could not look for the guest's processes");
            }
        }
    }

    async fn reconcile(&mut self) -> Result<Next> {
        let guest = match self
            .agent
            .objects
            .get_typed::<VirtualMachine>(&self.name)
            .await
        {
            Ok(Stored { object, .. }) => object,
            Err(AgentError::NotFound { .. }) => {
                self.runtime.kill().await;
                self.runtime.tear_down(&[]).await?;
                return Ok(Next::Gone);
            }
            Err(error) => return Err(error),
        };
        if !self.agent.fleet.is_here(&guest) {
            return match self.receive(&guest).await? {
                Some(next) => Ok(next),
                None => self.leave(&guest).await,
            };
        }
        if let Some(exit) = self.runtime.take_exit().await {
            self.handle_end(&guest, exit).await?;
            return Ok(Next::After(Duration::ZERO));
        }
        if self.runtime.is_running() && !self.runtime.may_run() {
            // As the guard does; what its backends lose meanwhile must not come back.
            self.runtime.kill().await;
            return Ok(Next::After(Duration::ZERO));
        }
        if let Some(next) = self.migrate(&guest).await? {
            return Ok(next);
        }
        let deleting = guest.metadata.deletion_timestamp.is_some();
        let leaving = !deleting && self.is_leaving(&guest).await?;
        if leaving && let Some(next) = self.move_away(&guest).await? {
            return Ok(next);
        }
        let wanted = !deleting && !leaving && guest.spec.power_state == PowerState::Running;
        if leaving && !self.runtime.is_running() {
            return self.release(&guest).await;
        }
        match (wanted, self.runtime.is_running()) {
            (true, true) => self.maintain(&guest).await,
            (true, false) if is_resting(&guest) => Ok(Next::Changed),
            (true, false) => self.start(&guest).await,
            (false, true) => self.stop(&guest).await,
            (false, false) => self.finish(&guest, deleting).await,
        }
    }

    async fn start(&mut self, guest: &VirtualMachine) -> Result<Next> {
        if guest.metadata.generation != guest.status.observed_generation {
            self.not_before = None;
        }
        if let Some(wait) = self
            .not_before
            .and_then(|at| at.checked_duration_since(Instant::now()))
        {
            return Ok(Next::After(wait));
        }
        self.stopping_since = None;
        let started = match self.may_start(guest).await {
            // The reconciler tells of another place, and of another lease.
            Ok(Permit::NotNow) => return Ok(Next::Changed),
            Ok(permit) => self.start_permitted(guest, permit).await,
            Err(error) => Err(error),
        };
        match started {
            Ok(()) => {
                let message = format!("process {}", self.runtime.process_id().unwrap_or_default());
                self.agent
                    .events
                    .normal(Kind::VirtualMachine, &self.name, "Started", message)
                    .await;
                self.maintain(guest).await
            }
            Err(error @ AgentError::State(_)) => Err(error),
            Err(error) => {
                self.runtime.kill().await;
                self.runtime.tear_down(&interface_names(guest)).await?;
                self.back_off();
                self.status
                    .failed(guest, error.reason(), &error.to_string())
                    .await?;
                Ok(Next::After(BACKOFF_FIRST))
            }
        }
    }

    async fn start_permitted(&mut self, guest: &VirtualMachine, permit: Permit) -> Result<()> {
        let lease = match permit {
            Permit::Leased(lease) => Some(lease),
            Permit::Free | Permit::NotNow => None,
        };
        failpoint(&self.name, "start-said");
        let plan = Plan::resolve(&self.agent, guest).await?;
        self.runtime
            .start(&plan, guest.status.restarts, lease)
            .await
    }

    /// Keeps what runs up to date with the object, and the object's status with what runs.
    async fn maintain(&mut self, guest: &VirtualMachine) -> Result<Next> {
        self.stopping_since = None;
        let plan = match Plan::resolve(&self.agent, guest).await {
            Ok(plan) => plan,
            Err(error @ AgentError::State(_)) => return Err(error),
            Err(error) => {
                let problem = Some((error.reason(), error.to_string()));
                self.status
                    .running(guest, self.runtime.as_ref(), None, problem)
                    .await?;
                return Ok(Next::After(TRY_AGAIN));
            }
        };
        if let Err(error) = self.adjust_terms(guest).await {
            let problem = Some((error.reason(), error.to_string()));
            self.status
                .running(guest, self.runtime.as_ref(), Some(&plan), problem)
                .await?;
            return Ok(Next::After(TRY_AGAIN));
        }
        let problem = match self.runtime.maintain(&plan).await {
            Ok(problem) => problem,
            Err(error) => Some((error.reason(), error.to_string())),
        };
        let next = if problem.is_some() || self.runtime.devices().iter().any(is_pending) {
            Next::After(TRY_AGAIN)
        } else {
            Next::Changed
        };
        self.status
            .running(guest, self.runtime.as_ref(), Some(&plan), problem)
            .await?;
        failpoint(&self.name, "running-said");
        Ok(next)
    }

    async fn stop(&mut self, guest: &VirtualMachine) -> Result<Next> {
        let limit = guest.spec.stop_timeout.duration();
        let Some(since) = self.stopping_since else {
            self.stopping_since = Some(Instant::now());
            self.status.stopping(guest).await?;
            failpoint(&self.name, "stop-said");
            self.agent
                .events
                .normal(
                    Kind::VirtualMachine,
                    &self.name,
                    "Stopping",
                    "the power button is pressed",
                )
                .await;
            if let Err(error) = self.runtime.press_power_button().await {
                tracing::warn!(guest = self.name, %error, "the power button could not be pressed");
            }
            failpoint(&self.name, "stop-button-pressed");
            return Ok(Next::After(limit));
        };
        let left = limit.saturating_sub(since.elapsed());
        if left.is_zero() {
            let message = format!("it did not shut down within {}", guest.spec.stop_timeout);
            self.agent
                .events
                .warning(Kind::VirtualMachine, &self.name, "Killed", message)
                .await;
            self.runtime.kill().await;
            return Ok(Next::After(Duration::ZERO));
        }
        Ok(Next::After(left))
    }

    /// Removes what is left of a guest that should not run; its object as well where that is being
    /// deleted.
    async fn finish(&mut self, guest: &VirtualMachine, deleting: bool) -> Result<Next> {
        self.runtime.tear_down(&interface_names(guest)).await?;
        self.stopping_since = None;
        if !deleting {
            self.status
                .stopped(guest, "PoweredOff", "it is shut down, as desired")
                .await?;
            return Ok(Next::Changed);
        }
        failpoint(&self.name, "delete-torn-down");
        self.runtime.remove_kept()?;
        failpoint(&self.name, "delete-logs-gone");
        self.agent
            .objects
            .remove(Kind::VirtualMachine, &self.name)
            .await?;
        self.agent
            .events
            .normal(
                Kind::VirtualMachine,
                &self.name,
                "Deleted",
                "nothing is left",
            )
            .await;
        Ok(Next::Gone)
    }

    async fn handle_end(&mut self, guest: &VirtualMachine, exit: GuestExit) -> Result<()> {
        failpoint(&self.name, "end-seen");
        let ran = self.runtime.running_for();
        self.runtime.tear_down(&interface_names(guest)).await?;
        let deleting = guest.metadata.deletion_timestamp.is_some();
        let wanted = !deleting && guest.spec.power_state == PowerState::Running;
        let events = &self.agent.events;
        if exit.clean {
            events
                .normal(Kind::VirtualMachine, &self.name, "Stopped", &exit.message)
                .await;
        } else {
            let reason = if exit.reason == FENCED {
                FENCED
            } else {
                "Ended"
            };
            events
                .warning(Kind::VirtualMachine, &self.name, reason, &exit.message)
                .await;
        }
        if !wanted {
            self.not_before = None;
            return self
                .status
                .stopped(guest, "PoweredOff", &exit.message)
                .await;
        }
        if ran.is_some_and(|ran| ran >= STABLE_AFTER) {
            self.failures = 0;
        }
        if exit.reason == FENCED {
            // It did nothing wrong: it starts again as soon as it may.
            return self.status.fenced(guest, exit.reason, &exit.message).await;
        }
        match (guest.spec.restart_policy, exit.clean) {
            (RestartPolicy::Always, _) | (RestartPolicy::OnFailure, false) => {
                self.back_off();
                self.status
                    .restarting(guest, exit.reason, &exit.message)
                    .await
            }
            (_, true) => self.status.stopped(guest, exit.reason, &exit.message).await,
            (RestartPolicy::Never, false) => {
                self.status.failed(guest, exit.reason, &exit.message).await
            }
        }
    }

    fn back_off(&mut self) {
        let delay = BACKOFF_FIRST * 2_u32.saturating_pow(self.failures.min(16));
        self.failures = self.failures.saturating_add(1);
        self.not_before = Some(Instant::now() + delay.min(BACKOFF_LIMIT));
    }
}

/// Whether a guest ended by itself and its restart policy leaves it so.
pub fn is_resting(guest: &VirtualMachine) -> bool {
    let status = &guest.status;
    status.observed_generation == guest.metadata.generation
        && match status.phase {
            Phase::Stopped => true,
            Phase::Failed => guest.spec.restart_policy == RestartPolicy::Never,
            _ => false,
        }
}

fn interface_names(guest: &VirtualMachine) -> Vec<String> {
    guest
        .spec
        .interfaces
        .iter()
        .map(|interface| interface.name.clone())
        .collect()
}
