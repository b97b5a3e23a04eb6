//! A guest's processes as it moves to another host, and as it comes from one.

use std::path::PathBuf;

use async_trait::async_trait;
use keelson_vmm::api::{GuestState, MigrationPhase};

use super::super::movable::{MovableRuntime, Stage};
use super::{
    GuestRuntime, JailUser, LeaseCheck, Machine, Origin, Plan, RunningPlan, Runtime, disk_backend,
    failpoint, write_atomically,
};
use crate::migration::GuestFlows;
use crate::{AgentError, error::Result};

#[async_trait]
impl MovableRuntime for Runtime {
    async fn stage(&self) -> Result<Stage> {
        let Some(machine) = &self.machine else {
            return Ok(Stage::Ordinary);
        };
        Ok(match machine.status().await?.state {
            GuestState::Incoming => Stage::Waiting,
            GuestState::Arrived => Stage::Arrived,
            GuestState::Paused => match machine.migration().await?.phase {
                MigrationPhase::Released => Stage::Released,
                MigrationPhase::Switching | MigrationPhase::Loaded => Stage::Switching,
                _ => Stage::Ordinary,
            },
            _ => Stage::Ordinary,
        })
    }

    fn api_socket(&self) -> PathBuf {
        self.paths.api_socket()
    }

    async fn prepare(
        &mut self,
        plan: &Plan,
        running: RunningPlan,
        lease: Option<LeaseCheck>,
    ) -> Result<()> {
        self.make_folder(plan, lease, "arrive-folder-made").await?;
        for port in &plan.ports {
            self.agent.network.prepare_port(port).await?;
        }
        self.ports.clone_from(&plan.ports);
        let snapshots = self.snapshots.create()?;
        let jail = self.agent.config.jail.then(|| JailUser::of(&self.name));
        if let Some(user) = jail {
            user.take_over(&self.paths, &[])?;
        }
        let origin = Origin {
            snapshot: None,
            jail: jail.map(|user| (user, snapshots)),
            incoming: true,
        };
        let programs = self.agent.config.programs()?;
        let lease = self.lease.clone();
        let machine = Machine::start(&programs, &self.paths, plan, &origin, lease).await?;
        // From here on it is killed if something fails.
        self.follow(machine);
        failpoint(&self.name, "arrive-machine-ready");
        write_atomically(&self.paths.plan(), &running)?;
        failpoint(&self.name, "arrive-plan-written");
        self.running = Some(running);
        Ok(())
    }

    async fn land(&mut self, plan: &Plan) -> Result<()> {
        // Its disks change from here on.
        self.snapshots.forget_disks()?;
        self.start_backends().await?;
        failpoint(&self.name, "land-backends-started");
        for port in &plan.ports {
            self.agent.network.ensure_port(port).await?;
        }
        self.ports.clone_from(&plan.ports);
        failpoint(&self.name, "land-ports-up");
        self.go_on().await?;
        failpoint(&self.name, "land-resumed");
        Ok(())
    }

    async fn cancel(&self) {
        if let Some(machine) = &self.machine
            && let Err(error) = machine.cancel_migration().await
        {
            // It has failed already, which is as good.
            tracing::debug!(guest = self.name, %error, "the migration could not be canceled");
        }
    }

    async fn release(&mut self) -> Result<()> {
        self.living_machine()?.release_migration().await?;
        failpoint(&self.name, "leave-released");
        let disks = std::mem::take(&mut self.disks);
        for process in disks.into_values() {
            process.terminate().await;
            process.reap();
        }
        failpoint(&self.name, "leave-backends-ended");
        Ok(())
    }

    async fn leaving_flows(&self) -> Result<(GuestFlows, u32)> {
        let running = self.running.iter();
        let interfaces = running.flat_map(|running| &running.hardware.interfaces);
        let (mut flows, mut left) = (GuestFlows::default(), 0);
        for (interface, ..) in interfaces {
            let network = &self.agent.network;
            let leaving = network.leaving_flows(&self.name, interface).await?;
            left += leaving.mapped_ports;
            flows.interfaces.push((interface.clone(), leaving.flows));
        }
        Ok((flows, left))
    }

    async fn take_back(&mut self) -> Result<()> {
        self.start_backends().await?;
        failpoint(&self.name, "stay-backends-started");
        self.go_on().await?;
        failpoint(&self.name, "stay-resumed");
        Ok(())
    }
}

impl Runtime {
    /// Starts the backends of all disks that have none.
    async fn start_backends(&mut self) -> Result<()> {
        let disks = self
            .running
            .as_ref()
            .map(|running| running.hardware.disks.clone());
        let programs = self.agent.config.programs()?;
        for (disk, spec) in disks.unwrap_or_default() {
            let serving = self.disks.get(&disk);
            if serving.is_some_and(|process| process.has_ended().is_none()) {
                continue;
            }
            if let Some(ended) = self.disks.remove(&disk) {
                ended.reap();
            }
            let lease = self.lease.clone();
            let process =
                disk_backend::start(&programs, &self.paths, &self.name, &disk, &spec, lease)
                    .await?;
            self.disks.insert(disk.clone(), process);
            if self.agent.config.jail {
                JailUser::of(&self.name).own_socket(&self.paths, &disk)?;
            }
        }
        Ok(())
    }

    /// Lets a guest that stands still go on, if it may run.
    async fn go_on(&self) -> Result<()> {
        if !self.may_run() {
            return Err(AgentError::Process {
                reason: "HostLeaseEnded",
                message: "this host's lease is not renewed; the guest may be started elsewhere"
                    .into(),
            });
        }
        self.living_machine()?.resume().await
    }

    /// The guest's virtual machine, unless that has ended.
    fn living_machine(&self) -> Result<&Machine> {
        let machine = self.machine.as_ref();
        let lives = machine.filter(|machine| machine.process.has_ended().is_none());
        lives.ok_or_else(|| AgentError::Process {
            reason: "MachineEnded",
            message: "the guest has ended".into(),
        })
    }
}
