//! The guest's life: boots it, does what the API asks, boots it again, and ends.

mod hotplug;
mod life;
mod migration;
mod requests;

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::api::{ApiServer, ExitReason, ExitStatus, GuestState, SharedState};
use crate::boot::BootFiles;
use crate::config::{BalloonConfig, ConsoleDevice, GuestConfig, InterfaceConfig};
use crate::console::{ConsoleLog, ConsoleOutput, ConsoleServer};
use crate::error::VmmError;
use crate::isolation::seccomp::{self, Mode, Thread};
use crate::isolation::supervisor::SupervisorLife;
use crate::isolation::{Jail, JailUser};
use crate::machine::{HostResources, open_kvm};
use crate::signals;
use crate::snapshot::Snapshot;
use crate::vcpu::install_kick_signal;
use crate::virtio::balloon::BalloonControl;
use crate::virtio::console::ConsolePort;
use crate::virtio::net::Tap;
use crate::virtio::vsock::UnixHost;

use life::{Guest, control_sender, reporters};

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
    /// Who keeps it from outside, if anybody does: it ends with that.
    pub supervisor: Option<SupervisorLife>,
    /// A folder in which snapshots may be taken.
    pub snapshot_directory: Option<PathBuf>,
    /// A folder with the sockets of disks that are added later.
    pub disk_directory: Option<PathBuf>,
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
            if let Some(directory) = &options.disk_directory {
                jail.allow_read(directory);
            }
            if let Some(directory) = &options.snapshot_directory {
                jail.allow_write(directory);
            }
            jail.enter(options.supervisor.as_ref())?;
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
    let resources = open_boot_files(launch).and_then(|files| Ok((files, open_taps(launch)?)));
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
        let config = &settled(config, &taps);
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
            virtio_console: (config.console.device == ConsoleDevice::Virtio)
                .then(|| Arc::new(ConsolePort::new(Arc::clone(&console)))),
            console,
            seccomp,
        };
        let reporters = reporters(&messages, &shared);
        Guest {
            host,
            launch,
            config: config.clone(),
            shared: &shared,
            reporters,
            inbox,
            messages,
            api: &api,
            removals: Vec::new(),
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

fn open_boot_files(launch: &Launch) -> Result<Option<BootFiles>, VmmError> {
    let files = BootFiles::open(&launch.config.kernel);
    if launch.restore.is_some() || launch.incoming {
        return Ok(files.ok());
    }
    Ok(Some(files?))
}

/// The interfaces' TAPs. A restored guest's have as many queues as its driver found, whatever the
/// number of the vCPUs.
fn open_taps(launch: &Launch) -> Result<Vec<Arc<Tap>>, VmmError> {
    let config = &launch.config;
    let mut interfaces = config.interfaces.clone();
    if let Some(restore) = &launch.restore {
        let was = Snapshot::open(&restore.directory)?.state().config()?;
        for (interface, was) in interfaces.iter_mut().zip(&was.interfaces) {
            // A snapshot that doesn't say is from before there were several.
            interface.queues = interface.queues.or(was.queues).or(Some(1));
        }
    }
    let open = |interface: &InterfaceConfig| Tap::open(interface, config.vcpus).map(Arc::new);
    Ok(interfaces.iter().map(open).collect::<Result<_, _>>()?)
}

/// The configuration with what was found out of the host.
fn settled(config: &GuestConfig, taps: &[Arc<Tap>]) -> GuestConfig {
    let mut config = config.clone();
    for (interface, tap) in config.interfaces.iter_mut().zip(taps) {
        interface.queues = Some(tap.pairs());
    }
    config
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
