//! Requests that consensus has to confirm first: that nothing newer was acknowledged elsewhere.

use std::collections::BTreeMap;

use super::RequestId;
use crate::Member;

/// Requests by the round of consensus that they wait for.
#[derive(Debug, Default)]
pub(super) struct Reads {
    rounds: BTreeMap<u64, Vec<Confirmation>>,
    /// They wait for the next round.
    new: Vec<Confirmation>,
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
        !self.new.is_empty()
    }

    /// One round of consensus serves every request that waits.
    pub(super) fn ask(&mut self, member: &mut Member, id: u64) {
        if member.read_index(id) {
            self.rounds.insert(id, std::mem::take(&mut self.new));
        }
    }

    /// What a round has confirmed.
    pub(super) fn take(&mut self, id: u64) -> Vec<Confirmation> {
        self.rounds.remove(&id).unwrap_or_default()
    }

    /// Requests whose round was lost ask again; clients that gave up are forgotten.
    pub(super) fn ask_again(&mut self, is_waiting: &dyn Fn(RequestId) -> bool) {
        for waiting in std::mem::take(&mut self.rounds).into_values() {
            self.new.extend(waiting);
        }
        self.new
            .retain(|confirmation| is_waiting(confirmation.request()));
    }
}
