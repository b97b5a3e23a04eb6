//! Why a migration failed.

use std::io;

use super::stream::StreamError;
use crate::snapshot::SnapshotError;

/// Why a guest can't be moved.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// The stream can't be read or written, or is not valid.
    #[error("the migration's stream: {0}")]
    Stream(#[from] StreamError),
    /// The other side refused or failed.
    #[error("the other side can't take the guest: {0}")]
    Refused(String),
    /// Something came that has no place there.
    #[error("the migration's stream has {found} where {expected} should be")]
    OutOfOrder {
        /// What came.
        found: &'static str,
        /// What should have come.
        expected: &'static str,
    },
    /// The guest writes faster than its memory can be sent.
    #[error(
        "after {rounds} rounds {remaining_mib} MiB were still to be sent, at {mib_per_second} MiB a second: \
         the guest writes its memory too fast; allow a longer downtime or more bandwidth"
    )]
    NotConverging {
        /// Rounds.
        rounds: u32,
        /// MiB that are left.
        remaining_mib: u64,
        /// What was sent a second.
        mib_per_second: u64,
    },
    /// It was canceled.
    #[error("the migration was canceled")]
    Canceled,
    /// The guest ended, was reset or is paused.
    #[error("the migration can't go on: {0}")]
    Guest(String),
    /// It took too long with the guest stopped.
    #[error("the guest was stopped for {0} s and the migration wasn't through")]
    Stopped(u64),
    /// The machine can't be saved, or built again.
    #[error(transparent)]
    Machine(#[from] SnapshotError),
    /// The machine can't be built.
    #[error("the machine can't be built: {0}")]
    Build(String),
    /// The host failed.
    #[error("can't {step}: {source}")]
    Os {
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl MigrationError {
    pub(crate) fn os(step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Os { step, source }
    }
}
