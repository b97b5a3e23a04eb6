//! Keep-alives and ends of leases: what of them goes into the log, and who waits for it.

use std::collections::{BTreeMap, BTreeSet};

use keelson_etcd_api::etcdserverpb as pb;

use super::input::{Answer, Effect};
use super::{Emit, RequestId};
use crate::RequestError;
use crate::command::{LeaseExpiry, LeaseRenewal, Operation};
use crate::keyspace::{LeaseChange, LeaseRecord};
use crate::lessor::{KeepAlive, Lessor};

/// Leases whose ends are proposed at each tick.
const ENDS_AT_ONCE: usize = 1000;
/// Leases in one checkpoint.
const CHECKPOINTS_AT_ONCE: usize = 1000;
/// Leases in one renewal.
const RENEWALS_AT_ONCE: usize = 10_000;
/// A renewal is proposed again when nothing was heard of it for this long, in milliseconds.
const RETRY_MS: u64 = 3000;

/// The lessor, and keep-alives that wait.
#[derive(Debug)]
pub(super) struct Leases {
    lessor: Lessor,
    /// The term in which this member's clock decides.
    term: Option<u64>,
    tick_ms: u64,
    election_ms: u64,
    /// Leases to be renewed in the log, and who waits for that.
    wanted: BTreeSet<i64>,
    waiting: Vec<(RequestId, i64)>,
    /// The renewal that is on its way: keep-alives that come meanwhile share the next one.
    renewal: Option<Renewal>,
    /// When the last one was proposed.
    proposed: u64,
    /// Keep-alives that came too late: answered when the lease is gone.
    late: BTreeMap<i64, Vec<RequestId>>,
}

#[derive(Debug)]
struct Renewal {
    command: u64,
    ids: Vec<i64>,
    waiting: Vec<(RequestId, i64)>,
}

impl Leases {
    pub(super) fn new(
        leases: impl IntoIterator<Item = (i64, LeaseRecord)>,
        tick_ms: u64,
        election_ticks: u32,
    ) -> Self {
        let election_ms = tick_ms * u64::from(election_ticks);
        Self {
            lessor: Lessor::new(leases, election_ms / 2),
            term: None,
            tick_ms,
            election_ms,
            wanted: BTreeSet::new(),
            waiting: Vec::new(),
            renewal: None,
            proposed: 0,
            late: BTreeMap::new(),
        }
    }

    /// A snapshot was installed.
    pub(super) fn replace(&mut self, leases: impl IntoIterator<Item = (i64, LeaseRecord)>) {
        self.lessor.replace(leases);
    }

    /// This member's clock decides in `term`; in no term if that is `None`. Called with `None`
    /// before what other leaders committed is applied, with a term when everything before it is.
    pub(super) fn lead(&mut self, term: Option<u64>, emit: Emit<'_>) {
        if term == self.term {
            return;
        }
        if self.term.take().is_some() {
            self.lessor.demote();
            self.wanted.clear();
            let renewing = self.renewal.take().into_iter();
            let waiting = renewing
                .flat_map(|renewal| renewal.waiting)
                .chain(self.waiting.drain(..));
            let late = std::mem::take(&mut self.late).into_values().flatten();
            for request in waiting.map(|(request, _)| request).chain(late) {
                renewed(emit, request, Err(RequestError::LeaderChanged));
            }
        }
        if term.is_some() {
            self.term = term;
            self.lessor.promote(self.election_ms);
        }
    }

    /// The term in which this member's clock decides.
    pub(super) fn term(&self) -> Option<u64> {
        self.term
    }

    /// Follows what was applied at `now`.
    pub(super) fn apply(&mut self, changes: &[LeaseChange], now: u64, emit: Emit<'_>) {
        if !changes.is_empty() {
            // A lease begins now, not at the last tick.
            self.lessor.tick(now);
        }
        for change in changes {
            self.lessor.apply(change);
            if let LeaseChange::Ended(id) = change {
                for request in self.late.remove(id).unwrap_or_default() {
                    renewed(emit, request, Ok(None));
                }
            }
        }
    }

    /// A keep-alive, now that consensus has confirmed that this member led when it came.
    pub(super) fn keep_alive(&mut self, request: RequestId, id: i64, now: u64, emit: Emit<'_>) {
        if self.term.is_none() {
            return renewed(emit, request, Err(RequestError::NotLeader));
        }
        match self.lessor.keep_alive(id, now) {
            KeepAlive::Gone => renewed(emit, request, Ok(None)),
            KeepAlive::Ending => self.late.entry(id).or_default().push(request),
            KeepAlive::Renewed {
                ttl,
                replicate_first,
                replicate,
            } => {
                if replicate {
                    self.wanted.insert(id);
                }
                if replicate_first {
                    self.waiting.push((request, id));
                } else {
                    renewed(emit, request, Ok(Some(ttl)));
                }
            }
        }
    }

    /// The outcome of a command came: of a renewal, maybe.
    pub(super) fn outcome(&mut self, command: u64, now: u64, emit: Emit<'_>) {
        let Some(renewal) = self.renewal.take_if(|renewal| renewal.command == command) else {
            return;
        };
        for id in renewal.ids {
            self.lessor.cover(id, self.proposed);
        }
        for (request, id) in renewal.waiting {
            // A client counts from the answer on.
            match self.lessor.keep_alive(id, now) {
                KeepAlive::Gone => renewed(emit, request, Ok(None)),
                KeepAlive::Ending => self.late.entry(id).or_default().push(request),
                KeepAlive::Renewed { ttl, .. } => renewed(emit, request, Ok(Some(ttl))),
            }
        }
    }

    /// The renewal to be proposed now as `command`, if there is one: one at a time, and one in each
    /// tick, so that the log has few however many leases there are.
    pub(super) fn renewal(
        &mut self,
        command: impl FnOnce() -> u64,
        now: u64,
    ) -> Option<(u64, Operation)> {
        if self.wanted.is_empty()
            || self.renewal.is_some()
            || now < self.proposed.saturating_add(self.tick_ms)
        {
            return None;
        }
        let mut ids = std::mem::take(&mut self.wanted);
        if let Some(&next) = ids.iter().nth(RENEWALS_AT_ONCE) {
            self.wanted = ids.split_off(&next);
        }
        let (waiting, later) = self.waiting.drain(..).partition(|(_, id)| ids.contains(id));
        self.waiting = later;
        let renewal = Renewal {
            command: command(),
            ids: ids.into_iter().collect(),
            waiting,
        };
        let proposal = (
            renewal.command,
            Operation::LeaseRenewal(LeaseRenewal {
                ids: renewal.ids.clone(),
            }),
        );
        self.proposed = now;
        self.renewal = Some(renewal);
        Some(proposal)
    }

    /// A tick passed. Requests of which `is_waiting` says no are forgotten.
    pub(super) fn tick(&mut self, now: u64, is_waiting: &dyn Fn(RequestId) -> bool) {
        self.lessor.tick(now);
        self.waiting.retain(|(request, _)| is_waiting(*request));
        self.late.retain(|_, requests| {
            requests.retain(|request| is_waiting(*request));
            !requests.is_empty()
        });
        if now >= self.proposed + RETRY_MS
            && let Some(lost) = self.renewal.take()
        {
            self.wanted.extend(lost.ids);
            self.waiting.extend(lost.waiting);
        }
    }

    /// What is to be proposed now, in the term in which this member's clock decides and in no other.
    pub(super) fn decide(&mut self) -> Vec<Operation> {
        let mut proposals = Vec::new();
        for (id, granted_at) in self.lessor.due(ENDS_AT_ONCE) {
            proposals.push(Operation::LeaseExpiry(LeaseExpiry { id, granted_at }));
        }
        let checkpoints = self.lessor.checkpoints(CHECKPOINTS_AT_ONCE);
        if !checkpoints.is_empty() {
            let checkpoint = |(id, remaining_ttl)| pb::LeaseCheckpoint { id, remaining_ttl };
            proposals.push(Operation::LeaseCheckpoint(pb::LeaseCheckpointRequest {
                checkpoints: checkpoints.into_iter().map(checkpoint).collect(),
            }));
        }
        proposals
    }

    /// Milliseconds that a lease has left; `None` if there is no such lease.
    pub(super) fn remaining(&self, id: i64, now: u64) -> Result<Option<u64>, RequestError> {
        self.term.ok_or(RequestError::NotLeader)?;
        Ok(self.lessor.remaining(id, now))
    }
}

fn renewed(emit: Emit<'_>, request: RequestId, outcome: Result<Option<i64>, RequestError>) {
    emit(Effect::Answer(request, Answer::Renewed(outcome)));
}
