//! What a disk looks like.

use serde::{Serialize, Serializer};

use super::DiskSpec;
use crate::latency::Latencies;
use crate::metrics::{OPERATIONS, QueueCounters};
use crate::overlay::chain::SourceCounters;

/// What a disk looks like now.
#[derive(Clone, Debug, Serialize)]
pub struct DiskStatus {
    /// What it is made of.
    #[serde(flatten)]
    pub spec: DiskSpec,
    /// Its size in bytes, as the guest sees it.
    pub capacity_bytes: u64,
    /// Whether all of it goes around the page cache.
    pub uncached: bool,
    /// Whether its data is encrypted.
    pub encrypted: bool,
    /// Layers of an overlay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<usize>,
    /// What was fetched of a base on a server.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<SourceCounters>,
    /// The counters of each queue.
    pub counters: Vec<QueueCounters>,
    /// How long requests took, in the order of [`OPERATIONS`]; in JSON, by their names.
    #[serde(serialize_with = "by_operation")]
    pub latencies: [Latencies; OPERATIONS.len()],
}

fn by_operation<S: Serializer>(
    latencies: &[Latencies; OPERATIONS.len()],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_map(OPERATIONS.iter().zip(latencies))
}
