//! When leases end. The leader's clock decides; every member keeps its own count, so that a lease's
//! time goes on where it was when another member leads.
//!
//! A grant is in the log, so each member knows when it was, by its own clock. Keep-alives are not: the
//! log has one renewal for as many of them as come within [`COVER_MS`]. A member that applies a renewal
//! gives the lease its time and [`COVER_MS`] more, for the leader answers that long without another
//! one. So no member ends a lease before the time that its client was promised, and none keeps it
//! longer than that, [`COVER_MS`], and what a change of leaders takes. What a member that is restarted
//! would not know, checkpoints tell: how long leases had left that nobody renewed.
//!
//! The members' clocks have to go at about the same speed, not to agree.

use std::collections::{BTreeMap, BTreeSet};

use crate::keyspace::{LeaseChange, LeaseRecord};

/// How long one renewal in the log covers the keep-alives that follow it, in milliseconds.
pub const COVER_MS: u64 = 1000;
/// How long the end of a lease is awaited until it is proposed again: a proposal may be lost.
const RETRY_MS: u64 = 3000;
/// Checkpoints of a lease are at least this far apart, in milliseconds.
const CHECKPOINT_MS: u64 = 1000;
/// Checkpoints of a lease that nobody renews: one for each such part of its time.
const CHECKPOINTS: u64 = 12;

/// The time of every lease. Times that are given are milliseconds of one clock that never goes back.
#[derive(Debug)]
pub struct Lessor {
    primary: bool,
    /// Milliseconds during which this member could have heard a keep-alive: while it is held up, no
    /// lease gets older.
    clock: u64,
    /// The caller's clock when `clock` went on last.
    seen: Option<u64>,
    /// Longest step that `clock` makes.
    step: u64,
    /// What is due before is due then: clients are to find a new leader first.
    hold_until: u64,
    leases: BTreeMap<i64, Lease>,
    ends: BTreeSet<(u64, i64)>,
    checkpoints: BTreeSet<(u64, i64)>,
}

#[derive(Debug, Clone, Copy)]
struct Lease {
    granted_at: u64,
    /// Its whole time.
    lifetime: u64,
    /// When it ends.
    end: u64,
    checkpoint: u64,
    /// Its end is proposed.
    ending: bool,
    /// Keep-alives until then, by the caller's clock, need no renewal in the log.
    covered_until: u64,
    /// Renewals that were proposed up to then cover nothing: a checkpoint may have come after them.
    covered_from: u64,
}

/// What becomes of a keep-alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeepAlive {
    /// There is no such lease.
    Gone,
    /// The lease is about to end: too late.
    Ending,
    /// The lease has its time again.
    Renewed {
        /// In seconds.
        ttl: i64,
        /// Whether a renewal has to be in the log before the client may hear of it.
        replicate_first: bool,
        /// Whether one should be, so that later keep-alives need not wait.
        replicate: bool,
    },
}

impl Lessor {
    /// Leases as a member finds them when it starts. `step` is the longest time, in milliseconds, that
    /// may pass between two ticks without the member being held up.
    pub fn new(leases: impl IntoIterator<Item = (i64, LeaseRecord)>, step: u64) -> Self {
        let mut lessor = Self {
            primary: false,
            clock: 0,
            seen: None,
            step,
            hold_until: 0,
            leases: BTreeMap::new(),
            ends: BTreeSet::new(),
            checkpoints: BTreeSet::new(),
        };
        lessor.replace(leases);
        lessor
    }

    /// Other leases take the place of all: a snapshot was installed.
    pub fn replace(&mut self, leases: impl IntoIterator<Item = (i64, LeaseRecord)>) {
        self.leases.clear();
        self.ends.clear();
        self.checkpoints.clear();
        for (id, record) in leases {
            let left = match record.remaining {
                // It may have been renewed any time before, and covered since.
                ..=0 => milliseconds(record.granted) + COVER_MS,
                remaining => milliseconds(remaining),
            };
            self.insert(id, record, left);
        }
    }

    /// Follows what was applied.
    pub fn apply(&mut self, change: &LeaseChange) {
        match *change {
            LeaseChange::Granted(id, record) => {
                self.remove(id);
                self.insert(id, record, milliseconds(record.granted));
            }
            LeaseChange::Renewed(id) if !self.primary => {
                let clock = self.clock;
                self.change(id, |lease| lease.end = clock + lease.lifetime + COVER_MS);
            }
            LeaseChange::Checkpoint(id, remaining) if !self.primary => {
                let end = self.clock + milliseconds(remaining);
                self.change(id, |lease| lease.end = lease.end.min(end));
            }
            // This member proposed it, and knows better.
            LeaseChange::Renewed(_) | LeaseChange::Checkpoint(..) => {}
            LeaseChange::Ended(id) => self.remove(id),
        }
    }

    /// This member leads, and has applied everything that was promised before. Nothing ends for
    /// `grace` milliseconds: clients have to find it.
    pub fn promote(&mut self, grace: u64) {
        self.primary = true;
        self.hold_until = self.clock + grace;
    }

    /// This member's clock decides no more.
    pub fn demote(&mut self) {
        self.primary = false;
        for lease in self.leases.values_mut() {
            lease.covered_until = 0;
            lease.covered_from = self.seen.unwrap_or(0);
            lease.ending = false;
        }
    }

    /// Whether this member's clock decides.
    pub fn is_primary(&self) -> bool {
        self.primary
    }

    /// Time passes.
    pub fn tick(&mut self, now: u64) {
        self.clock = self.at(now);
        self.seen = Some(now);
    }

    /// The clock as the caller's is at `now`.
    pub fn at(&self, now: u64) -> u64 {
        let seen = self.seen.unwrap_or(now);
        self.clock + now.saturating_sub(seen).min(self.step)
    }

    /// A keep-alive came, and this member is known to lead still.
    pub fn keep_alive(&mut self, id: i64, now: u64) -> KeepAlive {
        let at = self.at(now);
        let Some(lease) = self.leases.get(&id).copied() else {
            return KeepAlive::Gone;
        };
        if lease.ending {
            return KeepAlive::Ending;
        }
        self.change(id, |lease| lease.end = lease.end.max(at + lease.lifetime));
        KeepAlive::Renewed {
            ttl: i64::try_from(lease.lifetime / 1000).unwrap_or(i64::MAX),
            replicate_first: now > lease.covered_until,
            replicate: now + COVER_MS / 2 > lease.covered_until,
        }
    }

    /// A renewal that was proposed at `proposed` is in the log.
    pub fn cover(&mut self, id: i64, proposed: u64) {
        if let Some(lease) = self.leases.get_mut(&id)
            && proposed > lease.covered_from
        {
            lease.covered_until = lease.covered_until.max(proposed + COVER_MS);
        }
    }

    /// Milliseconds that a lease has left.
    pub fn remaining(&self, id: i64, now: u64) -> Option<u64> {
        let lease = self.leases.get(&id)?;
        let left = lease.end.saturating_sub(self.at(now));
        Some(if lease.ending { 0 } else { left })
    }

    /// Up to `limit` leases that are to end, with the log index of their grant. They are told again
    /// if they are still there some seconds later.
    pub fn due(&mut self, limit: usize) -> Vec<(i64, u64)> {
        if !self.primary || self.clock < self.hold_until {
            return Vec::new();
        }
        let due = self.ends.range(..=(self.clock, i64::MAX));
        let ids: Vec<i64> = due.take(limit).map(|(_, id)| *id).collect();
        let retry = self.clock + RETRY_MS;
        let mut ends = Vec::with_capacity(ids.len());
        for id in ids {
            self.change(id, |lease| {
                lease.ending = true;
                lease.end = retry;
                ends.push((id, lease.granted_at));
            });
        }
        ends
    }

    /// Up to `limit` leases whose remaining seconds the log should know. Keep-alives that come later
    /// have to be in the log behind it.
    pub fn checkpoints(&mut self, limit: usize) -> Vec<(i64, i64)> {
        if !self.primary {
            return Vec::new();
        }
        let due = self.checkpoints.range(..=(self.clock, i64::MAX));
        let ids: Vec<i64> = due.take(limit).map(|(_, id)| *id).collect();
        let (clock, seen) = (self.clock, self.seen.unwrap_or(0));
        let mut told = Vec::new();
        for id in ids {
            self.change(id, |lease| {
                let left = lease.end.saturating_sub(clock);
                lease.checkpoint = clock + lease.between_checkpoints();
                if !lease.ending && left + CHECKPOINT_MS <= lease.lifetime && left > 0 {
                    lease.covered_until = 0;
                    lease.covered_from = seen;
                    let seconds = i64::try_from(left.div_ceil(1000)).unwrap_or(i64::MAX);
                    told.push((id, seconds));
                }
            });
        }
        told
    }

    fn insert(&mut self, id: i64, record: LeaseRecord, left: u64) {
        let mut lease = Lease {
            granted_at: record.granted_at,
            lifetime: milliseconds(record.granted),
            end: self.clock.saturating_add(left),
            checkpoint: 0,
            ending: false,
            covered_until: 0,
            covered_from: self.seen.unwrap_or(0),
        };
        lease.checkpoint = self.clock + lease.between_checkpoints();
        self.ends.insert((lease.end, id));
        self.checkpoints.insert((lease.checkpoint, id));
        self.leases.insert(id, lease);
    }

    fn remove(&mut self, id: i64) {
        if let Some(lease) = self.leases.remove(&id) {
            self.ends.remove(&(lease.end, id));
            self.checkpoints.remove(&(lease.checkpoint, id));
        }
    }

    /// Changes a lease, and its places in the queues with it.
    fn change(&mut self, id: i64, change: impl FnOnce(&mut Lease)) {
        let Some(lease) = self.leases.get_mut(&id) else {
            return;
        };
        let before = *lease;
        change(lease);
        let after = *lease;
        if before.end != after.end {
            self.ends.remove(&(before.end, id));
            self.ends.insert((after.end, id));
        }
        if before.checkpoint != after.checkpoint {
            self.checkpoints.remove(&(before.checkpoint, id));
            self.checkpoints.insert((after.checkpoint, id));
        }
    }
}

impl Lease {
    fn between_checkpoints(&self) -> u64 {
        (self.lifetime / CHECKPOINTS).max(CHECKPOINT_MS)
    }
}

fn milliseconds(seconds: i64) -> u64 {
    u64::try_from(seconds).unwrap_or(0).saturating_mul(1000)
}
