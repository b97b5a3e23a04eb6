use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::history::History;
use crate::operation::{Operation, Outcome, Request, Response, TxnResult};
use crate::report::Violation;
use crate::watch::WatchBody;

/// The number of an entry.
pub type Id = usize;

/// What the search puts in order.
#[derive(Debug)]
pub struct Entry<'a> {
    /// Not before this time.
    pub call: u64,
    /// Not after this time.
    pub end: u64,
    /// What it is.
    pub what: What<'a>,
}

/// What an entry is.
#[derive(Debug, Clone)]
pub enum What<'a> {
    /// A client's operation.
    Operation(&'a Operation),
    /// A watch tells that this revision is there.
    Seen(i64),
    /// A lease ends by itself, if it does.
    Expiry(Request),
}

/// All entries, by what is known of their place. An entry is open until it has its place in the
/// order.
#[derive(Debug, Default)]
pub struct Entries<'a> {
    /// Them.
    pub all: Vec<Entry<'a>>,
    /// What changes nothing and is of the state of this revision, by call.
    pub reads: BTreeMap<i64, BTreeSet<(u64, Id)>>,
    /// What made this revision.
    pub writes: HashMap<i64, Id>,
    /// What was done, at a revision that is not known, by call.
    pub done: BTreeSet<(u64, Id)>,
    /// What was refused, by call.
    pub refused: BTreeSet<(u64, Id)>,
    /// What may have been done, by call.
    pub unknown: BTreeSet<(u64, Id)>,
    /// All but the unknown, by end.
    pub required: BTreeSet<(u64, Id)>,
    /// The highest revision that anybody was told of.
    pub last_revision: i64,
}

impl<'a> Entries<'a> {
    /// Those of a history. Two answers that claim the same revision break it at once.
    pub fn of(history: &'a History) -> Result<Self, Violation> {
        let mut entries = Self {
            last_revision: history.initial.revision,
            ..Self::default()
        };
        for operation in &history.operations {
            entries.add_operation(operation)?;
        }
        entries.add_seen(history);
        entries.add_expiries(history);
        Ok(entries)
    }

    fn add_operation(&mut self, operation: &'a Operation) -> Result<(), Violation> {
        let id = self.all.len();
        let mut entry = Entry {
            call: operation.call,
            end: operation.end,
            what: What::Operation(operation),
        };
        match &operation.outcome {
            Outcome::Failed => return Ok(()),
            Outcome::Unknown if matches!(operation.request, Request::Range(_)) => return Ok(()),
            Outcome::Unknown => {
                entry.end = u64::MAX;
                self.unknown.insert((entry.call, id));
            }
            Outcome::Refused(_) => {
                entry.call = earliest(operation);
                self.refused.insert((entry.call, id));
            }
            Outcome::Ok(response) => match response.revision() {
                None => {
                    if let Request::Compact(revision) = operation.request {
                        self.last_revision = self.last_revision.max(revision);
                    }
                    self.done.insert((entry.call, id));
                }
                Some(revision) if changes_keys(response) => {
                    self.last_revision = self.last_revision.max(revision);
                    if let Some(other) = self.writes.insert(revision, id) {
                        let other = self.operation(other);
                        return Err(Violation::new(
                            format!("two writes made revision {revision}"),
                            other
                                .into_iter()
                                .chain([operation])
                                .map(ToString::to_string)
                                .collect(),
                        ));
                    }
                }
                Some(revision) => {
                    entry.call = earliest(operation);
                    self.add_read(revision, entry.call, id);
                }
            },
        }
        if entry.end != u64::MAX {
            self.required.insert((entry.end, id));
        }
        self.all.push(entry);
        Ok(())
    }

    /// Whoever asks after a watch has told of a revision must not be answered with an older state.
    fn add_seen(&mut self, history: &History) {
        let mut seen: BTreeMap<i64, u64> = BTreeMap::new();
        let mut see = |revision: i64, at: u64| {
            let first = seen.entry(revision).or_insert(at);
            *first = at.min(*first);
        };
        for response in history.watches.iter().flat_map(|watch| &watch.responses) {
            match &response.body {
                WatchBody::Created | WatchBody::Progress => see(response.revision, response.at),
                WatchBody::Events(events) => {
                    for event in events {
                        see(event.revision(), response.at);
                    }
                }
                WatchBody::Compacted(_) | WatchBody::Canceled => {}
            }
        }
        for (revision, end) in seen.range(history.initial.revision..) {
            let id = self.all.len();
            self.add_read(*revision, 0, id);
            self.required.insert((*end, id));
            self.all.push(Entry {
                call: 0,
                end: *end,
                what: What::Seen(*revision),
            });
        }
    }

    /// Leases end by themselves, at times that are not known here: a lease may, once it is granted.
    fn add_expiries(&mut self, history: &History) {
        let granted = history.operations.iter().filter_map(|operation| {
            let done = matches!(operation.outcome, Outcome::Ok(_) | Outcome::Unknown);
            match operation.request {
                Request::LeaseGrant(id) if done => Some((operation.call, id)),
                _ => None,
            }
        });
        let initial = history.initial.leases.iter().map(|lease| (0, *lease));
        for (call, lease) in initial.chain(granted) {
            self.unknown.insert((call, self.all.len()));
            self.all.push(Entry {
                call,
                end: u64::MAX,
                what: What::Expiry(Request::LeaseRevoke(lease)),
            });
        }
    }

    fn add_read(&mut self, revision: i64, call: u64, id: Id) {
        self.last_revision = self.last_revision.max(revision);
        self.reads.entry(revision).or_default().insert((call, id));
    }

    /// The client's operation, where the entry is one.
    pub fn operation(&self, id: Id) -> Option<&'a Operation> {
        match self.all.get(id)?.what {
            What::Operation(operation) => Some(operation),
            What::Seen(_) | What::Expiry(_) => None,
        }
    }

    /// What is asked for, where the entry asks for something.
    pub fn request(&self, id: Id) -> Option<&Request> {
        match &self.all.get(id)?.what {
            What::Operation(operation) => Some(&operation.request),
            What::Expiry(request) => Some(request),
            What::Seen(_) => None,
        }
    }

    /// Takes an entry out, for it has its place; or puts it back in.
    pub fn set_open(&mut self, id: Id, open: bool) {
        let Some(entry) = self.all.get(id) else {
            return;
        };
        let (call, end) = (entry.call, entry.end);
        let set = |set: &mut BTreeSet<(u64, Id)>, key: (u64, Id)| {
            if open {
                set.insert(key)
            } else {
                set.remove(&key)
            }
        };
        if end != u64::MAX {
            set(&mut self.required, (end, id));
        }
        let kind = match &entry.what {
            What::Expiry(_) => &mut self.unknown,
            What::Seen(revision) => self.reads.entry(*revision).or_default(),
            What::Operation(operation) => match &operation.outcome {
                Outcome::Ok(response) => match response.revision() {
                    None => &mut self.done,
                    // These are found by their revision.
                    Some(_) if changes_keys(response) => return,
                    Some(revision) => self.reads.entry(revision).or_default(),
                },
                Outcome::Refused(_) => &mut self.refused,
                Outcome::Failed | Outcome::Unknown => &mut self.unknown,
            },
        };
        set(kind, (call, id));
    }
}

/// A serializable read may be of any state that was before its end.
fn earliest(operation: &Operation) -> u64 {
    match &operation.request {
        Request::Range(range) if range.serializable => 0,
        _ => operation.call,
    }
}

fn changes_keys(response: &Response) -> bool {
    match response {
        Response::Put { .. } => true,
        Response::Delete { deleted, .. } => *deleted > 0,
        Response::Txn { results, .. } => results.iter().any(|result| match result {
            TxnResult::Put { .. } => true,
            TxnResult::Delete { deleted, .. } => *deleted > 0,
            TxnResult::Range(_) => false,
        }),
        Response::Range { .. } | Response::Done => false,
    }
}
