//! Snapshots of guests: a directory with the files `state` ([`format`]) and `memory`
//! ([`MemoryState`]).
//!
//! A full snapshot has all of the guest's memory, a differential one what changed since the one
//! before. The file `state` comes last, by a rename, when all else is on the disk: a directory
//! without it holds no snapshot.

pub mod format;
pub(crate) mod memory_file;
mod state;
mod store;

use std::io;
use std::path::PathBuf;

pub use format::FormatError;
pub use state::{CHUNK, Difference, MemoryState, PageRange, SnapshotState};
pub(crate) use state::{MachineState, PlatformState};
pub(crate) use store::Writer;
pub use store::{Snapshot, Summary, merge};

/// Why a snapshot can't be taken or used.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A file can't be read or written.
    #[error("can't {step} {path}: {source}")]
    Io {
        /// What was tried.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The directory holds no snapshot.
    #[error("{0} holds no snapshot, or one that was never finished: it has no file `state`")]
    Missing(PathBuf),
    /// The directory holds a snapshot already.
    #[error("{0} has files in it: a snapshot needs a directory that is empty or not there yet")]
    Occupied(PathBuf),
    /// The state file is not usable.
    #[error("the snapshot {path} can't be used: {source}")]
    State {
        /// The state file.
        path: PathBuf,
        /// What is wrong with it.
        source: FormatError,
    },
    /// The memory file is not usable.
    #[error("the snapshot's memory {path} can't be used: {reason}")]
    Memory {
        /// The memory file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A differential snapshot's base is not the right one.
    #[error(
        "the snapshot {directory} is the difference to another one than is in {base} now: it can't \
         be used without that"
    )]
    Base {
        /// The differential snapshot.
        directory: PathBuf,
        /// Where its base was.
        base: PathBuf,
    },
    /// The chain of differences has no end.
    #[error("the snapshot {0} is behind more than {max} differences: merge it", max = store::MAX_CHAIN)]
    Chain(PathBuf),
    /// Its configuration is not valid.
    #[error("the snapshot's configuration is not valid: {0}")]
    Config(String),
    /// A clone must have the hardware of the snapshot.
    #[error("the snapshot doesn't fit the configuration: {0}")]
    Mismatch(String),
    /// What the snapshot holds doesn't fit this host.
    #[error("the snapshot can't be restored on this host: {0}")]
    Host(String),
    /// A device can't be paused or restored.
    #[error("the device {device}: {reason}")]
    Device {
        /// Its name.
        device: String,
        /// What is wrong.
        reason: String,
    },
    /// There is nothing that a difference could be to.
    #[error("there is no earlier snapshot of this process: take a full one first")]
    NoBase,
    /// KVM refused a step.
    #[error("KVM refused to {step}: {source}")]
    Kvm {
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        source: kvm_ioctls::Error,
    },
}

impl SnapshotError {
    pub(crate) fn io(
        step: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { step, path, source }
    }

    pub(crate) fn kvm(step: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { step, source }
    }
}
