//! The leases in memory: when each ends. What must survive a restart is in the lease tables.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use redb::{ReadableTable, Table};

use super::errors::Engine;
use super::record::{seal, unseal};
use crate::{LeaseId, StateError};

/// A lease with a longer time to live than this has its remaining time stored this often, so that
/// a restart doesn't give it all of its time again. Time during which the store is closed doesn't
/// count.
pub(super) const CHECKPOINT_INTERVAL: Duration = Duration::from_mins(1);

#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    /// Seconds from a grant or keep-alive.
    pub(super) granted: i64,
    pub(super) deadline: Instant,
    /// The stored remaining time is less than `granted`: a keep-alive must store it anew.
    pub(super) checkpointed: bool,
}

impl Entry {
    /// Whole seconds left, rounded up.
    pub(super) fn remaining(&self, now: Instant) -> i64 {
        let left = self.deadline.saturating_duration_since(now);
        let seconds = left.as_secs() + u64::from(left.subsec_nanos() > 0);
        i64::try_from(seconds)
            .unwrap_or(self.granted)
            .min(self.granted)
    }
}

/// All leases, by id and by deadline.
#[derive(Debug, Default)]
pub(super) struct Leases {
    entries: HashMap<LeaseId, Entry>,
    deadlines: BTreeSet<(Instant, LeaseId)>,
}

impl Leases {
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn get(&self, id: LeaseId) -> Result<Entry, StateError> {
        self.entries
            .get(&id)
            .copied()
            .ok_or(StateError::LeaseNotFound { lease: id })
    }

    /// Adds a lease, or sets when it ends.
    pub(super) fn set(&mut self, id: LeaseId, granted: i64, remaining: i64, now: Instant) {
        self.remove(id);
        let seconds = Duration::from_secs(u64::try_from(remaining).unwrap_or(0));
        // The longest lease is 285 years, which every clock here can hold.
        let deadline = now.checked_add(seconds).unwrap_or(now);
        self.deadlines.insert((deadline, id));
        let checkpointed = remaining < granted;
        self.entries.insert(
            id,
            Entry {
                granted,
                deadline,
                checkpointed,
            },
        );
    }

    pub(super) fn remove(&mut self, id: LeaseId) {
        if let Some(entry) = self.entries.remove(&id) {
            self.deadlines.remove(&(entry.deadline, id));
        }
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// Up to `limit` leases that have ended, the earliest first.
    pub(super) fn ended(&self, now: Instant, limit: usize) -> Vec<LeaseId> {
        let due = self
            .deadlines
            .iter()
            .take_while(|(deadline, _)| *deadline <= now);
        due.take(limit).map(|(_, id)| *id).collect()
    }

    /// Reads the stored leases; those go on with their remaining time from now.
    pub(super) fn load(
        table: &impl ReadableTable<i64, &'static [u8]>,
        now: Instant,
    ) -> Result<Self, StateError> {
        let mut leases = Self::default();
        for entry in table.iter().engine("read leases")? {
            let (id, bytes) = entry.engine("read leases")?;
            let id = id.value();
            let (granted, remaining) = decode(id, bytes.value()).ok_or_else(|| damaged(id))?;
            leases.set(id, granted, remaining, now);
        }
        Ok(leases)
    }

    /// Stores what is left of the leases that live longer than `longer_than`.
    pub(super) fn checkpoint(
        &mut self,
        table: &mut Table<'_, i64, &'static [u8]>,
        longer_than: Duration,
        now: Instant,
    ) -> Result<(), StateError> {
        for (id, entry) in &mut self.entries {
            if Duration::from_secs(u64::try_from(entry.granted).unwrap_or(0)) <= longer_than {
                continue;
            }
            store(table, *id, entry.granted, entry.remaining(now))?;
            entry.checkpointed = true;
        }
        Ok(())
    }

    pub(super) fn any_longer_than(&self, duration: Duration) -> bool {
        self.entries
            .values()
            .any(|entry| Duration::from_secs(u64::try_from(entry.granted).unwrap_or(0)) > duration)
    }
}

/// Stores a lease's times, in seconds.
pub(super) fn store(
    table: &mut Table<'_, i64, &'static [u8]>,
    id: LeaseId,
    granted: i64,
    remaining: i64,
) -> Result<(), StateError> {
    let mut body = granted.to_le_bytes().to_vec();
    body.extend_from_slice(&remaining.to_le_bytes());
    let bytes = seal(&id.to_le_bytes(), &body);
    table.insert(id, bytes.as_slice()).engine("store a lease")?;
    Ok(())
}

/// The seconds granted to a stored lease.
pub(super) fn require(
    table: &impl ReadableTable<i64, &'static [u8]>,
    id: LeaseId,
) -> Result<i64, StateError> {
    let bytes = table.get(id).engine("read a lease")?;
    let bytes = bytes.ok_or(StateError::LeaseNotFound { lease: id })?;
    let (granted, _) = decode(id, bytes.value()).ok_or_else(|| damaged(id))?;
    Ok(granted)
}

fn damaged(id: LeaseId) -> StateError {
    StateError::Corrupt(format!("lease {id:#x} fails its checksum"))
}

/// Granted and remaining seconds.
fn decode(id: LeaseId, bytes: &[u8]) -> Option<(i64, i64)> {
    let body = unseal(&id.to_le_bytes(), bytes)?;
    let (granted, rest) = body.split_first_chunk::<8>()?;
    let remaining = <[u8; 8]>::try_from(rest).ok()?;
    Some((i64::from_le_bytes(*granted), i64::from_le_bytes(remaining)))
}
