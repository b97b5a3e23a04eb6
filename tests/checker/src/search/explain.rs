use super::{DeadEnd, Search, is_of_the_past};
use crate::operation::{Outcome, Request};
use crate::report::Violation;
use crate::search::entries::{Id, What};

impl Search<'_> {
    /// Why there is no order: where the longest one that was found can't go on.
    pub(super) fn explain(&self) -> Violation {
        let Some(end) = &self.deepest else {
            return Violation::new(
                "no order of the operations explains their answers",
                Vec::new(),
            );
        };
        let mut excerpt = vec![format!(
            "{} operations are explained; the store is at revision {}, compacted at {}",
            end.depth,
            end.model.revision(),
            end.model.compacted()
        )];
        let what = match end.culprit {
            Some(id) => {
                self.show_answer(end, id, &mut excerpt);
                self.show_writers(end, id, &mut excerpt);
                format!(
                    "an answer is not of the state at revision {}",
                    end.model.revision()
                )
            }
            None => self.explain_stop(end, &mut excerpt),
        };
        Violation::new(what, excerpt)
    }

    /// Nothing could be next: what had to be, and what had to be before it.
    fn explain_stop(&self, end: &DeadEnd, excerpt: &mut Vec<String>) -> String {
        let next = end.model.revision() + 1;
        let stale: Vec<Id> = self
            .entries
            .reads
            .get(&end.model.revision())
            .map(|reads| reads.iter().map(|(_, id)| *id).collect())
            .unwrap_or_default();
        let stale: Vec<Id> = stale
            .into_iter()
            .filter(|id| self.is_late(end, *id))
            .collect();
        if let Some(first) = end.open.first() {
            excerpt.push(format!("this had to be next: {}", self.show(*first)));
            self.show_answer_of_model(end, *first, excerpt);
        }
        if let (Some(stale), Some(_)) = (stale.first(), end.open.first()) {
            excerpt.push(format!(
                "but this was called later and answered with an older state: {}",
                self.show(*stale)
            ));
            return format!(
                "an answer is stale: revision {} was over",
                end.model.revision()
            );
        }
        for id in end.open.iter().skip(1) {
            excerpt.push(format!("or this: {}", self.show(*id)));
        }
        match self.entries.writes.get(&next) {
            Some(write) => {
                excerpt.push(format!(
                    "revision {next} was made by: {}",
                    self.show(*write)
                ));
                if end.open.first() != Some(write) {
                    self.show_answer_of_model(end, *write, excerpt);
                }
                format!("the write of revision {next} can't have been next")
            }
            None if self.entries.last_revision >= next => {
                for event in self.seen.events.get(&next).into_iter().flatten() {
                    excerpt.push(format!("a watch was told of revision {next}: {event}"));
                }
                format!("nothing that was asked for can have made revision {next}")
            }
            None => "an answer is of no state that the store can have been in".to_owned(),
        }
    }

    /// Whether a read of the state was called when that state was over already.
    fn is_late(&self, end: &DeadEnd, id: Id) -> bool {
        let first = end
            .open
            .first()
            .and_then(|first| self.entries.all.get(*first));
        let read = self.entries.all.get(id);
        first
            .zip(read)
            .is_some_and(|(first, read)| read.call > first.end)
    }

    fn show_answer(&self, end: &DeadEnd, id: Id, excerpt: &mut Vec<String>) {
        excerpt.push(format!("this can't be explained: {}", self.show(id)));
        self.show_answer_of_model(end, id, excerpt);
    }

    fn show_answer_of_model(&self, end: &DeadEnd, id: Id, excerpt: &mut Vec<String>) {
        let Some(request) = self.entries.request(id) else {
            return;
        };
        let right = match end.model.apply(request) {
            Ok(_) if is_of_the_past(request) => match request {
                Request::Range(range) => end.model.read(range).to_string(),
                _ => return,
            },
            Ok(step) => step.response.to_string(),
            Err(refusal) => Outcome::Refused(refusal).to_string(),
        };
        excerpt.push(format!("in this state, the answer would be: {right}"));
    }

    /// Who wrote what a read should have seen.
    fn show_writers(&self, end: &DeadEnd, id: Id, excerpt: &mut Vec<String>) {
        /// More would hide what matters.
        const SHOWN: usize = 4;
        let Some(Request::Range(range)) = self.entries.request(id) else {
            return;
        };
        for kv in end.model.select(&range.keys).take(SHOWN) {
            if let Some(write) = self.entries.writes.get(&kv.mod_revision) {
                excerpt.push(format!("it was written by: {}", self.show(*write)));
            }
        }
    }

    fn show(&self, id: Id) -> String {
        match self
            .entries
            .all
            .get(id)
            .map(|entry| (&entry.what, entry.end))
        {
            Some((What::Operation(operation), _)) => operation.to_string(),
            Some((What::Seen(revision), end)) => {
                format!("a watch was told at {end} that revision {revision} is there")
            }
            Some((What::Expiry(request), _)) => format!("of itself: {request}"),
            None => String::new(),
        }
    }
}
