//! What the log replicates: one command for each entry.

use keelson_etcd_api::etcdserverpb as pb;
use prost::{Message, Oneof};

use crate::keyspace::{Alarm, Member};

/// An entry's data.
#[derive(Clone, PartialEq, Message)]
pub struct Command {
    /// Chosen by the member that proposed it, to find who waits for the outcome.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// What to do.
    #[prost(oneof = "Operation", tags = "2, 3, 4, 5, 6, 7, 8, 9, 10")]
    pub operation: Option<Operation>,
}

/// What a [`Command`] does.
#[derive(Clone, PartialEq, Oneof)]
pub enum Operation {
    /// Sets a key.
    #[prost(message, tag = "2")]
    Put(pb::PutRequest),
    /// Deletes keys.
    #[prost(message, tag = "3")]
    DeleteRange(pb::DeleteRangeRequest),
    /// Compares, reads and writes.
    #[prost(message, tag = "4")]
    Txn(pb::TxnRequest),
    /// Forgets history.
    #[prost(message, tag = "5")]
    Compact(pb::CompactionRequest),
    /// Grants a lease, with the id and time to live that the proposer chose.
    #[prost(message, tag = "6")]
    LeaseGrant(pb::LeaseGrantRequest),
    /// Ends a lease.
    #[prost(message, tag = "7")]
    LeaseRevoke(pb::LeaseRevokeRequest),
    /// Records how long leases have left.
    #[prost(message, tag = "8")]
    LeaseCheckpoint(pb::LeaseCheckpointRequest),
    /// Says a member's name and client URLs.
    #[prost(message, tag = "9")]
    Member(Member),
    /// Raises or lowers an alarm.
    #[prost(message, tag = "10")]
    Alarm(AlarmChange),
}

/// Raises or lowers an alarm.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct AlarmChange {
    /// Which.
    #[prost(message, optional, tag = "1")]
    pub alarm: Option<Alarm>,
    /// Whether it is raised.
    #[prost(bool, tag = "2")]
    pub raised: bool,
}

/// The outcome of a [`Command`] that was not refused. Headers hold the revision only.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // one for each operation
pub enum Response {
    Put(pb::PutResponse),
    DeleteRange(pb::DeleteRangeResponse),
    Txn(pb::TxnResponse),
    Compact(pb::CompactionResponse),
    LeaseGrant(pb::LeaseGrantResponse),
    LeaseRevoke(pb::LeaseRevokeResponse),
    Done,
}
