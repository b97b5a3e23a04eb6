//! Requests that consensus has to confirm first: that nothing newer was acknowledged elsewhere.

use std::collections::BTreeMap;

use super::RequestId;
use crate::Member;

/// Requests by the round of consensus that they wait for. One round at a time serves all that came
/// before it: what comes meanwhile shares the next one.
#[derive(Debug, Default)]
pub(super) struct Reads {
    rounds: BTreeMap<u64, Vec<Confirmation>>,
    /// They wait for the next round.
    new: Vec<Confirmation>,
    /// A tick has passed since the last round was asked for: it may be lost.
    overdue: bool,
}

/// What waits.
#[derive(Debug, Clone, Copy)]
pub(super) enum Confirmation {
    /// A read.
    Read(RequestId),
    /// The renewal of a lease: a leader that was cut off must not renew what another one lets end.
    RenewLease(RequestId, i64),
}

impl Confirmation {
    fn request(self) -> RequestId {
        match self {
            Self::Read(request) | Self::RenewLease(request, _) => request,
        }
    }
}

impl Reads {
    /// Adds a request to the next round.
    pub(super) fn push(&mut self, confirmation: Confirmation) {
        self.new.push(confirmation);
    }

    /// Whether a round is to be asked for.
    pub(super) fn wants_round(&self) -> bool {
        if self.rounds.is_empty() {
            !self.new.is_empty()
        } else {
            self.overdue
        }
    }

    /// One round of consensus serves every request that waits. Ids of rounds grow.
    pub(super) fn ask(&mut self, member: &mut Member, id: u64) {
        if member.read_index(id) {
            self.overdue = false;
            if !self.new.is_empty() {
                self.rounds.insert(id, std::mem::take(&mut self.new));
            }
        }
    }

    /// What a round has confirmed: also what was asked for by earlier ones, whose answers were lost
    /// or are late.
    pub(super) fn take(&mut self, id: u64) -> Vec<Confirmation> {
        let later = self.rounds.split_off(&(id + 1));
        let confirmed = std::mem::replace(&mut self.rounds, later);
        confirmed.into_values().flatten().collect()
    }

    /// A tick passed: rounds may be lost; clients that gave up are forgotten.
    pub(super) fn tick(&mut self, is_waiting: &dyn Fn(RequestId) -> bool) {
        self.rounds.retain(|_, waiting| {
            waiting.retain(|confirmation| is_waiting(confirmation.request()));
            !waiting.is_empty()
        });
        self.overdue = !self.rounds.is_empty();
        self.new
            .retain(|confirmation| is_waiting(confirmation.request()));
    }
}
