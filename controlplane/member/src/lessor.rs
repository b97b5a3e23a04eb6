//! When leases end: the leader's clock, which is not replicated.

use std::collections::{BTreeSet, HashMap};

/// Leases that a retry of a revocation waits, in milliseconds: the first one may be lost.
const RETRY_MS: u64 = 3000;

/// Expiry of every lease, while this member leads. Times are milliseconds of the caller's clock.
#[derive(Debug, Default)]
pub struct Lessor {
    primary: bool,
    expiries: HashMap<i64, u64>,
    queue: BTreeSet<(u64, i64)>,
}

impl Lessor {
    /// This member leads: every lease, given with its seconds, begins anew.
    pub fn promote(&mut self, leases: impl IntoIterator<Item = (i64, i64)>, now: u64) {
        self.demote();
        self.primary = true;
        for (id, seconds) in leases {
            self.renew(id, seconds, now);
        }
    }

    /// Another member leads.
    pub fn demote(&mut self) {
        *self = Self::default();
    }

    /// Whether this member's clock decides.
    pub fn is_primary(&self) -> bool {
        self.primary
    }

    /// Gives a lease its time, from now on.
    pub fn renew(&mut self, id: i64, seconds: i64, now: u64) {
        if self.primary {
            let lifetime = u64::try_from(seconds).unwrap_or(0).saturating_mul(1000);
            self.set(id, now.saturating_add(lifetime));
        }
    }

    /// Forgets a lease.
    pub fn remove(&mut self, id: i64) {
        if let Some(at) = self.expiries.remove(&id) {
            self.queue.remove(&(at, id));
        }
    }

    /// Milliseconds that a lease has left.
    pub fn remaining(&self, id: i64, now: u64) -> Option<u64> {
        self.expiries.get(&id).map(|at| at.saturating_sub(now))
    }

    /// Leases that are to be revoked, up to `limit`. They are told again if they are still there
    /// some seconds later.
    pub fn expired(&mut self, now: u64, limit: usize) -> Vec<i64> {
        let due = self.queue.range(..=(now, i64::MAX));
        let ids: Vec<i64> = due.take(limit).map(|(_, id)| *id).collect();
        for id in &ids {
            self.set(*id, now + RETRY_MS);
        }
        ids
    }

    fn set(&mut self, id: i64, at: u64) {
        self.remove(id);
        self.expiries.insert(id, at);
        self.queue.insert((at, id));
    }
}
