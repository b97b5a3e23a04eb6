//! `keelson start` and `keelson stop`

use std::time::Duration;

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
        wait_until_runs(client, &self.name, generation, self.timeout.duration()).await?;
        line(&format!("VirtualMachine/{} runs", self.name))
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
        wait_until_stopped(client, &self.name, generation, self.timeout.duration()).await?;
        line(&format!("VirtualMachine/{} is stopped", self.name))
    }
}

/// Waits until a guest runs that was started with this generation of its object, or can't.
pub async fn wait_until_runs(
    client: &mut Client,
    name: &str,
    generation: i64,
    limit: Duration,
) -> Result<(), Failure> {
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
    wait::until(
        client,
        Kind::VirtualMachine,
        name,
        limit,
        "running",
        started,
    )
    .await?;
    match failure {
        Some(message) => Err(anyhow::anyhow!("VirtualMachine/{name}: {message}").into()),
        None => Ok(()),
    }
}

/// Waits until a guest is shut off, as of this generation of its object.
pub async fn wait_until_stopped(
    client: &mut Client,
    name: &str,
    generation: i64,
    limit: Duration,
) -> Result<(), Failure> {
    let stopped = |object: Option<&Object>| match object {
        Some(Object::VirtualMachine(guest)) => {
            guest.status.phase == Phase::Stopped && guest.status.observed_generation >= generation
        }
        _ => true,
    };
    wait::until(
        client,
        Kind::VirtualMachine,
        name,
        limit,
        "stopped",
        stopped,
    )
    .await
}
