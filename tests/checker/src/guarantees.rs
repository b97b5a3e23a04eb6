//! What etcd promises of watches (<https://etcd.io/docs/v3.5/learning/api_guarantees/>), and what its
//! robustness tests check beside that.

use std::collections::{BTreeMap, HashSet};

use crate::history::History;
use crate::linearizability::Changes;
use crate::operation::{Outcome, Request};
use crate::report::{Verdict, Violation};
use crate::watch::{Event, Watch, WatchBody, WatchResponse};

/// The verdict on each guarantee.
///
/// - *ordered*: events arrive in order of revision.
/// - *unique*: no event arrives twice.
/// - *atomic*: the events of one revision arrive in one message.
/// - *reliable*: no event between two that arrived is left out, nor the last ones of a watch that had
///   the time to send them; and none is made up.
/// - *resumable*: a watch begins with the first event at or after its start revision.
/// - *bookmarkable*: when progress is notified, everything up to it has arrived.
/// - *prev-kv*: the previous value is that of the revision before. It may be left out if that
///   revision is compacted.
/// - *is-create*: what is marked as created did not exist.
/// - *filter*: only what was asked for arrives.
pub fn check(history: &History, changes: &Changes) -> Vec<(&'static str, Verdict)> {
    let rules: [(&'static str, Rule, Needs); 9] = [
        ("watch: ordered", ordered, Needs::Nothing),
        ("watch: unique", unique, Needs::Nothing),
        ("watch: atomic", atomic, Needs::Nothing),
        ("watch: reliable", reliable, Needs::Changes),
        ("watch: resumable", resumable, Needs::Changes),
        ("watch: bookmarkable", bookmarkable, Needs::Changes),
        ("watch: prev-kv", prev_kv, Needs::Changes),
        ("watch: is-create", is_create, Needs::Changes),
        ("watch: filter", filter, Needs::Nothing),
    ];
    let compactions = compactions(history);
    let told: Vec<Told<'_>> = history
        .watches
        .iter()
        .map(|watch| Told::new(watch, changes, &compactions))
        .collect();
    let verdict = |(name, rule, needs): (&'static str, Rule, Needs)| {
        let broken = told.iter().find_map(rule).map(Verdict::from);
        let unknown = matches!(needs, Needs::Changes) && !changes.complete;
        let verdict = match broken {
            Some(broken) => broken,
            None if unknown && !told.is_empty() => {
                Verdict::Undecided("no order of the operations is there to compare with".to_owned())
            }
            None => Verdict::Holds,
        };
        (name, verdict)
    };
    rules.map(verdict).into()
}

type Rule = fn(&Told<'_>) -> Option<Violation>;

/// What a rule compares watches with.
#[derive(Clone, Copy)]
enum Needs {
    Nothing,
    Changes,
}

/// A watch beside what happened.
struct Told<'a> {
    watch: &'a Watch,
    changes: &'a Changes,
    /// When a compaction was asked for, and at which revision.
    compactions: &'a [(u64, i64)],
    /// The first revision that it has to tell of.
    start: i64,
    /// Its events, each with its message.
    events: Vec<(&'a WatchResponse, &'a Event)>,
}

impl<'a> Told<'a> {
    fn new(watch: &'a Watch, changes: &'a Changes, compactions: &'a [(u64, i64)]) -> Self {
        let created = watch
            .responses
            .iter()
            .find(|response| response.body == WatchBody::Created);
        let start = match (watch.request.start_revision, created) {
            (0, Some(created)) => created.revision + 1,
            // What it was never told of can't be missed.
            (0, None) => i64::MAX,
            (start, _) => start,
        };
        let events = watch.responses.iter().flat_map(|response| {
            let events = match &response.body {
                WatchBody::Events(events) => events.as_slice(),
                _ => &[],
            };
            events.iter().map(move |event| (response, event))
        });
        Self {
            watch,
            changes,
            compactions,
            start,
            events: events.collect(),
        }
    }

    /// Events of these revisions that should have arrived before or with `until`, and have not.
    fn missing(&self, first: i64, last: i64, until: u64) -> Option<&'a Event> {
        if first > last {
            return None;
        }
        let told = self
            .events
            .iter()
            .filter(|(response, _)| response.at <= until);
        let told: HashSet<(i64, &[u8])> = told
            .map(|(_, event)| (event.revision(), &*event.kv.key))
            .collect();
        let wanted = self
            .changes
            .events
            .range(first..=last)
            .flat_map(|(_, events)| events);
        wanted
            .filter(|event| self.watch.request.wants(event))
            .find(|event| !told.contains(&(event.revision(), &*event.kv.key)))
    }

    /// The event as it happened.
    fn original(&self, event: &Event) -> Option<&'a Event> {
        let events = self.changes.events.get(&event.revision())?;
        events
            .iter()
            .find(|original| original.kv.key == event.kv.key)
    }

    fn broken(&self, what: String, excerpt: impl IntoIterator<Item = String>) -> Violation {
        let Watch {
            client,
            call,
            request,
            ..
        } = self.watch;
        let head = format!(
            "client {client} watches {} from revision {} since {call}",
            request.keys, request.start_revision
        );
        Violation::new(what, [head].into_iter().chain(excerpt).collect())
    }

    fn show(response: &WatchResponse, event: &Event) -> String {
        format!("told at {}: {event}", response.at)
    }
}

fn ordered(told: &Told<'_>) -> Option<Violation> {
    let mut pairs = told.events.iter().zip(told.events.iter().skip(1));
    let ((first, before), (second, after)) =
        pairs.find(|((_, before), (_, after))| before.revision() > after.revision())?;
    Some(told.broken(
        format!(
            "revision {} arrived after {}",
            after.revision(),
            before.revision()
        ),
        [Told::show(first, before), Told::show(second, after)],
    ))
}

fn unique(told: &Told<'_>) -> Option<Violation> {
    let mut seen = BTreeMap::new();
    told.events.iter().find_map(|(response, event)| {
        let key = (event.revision(), &event.kv.key);
        let (first, before) = seen.insert(key, (response, event))?;
        Some(told.broken(
            format!("a change of revision {} arrived twice", event.revision()),
            [Told::show(first, before), Told::show(response, event)],
        ))
    })
}

fn atomic(told: &Told<'_>) -> Option<Violation> {
    let mut pairs = told.events.iter().zip(told.events.iter().skip(1));
    let ((first, before), (second, after)) = pairs.find(|((first, before), (second, after))| {
        before.revision() == after.revision() && !std::ptr::eq(*first, *second)
    })?;
    Some(told.broken(
        format!("revision {} arrived in two messages", after.revision()),
        [Told::show(first, before), Told::show(second, after)],
    ))
}

fn reliable(told: &Told<'_>) -> Option<Violation> {
    let made_up = told.events.iter().find(|(_, event)| {
        let is_known = told.changes.complete;
        is_known
            && told
                .original(event)
                .is_none_or(|original| !original.is_same_change(event))
    });
    if let Some((response, event)) = made_up {
        let original = told
            .original(event)
            .map(|event| format!("what happened: {event}"));
        let excerpt = [Told::show(response, event)].into_iter().chain(original);
        return Some(told.broken("an event tells what did not happen".to_owned(), excerpt));
    }
    let first = told
        .events
        .first()
        .map_or(i64::MAX, |(_, event)| event.revision());
    let last = told.events.last().map_or(0, |(_, event)| event.revision());
    if let Some(event) = told.missing(first, last, u64::MAX) {
        return Some(told.broken(
            format!("a change was left out between revisions {first} and {last}"),
            [format!("this happened: {event}")],
        ));
    }
    let through = told.watch.complete_through?;
    let event = told.missing(told.start, through, u64::MAX)?;
    Some(told.broken(
        format!("a change never arrived, although the watch had time until revision {through}"),
        [format!("this happened: {event}")],
    ))
}

fn resumable(told: &Told<'_>) -> Option<Violation> {
    let (response, first) = told.events.first()?;
    if first.revision() < told.start {
        return Some(told.broken(
            format!("the first event is of before revision {}", told.start),
            [Told::show(response, first)],
        ));
    }
    let event = told.missing(told.start, first.revision(), u64::MAX)?;
    Some(told.broken(
        format!(
            "the first event is not the first from revision {} on",
            told.start
        ),
        [
            format!("this happened: {event}"),
            Told::show(response, first),
        ],
    ))
}

fn bookmarkable(told: &Told<'_>) -> Option<Violation> {
    let mut notified: Option<&WatchResponse> = None;
    for response in &told.watch.responses {
        match (&response.body, notified) {
            (WatchBody::Events(events), Some(before)) => {
                let late = events
                    .iter()
                    .find(|event| event.revision() <= before.revision);
                if let Some(late) = late {
                    return Some(told.broken(
                        format!(
                            "progress to revision {} was notified too early",
                            before.revision
                        ),
                        [
                            format!("notified at {}", before.at),
                            Told::show(response, late),
                        ],
                    ));
                }
            }
            (WatchBody::Progress, before) => {
                if let Some(before) = before.filter(|before| before.revision > response.revision) {
                    return Some(told.broken(
                        format!(
                            "progress went back from revision {} to {}",
                            before.revision, response.revision
                        ),
                        [format!("at {}, then at {}", before.at, response.at)],
                    ));
                }
                let from = notified
                    .map_or(0, |before| before.revision + 1)
                    .max(told.start);
                if let Some(event) = told.missing(from, response.revision, response.at) {
                    return Some(told.broken(
                        format!(
                            "progress to revision {} was notified at {}, without this",
                            response.revision, response.at
                        ),
                        [event.to_string()],
                    ));
                }
                notified = Some(response);
            }
            _ => {}
        }
    }
    None
}

fn prev_kv(told: &Told<'_>) -> Option<Violation> {
    let (response, event, original) = told.events.iter().find_map(|(response, event)| {
        let original = told.original(event)?;
        let is_right = match (&event.prev_kv, &original.prev_kv) {
            (None, _) if !told.watch.request.prev_kv => true,
            (None, Some(_)) => told
                .compactions
                .iter()
                .any(|(call, revision)| *call <= response.at && *revision >= event.revision()),
            (found, _) if !told.watch.request.prev_kv => found.is_none(),
            (found, right) => found == right,
        };
        (!is_right && told.changes.complete).then_some((response, event, original))
    })?;
    Some(told.broken(
        format!(
            "the previous value of revision {} is wrong",
            event.revision()
        ),
        [
            Told::show(response, event),
            format!("what happened: {original}"),
        ],
    ))
}

fn is_create(told: &Told<'_>) -> Option<Violation> {
    let creates = |event: &Event| event.kv.create_revision == event.kv.mod_revision;
    let (response, event, original) = told.events.iter().find_map(|(response, event)| {
        let original = told.original(event)?;
        let is_right = creates(event) == creates(original);
        (!is_right && told.changes.complete).then_some((response, event, original))
    })?;
    Some(told.broken(
        format!(
            "whether revision {} created the key is told wrongly",
            event.revision()
        ),
        [
            Told::show(response, event),
            format!("what happened: {original}"),
        ],
    ))
}

fn filter(told: &Told<'_>) -> Option<Violation> {
    let mut events = told.events.iter();
    let (response, event) = events.find(|(_, event)| !told.watch.request.wants(event))?;
    Some(told.broken(
        "an event was not asked for".to_owned(),
        [Told::show(response, event)],
    ))
}

fn compactions(history: &History) -> Vec<(u64, i64)> {
    let asked = history.operations.iter().filter_map(|operation| {
        let done = matches!(operation.outcome, Outcome::Ok(_) | Outcome::Unknown);
        match operation.request {
            Request::Compact(revision) if done => Some((operation.call, revision)),
            _ => None,
        }
    });
    asked.chain([(0, history.initial.compacted)]).collect()
}
