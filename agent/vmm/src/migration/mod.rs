//! Live migration: a guest's memory is sent while it runs, then what it wrote meanwhile, until so
//! little is left that it can be stopped for the rest.
//!
//! The stream ([`stream`]) goes over a connection to the API socket, which `migrate` turns into one at
//! the source, and `receive` at a process that was started with `--incoming`. Who manages both
//! processes carries it from one to the other: a VMM in its jail has no network.
//!
//! The guest runs at the source until it is paused for the last part, and goes on there whenever
//! anything fails before [`Request::ReleaseMigration`](crate::api::Request::ReleaseMigration). From then
//! on neither process lets it run until it is told to `resume`: whoever told the source to let go knows
//! where the guest is to run.

mod bandwidth;
mod error;
mod image;
mod incoming;
mod outgoing;
mod progress;
pub mod stream;

pub use error::MigrationError;
pub(crate) use image::{DiskIdentity, Hello, MachineImage};
pub(crate) use incoming::{Answer, Arrival, Arrived};
pub(crate) use outgoing::{Departure, Load, Step};
pub(crate) use progress::ProgressCell;

use serde::{Deserialize, Serialize};

/// What a live migration may take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MigrationLimits {
    /// Bytes a second while the guest runs; `None`: as fast as it goes. The last part, for which the
    /// guest is stopped, is not limited.
    pub bandwidth: Option<u64>,
    /// How long the guest may be stopped for the last part, in milliseconds, as far as that can be
    /// foreseen.
    pub downtime_ms: u64,
    /// How often what the guest wrote is sent again before the migration fails because the guest
    /// writes too fast.
    pub max_rounds: u32,
}

impl Default for MigrationLimits {
    fn default() -> Self {
        Self {
            bandwidth: None,
            downtime_ms: 300,
            max_rounds: 30,
        }
    }
}

/// Where a live migration is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MigrationPhase {
    /// There has been none.
    #[default]
    None,
    /// The guest runs, and its memory is being sent.
    Copying,
    /// The guest is stopped, and the rest is being sent.
    Switching,
    /// The other side has all of it. The guest is stopped, and goes on here unless the migration is
    /// released in time.
    Loaded,
    /// The guest is stopped until it is told to go on or ended.
    Released,
    /// It failed, was canceled or taken back; the guest runs on here.
    Failed,
}

/// What is known of a guest's latest migration away from this process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationStatus {
    /// Where it is.
    pub phase: MigrationPhase,
    /// How often memory was gone through, the first time included.
    pub rounds: u32,
    /// Bytes of the guest's memory.
    pub memory_bytes: u64,
    /// Bytes of memory that were sent, before compression; memory that changed counts again.
    pub sent_bytes: u64,
    /// Bytes that went over the connection.
    pub transferred_bytes: u64,
    /// Bytes of memory that are known to be left for now.
    pub remaining_bytes: u64,
    /// How fast memory was sent in the latest round, in bytes a second, before compression.
    pub bytes_per_second: u64,
    /// Since it began, in milliseconds; up to its end if it has ended.
    pub elapsed_ms: u64,
    /// How long the guest has been stopped for it, in microseconds, once it was.
    pub stopped_us: Option<u64>,
    /// Why it failed.
    pub error: Option<String>,
}
