//! The subcommands: what a running guest is asked for, and what is done with snapshots.

use std::path::PathBuf;

use clap::{Subcommand, ValueEnum};
use keelson_vmm::api::{AfterSnapshot, SnapshotKind, SnapshotRequest};
use keelson_vmm::client::{ClientError, VmmClient};
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
    /// Take snapshots and look after them.
    #[command(subcommand)]
    Snapshot(SnapshotTool),
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
    /// What was found can't be shown.
    #[error("can't show it: {0}")]
    Show(#[from] serde_json::Error),
}

impl ToolError {
    /// As the process's: 1, or 3 for a snapshot that is not usable.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Snapshot(_) => 3,
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
            Self::Snapshot(tool) => tool.run(),
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
