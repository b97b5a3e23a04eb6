//! The logic of a server around its member: who waits for what, when leases end, what is flushed,
//! when a removed member ends. It is told inputs and the time, and emits effects; threads, sockets
//! and the clock are its caller's, so that a simulation can take their place.

mod input;
mod leases;
pub mod maintenance;
pub mod membership;
mod proposals;
mod reads;

use std::collections::BTreeMap;
use std::sync::Arc;

pub use self::input::{Answer, Effect, Input, Progress, RequestId};
pub use self::maintenance::{Job, Maintenance, Wanted};

use self::leases::Leases;
use self::proposals::Proposals;
use self::reads::{Confirmation, Reads};
use crate::keyspace::Keyspace;
use crate::watch::Watches;
use crate::{ConsensusStatus, Member, MemberError, Output, RequestError};

/// Elections that a leader which was removed stays for: without it, the others may not be enough to
/// learn that they are enough without it.
const ELECTIONS_AFTER_REMOVAL: u32 = 10;

/// Takes effects as they come.
pub type Emit<'a> = &'a mut dyn FnMut(Effect);

/// How a replica runs.
#[derive(Debug, Clone, Copy)]
pub struct ReplicaOptions {
    /// Milliseconds of one tick.
    pub tick_ms: u64,
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
    leases: Leases,
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
        let leases = Leases::new(
            member.keyspace().leases(),
            options.tick_ms,
            options.election_ticks,
        );
        Self {
            watches: Watches::new(Arc::clone(member.keyspace())),
            member,
            leases,
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
            Input::RenewLease(request, id) if self.member.status().is_leader => {
                self.reads.push(Confirmation::RenewLease(request, id));
            }
            Input::RenewLease(request, _) => {
                let refused = Err(RequestError::NotLeader);
                emit(Effect::Answer(request, Answer::Renewed(refused)));
            }
            Input::LeaseRemaining(request, id) => {
                let remaining = self.leases.remaining(id, now);
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
        self.leases.tick(now, is_waiting);
        if let Some(term) = self.decides_leases() {
            for operation in self.leases.decide() {
                let id = self.new_id();
                self.proposals.decide(&mut self.member, term, id, operation);
            }
        }
        self.reads.tick(is_waiting);
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
        if let Some(term) = self.decides_leases() {
            let next_id = &mut self.next_id;
            let id = || {
                *next_id += 1;
                *next_id
            };
            if let Some((id, renewal)) = self.leases.renewal(id, now) {
                self.proposals.decide(&mut self.member, term, id, renewal);
            }
        }
        let output = self
            .member
            .advance(&mut |message| emit(Effect::Send(message)))?;
        let led = self.status.is_leader;
        self.update_status(emit);
        self.follow_leases(&output, now, emit);
        if output.removed && self.ticks_left.is_none() {
            // The others are to hear that it is so.
            let elections = if led { ELECTIONS_AFTER_REMOVAL } else { 1 };
            self.ticks_left = Some(self.options.election_ticks * elections);
        }
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

    /// The term in which this member may decide about leases. A tick or a message may have deposed it
    /// since leases heard last who leads.
    fn decides_leases(&self) -> Option<u64> {
        let term = self.member.decides_in();
        term.filter(|_| term == self.leases.term())
    }

    /// Leases follow what was applied, before anybody hears of it; and who leads.
    fn follow_leases(&mut self, output: &Output, now: u64, emit: Emit<'_>) {
        let leads = self.member.leads_since();
        if self.leases.term() != leads {
            self.leases.lead(None, emit);
        }
        if output.installed.is_some() {
            self.leases.replace(self.keyspace().leases());
        }
        self.leases.apply(&output.leases, now, emit);
        self.leases.lead(leads, emit);
    }

    fn progress(&self, id: u64) -> Result<Progress, RequestError> {
        if !self.member.status().is_leader {
            return Err(RequestError::NotLeader);
        }
        Ok(Progress {
            caught_up: self.member.is_caught_up(id),
            active: self.member.active_members(),
            voters: self.member.successors(),
        })
    }

    fn answer(&mut self, output: Output, now: u64, emit: Emit<'_>) {
        if let Some(revision) = output.installed {
            self.watches.jump(revision);
        }
        // Watches see a change no later than who made it: a client that watches its own writes
        // expects no more than that.
        if output.history.revision > 0 {
            self.watches.publish(output.history);
        }
        for (id, outcome) in output.outcomes {
            self.leases.outcome(id, now, emit);
            if let Some(request) = self.proposals.take(id) {
                emit(Effect::Answer(request, Answer::Outcome(outcome)));
            }
        }
        for (id, outcome) in output.membership {
            self.flush_to = self.member.status().applied;
            if let Some(request) = self.changes.remove(&id) {
                emit(Effect::Answer(request, Answer::Members(outcome)));
            }
        }
        for id in output.reads {
            for confirmed in self.reads.take(id) {
                match confirmed {
                    Confirmation::Read(request) => emit(Effect::Answer(request, Answer::Read)),
                    Confirmation::RenewLease(request, lease) => {
                        self.leases.keep_alive(request, lease, now, emit);
                    }
                }
            }
        }
    }

    fn update_status(&mut self, emit: Emit<'_>) {
        let status = self.member.status();
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
