//! A guest's move to another host while it runs.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::PlacementState;

/// A guest's latest move to another host while it runs: one that is under way, or how it ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Migration {
    /// What tells it from the guest's other ones.
    pub id: String,
    /// The host that the guest was on when it was asked for.
    pub source: String,
    /// The host that the guest is to go on on.
    pub destination: String,
    /// How far it is.
    pub phase: MigrationPhase,
    /// When it was asked for.
    pub requested_at: Timestamp,
    /// When it was over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
    /// What it may take.
    #[serde(default)]
    pub limits: MigrationLimits,
    /// On which terms the destination would run the guest, once it is ready for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub terms: Option<PlacementState>,
    /// What has been sent, as of a second ago.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<MigrationProgress>,
    /// How long the guest stood still, in milliseconds: at the source once the guest has moved, in all
    /// once it goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_milliseconds: Option<u64>,
    /// How many of its flows went with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flows_moved: Option<u32>,
    /// How many of its flows, and of its ports with an external one at an uplink, stayed behind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flows_left: Option<u32>,
    /// Why it failed; empty if it did not.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
}

/// How far a guest's move is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MigrationPhase {
    /// It was asked for.
    Requested,
    /// The destination waits for the guest, which runs at the source.
    Prepared,
    /// The guest is placed on the destination, and about to go on there.
    Moved,
    /// The guest runs on the destination.
    Completed,
    /// The guest did not move, or could not go on.
    Failed,
    /// Somebody wanted the guest to stay.
    Canceled,
}

impl MigrationPhase {
    /// Whether it is still under way.
    pub const fn is_active(self) -> bool {
        matches!(self, Self::Requested | Self::Prepared | Self::Moved)
    }
}

impl std::fmt::Display for MigrationPhase {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.pad(match self {
            Self::Requested => "Requested",
            Self::Prepared => "Prepared",
            Self::Moved => "Moved",
            Self::Completed => "Completed",
            Self::Failed => "Failed",
            Self::Canceled => "Canceled",
        })
    }
}

/// What a move may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MigrationLimits {
    /// Bytes that may be sent in a second while the guest runs; all that can be where not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
    /// How long the guest may stand still while the rest of its memory is sent, in milliseconds, as far as
    /// that can be foreseen; 300 where not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_milliseconds: Option<u64>,
}

/// What has been sent of a guest that moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MigrationProgress {
    /// How often the guest's memory was gone through.
    pub rounds: u32,
    /// Bytes of the guest's memory.
    pub memory_bytes: u64,
    /// Bytes of memory that were sent; memory that changed counts again.
    pub sent_bytes: u64,
    /// Bytes that went over the network.
    pub transferred_bytes: u64,
    /// Bytes of memory that are known to be left.
    pub remaining_bytes: u64,
    /// Bytes of memory that were sent in a second of the latest round.
    pub bytes_per_second: u64,
}
