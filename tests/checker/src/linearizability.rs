//! Whether operations took effect one at a time, each between its call and its end.
//!
//! The store is one object, for its revision counts every change and is in every answer: it can't be
//! partitioned by key. The same revision makes the search short. A read is of the state of its
//! revision, a write makes its revision, so that only what nobody was told of is searched for: which
//! write of unknown outcome made a revision that no answered write claims, and when leases and
//! compactions took effect, whose answers have no revision that counts. What watches were sent
//! narrows the former down.

use std::collections::BTreeMap;

use crate::history::History;
use crate::report::{Limits, Verdict};
use crate::search::{Entries, Search};
use crate::watch::{Event, EventKind, WatchBody};

/// What changed, by revision; a revision's events are in no order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// The store's revision before the first of them.
    pub begin: i64,
    /// The events of each revision.
    pub events: BTreeMap<i64, Vec<Event>>,
    /// Whether all changes between `begin` and the last are here.
    pub complete: bool,
}

/// Searches for an order of all operations that explains every answer. If there is one: what
/// changed, in this order.
pub fn check(history: &History, limits: &Limits) -> (Verdict, Option<Changes>) {
    let seen = changes_seen(history);
    let with_previous = with_previous(history, &seen);
    let (verdict, changes) = search(history, &with_previous, limits);
    // If it is a previous value that is wrong, there is an order without it.
    if verdict == Verdict::Holds || with_previous == seen {
        return (verdict, changes);
    }
    search(history, &seen, limits)
}

fn search(history: &History, seen: &Changes, limits: &Limits) -> (Verdict, Option<Changes>) {
    let entries = match Entries::of(history) {
        Ok(entries) => entries,
        Err(violation) => return (violation.into(), None),
    };
    let mut search = Search::new(history, entries, seen, limits);
    let verdict = search.run();
    let changes = (verdict == Verdict::Holds).then(|| search.changes());
    (verdict, changes)
}

/// What changed, as far as watches were told.
pub fn changes_seen(history: &History) -> Changes {
    let mut changes = Changes {
        begin: history.initial.revision,
        ..Changes::default()
    };
    for watch in &history.watches {
        for response in &watch.responses {
            let WatchBody::Events(events) = &response.body else {
                continue;
            };
            for event in events {
                let known = changes.events.entry(event.revision()).or_default();
                if !known.iter().any(|known| known.is_same_change(event)) {
                    known.push(event.clone());
                }
            }
        }
    }
    changes
}

/// And what follows from the previous values that they were told: each was put at its revision. Else
/// another request of unknown outcome could be taken for the one that did.
fn with_previous(history: &History, seen: &Changes) -> Changes {
    let mut changes = seen.clone();
    let responses = history.watches.iter().flat_map(|watch| &watch.responses);
    let events = responses.filter_map(|response| match &response.body {
        WatchBody::Events(events) => Some(events),
        _ => None,
    });
    let previous = events.flatten().filter_map(|event| event.prev_kv.as_ref());
    for previous in previous.filter(|kv| kv.mod_revision > history.initial.revision) {
        let put = Event {
            kind: EventKind::Put,
            kv: previous.clone(),
            prev_kv: None,
        };
        let known = changes.events.entry(previous.mod_revision).or_default();
        if !known.iter().any(|known| known.is_same_change(&put)) {
            known.push(put);
        }
    }
    changes
}
