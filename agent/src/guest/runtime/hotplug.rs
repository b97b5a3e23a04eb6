//! Disks and interfaces that come and go while their guest runs.
//!
//! What the guest runs with is written down before anything of a new device is made, and until nothing
//! of a removed one is left. So whenever an agent ends, the next one knows of all that there may be, asks
//! keelson-vmm what the guest has, and goes on from there.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use keelson_api::{DeviceState, DeviceStatus, Kind};
use keelson_vmm::api::{ErrorBody, PluggedDevice, RemovalRequest};
use keelson_vmm::config::GuestConfig;
use tokio::time::Instant;

use super::Runtime;
use crate::failpoint::failpoint;
use crate::guest::device::Device;
use crate::guest::jail::JailUser;
use crate::guest::machine::{Machine, disk_config, interface_config};
use crate::guest::plan::{Plan, RunningPlan};
use crate::guest::{disk_backend, disk_image};
use crate::host::{GuestPort, ProcessHandle, write_atomically};
use crate::{AgentError, error::Result};

/// How long a guest may take to let go of a device before something else is looked after. It may
/// still do so, of which keelson-vmm tells.
const RELEASE_LIMIT: Duration = Duration::from_secs(2);
/// How long after the first failure a device is tried again, which doubles.
const BACKOFF_FIRST: Duration = Duration::from_secs(10);
const BACKOFF_LIMIT: Duration = Duration::from_mins(5);

/// The devices that could not come or go yet.
#[derive(Debug, Default)]
pub(super) struct Pending {
    /// The spec's generation at which they were tried.
    generation: i64,
    obstacles: BTreeMap<Device, Attempts>,
}

/// What became of a device until now.
#[derive(Debug)]
struct Attempts {
    failures: u32,
    not_before: Instant,
    obstacle: Obstacle,
}

/// Why a device could not come or go.
#[derive(Debug)]
struct Obstacle {
    reason: &'static str,
    message: String,
    /// Whether the guest may have the device all the same.
    uncertain: bool,
}

impl Pending {
    /// Another spec is tried at once.
    fn begin(&mut self, generation: i64) {
        if self.generation != generation {
            self.generation = generation;
            for attempts in self.obstacles.values_mut() {
                attempts.not_before = Instant::now();
            }
        }
    }

    fn is_due(&self, device: &Device) -> bool {
        let attempts = self.obstacles.get(device);
        attempts.is_none_or(|attempts| attempts.not_before <= Instant::now())
    }

    /// Whether there was another obstacle before, or none.
    fn failed(&mut self, device: &Device, obstacle: Obstacle) -> bool {
        let before = self.obstacles.remove(device);
        let failures = before.as_ref().map_or(0, |attempts| attempts.failures);
        let is_new = before.is_none_or(|before| before.obstacle.reason != obstacle.reason);
        let delay = BACKOFF_FIRST * 2_u32.saturating_pow(failures.min(8));
        let attempts = Attempts {
            failures: failures + 1,
            not_before: Instant::now() + delay.min(BACKOFF_LIMIT),
            obstacle,
        };
        self.obstacles.insert(device.clone(), attempts);
        is_new
    }
}

impl Obstacle {
    fn new(reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
            uncertain: false,
        }
    }

    /// A refusal of keelson-vmm, which changes nothing.
    fn refused(body: ErrorBody) -> Self {
        let reason = match body.kind.as_str() {
            "not_released" => "NotReleased",
            "no_free_slot" => "NoFreeSlot",
            "memory_not_shared" => "MemoryNotShared",
            "backend_unusable" => "BackendUnusable",
            "paused" => "Paused",
            "migrating" => "Migrating",
            _ => "DeviceRefused",
        };
        Self::new(reason, body.message)
    }
}

impl From<AgentError> for Obstacle {
    fn from(error: AgentError) -> Self {
        Self::new(error.reason(), error.to_string())
    }
}

impl Runtime {
    /// Has the guest get and let go of disks and interfaces until it has those of the plan, as far as
    /// that goes; [`Self::device_statuses`] says what is left to be done.
    ///
    /// # Errors
    /// [`AgentError::Process`] where keelson-vmm doesn't answer.
    pub(super) async fn plug(&mut self, plan: &Plan) -> Result<()> {
        let (Some(running), Some(machine)) = (&self.running, self.machine.clone()) else {
            return Ok(());
        };
        self.pending.begin(plan.generation);
        let changes = running.device_changes(plan);
        self.pending
            .obstacles
            .retain(|device, _| changes.contains(device));
        if changes.is_empty() {
            return Ok(());
        }
        let has = machine.devices().await?;
        for device in changes {
            let has = has.iter().find(|has| has.id == device.id());
            let wanted = plan.hardware.has(&device);
            // What the guest has done since is no new attempt.
            let is_done = wanted == has.is_some();
            if !is_done && !self.pending.is_due(&device) {
                continue;
            }
            match self.plug_one(&machine, plan, &device, has).await {
                Ok(()) => {
                    self.pending.obstacles.remove(&device);
                }
                Err(obstacle) => self.note_obstacle(&device, obstacle).await,
            }
        }
        Ok(())
    }

    /// The devices that the guest has, and those that are to come or go.
    pub(super) fn device_statuses(&self, running: &RunningPlan) -> Vec<DeviceStatus> {
        let obstacles = &self.pending.obstacles;
        let of = |device: &Device| {
            let obstacle = obstacles.get(device).map(|attempts| &attempts.obstacle);
            let state = if running.removing.contains(device) {
                DeviceState::Detaching
            } else if running.adding.contains(device) || !running.hardware.has(device) {
                DeviceState::Attaching
            } else {
                DeviceState::Attached
            };
            DeviceStatus {
                reason: obstacle.map(|obstacle| obstacle.reason.to_owned()),
                message: obstacle.map(|obstacle| obstacle.message.clone()),
                ..device.status(state)
            }
        };
        let new = obstacles.keys();
        let new = new.filter(|device| !running.hardware.has(device));
        let devices = running.hardware.devices();
        devices
            .map(|device| of(&device))
            .chain(new.map(of))
            .collect()
    }

    async fn plug_one(
        &mut self,
        machine: &Machine,
        plan: &Plan,
        device: &Device,
        has: Option<&PluggedDevice>,
    ) -> Result<(), Obstacle> {
        let wanted = plan.hardware.has(device);
        match (wanted, has) {
            (true, Some(has)) if has.leaving => Err(Obstacle::new(
                "NotReleased",
                format!("{device}: the guest has not let go of the one that was there before"),
            )),
            (true, Some(_)) => Ok(self.settle(device)?),
            (true, None) => self.attach(machine, plan, device).await,
            (false, Some(_)) => self.detach(machine, device).await,
            (false, None) => {
                self.clear_away(device).await?;
                self.tell(device, "DeviceDetached", "the guest has let go of it")
                    .await;
                Ok(())
            }
        }
    }

    async fn attach(
        &mut self,
        machine: &Machine,
        plan: &Plan,
        device: &Device,
    ) -> Result<(), Obstacle> {
        if matches!(device, Device::Disk(_)) && !self.memory_is_shared()? {
            return Err(Obstacle::new(
                "MemoryNotShared",
                format!(
                    "{device}: the guest was started without disks, with memory that no disk's backend \
                     can map; stop and start it, and set sharedMemory in the spec of one that is to get \
                     its first disk while it runs"
                ),
            ));
        }
        // Of one of the same name, or of an attempt before.
        self.clear_away(device).await?;
        self.note(|running| running.begin_adding(device, &plan.hardware))?;
        failpoint(&self.name, "plug-noted");
        let added = match device {
            Device::Disk(name) => self.attach_disk(machine, plan, name).await,
            Device::Interface(name) => self.attach_interface(machine, plan, name).await,
        };
        if let Err(obstacle) = added {
            // Where the answer was lost, the guest is asked for what it has before anything is removed.
            if !obstacle.uncertain {
                self.clear_away(device).await?;
            }
            return Err(obstacle);
        }
        failpoint(&self.name, "plug-machine-has");
        self.settle(device)?;
        failpoint(&self.name, "plug-settled");
        self.tell(device, "DeviceAttached", "the guest has it")
            .await;
        Ok(())
    }

    async fn attach_disk(
        &mut self,
        machine: &Machine,
        plan: &Plan,
        name: &str,
    ) -> Result<(), Obstacle> {
        let mut disks = plan.hardware.disks.iter();
        let Some((_, spec)) = disks.find(|(disk, _)| disk == name) else {
            return Ok(());
        };
        disk_image::prepare(spec).await?;
        failpoint(&self.name, "disk-image-prepared");
        let programs = self.agent.config.programs()?;
        let lease = self.lease.clone();
        let process =
            disk_backend::start(&programs, &self.paths, &self.name, name, spec, lease).await?;
        self.disks.insert(name.to_owned(), process);
        if self.agent.config.jail {
            JailUser::of(&self.name).own_socket(&self.paths, name)?;
        }
        failpoint(&self.name, "plug-backend-ready");
        let disk = disk_config(&self.paths, name, spec);
        asked(machine.ask(move |client| client.add_disk(disk)).await).map(drop)
    }

    async fn attach_interface(
        &mut self,
        machine: &Machine,
        plan: &Plan,
        name: &str,
    ) -> Result<(), Obstacle> {
        let Some(port) = plan.ports.iter().find(|port| port.interface == name) else {
            return Ok(());
        };
        let single = GuestPort {
            several_queues: false,
            ..port.clone()
        };
        self.agent.network.ensure_port(&single).await?;
        self.ports.push(port.clone());
        failpoint(&self.name, "plug-port-made");
        let interface = interface_config(port)?;
        let added = machine.ask(move |client| client.add_interface(interface));
        asked(added.await).map(drop)
    }

    async fn detach(&mut self, machine: &Machine, device: &Device) -> Result<(), Obstacle> {
        self.note(|running| running.begin_removing(device))?;
        failpoint(&self.name, "unplug-noted");
        if let Device::Interface(name) = device {
            // Its address may be another guest's from now on.
            self.ports.retain(|port| port.interface != *name);
            self.agent.network.silence_port(&self.name, name).await?;
            failpoint(&self.name, "unplug-silenced");
        }
        let request = RemovalRequest {
            timeout_ms: u64::try_from(RELEASE_LIMIT.as_millis()).unwrap_or(u64::MAX),
            ..RemovalRequest::of(device.id())
        };
        asked(
            machine
                .ask(move |client| client.remove_device(request))
                .await,
        )?;
        failpoint(&self.name, "unplug-released");
        self.clear_away(device).await?;
        self.tell(device, "DeviceDetached", "the guest has let go of it")
            .await;
        Ok(())
    }

    /// Removes what there is on this host of a device that the guest doesn't have.
    async fn clear_away(&mut self, device: &Device) -> Result<()> {
        let recorded = self.running.as_ref();
        if !recorded.is_some_and(|running| running.hardware.has(device)) {
            return Ok(());
        }
        match device {
            Device::Disk(name) => {
                self.disks.remove(name);
                if let Some(Ok(process)) = ProcessHandle::find(&self.paths.disk_record(name))? {
                    process.terminate().await;
                    process.reap();
                }
                failpoint(&self.name, "unplug-backend-ended");
                self.paths.remove_disk(name)?;
            }
            Device::Interface(name) => {
                self.ports.retain(|port| port.interface != *name);
                self.agent.network.remove_port(&self.name, name).await?;
                failpoint(&self.name, "unplug-port-gone");
            }
        }
        self.note(|running| running.forget(device))?;
        failpoint(&self.name, "unplug-forgotten");
        Ok(())
    }

    fn settle(&mut self, device: &Device) -> Result<()> {
        self.note(|running| running.settle(device))
    }

    /// Writes down what the guest runs with, before anything follows from it.
    fn note(&mut self, change: impl FnOnce(&mut RunningPlan)) -> Result<()> {
        if let Some(running) = &mut self.running {
            change(running);
            write_atomically(&self.paths.plan(), running)?;
        }
        Ok(())
    }

    /// Whether disks' backends can map the guest's memory, as it was started.
    fn memory_is_shared(&self) -> Result<bool> {
        let path = self.paths.vmm_config();
        let what = || format!("read {}", path.display());
        let text = fs::read(&path).map_err(AgentError::io(what()))?;
        let config: GuestConfig =
            serde_json::from_slice(&text).map_err(|error| AgentError::io(what())(error.into()))?;
        Ok(config.shares_memory())
    }

    async fn note_obstacle(&mut self, device: &Device, obstacle: Obstacle) {
        let (reason, message) = (obstacle.reason, obstacle.message.clone());
        if self.pending.failed(device, obstacle) {
            let events = &self.agent.events;
            events
                .warning(Kind::VirtualMachine, &self.name, reason, message)
                .await;
        }
    }

    async fn tell(&self, device: &Device, reason: &'static str, what: &str) {
        let message = format!("{device}: {what}");
        let events = &self.agent.events;
        events
            .normal(Kind::VirtualMachine, &self.name, reason, message)
            .await;
    }
}

/// What keelson-vmm answered; without an answer nobody knows what it has done.
fn asked<T>(answer: Result<std::result::Result<T, ErrorBody>>) -> Result<T, Obstacle> {
    match answer {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(body)) => Err(Obstacle::refused(body)),
        Err(error) => Err(Obstacle {
            uncertain: true,
            ..Obstacle::from(error)
        }),
    }
}
