//! What the task that keeps a guest does while the guest moves to another host, or comes from one.

mod arrival;
mod departure;

use std::sync::Arc;
use std::time::Duration;

use keelson_api::{Kind, MigrationPhase, PowerState, VirtualMachine};

use super::super::movable::Stage;
use super::{GuestActor, Next};
use crate::error::Result;
use crate::migration::{Arrival, Departure, Ring, transitions};

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
