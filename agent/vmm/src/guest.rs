//! The guest's life: boots it, does what the API asks, boots it again, and ends.

mod migration;

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::api::{
    Acknowledged, AfterSnapshot, ApiServer, ApiThread, BalloonAnswer, Control, ControlSender,
    Event, ExitReason, ExitStatus, GuestState, Reply, SharedState, SnapshotKind, SnapshotRequest,
    SnapshotTaken,
};
use crate::boot::BootFiles;
use crate::config::{BalloonConfig, EndAction, GuestConfig, InterfaceConfig, OnReboot};
use crate::console::{ConsoleLog, ConsoleOutput, ConsoleServer};
use crate::devices::panic::GuestPanic;
use crate::error::VmmError;
use crate::isolation::seccomp::{self, Mode, Thread};
use crate::isolation::{Jail, JailUser};
use crate::machine::{Distress, HostResources, Kind, Machine, Order, Reporters, open_kvm};
use crate::memory::PAGE;
use crate::migration::{Arrived, MigrationError, Step};
use crate::signals;
use crate::snapshot::Snapshot;
use crate::vcpu::{VcpuEnd, install_kick_signal};
use crate::virtio::balloon::BalloonControl;
use crate::virtio::block::DiskEvent;
use crate::virtio::net::Tap;
use crate::virtio::vsock::UnixHost;

use migration::Run;

/// What the thread that owns the guest waits for.
enum Message {
    Control(Control),
    Vcpu(VcpuEnd),
    Distress(Distress),
    /// Of the departure with this number.
    Departure(u64, Step),
    Arrived(Result<Box<Arrived>, MigrationError>),
}

/// What a boot of the guest ended with.
enum BootEnd {
    /// Boot again.
    Again,
    /// The guest's end.
    Final(ExitStatus),
}

/// A guest to run.
#[derive(Debug)]
pub struct Launch {
    /// Its configuration.
    pub config: GuestConfig,
    /// Where to serve its API.
    pub api_socket: PathBuf,
    /// The snapshot that it goes on from, instead of booting its kernel.
    pub restore: Option<Restore>,
    /// The guest comes from another process, by a migration.
    pub incoming: bool,
    /// What becomes of system calls that no thread has a need for.
    pub seccomp: Mode,
    /// The jail that it runs in.
    pub jail: Option<JailOptions>,
}

/// A guest's jail, apart from what its configuration says.
#[derive(Debug)]
pub struct JailOptions {
    /// Who its process becomes.
    pub user: JailUser,
    /// A folder in which snapshots may be taken.
    pub snapshot_directory: Option<PathBuf>,
}

impl Launch {
    /// Enters the jail, if there is one, and limits this thread's system calls. What needs rights
    /// is open.
    fn isolate(&self) -> Result<(), VmmError> {
        if let Some(options) = &self.jail {
            let mut jail = Jail::new(options.user);
            let config = &self.config;
            if let Some(restore) = &self.restore {
                for directory in Snapshot::open(&restore.directory)?.directories() {
                    jail.allow_read(directory);
                }
            }
            for disk in &config.disks {
                jail.allow_read(parent(&disk.socket));
            }
            if let Some(vsock) = &config.vsock {
                jail.allow_read(parent(&vsock.socket));
            }
            jail.allow_write(parent(&config.console.log));
            if let Some(directory) = &options.snapshot_directory {
                jail.allow_write(directory);
            }
            jail.enter()?;
        }
        seccomp::apply(Thread::Owner, self.seccomp)?;
        Ok(())
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}

/// How a snapshot is restored.
#[derive(Debug)]
pub struct Restore {
    /// The snapshot's directory.
    pub directory: PathBuf,
    /// Read all memory first and compare it with its checksums.
    pub verify: bool,
    /// Note the pages that the guest writes, so that the next snapshot can be differential.
    pub track_dirty_pages: bool,
}

/// Runs a guest until it ends.
///
/// Blocks the calling thread, which owns the guest; SIGTERM and SIGINT of the process end it.
pub fn run(launch: &Launch) -> Result<ExitStatus, VmmError> {
    let (config, api_socket) = (&launch.config, &launch.api_socket);
    config.validate()?;
    let kvm = Arc::new(open_kvm()?);
    let wake =
        EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(VmmError::os("create an eventfd"))?;
    let (vcpus, size) = (config.vcpus, config.memory.size_mib);
    let shared = Arc::new(SharedState::new(config.name.clone(), vcpus, size, wake));
    let console = Arc::new(ConsoleOutput::new().map_err(VmmError::os("create an eventfd"))?);
    let log_limit = config.console.log_limit_mib << 20;
    let log = ConsoleLog::open(&config.console.log, log_limit).map_err(|source| VmmError::Log {
        path: config.console.log.clone(),
        source,
    })?;
    let console_listener = listen("console", &config.console.socket)?;
    let api_listener = listen("API", api_socket)?;
    let vsock = match &config.vsock {
        Some(vsock) => {
            let listener = listen("vsock", &vsock.socket)?;
            Some(UnixHost::new(listener, &vsock.socket))
        }
        None => None,
    };

    // The API shows why the guest can't start, so that what fails from here on is told there too.
    let resources = open_boot_files(launch).and_then(|files| Ok((files, open_taps(config)?)));
    launch.isolate()?;
    let seccomp = launch.seccomp;
    let (messages, inbox) = channel();
    let control = control_sender(&messages);
    signals::end_on_termination(control_sender(&messages), seccomp)
        .map_err(VmmError::os("handle signals"))?;
    install_kick_signal().map_err(VmmError::os("handle signals"))?;
    let server = ConsoleServer::new(Arc::clone(&console), console_listener, log);
    let api = ApiServer::spawn(api_listener, Arc::clone(&shared), server, control, seccomp)
        .map_err(VmmError::os("start the API thread"))?;

    let result = resources.and_then(|(boot_files, taps)| {
        let host = HostResources {
            kvm,
            boot_files,
            taps,
            vsock,
            balloon: Arc::new(BalloonControl::new(
                config
                    .balloon
                    .as_ref()
                    .map_or(0, |balloon| BalloonConfig::pages(balloon.size_mib)),
            )),
            console,
            seccomp,
        };
        let reporters = reporters(&messages, &shared);
        Guest {
            host,
            launch,
            config,
            shared: &shared,
            reporters,
            inbox,
            messages,
            api: &api,
        }
        .live()
    });
    let exit = match &result {
        Ok(exit) => exit.clone(),
        Err(e) => ExitStatus {
            reason: ExitReason::Error,
            message: e.to_string(),
        },
    };
    let failed = exit.reason.is_failure();
    shared.finish(
        if failed {
            GuestState::Failed
        } else {
            GuestState::Stopped
        },
        exit,
    );
    api.finish();
    let vsock = config.vsock.as_ref().map(|vsock| &vsock.socket);
    for socket in [api_socket, &config.console.socket]
        .into_iter()
        .chain(vsock)
    {
        // Somebody may have removed it already.
        let _ = fs::remove_file(socket);
    }
    result
}

fn control_sender(messages: &Sender<Message>) -> ControlSender {
    let messages = messages.clone();
    Box::new(move |control| messages.send(Message::Control(control)).is_ok())
}

fn reporters(messages: &Sender<Message>, shared: &Arc<SharedState>) -> Reporters {
    let distressed = Mutex::new(messages.clone());
    let messages = Mutex::new(messages.clone());
    let shared = Arc::clone(shared);
    Reporters {
        distress: Arc::new(move |distress| {
            let messages = distressed.lock().unwrap_or_else(PoisonError::into_inner);
            // Fails only while the process ends.
            let _ = messages.send(Message::Distress(distress));
        }),
        end: Arc::new(move |end| {
            let messages = messages.lock().unwrap_or_else(PoisonError::into_inner);
            // Fails only while the process ends.
            let _ = messages.send(Message::Vcpu(end));
        }),
        disk: Arc::new(move |event| {
            shared.emit(match event {
                DiskEvent::Disconnected(id) => Event::DiskDisconnected { id },
                DiskEvent::Reconnected(id) => Event::DiskReconnected { id },
            });
        }),
    }
}

fn open_boot_files(launch: &Launch) -> Result<Option<BootFiles>, VmmError> {
    let files = BootFiles::open(&launch.config.kernel);
    if launch.restore.is_some() || launch.incoming {
        return Ok(files.ok());
    }
    Ok(Some(files?))
}

fn open_taps(config: &GuestConfig) -> Result<Vec<Arc<Tap>>, VmmError> {
    let open = |interface: &InterfaceConfig| Tap::open(&interface.id, &interface.tap).map(Arc::new);
    Ok(config
        .interfaces
        .iter()
        .map(open)
        .collect::<Result<_, _>>()?)
}

struct Guest<'a> {
    host: HostResources,
    launch: &'a Launch,
    config: &'a GuestConfig,
    shared: &'a SharedState,
    reporters: Reporters,
    inbox: Receiver<Message>,
    messages: Sender<Message>,
    api: &'a ApiThread,
}

impl Guest<'_> {
    /// Boots until the guest ends.
    fn live(&self) -> Result<ExitStatus, VmmError> {
        let mut run = Run::default();
        let mut machine = match &self.launch.restore {
            Some(restore) => self.restore(restore)?,
            None if self.launch.incoming => match self.receive()? {
                Ok((machine, arrived)) => {
                    run = arrived;
                    machine
                }
                Err(BootEnd::Final(exit)) => return Ok(exit),
                Err(BootEnd::Again) => self.boot()?,
            },
            None => self.boot()?,
        };
        loop {
            let end = self.wait(&mut machine, &mut run);
            self.abandon_departure(&mut run);
            run = Run::default();
            drop(machine);
            // What the old vCPUs still sent is about a machine that is gone.
            self.discard_vcpu_messages();
            match end {
                BootEnd::Final(exit) => return Ok(exit),
                BootEnd::Again => {
                    self.shared.emit(Event::Reboot);
                    self.shared.set_state(GuestState::Starting);
                    machine = self.boot()?;
                }
            }
        }
    }

    fn restore(&self, restore: &Restore) -> Result<Machine, VmmError> {
        let snapshot = Snapshot::open(&restore.directory)?;
        if restore.verify {
            snapshot.verify()?;
        }
        let track = restore.track_dirty_pages;
        let machine = Machine::restore(&self.host, self.config, &snapshot, track, &self.reporters)?;
        self.api.attach(machine.serial());
        self.shared.booted();
        Ok(machine)
    }

    fn boot(&self) -> Result<Machine, VmmError> {
        let machine = Machine::start(&self.host, self.config, &self.reporters)?;
        self.api.attach(machine.serial());
        self.shared.booted();
        Ok(machine)
    }

    fn wait(&self, machine: &mut Machine, run: &mut Run) -> BootEnd {
        loop {
            let message = match run.deadline() {
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    match self.inbox.recv_timeout(left) {
                        Err(RecvTimeoutError::Timeout) => {
                            self.expire(machine, run);
                            continue;
                        }
                        other => other.ok(),
                    }
                }
                None => self.inbox.recv().ok(),
            };
            // The sender is this guest's own, so the channel is never closed.
            let Some(message) = message else {
                return exit(ExitReason::Error, "the control channel closed");
            };
            let end = match message {
                Message::Control(control) => self.control(machine, run, control),
                Message::Distress(distress) => self.distressed(distress),
                Message::Vcpu(end) => self.vcpu_ended(end),
                Message::Departure(number, step) => {
                    self.departing(machine, run, number, step);
                    None
                }
                // A guest that has come is here.
                Message::Arrived(_) => None,
            };
            if let Some(end) = end {
                return end;
            }
        }
    }

    fn control(&self, machine: &mut Machine, run: &mut Run, control: Control) -> Option<BootEnd> {
        match control {
            Control::PowerButton => self.press_power_button(machine),
            Control::Pause(reply) => self.pause(machine, run, reply),
            Control::Resume(reply) => self.resume(machine, run, reply),
            Control::Snapshot(request, reply) => self.snapshot(machine, run, &request, reply),
            Control::Balloon(reply) => self.balloon(machine, run.paused, reply),
            Control::ResizeBalloon(size_mib, reply) => self.resize_balloon(size_mib, reply),
            Control::Migrate(limits, connection) => self.depart(machine, run, limits, connection),
            Control::ReleaseMigration(reply) => self.release(run, reply),
            Control::CancelMigration(reply) => self.cancel_departure(machine, run, reply),
            Control::Receive(connection) => {
                connection.refuse("not_incoming", "the guest is here already");
            }
            Control::Reset => return Some(BootEnd::Again),
            Control::Kill => {
                self.shared.set_state(GuestState::Stopping);
                return Some(exit(ExitReason::Killed, "the guest was killed by request"));
            }
        }
        None
    }

    fn vcpu_ended(&self, end: VcpuEnd) -> Option<BootEnd> {
        Some(match end {
            VcpuEnd::Shutdown => exit(ExitReason::Shutdown, "the guest shut down"),
            VcpuEnd::Reset => self.reset("the guest rebooted"),
            VcpuEnd::TripleFault(message) => exit(ExitReason::TripleFault, &message),
            VcpuEnd::Error(message) => exit(ExitReason::Error, &message),
            VcpuEnd::Stopped => return None,
        })
    }

    /// A reset that the guest asked for.
    fn reset(&self, message: &str) -> BootEnd {
        match self.config.on_reboot {
            OnReboot::Reboot => BootEnd::Again,
            OnReboot::Exit => exit(ExitReason::Reboot, message),
        }
    }

    /// The guest's kernel is in trouble: what the configuration says for that.
    fn distressed(&self, distress: Distress) -> Option<BootEnd> {
        let (event, action, reason, message) = match distress {
            Distress::Panic(panic) => (
                Event::GuestPanic {
                    crash_loaded: panic == GuestPanic::CrashLoaded,
                },
                self.config.panic.as_ref().map(|panic| panic.action),
                ExitReason::GuestPanic,
                "the guest's kernel panicked",
            ),
            Distress::Watchdog => (
                Event::Watchdog,
                self.config
                    .watchdog
                    .as_ref()
                    .map(|watchdog| watchdog.action),
                ExitReason::Watchdog,
                "the guest has not fed its watchdog in time",
            ),
        };
        tracing::warn!("{message}");
        self.shared.emit(event);
        // A crash kernel is at work; what it does is its own affair.
        if distress == Distress::Panic(GuestPanic::CrashLoaded) {
            return None;
        }
        match action.unwrap_or_default() {
            EndAction::None => None,
            EndAction::Reset => Some(self.reset(message)),
            EndAction::Exit => Some(exit(reason, message)),
        }
    }

    fn balloon(&self, machine: &Machine, paused: bool, reply: Reply) {
        if self.config.balloon.is_none() {
            return reply.refuse("no_balloon", "the guest has no balloon");
        }
        let status = machine.balloon(paused);
        let bytes = |pages| u64::from(pages) * PAGE;
        let (statistics, age) = status.statistics.unzip();
        reply.send(Ok(serde_json::json!(BalloonAnswer {
            wanted_bytes: bytes(status.wanted_pages),
            actual_bytes: bytes(status.actual_pages),
            reported_bytes: status.reported_bytes,
            statistics,
            statistics_age_ms: age.map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX)),
        })));
    }

    fn resize_balloon(&self, size_mib: u64, reply: Reply) {
        if self.config.balloon.is_none() {
            return reply.refuse("no_balloon", "the guest has no balloon");
        }
        let memory_mib = self.config.memory.size_mib;
        if let Err(e) = BalloonConfig::check_size("size_mib", size_mib, memory_mib) {
            return reply.refuse("out_of_range", e.to_string());
        }
        self.host.balloon.resize(BalloonConfig::pages(size_mib));
        acknowledge(reply);
    }

    fn press_power_button(&self, machine: &Machine) {
        match machine.press_power_button() {
            Ok(()) => self.shared.set_state(GuestState::Stopping),
            Err(e) => tracing::warn!("can't press the power button: {e}"),
        }
    }

    fn pause(&self, machine: &Machine, run: &mut Run, reply: Reply) {
        if let Some(reason) = run.refusal() {
            return reply.refuse("migrating", reason);
        }
        if !run.paused
            && let Err(e) = machine.pause()
        {
            return reply.refuse("pause_failed", e.to_string());
        }
        run.paused = true;
        self.shared.set_state(GuestState::Paused);
        acknowledge(reply);
    }

    fn resume(&self, machine: &Machine, run: &mut Run, reply: Reply) {
        if self.take_back(machine, run) {
            return acknowledge(reply);
        }
        if let Some(reason) = run.refusal() {
            return reply.refuse("migrating", reason);
        }
        if !run.paused {
            return reply.refuse("not_paused", "the guest is not paused");
        }
        machine.resume();
        run.go_on();
        self.shared.resumed();
        acknowledge(reply);
    }

    fn snapshot(
        &self,
        machine: &mut Machine,
        run: &mut Run,
        request: &SnapshotRequest,
        reply: Reply,
    ) {
        if let Some(reason) = run.refusal() {
            return reply.refuse("migrating", reason);
        }
        let order = Order {
            directory: &request.directory,
            kind: match request.kind {
                SnapshotKind::Full => Kind::Full,
                SnapshotKind::Differential => Kind::Differential,
            },
            paused: run.paused,
            resume: request.then == AfterSnapshot::Resume,
        };
        match machine.snapshot(self.config, &order) {
            Ok(taken) => {
                if !order.resume && !run.paused {
                    run.paused = true;
                    self.shared.set_state(GuestState::Paused);
                }
                tracing::info!(
                    directory = %request.directory.display(),
                    memory_bytes = taken.memory_bytes,
                    paused_us = micros(taken.paused),
                    "took a snapshot"
                );
                reply.send(Ok(serde_json::json!(SnapshotTaken {
                    memory_bytes: taken.memory_bytes,
                    paused_us: micros(taken.paused),
                })));
            }
            Err(e) => {
                tracing::warn!("the snapshot failed: {e}");
                reply.refuse("snapshot_failed", e.to_string());
            }
        }
    }

    fn discard_vcpu_messages(&self) {
        let kept: Vec<Message> = self
            .inbox
            .try_iter()
            .filter(|m| matches!(m, Message::Control(_)))
            .collect();
        for message in kept {
            let _ = self.messages.send(message);
        }
    }
}

fn exit(reason: ExitReason, message: &str) -> BootEnd {
    BootEnd::Final(ExitStatus {
        reason,
        message: message.to_owned(),
    })
}

fn acknowledge(reply: Reply) {
    reply.send(Ok(serde_json::json!(Acknowledged {})));
}

fn micros(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Listens on a Unix socket, replacing one that nobody listens on any more.
fn listen(what: &'static str, path: &Path) -> Result<UnixListener, VmmError> {
    let failed = |source| VmmError::Socket {
        what,
        path: path.into(),
        source,
    };
    let stale = fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    if stale {
        if UnixStream::connect(path).is_ok() {
            return Err(failed(io::Error::new(
                io::ErrorKind::AddrInUse,
                "another process listens on it",
            )));
        }
        fs::remove_file(path).map_err(failed)?;
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}
