//! The processes and devices of one guest on this host.

mod disks;
mod hotplug;
mod migration;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::FutureExt;
use keelson_api::DeviceStatus;
use keelson_vmm::api::{ExitStatus, GuestState};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::device::Device;
use super::exit::{GuestExit, first_ended};
use super::jail::JailUser;
use super::layer::GuestRuntime;
use super::machine::Origin;
use super::movable::MovableRuntime;
use super::plan::{Plan, RunningPlan};
use super::snapshots::GuestSnapshots;
use super::{GuestPaths, Machine, disk_backend, disk_image};
use crate::config::Config;
use crate::failpoint::failpoint;
use crate::fleet::LeaseCheck;
use crate::host::{GuestPort, ProcessHandle, write_atomically};
use crate::{Agent, AgentError, error::Result};

/// How long the last words of a keelson-vmm that has ended may take to be written down.
const LAST_WORDS_LIMIT: Duration = Duration::from_secs(2);

/// What keelson-vmm ends with before a guest runs.
const REFUSED: [&str; 4] = [
    "MachineConfigurationInvalid",
    "KernelUnusable",
    "KvmUnavailable",
    "DeviceUnavailable",
];

/// A problem of a guest that goes on running: one CamelCase word, and a sentence.
pub type Problem = (&'static str, String);

/// The processes and devices of one guest on this host.
#[derive(Debug)]
pub struct Runtime {
    agent: Agent,
    name: String,
    paths: GuestPaths,
    snapshots: GuestSnapshots,
    machine: Option<Machine>,
    /// Writes down how the guest ends.
    follower: Option<JoinHandle<()>>,
    disks: BTreeMap<String, ProcessHandle>,
    /// What the guest runs with.
    running: Option<RunningPlan>,
    /// Disks and interfaces that could not come or go yet.
    pending: hotplug::Pending,
    /// Rings when the guest has let go of one.
    device_gone: Arc<Notify>,
    /// The interfaces whose rules are in force.
    ports: Vec<GuestPort>,
    /// How the guest ended, where an earlier agent did not see it.
    ended_unseen: Option<GuestExit>,
    /// What it runs by, where it may run only while the host's lease lasts.
    lease: Option<LeaseCheck>,
}

impl Runtime {
    /// The guest `name`, of which nothing is known yet.
    pub fn new(agent: &Agent, name: &str) -> Self {
        Self {
            paths: GuestPaths::new(&agent.config, name),
            snapshots: GuestSnapshots::new(&agent.config, name),
            agent: agent.clone(),
            name: name.into(),
            machine: None,
            follower: None,
            disks: BTreeMap::new(),
            running: None,
            pending: hotplug::Pending::default(),
            device_gone: Arc::default(),
            ports: Vec::new(),
            ended_unseen: None,
            lease: None,
        }
    }

    /// The guests that were started and not torn down since.
    pub fn known_guests(config: &Config) -> Vec<String> {
        let folder: PathBuf = GuestPaths::all_guests(config);
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect()
    }
}

#[async_trait]
impl GuestRuntime for Runtime {
    /// Finds what an earlier agent started; whether the guest runs.
    async fn adopt(&mut self) -> Result<bool> {
        if !self.paths.exist() {
            return Ok(false);
        }
        failpoint(&self.name, "adopt-begun");
        if self.paths.lease().exists() {
            self.lease = Some(self.agent.fleet.lease_check());
        }
        self.running = fs::read(self.paths.plan())
            .ok()
            .and_then(|text| serde_json::from_slice(&text).ok());
        let disks = self
            .running
            .iter()
            .flat_map(|running| &running.hardware.disks);
        for (disk, _) in disks {
            if let Some(Ok(process)) = ProcessHandle::find(&self.paths.disk_record(disk))? {
                self.disks.insert(disk.clone(), process);
            }
        }
        failpoint(&self.name, "adopt-disks-found");
        match Machine::find(&self.paths)? {
            None => Ok(false),
            Some(Err(exit)) => {
                self.ended_unseen = Some(GuestExit::new(self.last_words(), &exit));
                Ok(false)
            }
            // Without its plan nobody knows what it is: it was not set up to the end.
            Some(Ok(machine)) if self.running.is_none() => {
                machine.process.kill().await;
                Ok(false)
            }
            Some(Ok(machine)) => {
                failpoint(&self.name, "adopt-machine-found");
                self.follow(machine);
                Ok(true)
            }
        }
    }

    /// Sets up everything that the plan names and starts the guest; with `lease`, so that it is killed
    /// when the host's lease is about to end.
    ///
    /// # Errors
    /// What could not be set up, and why. What was set up until then stays, for
    /// [`Self::tear_down`].
    async fn start(&mut self, plan: &Plan, restarts: u32, lease: Option<LeaseCheck>) -> Result<()> {
        self.make_folder(plan, lease, "start-folder-made").await?;
        let programs = self.agent.config.programs()?;
        for (disk, spec) in &plan.hardware.disks {
            disk_image::prepare(spec).await?;
            failpoint(&self.name, "disk-image-prepared");
            let process = disk_backend::start(
                &programs,
                &self.paths,
                &self.name,
                disk,
                spec,
                self.lease.clone(),
            )
            .await?;
            self.disks.insert(disk.clone(), process);
        }
        for port in &plan.ports {
            self.agent.network.ensure_port(port).await?;
        }
        self.ports.clone_from(&plan.ports);
        failpoint(&self.name, "start-ports-made");
        let snapshots = self.snapshots.create()?;
        let jail = self.agent.config.jail.then(|| JailUser::of(&self.name));
        if let Some(user) = jail {
            user.take_over(&self.paths, &plan.hardware.disks)?;
        }
        failpoint(&self.name, "start-jail-owned");
        let restored = self.snapshots.to_restore();
        let origin = Origin {
            snapshot: restored.as_ref().map(|snapshot| snapshots.join(snapshot)),
            jail: jail.map(|user| (user, snapshots)),
            incoming: false,
        };
        let machine = self.start_machine(&programs, plan, &origin).await?;
        // From here on it is killed if something fails.
        self.follow(machine);
        self.snapshots.forget_restore()?;
        let running = RunningPlan::begin(plan, restarts);
        failpoint(&self.name, "machine-ready");
        write_atomically(&self.paths.plan(), &running)?;
        failpoint(&self.name, "start-plan-written");
        self.running = Some(running);
        Ok(())
    }

    /// Adds and removes disks and interfaces, puts changed rules in force, and replaces disk backends that
    /// ended. Returns what is wrong
    /// with a guest that goes on running.
    async fn maintain(&mut self, plan: &Plan) -> Result<Option<Problem>> {
        // What is wrong with the rest is to be mended all the same.
        let plugged = self.plug(plan).await;
        let ports = self.settled_ports(plan);
        if self.ports != ports {
            for port in &ports {
                self.agent.network.ensure_port(port).await?;
            }
            self.ports = ports;
        }
        let problem = self.keep_backends().await?;
        // Those that were replaced are asked as well.
        self.adjust_disks(plan).await?;
        self.adjust_limits(plan)?;
        plugged.map(|()| problem)
    }

    /// Whether something of a guest that runs well has changed of which nobody is told: an image that
    /// another file took the place of, a pause that could not be written down, a lease that has ended.
    async fn has_changed(&self, was_paused: bool) -> bool {
        let disks = self.running.iter();
        for (disk, spec) in disks.flat_map(|running| &running.hardware.disks) {
            if self.has_vanished(disk, spec).await {
                return true;
            }
        }
        !self.may_run() || self.is_paused().await != was_paused
    }

    /// How the guest ended, if it did since this was last asked.
    async fn take_exit(&mut self) -> Option<GuestExit> {
        if let Some(exit) = self.ended_unseen.take() {
            return Some(self.fenced(exit));
        }
        let exit = self.machine.as_ref()?.process.has_ended()?;
        let machine = self.machine.take()?;
        if let Some(follower) = self.follower.take() {
            // It ends with the socket.
            let _ = tokio::time::timeout(LAST_WORDS_LIMIT, follower).await;
        }
        machine.process.reap();
        Some(self.fenced(GuestExit::new(self.last_words(), &exit)))
    }

    /// Waits until one of the guest's processes ends, or it lets go of a device.
    async fn something_ended(&self) {
        let machine = self.machine.iter().map(|machine| &machine.process);
        let processes = machine.chain(self.disks.values());
        let waits = processes.map(|process| process.ended().map(drop).boxed());
        let device_gone = self.device_gone.notified().boxed();
        first_ended(waits.chain([device_gone]).collect()).await;
    }

    /// Presses the guest's power button; one that stands still goes on for that. A guest that was
    /// paused by a snapshot after which it is to be shut off takes no further step.
    async fn press_power_button(&self) -> Result<()> {
        let Some(machine) = &self.machine else {
            return Ok(());
        };
        if self.is_paused().await {
            if self.snapshots.disks_as_of().is_some() {
                machine.process.kill().await;
                return Ok(());
            }
            machine.resume().await?;
        }
        machine.press_power_button().await
    }

    /// Ends the guest at once. What belongs to it is left to [`Self::tear_down`].
    async fn kill(&self) {
        if let Some(machine) = &self.machine {
            machine.process.kill().await;
        }
    }

    /// Ends the disks' backends, once the machine has ended, and removes devices and records.
    async fn tear_down(&mut self, interfaces: &[String]) -> Result<()> {
        if let Some(machine) = self.machine.take() {
            machine.process.ended().await;
            machine.process.reap();
        }
        for record in self.paths.disk_records() {
            if let Some(Ok(process)) = ProcessHandle::find(&record)? {
                process.terminate().await;
                process.reap();
            }
        }
        failpoint(&self.name, "teardown-disks-ended");
        self.disks.clear();
        self.pending = hotplug::Pending::default();
        self.lease = None;
        let mut interfaces: Vec<_> = interfaces.to_vec();
        if let Some(running) = self.running.take() {
            interfaces.extend(
                running
                    .hardware
                    .interfaces
                    .into_iter()
                    .map(|(name, ..)| name),
            );
        }
        interfaces.extend(self.ports.drain(..).map(|port| port.interface));
        interfaces.sort();
        interfaces.dedup();
        if self.paths.exist() {
            for interface in &interfaces {
                self.agent
                    .network
                    .remove_port(&self.name, interface)
                    .await?;
                failpoint(&self.name, "teardown-port-gone");
            }
        }
        self.paths.remove()?;
        failpoint(&self.name, "teardown-folder-gone");
        Ok(())
    }

    /// Removes the guest's logs and snapshots.
    fn remove_kept(&self) -> Result<()> {
        self.snapshots.remove_all()?;
        self.paths.remove_logs()
    }

    /// Whether the guest stands still.
    async fn is_paused(&self) -> bool {
        match &self.machine {
            Some(machine) => machine
                .status()
                .await
                .is_ok_and(|status| status.state == GuestState::Paused),
            None => false,
        }
    }

    /// Whether the guest's keelson-vmm runs.
    fn is_running(&self) -> bool {
        self.machine.is_some()
    }

    /// The process id of the guest's keelson-vmm.
    fn process_id(&self) -> Option<u32> {
        self.machine
            .as_ref()
            .map(|machine| machine.process.process_id())
    }

    /// What the guest runs with.
    fn running(&self) -> Option<&RunningPlan> {
        self.running.as_ref()
    }

    fn devices(&self) -> Vec<DeviceStatus> {
        let running = self.running.as_ref();
        running.map_or_else(Vec::new, |running| self.device_statuses(running))
    }

    /// Whether the guest is killed when the host's lease is about to end.
    fn is_leased(&self) -> bool {
        self.lease.is_some()
    }

    /// Whether it may run as far as the host's lease goes.
    fn may_run(&self) -> bool {
        self.lease.as_ref().is_none_or(LeaseCheck::holds)
    }

    /// From now on the guest is killed when the host's lease is about to end. There must be a guard.
    fn put_on_lease(&mut self, lease: LeaseCheck) -> Result<()> {
        self.mark_leased()?;
        self.lease = Some(lease);
        Ok(())
    }

    fn as_movable(&mut self) -> Option<&mut dyn MovableRuntime> {
        Some(self)
    }

    /// From now on it goes on without the lease, which its object must say already.
    fn take_off_lease(&mut self) -> Result<()> {
        let path = self.paths.lease();
        fs::remove_file(&path).map_err(AgentError::io(format!("remove {}", path.display())))?;
        self.lease = None;
        Ok(())
    }
}

impl Runtime {
    /// Starts the virtual machine. From here on the disks may change, unless it never came so far.
    async fn start_machine(
        &self,
        programs: &Path,
        plan: &Plan,
        origin: &Origin,
    ) -> Result<Machine> {
        let disks_as_of = self.snapshots.disks_as_of();
        self.snapshots.forget_disks()?;
        let started = Machine::start(programs, &self.paths, plan, origin, self.lease.clone()).await;
        if let (Err(AgentError::Process { reason, .. }), Some(snapshot)) = (&started, disks_as_of)
            && REFUSED.contains(reason)
        {
            self.snapshots.keep_disks(&snapshot)?;
        }
        started
    }

    /// The interfaces that the guest has, or is about to get, as planned.
    fn settled_ports(&self, plan: &Plan) -> Vec<GuestPort> {
        let Some(running) = &self.running else {
            return Vec::new();
        };
        let ports = plan.ports.iter().filter(|port| {
            let device = Device::Interface(port.interface.clone());
            running.hardware.has(&device) && !running.removing.contains(&device)
        });
        ports.cloned().collect()
    }

    fn adjust_limits(&mut self, plan: &Plan) -> Result<()> {
        if let (Some(running), Some(machine)) = (&mut self.running, &self.machine)
            && running.limits != plan.limits
        {
            machine.process.limit(&plan.limits)?;
            running.limits = plan.limits;
            write_atomically(&self.paths.plan(), running)?;
        }
        Ok(())
    }

    /// Makes the folder of a guest of whom nothing is left, with its mark and its seed.
    async fn make_folder(
        &mut self,
        plan: &Plan,
        lease: Option<LeaseCheck>,
        made: &'static str,
    ) -> Result<()> {
        self.tear_down(&[]).await?;
        self.paths.create()?;
        self.lease = lease;
        if self.lease.is_some() {
            self.mark_leased()?;
        }
        failpoint(&self.name, made);
        if let Some(seed) = &plan.hardware.seed {
            seed.write(&self.paths.cloud_init_image())?;
        }
        Ok(())
    }

    fn mark_leased(&self) -> Result<()> {
        let path = self.paths.lease();
        fs::write(&path, "").map_err(AgentError::io(format!("write {}", path.display())))
    }

    /// What to say of a guest that the guard killed.
    fn fenced(&self, exit: GuestExit) -> GuestExit {
        match fs::read_to_string(self.paths.fenced()) {
            Ok(at) => GuestExit {
                clean: false,
                reason: super::actor::FENCED,
                message: format!(
                    "killed at {at}, since the host's lease was not renewed and the guest may be \
                     started elsewhere"
                ),
            },
            Err(_) => exit,
        }
    }

    fn follow(&mut self, machine: Machine) {
        let follower = machine.clone();
        let name = self.name.clone();
        let events = self.agent.events.clone();
        let device_gone = Arc::clone(&self.device_gone);
        self.follower = Some(tokio::spawn(async move {
            if let Err(error) = follower.follow(&events, &name, &device_gone).await {
                tracing::debug!(guest = name, %error, "keelson-vmm can't be followed");
            }
        }));
        self.machine = Some(machine);
    }

    fn last_words(&self) -> Option<ExitStatus> {
        serde_json::from_slice(&fs::read(self.paths.exit()).ok()?).ok()
    }
}
