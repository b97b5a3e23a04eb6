use std::time::Duration;

use bytes::Bytes;

use crate::{LeaseId, Revision};

/// Asks for a lease, as etcd's `LeaseGrant`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaseGrantRequest {
    /// How long the lease lives without being kept alive; whole seconds, rounded up, at least 1 s.
    pub ttl: Duration,
    /// The id to give it; `None` lets the store choose one.
    pub id: Option<LeaseId>,
}

impl LeaseGrantRequest {
    /// A lease of `ttl` with an id that the store chooses.
    pub fn new(ttl: Duration) -> Self {
        Self { ttl, id: None }
    }

    /// Asks for this id.
    #[must_use]
    pub fn id(mut self, id: LeaseId) -> Self {
        self.id = Some(id);
        self
    }
}

/// A lease granted or kept alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// Its id.
    pub id: LeaseId,
    /// How long it lives from now. A server with a longer minimum grants more than was asked for.
    pub ttl: Duration,
    /// The store's revision when it answered. Leases themselves take no revision.
    pub revision: Revision,
}

/// A lease's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseStatus {
    /// Its id.
    pub id: LeaseId,
    /// How long it lives from a grant or keep-alive.
    pub granted_ttl: Duration,
    /// How long it still has, in whole seconds.
    pub remaining_ttl: Duration,
    /// The keys attached to it, in byte order, if asked for.
    pub keys: Vec<Bytes>,
    /// The store's revision when it answered.
    pub revision: Revision,
}
