//! Leases of the state machine: what is replicated of them.

use std::collections::{BTreeSet, HashMap};

use bytes::Bytes;

/// What is stored of a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaseRecord {
    /// Seconds it was granted for.
    pub granted: i64,
    /// Seconds that remained at the last checkpoint; 0 if there was none since it was renewed.
    pub remaining: i64,
    /// Log index of its grant, which tells it from an earlier lease of the same id; 0 if it is
    /// older than this field.
    pub granted_at: u64,
}

/// What happened to a lease when an entry was applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseChange {
    /// It began.
    Granted(i64, LeaseRecord),
    /// It has its whole time again.
    Renewed(i64),
    /// It had this many seconds left.
    Checkpoint(i64, i64),
    /// It is gone.
    Ended(i64),
}

/// A lease and the keys attached to it.
#[derive(Debug, Clone)]
pub(super) struct Lease {
    pub(super) record: LeaseRecord,
    pub(super) keys: BTreeSet<Bytes>,
}

/// All leases.
pub(super) type Leases = HashMap<i64, Lease>;

/// Longest time to live, in seconds (etcd's `lease.MaxLeaseTTL`).
pub const MAX_LEASE_TTL: i64 = 9_000_000_000;
