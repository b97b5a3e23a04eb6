//! `keelson start` and `keelson stop`

use clap::Args;
use keelson_api::proto::{StartRequest, StopRequest};
use keelson_api::{Kind, Object, Phase, TimeLimit};

use crate::client::Client;
use crate::failure::Failure;
use crate::output::line;
use crate::wait;

/// Start a guest.
#[derive(Args)]
pub struct Start {
    /// The guest.
    name: String,
    /// Do not wait until it runs.
    #[arg(long)]
    no_wait: bool,
    /// How long to wait.
    #[arg(long, default_value = "1m")]
    timeout: TimeLimit,
}

/// Shut a guest down.
#[derive(Args)]
pub struct Stop {
    /// The guest.
    name: String,
    /// Kill it at once, without the power button: what it has not synced is lost.
    #[arg(long)]
    force: bool,
    /// Do not wait until it is shut down.
    #[arg(long)]
    no_wait: bool,
    /// How long to wait.
    #[arg(long, default_value = "2m")]
    timeout: TimeLimit,
}

impl Start {
    /// Runs the command.
    pub async fn run(self, client: &mut Client) -> Result<(), Failure> {
        let object = client
            .guests
            .start(StartRequest {
                name: self.name.clone(),
            })
            .await?;
        let generation = crate::client::decode(&object.into_inner())?
            .metadata()
            .generation;
        if self.no_wait {
            return line(&format!("VirtualMachine/{} is starting", self.name));
        }
        let mut failure = None;
        let started = |object: Option<&Object>| {
            let Some(Object::VirtualMachine(guest)) = object else {
                return true;
            };
            let current = guest.status.observed_generation >= generation;
            if current && guest.status.phase == Phase::Failed {
                failure = guest
                    .status
                    .conditions
                    .first()
                    .map(|ready| ready.message.clone());
                return true;
            }
            current && guest.status.phase == Phase::Running
        };
        let limit = self.timeout.duration();
        wait::until(
            client,
            Kind::VirtualMachine,
            &self.name,
            limit,
            "running",
            started,
        )
        .await?;
        match failure {
            Some(message) => Err(anyhow::anyhow!("VirtualMachine/{}: {message}", self.name).into()),
            None => line(&format!("VirtualMachine/{} runs", self.name)),
        }
    }
}

impl Stop {
    /// Runs the command.
    pub async fn run(self, client: &mut Client) -> Result<(), Failure> {
        let request = StopRequest {
            name: self.name.clone(),
            force: self.force,
        };
        let object = client.guests.stop(request).await?;
        let generation = crate::client::decode(&object.into_inner())?
            .metadata()
            .generation;
        if self.no_wait {
            return line(&format!("VirtualMachine/{} is stopping", self.name));
        }
        let stopped = |object: Option<&Object>| match object {
            Some(Object::VirtualMachine(guest)) => {
                guest.status.phase == Phase::Stopped
                    && guest.status.observed_generation >= generation
            }
            _ => true,
        };
        let limit = self.timeout.duration();
        wait::until(
            client,
            Kind::VirtualMachine,
            &self.name,
            limit,
            "stopped",
            stopped,
        )
        .await?;
        line(&format!("VirtualMachine/{} is stopped", self.name))
    }
}
