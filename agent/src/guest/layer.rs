//! What runs guests on a host: processes, or in measurements of whole fleets a simulation.

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use keelson_api::{DeviceState, DeviceStatus};

use super::exit::GuestExit;
use super::movable::MovableRuntime;
use super::plan::{Plan, RunningPlan};
use super::runtime::{Problem, Runtime};
use crate::config::Config;
use crate::fleet::LeaseCheck;
use crate::{Agent, error::Result};

/// What runs guests on a host.
pub trait GuestLayer: fmt::Debug + Send + Sync {
    /// The guest `name`, of which nothing is known yet.
    fn guest(&self, agent: &Agent, name: &str) -> Box<dyn GuestRuntime>;

    /// The guests that were started and not torn down since, by whichever agent of this host.
    fn known_guests(&self, config: &Config) -> Vec<String>;
}

/// One guest on a host, as its actor drives it.
#[async_trait]
pub trait GuestRuntime: fmt::Debug + Send + Sync {
    /// Finds what an earlier agent started; whether the guest runs.
    async fn adopt(&mut self) -> Result<bool>;

    /// Sets up everything that the plan names and starts the guest.
    async fn start(&mut self, plan: &Plan, restarts: u32, lease: Option<LeaseCheck>) -> Result<()>;

    /// Makes what can change while the guest runs as the plan has it; what is wrong with it.
    async fn maintain(&mut self, plan: &Plan) -> Result<Option<Problem>>;

    /// Whether something of a guest that runs well may have changed without anybody being told.
    async fn has_changed(&self, was_paused: bool) -> bool;

    /// How the guest ended, if it did since this was last asked.
    async fn take_exit(&mut self) -> Option<GuestExit>;

    /// Waits until one of the guest's processes ends, or it lets go of a device; for ever where there is
    /// none.
    async fn something_ended(&self);

    /// Presses the guest's power button.
    async fn press_power_button(&self) -> Result<()>;

    /// Ends the guest at once.
    async fn kill(&self);

    /// Removes all that there is of the guest on this host, once it has ended.
    async fn tear_down(&mut self, interfaces: &[String]) -> Result<()>;

    /// Removes the guest's logs and snapshots.
    fn remove_kept(&self) -> Result<()>;

    /// Whether the guest stands still.
    async fn is_paused(&self) -> bool;

    /// Whether the guest runs, or stands still.
    fn is_running(&self) -> bool;

    /// How long it has run.
    fn running_for(&self) -> Option<Duration> {
        self.running().and_then(RunningPlan::running_for)
    }

    /// Its process.
    fn process_id(&self) -> Option<u32>;

    /// What it runs with.
    fn running(&self) -> Option<&RunningPlan>;

    /// The disks and interfaces that it has, and those that are to come or go.
    fn devices(&self) -> Vec<DeviceStatus> {
        let devices = self.running().into_iter();
        let devices = devices.flat_map(|running| running.hardware.devices());
        devices
            .map(|device| device.status(DeviceState::Attached))
            .collect()
    }

    /// Whether it is killed when the host's lease is about to end.
    fn is_leased(&self) -> bool;

    /// Whether it may run as far as the host's lease goes.
    fn may_run(&self) -> bool;

    /// From now on it is killed when the host's lease is about to end.
    fn put_on_lease(&mut self, lease: LeaseCheck) -> Result<()>;

    /// The same guest, as it moves to another host and comes from one; `None` if it can't.
    fn as_movable(&mut self) -> Option<&mut dyn MovableRuntime> {
        None
    }

    /// From now on it goes on without the lease.
    fn take_off_lease(&mut self) -> Result<()>;
}

/// Guests that are processes of this host.
#[derive(Debug)]
pub struct GuestProcesses;

impl GuestLayer for GuestProcesses {
    fn guest(&self, agent: &Agent, name: &str) -> Box<dyn GuestRuntime> {
        Box::new(Runtime::new(agent, name))
    }

    fn known_guests(&self, config: &Config) -> Vec<String> {
        Runtime::known_guests(config)
    }
}
