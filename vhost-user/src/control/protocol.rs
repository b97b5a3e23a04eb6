//! Requests and responses.

use serde::{Deserialize, Serialize};

use crate::Error;
use crate::catalog::DiskSpec;
use crate::overlay::OverlayError;
use crate::rate_limit::Limits;

/// The longest line in either direction but for answers to `list` and `metrics`, in bytes.
pub const MAX_LINE: usize = 64 << 10;

/// A request line: `{"request":"list"}`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// All disks with their sizes and counters, and all groups.
    List,
    /// Serve one more disk. Its key, if it has one, is to be read from a descriptor that comes
    /// with the line (`SCM_RIGHTS`).
    Add {
        /// What it is made of.
        disk: DiskSpec,
        /// Whether a descriptor with a key comes along.
        #[serde(default)]
        key: bool,
    },
    /// Stop serving a disk.
    Remove {
        /// Its name.
        id: String,
    },
    /// Make a disk larger, or look again how large its image is.
    Resize {
        /// Its name.
        id: String,
        /// The new size in bytes.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        bytes: Option<u64>,
    },
    /// Make a snapshot of an overlay, at its path with the name appended.
    Snapshot {
        /// The disk's name.
        id: String,
        /// The snapshot's.
        name: String,
    },
    /// Change a disk's limits; what is left out is not limited any more.
    Limit {
        /// Its name.
        id: String,
        /// The limits.
        limits: Limits,
    },
    /// Change a group's limits.
    LimitGroup {
        /// The group's name.
        group: String,
        /// The limits.
        limits: Limits,
    },
    /// Everything for Prometheus, in its text format.
    Metrics,
}

/// A response line.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// It was done.
    Ok(serde_json::Value),
    /// It was refused.
    Error(ErrorBody),
}

/// Why a request was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// A stable word for programs: `bad_request`, `not_found`, `in_use`, `image`, `failed`,
    /// `too_many_clients`.
    pub kind: String,
    /// One sentence for people.
    pub message: String,
}

impl From<Error> for ErrorBody {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::ImageInUse { .. } => "in_use",
            Error::Overlay(OverlayError::Refused { .. }) => "bad_request",
            Error::Io { source, .. } => match source.kind() {
                std::io::ErrorKind::NotFound => "not_found",
                std::io::ErrorKind::InvalidInput => "bad_request",
                _ => "failed",
            },
            error if error.exit_code() == 3 => "image",
            _ => "failed",
        };
        Self {
            kind: kind.into(),
            message: error.to_string(),
        }
    }
}
