//! The subcommands: what a running guest is asked for, and what is done with snapshots.

use std::path::PathBuf;

use clap::{Subcommand, ValueEnum};
use keelson_vmm::api::{AfterSnapshot, RemovalRequest, SnapshotKind, SnapshotRequest};
use keelson_vmm::client::{ClientError, VmmClient};
use keelson_vmm::config::DiskConfig;
use keelson_vmm::snapshot::{Snapshot, SnapshotError, merge};

/// What to do instead of running a guest.
#[derive(Subcommand)]
pub enum Tool {
    /// Pause a running guest.
    Pause(Target),
    /// Let a paused guest go on.
    Resume(Target),
    /// Show what a guest's balloon has and how the guest uses its memory, as JSON; or change its size.
    Balloon {
        #[command(flatten)]
        target: Target,
        /// What the guest is to give back in all, in MiB.
        #[arg(long, value_name = "MIB")]
        resize: Option<u64>,
    },
    /// Tell a guest with a virtio console the size of the terminal that shows it.
    ResizeConsole {
        #[command(flatten)]
        target: Target,
        /// Characters in a line.
        columns: u16,
        /// Lines.
        rows: u16,
    },
    /// Add disks and interfaces to a running guest, and remove them.
    #[command(subcommand)]
    Device(DeviceTool),
    /// Take snapshots and look after them.
    #[command(subcommand)]
    Snapshot(SnapshotTool),
}

/// What to do about a running guest's devices.
#[derive(Subcommand)]
pub enum DeviceTool {
    /// Show the disks and interfaces, as JSON.
    List(Target),
    /// Add a disk, whose backend listens.
    AddDisk {
        #[command(flatten)]
        target: Target,
        /// The disk as in a guest's configuration: `{"id": "data", "socket": "/run/data.sock"}`.
        disk: String,
    },
    /// Add an interface. Attaches to its TAP, for which it needs the rights.
    AddInterface {
        #[command(flatten)]
        target: Target,
        /// The interface as in a guest's configuration: `{"id": "eth1", "tap": "tap1", "mac": "…"}`.
        interface: String,
    },
    /// Remove a disk or an interface, when the guest has let go of it.
    Remove {
        #[command(flatten)]
        target: Target,
        /// Its id.
        id: String,
        /// How long the guest may take.
        #[arg(long, value_name = "SECONDS", default_value_t = 10)]
        timeout: u64,
    },
}

/// The guest to ask.
#[derive(clap::Args)]
pub struct Target {
    /// The guest's API socket.
    #[arg(long, value_name = "PATH")]
    api_socket: PathBuf,
}

/// What to do about a snapshot.
#[derive(Subcommand)]
pub enum SnapshotTool {
    /// Take a snapshot of a running or paused guest.
    Take {
        #[command(flatten)]
        target: Target,
        /// The directory to take it to: empty, or not there yet.
        directory: PathBuf,
        /// Take only what changed since the snapshot before.
        #[arg(long)]
        differential: bool,
        /// What a running guest does then.
        #[arg(long, value_enum, default_value_t = Then::Resume)]
        then: Then,
    },
    /// Show what a snapshot holds, as JSON; `.config` is a configuration to start clones from.
    Info {
        /// The snapshot's directory.
        directory: PathBuf,
    },
    /// Read all of a snapshot, with those that it is a difference to, and check it.
    Verify {
        /// The snapshot's directory.
        directory: PathBuf,
    },
    /// Make a full snapshot of a differential one and those before it.
    Merge {
        /// The differential snapshot's directory.
        from: PathBuf,
        /// The directory of the new one: empty, or not there yet.
        to: PathBuf,
    },
}

/// What a running guest does after a snapshot.
#[derive(Clone, Copy, ValueEnum)]
pub enum Then {
    /// It goes on.
    Resume,
    /// It stays paused, with its disks as they are in the snapshot.
    Pause,
}

/// Why a tool failed.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// The guest can't be asked, or refused.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A snapshot is not usable.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// What is to be added isn't one.
    #[error("no device's configuration: {0}")]
    Device(serde_json::Error),
    /// What was found can't be shown.
    #[error("can't show it: {0}")]
    Show(#[from] serde_json::Error),
}

impl ToolError {
    /// As the process's: 1, 2 for what is no configuration, or 3 for a snapshot that is not usable.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Snapshot(_) => 3,
            Self::Device(_) => 2,
            Self::Client(_) | Self::Show(_) => 1,
        }
    }
}

impl Tool {
    /// Does it.
    pub fn run(self) -> Result<(), ToolError> {
        match self {
            Self::Pause(target) => Ok(VmmClient::connect(target.api_socket)?.pause()?),
            Self::Resume(target) => Ok(VmmClient::connect(target.api_socket)?.resume()?),
            Self::Balloon { target, resize } => {
                let mut client = VmmClient::connect(target.api_socket)?;
                match resize {
                    Some(size_mib) => Ok(client.resize_balloon(size_mib)?),
                    None => show(&client.balloon()?),
                }
            }
            Self::ResizeConsole {
                target,
                columns,
                rows,
            } => Ok(VmmClient::connect(target.api_socket)?.resize_console(columns, rows)?),
            Self::Device(tool) => tool.run(),
            Self::Snapshot(tool) => tool.run(),
        }
    }
}

impl DeviceTool {
    fn run(self) -> Result<(), ToolError> {
        match self {
            Self::List(target) => show(&VmmClient::connect(target.api_socket)?.devices()?),
            Self::AddDisk { target, disk } => {
                let mut disk: DiskConfig =
                    serde_json::from_str(&disk).map_err(ToolError::Device)?;
                // The guest's process may have another working directory.
                disk.socket = std::path::absolute(&disk.socket).unwrap_or(disk.socket);
                show(&VmmClient::connect(target.api_socket)?.add_disk(disk)?)
            }
            Self::AddInterface { target, interface } => {
                let interface = serde_json::from_str(&interface).map_err(ToolError::Device)?;
                show(&VmmClient::connect(target.api_socket)?.add_interface(interface)?)
            }
            Self::Remove {
                target,
                id,
                timeout,
            } => {
                let timeout_ms = timeout.saturating_mul(1000);
                let removal = RemovalRequest { id, timeout_ms };
                Ok(VmmClient::connect(target.api_socket)?.remove_device(removal)?)
            }
        }
    }
}

impl SnapshotTool {
    fn run(self) -> Result<(), ToolError> {
        match self {
            Self::Take {
                target,
                directory,
                differential,
                then,
            } => {
                // The guest's process may have another working directory.
                let directory = std::path::absolute(&directory).unwrap_or(directory);
                let taken = VmmClient::connect(target.api_socket)?.snapshot(SnapshotRequest {
                    directory,
                    kind: if differential {
                        SnapshotKind::Differential
                    } else {
                        SnapshotKind::Full
                    },
                    then: match then {
                        Then::Resume => AfterSnapshot::Resume,
                        Then::Pause => AfterSnapshot::Pause,
                    },
                })?;
                show(&taken)
            }
            Self::Info { directory } => {
                let snapshot = Snapshot::open(&directory)?;
                show(&snapshot.summary()?)
            }
            Self::Verify { directory } => Ok(Snapshot::open(&directory)?.verify()?),
            Self::Merge { from, to } => Ok(merge(&from, &to)?),
        }
    }
}

fn show(value: &impl serde::Serialize) -> Result<(), ToolError> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}
