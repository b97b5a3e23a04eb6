use std::path::PathBuf;

use crate::{LeaseId, Revision};

/// Why a call to a [`StateStore`](crate::StateStore) failed.
///
/// A key that doesn't exist is not an error: ranges come back empty.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// The revision asked for has been compacted away. Read the current state again and go on from
    /// the revision of that answer.
    #[error(
        "revision {requested} has been compacted{}: list again and continue from the revision of \
         that answer",
        known(", the oldest that can be read is ", *compact_revision)
    )]
    Compacted {
        /// The revision in the request; 0 where the server doesn't repeat it.
        requested: Revision,
        /// Oldest revision that can still be read; 0 where the server doesn't say it.
        compact_revision: Revision,
    },

    /// The revision asked for doesn't exist yet.
    #[error("revision {requested} is in the future{}", known(", the store is at ", *current))]
    FutureRevision {
        /// The revision in the request; 0 where the server doesn't repeat it.
        requested: Revision,
        /// Current revision; 0 where the server doesn't say it.
        current: Revision,
    },

    /// No lease has this id: it expired, was revoked, or never existed.
    #[error("lease {lease:#x} not found: it expired, was revoked or never existed")]
    LeaseNotFound {
        /// The id in the request; 0 where the server doesn't repeat it.
        lease: LeaseId,
    },

    /// A lease with this id exists already.
    #[error("lease {lease:#x} exists already")]
    LeaseExists {
        /// The id in the request.
        lease: LeaseId,
    },

    /// Something is larger than the limit for it.
    #[error("{what} is {size} long, the limit is {limit}")]
    TooLarge {
        /// What is too large, with its unit, for example "key in bytes".
        what: &'static str,
        /// Its size; 0 where the server doesn't say it.
        size: usize,
        /// The limit.
        limit: usize,
    },

    /// A transaction would change one key twice.
    #[error(
        "the transaction changes one key twice: give each key to at most one put, and to no delete beside it"
    )]
    DuplicateKey,

    /// The request makes no sense; nothing was done.
    #[error("invalid request: {0}")]
    InvalidArgument(String),

    /// A limit on how many things may exist at once was reached.
    #[error("{what}: the limit of {limit} is reached")]
    Exhausted {
        /// What there is too much of, for example "leases".
        what: &'static str,
        /// The limit.
        limit: usize,
    },

    /// The store's URL can't be used.
    #[error("state store URL {url:?}: {reason}")]
    InvalidUrl {
        /// The URL, passwords left out.
        url: String,
        /// What is wrong and what would be right.
        reason: String,
    },

    /// The server can't be reached, has no leader, or did not answer in time. Nothing was changed:
    /// asking again is safe.
    #[error("state store unavailable: {0}")]
    Unavailable(String),

    /// The connection was lost, or time ran out, after a write had been sent: it may have been
    /// done, or may still be. Read what it was to change before deciding to repeat it; a
    /// compare-and-swap can be repeated safely.
    #[error(
        "whether the state store did the write is unknown: {0}; read again before repeating it"
    )]
    OutcomeUnknown(String),

    /// The server wants credentials, or other ones.
    #[error("access to the state store denied: {0}")]
    PermissionDenied(String),

    /// Another process has the store open.
    #[error("state store {path} is in use by {holder}: stop it, or use another directory")]
    InUse {
        /// The store's directory.
        path: PathBuf,
        /// The other process, as far as it is known.
        holder: String,
    },

    /// The store was written by a newer version of this program.
    #[error(
        "state store {path} has format {found}, this version reads up to {supported}: \
         install the version that wrote it, or a newer one"
    )]
    NewerFormat {
        /// The store's directory.
        path: PathBuf,
        /// Format version found.
        found: i64,
        /// Newest format version that this program reads.
        supported: i64,
    },

    /// Stored data is damaged. What is damaged is never returned as data.
    #[error("state store is corrupt: {0}; restore it from a backup")]
    Corrupt(String),

    /// The storage engine or the file system failed. After a failed write the store takes no more
    /// writes until it is opened again, because what the disk holds is unknown.
    #[error("state store failed: {0}")]
    Storage(String),

    /// The store has been closed.
    #[error("the state store is closed")]
    Closed,
}

/// `text` and `number`, if that is known.
fn known(text: &str, number: i64) -> String {
    match number {
        0 => String::new(),
        number => format!("{text}{number}"),
    }
}
