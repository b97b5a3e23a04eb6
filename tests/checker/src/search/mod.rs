//! The search for an order.

mod candidates;
mod entries;
mod explain;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use self::candidates::Told;
use self::entries::Id;
use crate::history::History;
use crate::linearizability::Changes;
use crate::model::Model;
use crate::operation::{Outcome, Range, RangeResult, Request, Response};
use crate::report::{Limits, Verdict};

pub use self::entries::Entries;

/// A search for an order of all entries in which every answer is right.
pub struct Search<'a> {
    history: &'a History,
    entries: Entries<'a>,
    /// What watches were told of each revision.
    seen: &'a Changes,
    /// Of which revisions each watch has told.
    told: Vec<Told<'a>>,
    /// What was read of past revisions, by revision.
    past_reads: HashMap<i64, Vec<(Id, &'a Range, &'a RangeResult)>>,
    model: Model,
    /// The order so far.
    order: Vec<Id>,
    /// A number for the set of entries in `order`.
    placed: u128,
    /// States that led nowhere: the entries that had their place, and what the store held.
    known: HashSet<(u128, u128)>,
    choices: Vec<Choice>,
    limits: Limits,
    steps: u64,
    deepest: Option<DeadEnd>,
}

/// A point in the order where several entries could be next.
struct Choice {
    model: Model,
    depth: usize,
    untried: Vec<Id>,
}

/// Where no entry can be next.
struct DeadEnd {
    model: Model,
    depth: usize,
    /// An entry whose answer is not of this state, if that is what is wrong.
    culprit: Option<Id>,
    /// Entries that could have been next by their times, the one that had to be first.
    open: Vec<Id>,
}

impl<'a> Search<'a> {
    pub fn new(
        history: &'a History,
        entries: Entries<'a>,
        seen: &'a Changes,
        limits: &Limits,
    ) -> Self {
        let mut past_reads: HashMap<_, Vec<_>> = HashMap::new();
        for id in 0..entries.all.len() {
            let Some(operation) = entries.operation(id) else {
                continue;
            };
            if let Request::Range(range) = &operation.request
                && let Outcome::Ok(Response::Range { result, .. }) = &operation.outcome
                && range.revision > 0
            {
                let reads = past_reads.entry(range.revision).or_default();
                reads.push((id, range, result));
            }
        }
        Self {
            history,
            entries,
            seen,
            told: history.watches.iter().filter_map(Told::of).collect(),
            past_reads,
            model: Model::new(&history.initial),
            order: Vec::new(),
            placed: 0,
            known: HashSet::new(),
            choices: Vec::new(),
            limits: limits.clone(),
            steps: 0,
            deepest: None,
        }
    }

    pub fn run(&mut self) -> Verdict {
        let mut alive = self.past_is_right();
        loop {
            alive = alive && self.place_reads();
            if alive && self.entries.required.is_empty() {
                return Verdict::Holds;
            }
            if self.steps > self.limits.steps || self.known.len() > self.limits.states {
                return Verdict::Undecided(format!(
                    "{} steps did not suffice: {} of {} operations have their place",
                    self.steps,
                    self.order.len(),
                    self.entries.all.len()
                ));
            }
            alive = alive && self.known.insert((self.placed, self.model.fingerprint()));
            let mut next = if alive { self.next() } else { Vec::new() };
            if alive && next.is_empty() {
                self.remember_dead_end(None);
            }
            // The first that is found is tried first.
            next.reverse();
            let tried = match next.pop() {
                Some(id) => {
                    if !next.is_empty() {
                        self.choices.push(Choice {
                            model: self.model.clone(),
                            depth: self.order.len(),
                            untried: next,
                        });
                    }
                    id
                }
                None => match self.back() {
                    Some(id) => id,
                    None => return self.explain().into(),
                },
            };
            alive = self.place_change(tried);
        }
    }

    /// What changed, in the order that was found.
    pub fn changes(&self) -> Changes {
        let mut changes = Changes {
            begin: self.history.initial.revision,
            events: BTreeMap::new(),
            complete: true,
        };
        let mut model = Model::new(&self.history.initial);
        for id in &self.order {
            let Some(Ok(step)) = self
                .entries
                .request(*id)
                .map(|request| model.apply(request))
            else {
                continue;
            };
            model = step.model;
            if !step.events.is_empty() {
                changes.events.insert(model.revision(), step.events);
            }
        }
        changes
    }

    /// No entry that is called after this time can be next.
    fn frontier(&self) -> u64 {
        self.entries
            .required
            .first()
            .map_or(u64::MAX, |(end, _)| *end)
    }

    /// Gives a place to all entries that change nothing and are right in this state. There is no
    /// choice in this: where they could be placed later, they can be placed now. False if one can't
    /// be right any more.
    fn place_reads(&mut self) -> bool {
        let revision = self.model.revision();
        loop {
            let frontier = self.frontier();
            let open = self
                .entries
                .reads
                .get(&revision)
                .and_then(|reads| reads.first());
            if let Some(&(call, id)) = open
                && call <= frontier
            {
                if !self.is_right(id) {
                    self.remember_dead_end(Some(id));
                    return false;
                }
                self.place(id);
                continue;
            }
            let refused = self.entries.refused.range(..=(frontier, Id::MAX));
            let candidates: Vec<Id> = refused.map(|(_, id)| *id).collect();
            let Some(id) = candidates.into_iter().find(|id| self.is_right(*id)) else {
                return true;
            };
            self.place(id);
        }
    }

    /// Whether an entry that changes nothing is answered as this state would.
    fn is_right(&mut self, id: Id) -> bool {
        self.steps += 1;
        let Some(operation) = self.entries.operation(id) else {
            return true;
        };
        match (self.model.apply(&operation.request), &operation.outcome) {
            (Err(refusal), Outcome::Refused(answered)) => refusal == *answered,
            // What was read of the past has been compared when the past was the present.
            (Ok(_), Outcome::Ok(_)) if is_of_the_past(&operation.request) => true,
            (Ok(step), Outcome::Ok(answered)) => step.response == *answered,
            _ => false,
        }
    }

    /// Gives a place to an entry that changes something. False if what was read of the state that
    /// it makes is not what is in it.
    fn place_change(&mut self, id: Id) -> bool {
        let step = self
            .entries
            .request(id)
            .map(|request| self.model.apply(request));
        let Some(Ok(step)) = step else {
            return false;
        };
        let advances = step.model.revision() > self.model.revision();
        self.model = step.model;
        self.place(id);
        !advances || self.past_is_right()
    }

    fn past_is_right(&mut self) -> bool {
        let reads = self.past_reads.get(&self.model.revision());
        let wrong = reads.and_then(|reads| {
            let mut reads = reads.iter();
            reads.find(|(_, range, result)| self.model.read(range) != **result)
        });
        match wrong {
            Some(&(id, ..)) => {
                self.remember_dead_end(Some(id));
                false
            }
            None => true,
        }
    }

    fn place(&mut self, id: Id) {
        self.entries.set_open(id, false);
        self.placed ^= number_of(id);
        self.order.push(id);
    }

    /// Goes back to the last choice; what is tried there now.
    fn back(&mut self) -> Option<Id> {
        let choice = self.choices.last_mut()?;
        let id = choice.untried.pop();
        self.model = choice.model.clone();
        for id in self.order.drain(choice.depth..).rev() {
            self.entries.set_open(id, true);
            self.placed ^= number_of(id);
        }
        if choice.untried.is_empty() {
            self.choices.pop();
        }
        id
    }

    fn open(&self) -> Vec<Id> {
        /// More than that would explain nothing.
        const SHOWN: usize = 8;
        let frontier = self.frontier();
        let required = self.entries.required.iter().take(100 * SHOWN);
        let open = required.filter(|(_, id)| self.entries.all[*id].call <= frontier);
        open.map(|(_, id)| *id).take(SHOWN).collect()
    }

    fn remember_dead_end(&mut self, culprit: Option<Id>) {
        let depth = self.order.len();
        if self
            .deepest
            .as_ref()
            .is_none_or(|deepest| deepest.depth < depth)
        {
            self.deepest = Some(DeadEnd {
                model: self.model.clone(),
                depth,
                culprit,
                open: self.open(),
            });
        }
    }
}

fn number_of(id: Id) -> u128 {
    let half = |salt: u64| {
        let mut hasher = DefaultHasher::new();
        (salt, id).hash(&mut hasher);
        u128::from(hasher.finish())
    };
    half(1) << 64 | half(2)
}

fn is_of_the_past(request: &Request) -> bool {
    matches!(request, Request::Range(range) if range.revision > 0)
}
