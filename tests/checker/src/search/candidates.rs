//! What could be next in the order, of what changes something.

use std::collections::BTreeSet;

use super::Search;
use super::entries::Id;
use crate::model::Model;
use crate::operation::{Outcome, Refusal, Request, TxnOperation};
use crate::watch::{Event, Watch, WatchBody, WatchRequest};

/// The revisions that a watch has told of, all of them, as far as they are of its keys.
pub(super) struct Told<'a> {
    request: &'a WatchRequest,
    first: i64,
    last: i64,
}

impl Search<'_> {
    /// The entries that could be next, of those that change something.
    pub(super) fn next(&mut self) -> Vec<Id> {
        let frontier = self.frontier();
        let revision = self.model.revision();
        let reads = self.entries.reads.get(&revision);
        let may_advance = reads.is_none_or(BTreeSet::is_empty);
        let mut next = Vec::new();
        if let Some(write) = self.entries.writes.get(&(revision + 1)).copied() {
            if may_advance && self.entries.all[write].call <= frontier {
                self.consider(write, true, &mut next);
            }
        } else if may_advance {
            self.fill_gap(frontier, &mut next);
        }
        for (_, id) in self
            .entries
            .done
            .range(..=(frontier, Id::MAX))
            .copied()
            .collect::<Vec<_>>()
        {
            self.consider(id, false, &mut next);
        }
        for (_, id) in self
            .entries
            .refused
            .range(..=(frontier, Id::MAX))
            .copied()
            .collect::<Vec<_>>()
        {
            self.consider(id, false, &mut next);
        }
        next
    }

    /// Adds an entry if it is right in this state, or else what of unknown outcome would make it so.
    fn consider(&mut self, id: Id, advances: bool, next: &mut Vec<Id>) {
        let Some(operation) = self.entries.operation(id) else {
            return;
        };
        self.steps += 1;
        match (self.model.apply(&operation.request), &operation.outcome) {
            (Ok(step), Outcome::Ok(answered))
                if step.response == *answered && step.events.is_empty() != advances =>
            {
                next.push(id);
            }
            (Err(Refusal::LeaseNotFound), Outcome::Ok(_))
            | (_, Outcome::Refused(Refusal::LeaseExists)) => {
                let leases = leases(&operation.request);
                self.enable(
                    next,
                    |_, request| matches!(request, Request::LeaseGrant(id) if leases.contains(id)),
                );
            }
            (Err(Refusal::LeaseExists), Outcome::Ok(_))
            | (_, Outcome::Refused(Refusal::LeaseNotFound)) => {
                let leases = leases(&operation.request);
                self.enable(
                    next,
                    |_, request| matches!(request, Request::LeaseRevoke(id) if leases.contains(id)),
                );
            }
            (_, Outcome::Refused(Refusal::Compacted)) => {
                self.enable(next, |_, request| matches!(request, Request::Compact(_)));
            }
            _ => {}
        }
    }

    /// Adds what of unknown outcome is wanted and changes no key.
    fn enable(&mut self, next: &mut Vec<Id>, wanted: impl Fn(&Model, &Request) -> bool) {
        let frontier = self.frontier();
        for (_, id) in self.entries.unknown.range(..=(frontier, Id::MAX)) {
            let Some(request) = self.entries.request(*id) else {
                continue;
            };
            if wanted(&self.model, request)
                && !self.has_like(next, request)
                && let Ok(step) = self.model.apply(request)
                && step.events.is_empty()
            {
                next.push(*id);
            }
        }
    }

    /// Adds what may have made the next revision, which no answer claims.
    fn fill_gap(&mut self, frontier: u64, next: &mut Vec<Id>) {
        let revision = self.model.revision() + 1;
        let wanted = self.entries.last_revision >= revision;
        let seen = self
            .seen
            .events
            .get(&revision)
            .map_or(&[][..], Vec::as_slice);
        let done = self.entries.done.range(..=(frontier, Id::MAX));
        let unknown = self.entries.unknown.range(..=(frontier, Id::MAX));
        let mut lacking = Vec::new();
        for (_, id) in done.chain(unknown) {
            let Some(request) = self.entries.request(*id) else {
                continue;
            };
            let is_revoke = matches!(request, Request::LeaseRevoke(_));
            // Beyond what anybody was told of, only leases that end make a difference.
            if !is_revoke && (!wanted || !may_have_made(request, seen)) {
                continue;
            }
            if self.has_like(next, request) {
                continue;
            }
            self.steps += 1;
            match self.model.apply(request) {
                Ok(step) if !step.events.is_empty() && self.agrees(&step.events, seen) => {
                    next.push(*id);
                }
                Err(Refusal::LeaseNotFound) if !is_revoke => lacking.extend(leases(request)),
                _ => {}
            }
        }
        if !lacking.is_empty() {
            self.enable(
                next,
                |_, request| matches!(request, Request::LeaseGrant(id) if lacking.contains(id)),
            );
        }
    }

    /// Whether these are the events that watches were told of.
    fn agrees(&self, events: &[Event], seen: &[Event]) -> bool {
        let is_among = |event: &Event, events: &[Event]| {
            let mut events = events.iter();
            events.any(|other| other.is_same_change(event))
        };
        let revision = self.model.revision() + 1;
        seen.iter().all(|seen| is_among(seen, events))
            && events.iter().all(|event| {
                is_among(event, seen) || !self.told.iter().any(|told| told.covers(revision, event))
            })
    }

    /// Whether one that asks for the same is there already. Of those of unknown outcome, which have
    /// no end, the one that was called first is as good as any; those that are done come first.
    fn has_like(&self, next: &[Id], request: &Request) -> bool {
        next.iter()
            .any(|other| self.entries.request(*other) == Some(request))
    }
}

impl<'a> Told<'a> {
    pub(super) fn of(watch: &'a Watch) -> Option<Self> {
        let revisions = watch.responses.iter().flat_map(|response| {
            let events = match &response.body {
                WatchBody::Events(events) => events.as_slice(),
                _ => &[],
            };
            events.iter().map(Event::revision)
        });
        let (first, last) = (revisions.clone().min()?, revisions.max()?);
        Some(Self {
            request: &watch.request,
            first,
            last,
        })
    }

    fn covers(&self, revision: i64, event: &Event) -> bool {
        (self.first..=self.last).contains(&revision) && self.request.wants(event)
    }
}

/// The leases that a request needs or names.
fn leases(request: &Request) -> Vec<i64> {
    match request {
        Request::LeaseGrant(id) | Request::LeaseRevoke(id) => vec![*id],
        Request::Put(put) => vec![put.lease],
        Request::Txn(txn) => {
            let operations = txn.success.iter().chain(&txn.failure);
            let puts = operations.filter_map(|operation| match operation {
                TxnOperation::Put(put) => Some(put.lease),
                TxnOperation::Range(_) | TxnOperation::Delete(_) => None,
            });
            puts.collect()
        }
        Request::Range(_) | Request::Delete(_) | Request::Compact(_) => Vec::new(),
    }
}

/// Whether a request is about the keys that changed, as a first and cheap test.
fn may_have_made(request: &Request, seen: &[Event]) -> bool {
    let Some(first) = seen.first() else {
        return true;
    };
    match request {
        Request::Put(put) => put.key == first.kv.key && put.value == first.kv.value,
        Request::Delete(delete) => delete.keys.contains(&first.kv.key),
        _ => true,
    }
}
