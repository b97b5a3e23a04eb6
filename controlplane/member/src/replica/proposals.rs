//! Commands on their way through the log, and who waits for their outcomes.

use std::collections::BTreeMap;

use prost::Message as _;

use super::RequestId;
use crate::Member;
use crate::command::{Authority, Command, Operation};

/// Clients that may wait for an answer at once.
const MAX_WAITERS: usize = 100_000;

/// Commands that this member proposed.
#[derive(Debug, Default)]
pub(super) struct Proposals {
    /// By the command's id.
    waiters: BTreeMap<u64, RequestId>,
    /// Commands that wait for a leader.
    held: Vec<Vec<u8>>,
    failed: u64,
}

impl Proposals {
    /// Whether no more clients may wait.
    pub(super) fn is_full(&self) -> bool {
        self.waiters.len() >= MAX_WAITERS
    }

    /// Proposes a client's command under a new id.
    pub(super) fn propose(
        &mut self,
        member: &mut Member,
        id: u64,
        request: RequestId,
        operation: Operation,
        authority: Option<Authority>,
    ) {
        self.waiters.insert(id, request);
        let command = Command {
            id,
            operation: Some(operation),
            authority,
        };
        self.submit(member, command.encode_to_vec());
    }

    /// Proposes what the member decided as the leader of `term`: never held or sent to another leader.
    pub(super) fn decide(&mut self, member: &mut Member, term: u64, id: u64, operation: Operation) {
        let command = Command {
            id,
            operation: Some(operation),
            authority: None,
        };
        if member
            .propose_decision(term, command.encode_to_vec())
            .is_err()
        {
            self.failed += 1;
            tracing::debug!(term, "a decision came too late");
        }
    }

    /// Proposes what waits for a leader, if there is one now.
    pub(super) fn submit_held(&mut self, member: &mut Member) {
        if member.status().leader != 0 {
            for command in std::mem::take(&mut self.held) {
                self.submit(member, command);
            }
        }
    }

    /// Who waits for the outcome of this command.
    pub(super) fn take(&mut self, id: u64) -> Option<RequestId> {
        self.waiters.remove(&id)
    }

    /// Forgets clients that gave up.
    pub(super) fn retain(&mut self, is_waiting: &dyn Fn(RequestId) -> bool) {
        self.waiters.retain(|_, request| is_waiting(*request));
    }

    /// Clients that wait.
    pub(super) fn pending(&self) -> usize {
        self.waiters.len()
    }

    /// Proposals that were refused or dropped.
    pub(super) fn failed(&self) -> u64 {
        self.failed
    }

    /// Notes that a proposal was refused.
    pub(super) fn count_failure(&mut self) {
        self.failed += 1;
    }

    fn submit(&mut self, member: &mut Member, command: Vec<u8>) {
        if member.status().leader == 0 {
            self.held.push(command);
        } else if member.propose(command).is_err() {
            // Leadership is being handed over: the client tries again when it hears nothing.
            self.failed += 1;
            tracing::debug!("a proposal was dropped");
        }
    }
}
