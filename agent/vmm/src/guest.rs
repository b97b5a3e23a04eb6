//! The guest's life: boots it, does what the API asks, boots it again, and ends.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::api::{
    ApiServer, ApiThread, Control, ControlSender, Event, ExitReason, ExitStatus, GuestState,
    SharedState,
};
use crate::config::{GuestConfig, InterfaceConfig, OnReboot};
use crate::console::{ConsoleLog, ConsoleOutput, ConsoleServer};
use crate::error::VmmError;
use crate::machine::{HostResources, Machine, Reporters, open_kvm};
use crate::signals;
use crate::vcpu::{VcpuEnd, install_kick_signal};
use crate::virtio::block::DiskEvent;
use crate::virtio::net::Tap;

/// What the thread that owns the guest waits for.
enum Message {
    Control(Control),
    Vcpu(VcpuEnd),
}

/// What a boot of the guest ended with.
enum BootEnd {
    /// Boot again.
    Again,
    /// The guest's end.
    Final(ExitStatus),
}

/// Runs the guest of `config` until it ends, serving its API on `api_socket`.
///
/// Blocks the calling thread, which owns the guest; SIGTERM and SIGINT of the process end it.
pub fn run(config: &GuestConfig, api_socket: &Path) -> Result<ExitStatus, VmmError> {
    config.validate()?;
    let kvm = open_kvm()?;
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

    let (messages, inbox) = channel();
    let control = control_sender(&messages);
    signals::end_on_termination(control_sender(&messages))
        .map_err(VmmError::os("handle signals"))?;
    install_kick_signal().map_err(VmmError::os("handle signals"))?;
    let server = ConsoleServer::new(Arc::clone(&console), console_listener, log);
    let api = ApiServer::spawn(api_listener, Arc::clone(&shared), server, control)
        .map_err(VmmError::os("start the API thread"))?;

    let result = open_taps(config).and_then(|taps| {
        let host = HostResources { kvm, taps, console };
        let reporters = reporters(&messages, &shared);
        Guest {
            host,
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
    let failed = matches!(exit.reason, ExitReason::TripleFault | ExitReason::Error);
    shared.finish(
        if failed {
            GuestState::Failed
        } else {
            GuestState::Stopped
        },
        exit,
    );
    api.finish();
    for socket in [api_socket, &config.console.socket] {
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
    let messages = Mutex::new(messages.clone());
    let shared = Arc::clone(shared);
    Reporters {
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
        loop {
            let machine = self.boot()?;
            let end = self.wait(&machine);
            drop(machine);
            // What the old vCPUs still sent is about a machine that is gone.
            self.discard_vcpu_messages();
            match end {
                BootEnd::Final(exit) => return Ok(exit),
                BootEnd::Again => {
                    self.shared.emit(Event::Reboot);
                    self.shared.set_state(GuestState::Starting);
                }
            }
        }
    }

    fn boot(&self) -> Result<Machine, VmmError> {
        let machine = Machine::start(&self.host, self.config, &self.reporters)?;
        self.api.attach(machine.serial());
        self.shared.booted();
        Ok(machine)
    }

    fn wait(&self, machine: &Machine) -> BootEnd {
        let exit = |reason, message: &str| {
            BootEnd::Final(ExitStatus {
                reason,
                message: message.to_owned(),
            })
        };
        loop {
            // The sender is this guest's own, so the channel is never closed.
            let Ok(message) = self.inbox.recv() else {
                return exit(ExitReason::Error, "the control channel closed");
            };
            match message {
                Message::Control(Control::PowerButton) => self.press_power_button(machine),
                Message::Control(Control::Reset) => return BootEnd::Again,
                Message::Control(Control::Kill) => {
                    self.shared.set_state(GuestState::Stopping);
                    return exit(ExitReason::Killed, "the guest was killed by request");
                }
                Message::Vcpu(VcpuEnd::Shutdown) => {
                    return exit(ExitReason::Shutdown, "the guest shut down");
                }
                Message::Vcpu(VcpuEnd::Reset) => match self.config.on_reboot {
                    OnReboot::Reboot => return BootEnd::Again,
                    OnReboot::Exit => return exit(ExitReason::Reboot, "the guest rebooted"),
                },
                Message::Vcpu(VcpuEnd::TripleFault(message)) => {
                    return exit(ExitReason::TripleFault, &message);
                }
                Message::Vcpu(VcpuEnd::Error(message)) => return exit(ExitReason::Error, &message),
                Message::Vcpu(VcpuEnd::Stopped) => {}
            }
        }
    }

    fn press_power_button(&self, machine: &Machine) {
        match machine.press_power_button() {
            Ok(()) => self.shared.set_state(GuestState::Stopping),
            Err(e) => tracing::warn!("can't press the power button: {e}"),
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
