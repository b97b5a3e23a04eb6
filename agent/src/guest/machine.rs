//! The keelson-vmm process of a guest.

use std::path::{Path, PathBuf};
use std::time::Duration;

use keelson_vmm::api::{
    ErrorBody, Event, ExitStatus, GuestState, MigrationStatus, PluggedDevice, Request, Response,
    SnapshotRequest, SnapshotTaken, Status,
};
use keelson_vmm::client::{ClientError, VmmClient};
use keelson_vmm::config::{
    BalloonConfig, ConsoleConfig, ConsoleDevice, CpuConfig, DiskConfig, EndAction, GuestConfig,
    HugepageSize, InterfaceConfig, KernelConfig, MemoryConfig, OnReboot, PanicConfig, VhostUse,
    VsockConfig, WatchdogConfig,
};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::Notify;

use keelson_api::{DiskSpec, Kind, VirtioConsole};

use super::GuestPaths;
use super::device::Device;
use super::jail::JailUser;
use super::plan::Plan;
use crate::events::EventRecorder;
use crate::failpoint::failpoint;
use crate::fleet::LeaseCheck;
use crate::host::{Exit, GuestPort, LaunchRequest, ProcessHandle};
use crate::{AgentError, error::Result};

/// How long keelson-vmm may take to set the guest up, loading its kernel and initrd included.
const READY_LIMIT: Duration = Duration::from_secs(30);
const READY_POLL: Duration = Duration::from_millis(2);
/// How long keelson-vmm keeps of a console; the log is rotated at half of it.
const CONSOLE_LOG_LIMIT_MIB: u64 = 16;

/// Where a virtual machine comes from, and where it lives.
#[derive(Clone, Debug, Default)]
pub struct Origin {
    /// Its user, and the folder of its snapshots, if it is jailed.
    pub jail: Option<(JailUser, PathBuf)>,
    /// The snapshot that it goes on from, instead of booting.
    pub snapshot: Option<PathBuf>,
    /// It waits for a guest of another host, instead of booting.
    pub incoming: bool,
}

/// A guest's virtual machine.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Its keelson-vmm.
    pub process: ProcessHandle,
    paths: GuestPaths,
}

impl Machine {
    /// Starts a virtual machine and waits until its processors run.
    ///
    /// # Errors
    /// [`AgentError::Process`] with the reason that keelson-vmm gives.
    pub async fn start(
        programs: &Path,
        paths: &GuestPaths,
        plan: &Plan,
        origin: &Origin,
        lease: Option<LeaseCheck>,
    ) -> Result<Self> {
        let config = vmm_config(paths, plan)?;
        crate::host::write_atomically(&paths.vmm_config(), &config)?;
        let mut arguments = vec![
            "--config".into(),
            paths.vmm_config().into(),
            "--api-socket".into(),
            paths.api_socket().into(),
        ];
        if let Some((user, snapshots)) = &origin.jail {
            arguments.push("--jail".into());
            arguments.push(user.to_string().into());
            arguments.push("--snapshot-directory".into());
            arguments.push(snapshots.into());
            arguments.push("--disk-directory".into());
            arguments.push(paths.run().into());
        }
        if let Some(snapshot) = &origin.snapshot {
            arguments.push("--restore".into());
            arguments.push(snapshot.into());
        }
        if origin.incoming {
            arguments.push("--incoming".into());
        }
        let request = LaunchRequest {
            program: programs.join("keelson-vmm"),
            arguments,
            unit: format!("keelson-vm-{}", plan.name),
            log: paths.vmm_log(),
            record: paths.vmm_record(),
            limits: plan.limits,
            inherited: None,
            lease,
        };
        let process = ProcessHandle::launch(&request)?;
        failpoint(&plan.name, "machine-launched");
        let machine = Self {
            process,
            paths: paths.clone(),
        };
        if let Ok(ready) = tokio::time::timeout(READY_LIMIT, machine.ready()).await {
            return ready.map(|()| machine);
        }
        machine.process.kill().await;
        machine.process.reap();
        Err(AgentError::Process {
            reason: "MachineLate",
            message: format!("the virtual machine was not set up within {READY_LIMIT:?}"),
        })
    }

    /// Finds the virtual machine that an earlier agent started: `Err` with how it ended if it has.
    pub fn find(paths: &GuestPaths) -> Result<Option<std::result::Result<Self, Exit>>> {
        let found = ProcessHandle::find(&paths.vmm_record())?;
        Ok(found.map(|found| {
            found.map(|process| Self {
                process,
                paths: paths.clone(),
            })
        }))
    }

    /// What the guest does now.
    pub async fn status(&self) -> Result<Status> {
        self.call(VmmClient::status).await
    }

    /// Presses the ACPI power button.
    pub async fn press_power_button(&self) -> Result<()> {
        self.call(VmmClient::power_button).await
    }

    /// Stops the guest's processors and devices, its disks' requests finished.
    pub async fn pause(&self) -> Result<()> {
        self.call(VmmClient::pause).await
    }

    /// Lets a paused guest go on.
    pub async fn resume(&self) -> Result<()> {
        self.call(VmmClient::resume).await
    }

    /// How its guest's latest migration away from it gets on.
    pub async fn migration(&self) -> Result<MigrationStatus> {
        self.call(VmmClient::migration).await
    }

    /// Keeps a guest stopped that the other side has, until it is told to go on or ended.
    pub async fn release_migration(&self) -> Result<()> {
        self.call(VmmClient::release_migration).await
    }

    /// Lets a guest stay that is being migrated and was not released.
    pub async fn cancel_migration(&self) -> Result<()> {
        self.call(VmmClient::cancel_migration).await
    }

    /// Tells the guest the size of the terminal that shows its console. One whose console is the serial port
    /// refuses.
    pub async fn resize_console(&self, columns: u16, rows: u16) -> Result<()> {
        self.call(move |client| client.resize_console(columns, rows))
            .await
    }

    /// Takes a snapshot; returns when it is on the disk.
    pub async fn snapshot(&self, request: SnapshotRequest) -> Result<SnapshotTaken> {
        self.call(move |client| client.snapshot(request)).await
    }

    /// Which disks and interfaces the guest has.
    pub async fn devices(&self) -> Result<Vec<PluggedDevice>> {
        let answer = self.call(VmmClient::devices).await?;
        Ok(answer.devices)
    }

    /// Makes a request that may be refused, with a word for why.
    pub async fn ask<T: Send + 'static>(
        &self,
        request: impl FnOnce(&mut VmmClient) -> std::result::Result<T, ClientError> + Send + 'static,
    ) -> Result<std::result::Result<T, ErrorBody>> {
        let request = |client: &mut VmmClient| match request(client) {
            Ok(answer) => Ok(Ok(answer)),
            Err(ClientError::Refused(body)) => Ok(Err(body)),
            Err(error) => Err(error),
        };
        self.call(request).await
    }

    /// Tells as events what the guest's devices say about its kernel, rings `device_gone` when the guest
    /// has let go of one, and writes down how the guest ended, for the agent that cleans up after it.
    /// Returns when keelson-vmm closes its socket.
    pub async fn follow(
        self,
        events: &EventRecorder,
        name: &str,
        device_gone: &Notify,
    ) -> Result<()> {
        let what = || format!("follow {}", self.paths.api_socket().display());
        let stream = UnixStream::connect(self.paths.api_socket()).await;
        let (reader, mut writer) = stream.map_err(AgentError::io(what()))?.into_split();
        let mut line = serde_json::to_string(&Request::Subscribe)
            .map_err(|error| AgentError::io(what())(error.into()))?;
        line.push('\n');
        writer
            .write_all(line.as_bytes())
            .await
            .map_err(AgentError::io(what()))?;
        let warn = |reason, message| events.warning(Kind::VirtualMachine, name, reason, message);
        let mut lines = BufReader::new(reader).lines();
        while let Some(line) = lines.next_line().await.map_err(AgentError::io(what()))? {
            if let Ok(event) = serde_json::from_str(&line) {
                match event {
                    Event::Exit { reason, message } => {
                        let status = ExitStatus { reason, message };
                        crate::host::write_atomically(&self.paths.exit(), &status)?;
                    }
                    Event::GuestPanic {
                        crash_loaded: false,
                    } => {
                        warn("GuestPanicked", "its kernel panicked").await;
                    }
                    Event::GuestPanic { crash_loaded: true } => {
                        let message = "its kernel panicked and started its crash kernel";
                        warn("GuestPanicked", message).await;
                    }
                    Event::DeviceRemoved { .. } => device_gone.notify_one(),
                    Event::Watchdog => {
                        warn("WatchdogExpired", "it has not fed its watchdog in time").await;
                    }
                    _ => {}
                }
            } else if let Ok(Response::<Status>::Error(error)) = serde_json::from_str(&line) {
                tracing::warn!(
                    kind = error.kind,
                    error.message,
                    "keelson-vmm refused to be followed"
                );
            }
        }
        Ok(())
    }

    async fn ready(&self) -> Result<()> {
        loop {
            if let Some(exit) = self.process.has_ended() {
                self.process.reap();
                return Err(start_failure(&exit));
            }
            match self.status().await {
                // It has not come to its first instruction, and is about to exit with the reason.
                Ok(status) if status.state == GuestState::Failed && status.boots == 0 => {}
                Ok(status) if status.state != GuestState::Starting => return Ok(()),
                Ok(_) | Err(_) => {}
            }
            tokio::time::sleep(READY_POLL).await;
        }
    }

    async fn call<T: Send + 'static>(
        &self,
        request: impl FnOnce(&mut VmmClient) -> std::result::Result<T, ClientError> + Send + 'static,
    ) -> Result<T> {
        let socket = self.paths.api_socket();
        let call = move || VmmClient::connect(socket).and_then(|mut client| request(&mut client));
        let answer = tokio::task::spawn_blocking(call)
            .await
            .map_err(|error| AgentError::io("call keelson-vmm")(std::io::Error::other(error)))?;
        answer.map_err(|error| match error {
            ClientError::Refused(body) => AgentError::Precondition(vec![body.message]),
            error => AgentError::Process {
                reason: "MachineUnreachable",
                message: error.to_string(),
            },
        })
    }
}

/// The exit codes of keelson-vmm, which its --help lists.
fn start_failure(exit: &Exit) -> AgentError {
    let reason = match exit.code {
        Some(2) => "MachineConfigurationInvalid",
        // With the message, which names the kernel, the initrd or the snapshot.
        Some(3) => "KernelUnusable",
        Some(4) => "KvmUnavailable",
        Some(5) => "DeviceUnavailable",
        _ => "MachineFailed",
    };
    AgentError::Process {
        reason,
        message: exit.last_line.clone(),
    }
}

fn end_action(action: keelson_api::EndAction) -> EndAction {
    match action {
        keelson_api::EndAction::None => EndAction::None,
        keelson_api::EndAction::Reset => EndAction::Reset,
        keelson_api::EndAction::End => EndAction::Exit,
    }
}

/// A disk, as keelson-vmm is told of it.
pub fn disk_config(paths: &GuestPaths, name: &str, spec: &DiskSpec) -> DiskConfig {
    DiskConfig {
        id: Device::Disk(name.into()).id(),
        socket: paths.disk_socket(name),
        read_only: spec.read_only,
        queues: spec.queues,
        queue_size: 256,
    }
}

/// An interface, as keelson-vmm is told of it.
///
/// # Errors
/// [`AgentError::Process`] for an address that is none.
pub fn interface_config(port: &GuestPort) -> Result<InterfaceConfig> {
    Ok(InterfaceConfig {
        id: Device::Interface(port.interface.clone()).id(),
        tap: port.device(),
        mac: port.mac.to_string().parse().map_err(invalid)?,
        mtu: port.network_spec.mtu,
        queues: None,
        vhost: VhostUse::default(),
    })
}

fn invalid(message: String) -> AgentError {
    AgentError::Process {
        reason: "MachineConfigurationInvalid",
        message,
    }
}

fn vmm_config(paths: &GuestPaths, plan: &Plan) -> Result<GuestConfig> {
    let hardware = &plan.hardware;
    let devices = &hardware.devices;
    let disks = hardware.disks.iter();
    let disks = disks.map(|(name, spec)| disk_config(paths, name, spec));
    let interfaces: Result<Vec<_>> = plan.ports.iter().map(interface_config).collect();
    let config = GuestConfig {
        name: plan.name.clone(),
        vcpus: hardware.cpus,
        memory: MemoryConfig {
            size_mib: hardware.memory.mib(),
            hugepages: hardware.hugepages.map(|size| match size {
                keelson_api::HugepageSize::Size2Mi => HugepageSize::Size2MiB,
                keelson_api::HugepageSize::Size1Gi => HugepageSize::Size1GiB,
            }),
            shared: hardware.shared_memory.then_some(true),
            ..MemoryConfig::default()
        },
        cpu: CpuConfig::default(),
        kernel: KernelConfig {
            image: hardware.kernel.image.clone(),
            initrd: hardware.kernel.initrd.clone(),
            command_line: hardware.kernel.command_line.clone(),
        },
        console: ConsoleConfig {
            device: match devices.console {
                None => ConsoleDevice::Serial,
                Some(VirtioConsole {}) => ConsoleDevice::Virtio,
            },
            socket: paths.console_socket(),
            log: paths.console_log(),
            log_limit_mib: CONSOLE_LOG_LIMIT_MIB,
        },
        disks: disks.collect(),
        interfaces: interfaces?,
        balloon: devices.balloon.map(|balloon| BalloonConfig {
            size_mib: balloon.size.mib(),
            deflate_on_oom: balloon.deflate_on_oom,
            free_page_reporting: balloon.free_page_reporting,
            statistics: true,
        }),
        vsock: devices.vsock.map(|vsock| VsockConfig {
            cid: vsock.cid,
            socket: paths.vsock_socket(),
        }),
        panic: devices.panic.map(|panic| PanicConfig {
            action: end_action(panic.action),
        }),
        watchdog: devices.watchdog.map(|watchdog| WatchdogConfig {
            action: end_action(watchdog.action),
        }),
        on_reboot: OnReboot::Reboot,
    };
    config
        .validate()
        .map_err(|error| invalid(error.to_string()))?;
    Ok(config)
}
