//! The logic of a server around its member: who waits for what, when leases end, what is flushed,
//! when a removed member ends. It is told inputs and the time, and emits effects; threads, sockets
//! and the clock are its caller's, so that a simulation can take their place.

mod input;
pub mod maintenance;
pub mod membership;
mod proposals;
mod reads;

use std::collections::BTreeMap;
use std::sync::Arc;

use keelson_etcd_api::etcdserverpb as pb;

pub use self::input::{Answer, Effect, Input, Progress, RequestId};
pub use self::maintenance::{Job, Maintenance, Wanted};

use self::proposals::Proposals;
use self::reads::{Confirmation, Reads};
use crate::command::{Operation, Response};
use crate::keyspace::Keyspace;
use crate::lessor::Lessor;
use crate::watch::Watches;
use crate::{ConsensusStatus, Member, MemberError, Output, RequestError};

/// Leases revoked at each tick.
const REVOCATIONS_AT_ONCE: usize = 1000;

/// Takes effects as they come.
pub type Emit<'a> = &'a mut dyn FnMut(Effect);

/// How a replica runs.
#[derive(Debug, Clone, Copy)]
pub struct ReplicaOptions {
    /// Ticks until an election.
    pub election_ticks: u32,
    /// In the upper half of the ids of commands, so that members' ids differ.
    pub id_prefix: u32,
}

/// What is counted, since the replica began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Statistics {
    /// Clients that wait for an outcome now.
    pub proposals_pending: usize,
    /// Proposals that were refused or dropped.
    pub proposals_failed: u64,
    /// How often the leader became another.
    pub leader_changes: u64,
}

/// A member and the requests that wait for it. All times are milliseconds of one clock that never
/// goes back.
pub struct Replica {
    member: Member,
    watches: Arc<Watches>,
    lessor: Lessor,
    proposals: Proposals,
    /// Who waits for a change of membership, by the change's id.
    changes: BTreeMap<u64, RequestId>,
    reads: Reads,
    next_id: u64,
    options: ReplicaOptions,
    status: ConsensusStatus,
    leader_changes: u64,
    /// The keyspace is to be flushed at least up to this log index: a snapshot before a member was
    /// added is of no use to it.
    flush_to: u64,
    /// Maintenance is to look whether it has something to do.
    maintain: bool,
    /// The disk is so slow that no more is taken until it has caught up.
    is_full: bool,
    /// Ticks until this member, which was removed, ends.
    ticks_left: Option<u32>,
}

impl Replica {
    /// Nobody waits yet. The first [`Replica::advance`] says how the member begins.
    pub fn new(member: Member, options: ReplicaOptions) -> Self {
        Self {
            watches: Watches::new(Arc::clone(member.keyspace())),
            member,
            lessor: Lessor::default(),
            proposals: Proposals::default(),
            changes: BTreeMap::new(),
            reads: Reads::default(),
            next_id: u64::from(options.id_prefix) << 32,
            options,
            status: ConsensusStatus::default(),
            leader_changes: 0,
            flush_to: 0,
            maintain: false,
            is_full: false,
            ticks_left: None,
        }
    }

    /// The keyspace, for reads.
    pub fn keyspace(&self) -> &Arc<Keyspace> {
        self.member.keyspace()
    }

    /// The watches.
    pub fn watches(&self) -> &Arc<Watches> {
        &self.watches
    }

    /// What the member knows of its cluster, as it was last emitted.
    pub fn status(&self) -> ConsensusStatus {
        self.status
    }

    /// What is counted.
    pub fn statistics(&self) -> Statistics {
        Statistics {
            proposals_pending: self.proposals.pending(),
            proposals_failed: self.proposals.failed(),
            leader_changes: self.leader_changes,
        }
    }

    /// Takes an input. What follows from it is emitted by the next [`Replica::advance`], before
    /// which there may be more inputs: they share its sync.
    pub fn handle(&mut self, input: Input, now: u64, emit: Emit<'_>) -> Result<(), MemberError> {
        match input {
            Input::Propose(request, operation, authority) => {
                if self.proposals.is_full() || self.is_full {
                    self.proposals.count_failure();
                    let refused = Err(RequestError::TooManyRequests);
                    emit(Effect::Answer(request, Answer::Outcome(refused)));
                    return Ok(());
                }
                let id = self.new_id();
                self.proposals
                    .propose(&mut self.member, id, request, operation, authority);
            }
            Input::Change(request, mut change) => {
                change.id = self.new_id();
                match self.member.propose_change(&change) {
                    Ok(()) => drop(self.changes.insert(change.id, request)),
                    Err(error) => emit(Effect::Answer(request, Answer::Members(Err(error)))),
                }
            }
            Input::Read(request) => self.reads.push(Confirmation::Read(request)),
            Input::RenewLease(request, id) => self.renew_lease(request, id, emit),
            Input::LeaseRemaining(request, id) => {
                let remaining = if self.lessor.is_primary() {
                    Ok(self.lessor.remaining(id, now))
                } else {
                    Err(RequestError::NotLeader)
                };
                emit(Effect::Answer(request, Answer::Remaining(remaining)));
            }
            Input::Progress(request, id) => {
                let progress = self.progress(id);
                emit(Effect::Answer(request, Answer::Progress(progress)));
            }
            Input::Message(message) => self.member.step(message),
            Input::Unreachable(id) => self.member.report_unreachable(id),
            Input::Transfer(id) => self.member.transfer_leader(id),
            Input::Snapshot(snapshot) => {
                let (message, staged) = *snapshot;
                self.member.step_snapshot(message, staged)?;
                // Before anything else is heard: it belongs to this message.
                self.advance(now, emit)?;
            }
            Input::SnapshotSent(to, sent) => self.member.report_snapshot(to, sent),
            Input::Flushed(metadata) => {
                if metadata.applied_index >= self.flush_to {
                    self.flush_to = 0;
                }
                self.member.flushed(&metadata)?;
            }
            Input::Spare(name) => self.member.log().add_spare(name),
            Input::Failed(error) => return Err(error),
        }
        Ok(())
    }

    /// A tick of the clock passed. Requests of which `is_waiting` says no are forgotten: their
    /// clients gave up. [`Replica::advance`] has to follow.
    pub fn tick(
        &mut self,
        now: u64,
        is_waiting: &dyn Fn(RequestId) -> bool,
    ) -> Result<(), MemberError> {
        if let Some(left) = &mut self.ticks_left {
            *left = left.checked_sub(1).ok_or(MemberError::Removed)?;
        }
        self.member.tick();
        self.proposals.submit_held(&mut self.member);
        for id in self.lessor.expired(now, REVOCATIONS_AT_ONCE) {
            let revoke = Operation::LeaseRevoke(pb::LeaseRevokeRequest { id });
            let id_of_command = self.new_id();
            self.proposals
                .propose_own(&mut self.member, id_of_command, revoke);
        }
        self.reads.ask_again(is_waiting);
        self.proposals.retain(is_waiting);
        self.changes.retain(|_, request| is_waiting(*request));
        self.maintain = true;
        Ok(())
    }

    /// Does everything that follows from the inputs: see [`Member::advance`].
    pub fn advance(&mut self, now: u64, emit: Emit<'_>) -> Result<(), MemberError> {
        // One round of consensus serves every read that waits.
        if self.reads.wants_round() {
            let id = self.new_id();
            self.reads.ask(&mut self.member, id);
        }
        let output = self
            .member
            .advance(&mut |message| emit(Effect::Send(message)))?;
        self.update_status(now, emit);
        self.answer(output, now, emit);
        let (flush, full) = self.keyspace().unflushed();
        self.is_full = full;
        if std::mem::take(&mut self.maintain) || self.flush_to > 0 || flush {
            emit(Effect::Maintain(Wanted {
                spares: self.member.log().missing_spares(),
                flush: self.flush_to > 0,
            }));
        }
        Ok(())
    }

    fn renew_lease(&mut self, request: RequestId, id: i64, emit: Emit<'_>) {
        if self.lessor.is_primary() {
            self.reads.push(Confirmation::RenewLease(request, id));
        } else {
            let refused = Err(RequestError::NotLeader);
            emit(Effect::Answer(request, Answer::Renewed(refused)));
        }
    }

    fn progress(&self, id: u64) -> Result<Progress, RequestError> {
        if !self.member.status().is_leader {
            return Err(RequestError::NotLeader);
        }
        Ok(Progress {
            caught_up: self.member.is_caught_up(id),
            active: self.member.active_members(),
        })
    }

    fn answer(&mut self, output: Output, now: u64, emit: Emit<'_>) {
        if output.removed && self.ticks_left.is_none() {
            // The others are to hear that it is so.
            self.ticks_left = Some(self.options.election_ticks);
        }
        if let Some(revision) = output.installed {
            self.watches.jump(revision);
        }
        // Watches see a change no later than who made it: a client that watches its own writes
        // expects no more than that.
        if output.history.revision > 0 {
            self.watches.publish(output.history);
        }
        for (id, outcome) in output.outcomes {
            if let Ok(Response::LeaseGrant(grant)) = &outcome {
                self.lessor.renew(grant.id, grant.ttl, now);
            }
            let Some(waiter) = self.proposals.take(id) else {
                continue;
            };
            if let (Some(lease), Ok(_)) = (waiter.revokes, &outcome) {
                self.lessor.remove(lease);
            }
            emit(Effect::Answer(waiter.request, Answer::Outcome(outcome)));
        }
        for (id, outcome) in output.membership {
            self.flush_to = self.member.status().applied;
            if let Some(request) = self.changes.remove(&id) {
                emit(Effect::Answer(request, Answer::Members(outcome)));
            }
        }
        for id in output.reads {
            for confirmed in self.reads.take(id) {
                let (request, answer) = match confirmed {
                    Confirmation::Read(request) => (request, Answer::Read),
                    Confirmation::RenewLease(request, lease) => {
                        (request, Answer::Renewed(self.renewed(lease, now)))
                    }
                };
                emit(Effect::Answer(request, answer));
            }
        }
    }

    /// Renews a lease, now that consensus has confirmed that this member leads.
    fn renewed(&mut self, id: i64, now: u64) -> Result<Option<i64>, RequestError> {
        if !self.lessor.is_primary() {
            return Err(RequestError::NotLeader);
        }
        let Some((record, _)) = self.keyspace().lease(id) else {
            return Ok(None);
        };
        self.lessor.renew(id, record.granted, now);
        Ok(Some(record.granted))
    }

    fn update_status(&mut self, now: u64, emit: Emit<'_>) {
        let status = self.member.status();
        if status.is_leader != self.status.is_leader {
            if status.is_leader {
                let leases = self.keyspace().leases();
                let leases = leases.into_iter().map(|(id, record)| {
                    let remaining = if record.remaining > 0 {
                        record.remaining
                    } else {
                        record.granted
                    };
                    (id, remaining)
                });
                self.lessor.promote(leases, now);
            } else {
                self.lessor.demote();
            }
        }
        if status.leader != self.status.leader {
            self.leader_changes += 1;
            tracing::info!(leader = %format_args!("{:x}", status.leader), term = status.term, "leader changed");
        }
        if status != self.status {
            self.status = status;
            emit(Effect::Status(status));
        }
    }

    fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }
}

impl std::fmt::Debug for Replica {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Replica")
            .field("member", &self.member)
            .field("statistics", &self.statistics())
            .finish_non_exhaustive()
    }
}
