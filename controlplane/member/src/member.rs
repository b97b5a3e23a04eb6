//! One member: consensus over the log, applied to the keyspace.
//!
//! A member is told what happened (time passed, a message came, a client wants something) and then
//! [`Member::advance`]d; it has no thread, socket or clock of its own.

use std::collections::BTreeMap;
use std::sync::Arc;

use prost::Message as _;
use raft::eraftpb::{
    ConfChange, ConfChangeType, ConfState, Entry, EntryType, HardState, Message, MessageType,
    SnapshotMetadata,
};
use raft::{Config, ProgressState, RawNode, ReadOnlyOption, SnapshotStatus, StateRole};

use crate::command::{Command, Response};
use crate::disk::Disk;
use crate::guard;
use crate::keyspace::{
    FORMAT, History, Keyspace, LeaseChange, Member as MemberInfo, Metadata, StagedSnapshot,
    remove_incoming,
};
use crate::log::{Log, Owner, Position, snapshot_of};
use crate::logger;
use crate::planted::{PlantedBug, is_planted};
use crate::rebuild::remove_aside;
use crate::{Limits, MemberError, RequestError};

/// Bytes of entries in one message.
const MESSAGE_BYTES: u64 = 512 * 1024;
/// Messages to one follower that are not answered yet.
const INFLIGHT_MESSAGES: usize = 256;

/// Proposals that wait while leadership is handed over.
const MAX_POSTPONED: usize = 10_000;

/// How a member is set up.
#[derive(Debug, Clone)]
pub struct MemberOptions {
    /// Its cluster.
    pub cluster_id: u64,
    /// Its id; not 0.
    pub id: u64,
    /// Where it begins.
    pub start: Start,
    /// Ticks without a leader until an election.
    pub election_ticks: usize,
    /// Where randomness begins.
    pub seed: u64,
    /// Memory for the storage engine's cache, in bytes.
    pub cache_bytes: usize,
    /// At which sizes something new begins.
    pub limits: Limits,
}

/// Where a member begins.
#[derive(Debug, Clone)]
pub enum Start {
    /// With what its data folder holds.
    Continue,
    /// As one of the first members of a cluster.
    New(Vec<MemberInfo>),
    /// With nothing but what is known of the cluster's members, which send it the rest.
    Join(Vec<MemberInfo>),
}

/// A member.
pub struct Member {
    node: RawNode<Log>,
    keyspace: Arc<Keyspace>,
    random: Random,
    /// Term and role at which the election timeout was drawn last.
    drawn: (u64, StateRole),
    /// Reads that wait until an index is applied.
    reads: BTreeMap<u64, Vec<u64>>,
    applied: Position,
    disk: Arc<dyn Disk>,
    /// A snapshot that was received, until consensus has taken or refused it.
    staged: Option<StagedSnapshot>,
    /// Why the member can't go on, if a message told it.
    lost: Option<MemberError>,
    removed: bool,
    /// Proposals that wait until leadership is handed over.
    postponed: Vec<Message>,
    /// A planted bug: the next command is applied twice.
    repeats: bool,
}

/// What came out of [`Member::advance`].
#[derive(Debug, Default)]
pub struct Output {
    /// Outcomes of commands of any member, by id.
    pub outcomes: Vec<(u64, Result<Response, RequestError>)>,
    /// Outcomes of changes of membership, by id.
    pub membership: Vec<(u64, Result<Vec<MemberInfo>, RequestError>)>,
    /// What was applied, for watches. Revision 0 if nothing was.
    pub history: History,
    /// What happened to leases, in order.
    pub leases: Vec<LeaseChange>,
    /// Reads, by the id given to [`Member::read_index`], that may read now.
    pub reads: Vec<u64>,
    /// A snapshot was installed: events up to this revision are in no history here.
    pub installed: Option<i64>,
    /// The cluster has removed this member.
    pub removed: bool,
}

/// What a member knows of its cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ConsensusStatus {
    /// The leader's id; 0 if there is none.
    pub leader: u64,
    /// The term.
    pub term: u64,
    /// Index of the last entry that is committed.
    pub committed: u64,
    /// Index of the last entry that is applied.
    pub applied: u64,
    /// Whether this member leads.
    pub is_leader: bool,
    /// Whether it may serve reads without asking: it is the only voter.
    pub is_alone: bool,
    /// Whether it has no vote.
    pub is_learner: bool,
}

/// A change of membership, in the context of its entry.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MembershipChange {
    /// As [`Command::id`].
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// What it does: one of [`ChangeKind`].
    #[prost(enumeration = "ChangeKind", tag = "2")]
    pub kind: i32,
    /// The member, with what is to be known of it.
    #[prost(message, optional, tag = "3")]
    pub member: Option<MemberInfo>,
}

/// Kinds of [`MembershipChange`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, prost::Enumeration)]
pub enum ChangeKind {
    /// A voter or learner joins.
    Add = 0,
    /// A member leaves for good.
    Remove = 1,
    /// A member's peer URLs change.
    Update = 2,
    /// A learner becomes a voter.
    Promote = 3,
}

impl Member {
    /// Opens the member that `disk` holds, or makes a new one.
    pub fn open(disk: &Arc<dyn Disk>, options: &MemberOptions) -> Result<Self, MemberError> {
        remove_incoming(&**disk)?;
        remove_aside(&**disk)?;
        let keyspace = Keyspace::open(
            &**disk,
            options.cache_bytes,
            first_metadata(options),
            options.limits,
        )?;
        let may_be_new = !matches!(options.start, Start::Continue);
        let metadata = keyspace.metadata();
        if metadata.cluster_id != options.cluster_id {
            return Err(MemberError::Foreign(format!(
                "the data belongs to cluster {:x}, this member to cluster {:x}: start it with the \
                 options that made it, or on its own folder",
                metadata.cluster_id, options.cluster_id
            )));
        }
        let owner = Owner {
            cluster_id: options.cluster_id,
            member_id: options.id,
        };
        let applied = Position {
            index: metadata.applied_index,
            term: metadata.applied_term,
        };
        let conf_state: ConfState = metadata.consensus.clone().unwrap_or_default().into();
        let log = Log::open(
            Arc::clone(disk),
            owner,
            applied,
            conf_state.clone(),
            may_be_new,
            options.limits,
        )?;
        let config = Config {
            id: options.id,
            election_tick: options.election_ticks,
            heartbeat_tick: 1,
            applied: applied.index,
            max_size_per_msg: MESSAGE_BYTES,
            max_inflight_msgs: INFLIGHT_MESSAGES,
            check_quorum: true,
            pre_vote: true,
            read_only_option: ReadOnlyOption::Safe,
            ..Config::default()
        };
        let node = RawNode::new(&config, log, &logger::to_tracing())?;
        let mut member = Self {
            node,
            keyspace: Arc::new(keyspace),
            random: Random(options.seed | 1),
            drawn: (u64::MAX, StateRole::Follower),
            reads: BTreeMap::new(),
            applied,
            disk: Arc::clone(disk),
            staged: None,
            lost: None,
            removed: metadata.removed_members.contains(&options.id),
            postponed: Vec::new(),
            repeats: applied.index > 1 && is_planted(PlantedBug::ApplyTwice),
        };
        member.draw_timeout();
        if conf_state.voters == [options.id] {
            member.node.campaign()?;
        }
        Ok(member)
    }

    /// The keyspace.
    pub fn keyspace(&self) -> &Arc<Keyspace> {
        &self.keyspace
    }

    /// What it knows of its cluster.
    pub fn status(&self) -> ConsensusStatus {
        let raft = &self.node.raft;
        let is_leader = raft.state == StateRole::Leader;
        let voters = raft.prs().conf().to_conf_state();
        ConsensusStatus {
            leader: raft.leader_id,
            term: raft.term,
            committed: raft.raft_log.committed,
            applied: self.applied.index,
            is_leader,
            is_alone: is_leader && voters.voters == [raft.id] && voters.voters_outgoing.is_empty(),
            is_learner: voters.learners.contains(&raft.id),
        }
    }

    /// The term in which this member leads, once it has applied everything that was acknowledged
    /// before.
    pub fn leads_since(&self) -> Option<u64> {
        let raft = &self.node.raft;
        let leads = raft.state == StateRole::Leader && self.applied.term == raft.term;
        leads.then_some(raft.term)
    }

    /// The term in which this member may decide alone: it leads, as [`Member::leads_since`], and is
    /// not handing leadership over.
    pub fn decides_in(&self) -> Option<u64> {
        let transfers = self.node.raft.lead_transferee.is_some();
        self.leads_since().filter(|_| !transfers)
    }

    /// Whether `id` follows closely enough to vote.
    pub fn is_caught_up(&self, id: u64) -> bool {
        let raft = &self.node.raft;
        raft.prs().get(id).is_some_and(|progress| {
            // As etcd: nine tenths of what the leader has.
            progress.matched > 0 && progress.matched >= raft.raft_log.committed / 10 * 9
        })
    }

    /// Members from which the leader heard within the last election timeout, itself included.
    pub fn active_members(&self) -> Vec<u64> {
        let raft = &self.node.raft;
        raft.prs()
            .iter()
            .filter(|(id, progress)| **id == raft.id || progress.recent_active)
            .map(|(id, _)| *id)
            .collect()
    }

    /// Voters that could lead in this leader's place, those first that follow most closely.
    pub fn successors(&self) -> Vec<u64> {
        let raft = &self.node.raft;
        let voters = raft.prs().conf().to_conf_state().voters;
        let mut others: Vec<(u64, u64)> = raft
            .prs()
            .iter()
            .filter(|(id, progress)| {
                **id != raft.id && progress.recent_active && voters.contains(id)
            })
            .map(|(id, progress)| (progress.matched, *id))
            .collect();
        others.sort_unstable_by(|a, b| b.cmp(a));
        others.into_iter().map(|(_, id)| id).collect()
    }

    /// A tick of the clock passed.
    pub fn tick(&mut self) {
        self.node.tick();
        self.step_postponed();
        self.draw_timeout();
    }

    /// A message came from another member. One that makes no sense is dropped.
    pub fn step(&mut self, message: Message) {
        if message.to != self.node.raft.id {
            return; // for one that was here before, at the same URL
        }
        if message.msg_type() == MessageType::MsgSnapshot {
            return; // without its data: see [`Member::step_snapshot`]
        }
        self.step_checked(message);
    }

    /// A snapshot came from the leader, whole. It is installed by the next [`Member::advance`], or
    /// removed if it is not needed.
    pub fn step_snapshot(
        &mut self,
        mut message: Message,
        staged: StagedSnapshot,
    ) -> Result<(), MemberError> {
        self.discard_staged()?;
        if message.to != self.node.raft.id {
            return staged.discard(&*self.disk);
        }
        let metadata = staged.metadata();
        let Some(configuration) = metadata.consensus.clone() else {
            return staged.discard(&*self.disk);
        };
        if metadata.cluster_id != self.keyspace.metadata().cluster_id {
            return staged.discard(&*self.disk);
        }
        let at = Position {
            index: metadata.applied_index,
            term: metadata.applied_term,
        };
        let configuration = configuration.into();
        if let Err(refusal) = guard::check_configuration(&configuration) {
            tracing::warn!(refusal, "refused a snapshot");
            return staged.discard(&*self.disk);
        }
        message.set_snapshot(snapshot_of(at, configuration));
        message.set_msg_type(MessageType::MsgSnapshot);
        self.staged = Some(staged);
        self.step_checked(message);
        Ok(())
    }

    /// How sending a snapshot to a member ended.
    pub fn report_snapshot(&mut self, id: u64, sent: bool) {
        let status = if sent {
            SnapshotStatus::Finish
        } else {
            SnapshotStatus::Failure
        };
        self.node.report_snapshot(id, status);
    }

    fn step_checked(&mut self, message: Message) {
        let raft = &self.node.raft;
        if let Err(refusal) = guard::check_form(&message, message.from, raft.id)
            .and_then(|()| guard::check(raft, &message))
        {
            tracing::warn!(from = %format_args!("{:x}", message.from), kind = ?message.msg_type(), refusal, "refused a message");
            self.note_loss(&message);
            return;
        }
        self.step_trusted(message);
    }

    fn step_trusted(&mut self, message: Message) {
        if message.msg_type() == MessageType::MsgPropose && self.postpones() {
            self.postponed.push(message);
            return;
        }
        if let Err(error) = self.node.step(message) {
            tracing::debug!(%error, "dropped a message");
        }
        self.draw_timeout();
    }

    /// The leader has heard of more entries from this member than it has: it was started on older
    /// copies of its files.
    fn note_loss(&mut self, message: &Message) {
        let raft = &self.node.raft;
        let last = raft.raft_log.last_index();
        if message.msg_type() == MessageType::MsgHeartbeat
            && message.term >= raft.term
            && raft.prs().get(message.from).is_some()
            && guard::check_form(message, message.from, raft.id).is_ok()
            && message.commit > last
        {
            self.lost = Some(MemberError::Corrupt(format!(
                "the leader knows that this member had entry {}, and the log ends at {last}: its \
                 files are older copies",
                message.commit
            )));
        }
    }

    fn discard_staged(&mut self) -> Result<(), MemberError> {
        match self.staged.take() {
            Some(staged) => staged.discard(&*self.disk),
            None => Ok(()),
        }
    }

    /// Proposes a command. Its outcome comes from [`Member::advance`], or never: a change of leaders
    /// may lose it.
    pub fn propose(&mut self, command: Vec<u8>) -> Result<(), RequestError> {
        if self.postpones() {
            let mut message = Message::default();
            message.set_msg_type(MessageType::MsgPropose);
            let entry = Entry {
                data: command,
                ..Entry::default()
            };
            message.mut_entries().push(entry);
            self.postponed.push(message);
            return Ok(());
        }
        self.node
            .propose(Vec::new(), command)
            .map_err(|_| RequestError::NoLeader)
    }

    /// Proposes what this member decided as the leader of `term`. It goes into the log in that term or
    /// not at all: another leader, or this one in a later term, may have decided otherwise since.
    pub fn propose_decision(&mut self, term: u64, command: Vec<u8>) -> Result<(), RequestError> {
        if self.decides_in() != Some(term) {
            return Err(RequestError::NotLeader);
        }
        self.node
            .propose(Vec::new(), command)
            .map_err(|_| RequestError::NotLeader)
    }

    /// While leadership is handed over, or nobody has it, proposals would be lost, also those that
    /// another member sent to the leader that this one was: they wait for the next leader.
    fn postpones(&self) -> bool {
        let raft = &self.node.raft;
        let lost = raft.lead_transferee.is_some() || raft.leader_id == raft::INVALID_ID;
        lost && self.postponed.len() < MAX_POSTPONED
    }

    fn step_postponed(&mut self) {
        let raft = &self.node.raft;
        if raft.lead_transferee.is_some() || raft.leader_id == raft::INVALID_ID {
            return;
        }
        for mut message in std::mem::take(&mut self.postponed) {
            message.from = self.node.raft.id;
            self.step_trusted(message);
        }
    }

    /// Proposes a change of membership.
    pub fn propose_change(&mut self, change: &MembershipChange) -> Result<(), RequestError> {
        let member = change.member.clone().unwrap_or_default();
        let change_type = match (change.kind(), member.is_learner) {
            (ChangeKind::Remove, _) => ConfChangeType::RemoveNode,
            (ChangeKind::Add | ChangeKind::Update, true) => ConfChangeType::AddLearnerNode,
            _ => ConfChangeType::AddNode,
        };
        let conf_change = ConfChange {
            change_type: change_type.into(),
            node_id: member.id,
            context: change.encode_to_vec(),
            ..ConfChange::default()
        };
        self.node
            .propose_conf_change(Vec::new(), conf_change)
            .map_err(|_| RequestError::NoLeader)
    }

    /// Asks for a read that sees everything acknowledged until now; `id` comes back from
    /// [`Member::advance`], or never, and can be asked for again. Returns whether there is a leader
    /// to ask.
    pub fn read_index(&mut self, id: u64) -> bool {
        let raft = &self.node.raft;
        let ready = raft.leader_id != raft::INVALID_ID
            && (raft.state != StateRole::Leader || raft.commit_to_current_term());
        if ready {
            self.node.read_index(id.to_le_bytes().to_vec());
        }
        ready
    }

    /// Hands leadership to another member.
    pub fn transfer_leader(&mut self, to: u64) {
        self.node.transfer_leader(to);
    }

    /// A member could not be reached.
    pub fn report_unreachable(&mut self, id: u64) {
        self.node.report_unreachable(id);
    }

    /// The keyspace is durable as of `metadata`: gives up log entries that no member needs.
    pub fn flushed(&mut self, metadata: &Metadata) -> Result<(), MemberError> {
        let at = Position {
            index: metadata.applied_index,
            term: metadata.applied_term,
        };
        let configuration = metadata.consensus.clone().unwrap_or_default();
        let needed = self.needed_by_followers();
        let kept = self.keyspace.limits().kept_entries;
        let log = self.node.mut_store();
        log.offer_snapshot(at, configuration.into());
        let release = match needed {
            _ if log.is_long() => at.index.saturating_sub(kept),
            Some(needed) => needed.min(at.index.saturating_sub(kept)),
            None => at.index.saturating_sub(1),
        };
        log.release(release)
    }

    /// The last entry that every follower has which the leader hears of; `None` if there is no
    /// other member.
    fn needed_by_followers(&self) -> Option<u64> {
        let raft = &self.node.raft;
        let mut others = raft
            .prs()
            .iter()
            .filter(|(id, _)| **id != raft.id)
            .peekable();
        others.peek()?;
        if raft.state != StateRole::Leader {
            return Some(u64::MAX);
        }
        let needs = others
            .filter(|(_, progress)| {
                progress.recent_active || progress.state == ProgressState::Snapshot
            })
            .map(|(_, progress)| progress.matched);
        Some(needs.min().unwrap_or(u64::MAX))
    }

    /// The log, to prepare its files.
    pub fn log(&mut self) -> &mut Log {
        self.node.mut_store()
    }

    /// Does everything that follows from what the member was told: appends to the log (one sync),
    /// sends, applies. Messages that need not wait for the sync are sent before it.
    pub fn advance(&mut self, send: &mut dyn FnMut(Message)) -> Result<Output, MemberError> {
        let mut output = Output::default();
        self.check_damage()?;
        while self.node.has_ready() {
            let mut ready = self.node.ready();
            self.check_damage()?;
            self.persist_changes(ready.committed_entries())?;
            ready.take_messages().into_iter().for_each(&mut *send);
            if !ready.snapshot().is_empty() {
                self.install(ready.snapshot().get_metadata(), ready.hs(), &mut output)?;
            }
            self.apply(ready.take_committed_entries(), &mut output)?;
            self.persist(ready.entries(), ready.hs())?;
            for read in ready.take_read_states() {
                if let Ok(id) = read.request_ctx.as_slice().try_into() {
                    let id = u64::from_le_bytes(id);
                    self.reads.entry(read.index).or_default().push(id);
                }
            }
            ready
                .take_persisted_messages()
                .into_iter()
                .for_each(&mut *send);
            let mut light = self.node.advance_append(ready);
            self.persist_changes(light.committed_entries())?;
            light.take_messages().into_iter().for_each(&mut *send);
            self.apply(light.take_committed_entries(), &mut output)?;
            self.node.advance_apply_to(self.applied.index);
            self.draw_timeout();
        }
        self.discard_staged()?;
        output.removed = self.removed;
        while let Some(entry) = self.reads.first_entry() {
            if *entry.key() > self.applied.index {
                break;
            }
            output.reads.extend(entry.remove());
        }
        Ok(output)
    }

    /// Ends a member of which something stored was found damaged, by whoever read it.
    fn check_damage(&mut self) -> Result<(), MemberError> {
        if let Some(lost) = self.lost.take() {
            return Err(lost);
        }
        match self.keyspace.damage().or(self.node.store().damage()) {
            Some(damage) => Err(damage),
            None => Ok(()),
        }
    }

    fn install(
        &mut self,
        wanted: &SnapshotMetadata,
        state: Option<&HardState>,
        output: &mut Output,
    ) -> Result<(), MemberError> {
        let staged = self.staged.take().ok_or_else(|| {
            MemberError::DamagedSnapshot("consensus took one that did not come".into())
        })?;
        let at = Position {
            index: wanted.index,
            term: wanted.term,
        };
        let mut state = state.cloned().unwrap_or(self.node.store().hard_state());
        state.commit = state.commit.max(at.index);
        self.node.mut_store().begin_install(at)?;
        self.keyspace.install(&*self.disk, staged)?;
        let log = self.node.mut_store();
        log.restart(at, &state)?;
        log.set_conf_state(wanted.get_conf_state().clone());
        log.offer_snapshot(at, wanted.get_conf_state().clone());
        self.applied = at;
        output.installed = Some(self.keyspace.revision());
        tracing::info!(index = at.index, "installed a snapshot");
        Ok(())
    }

    fn persist(&mut self, entries: &[Entry], state: Option<&HardState>) -> Result<(), MemberError> {
        let stored = self.node.store().hard_state();
        let state = state.unwrap_or(&stored);
        // A commit index alone is not worth a sync: it is found again.
        if entries.is_empty() && (state.term, state.vote) == (stored.term, stored.vote) {
            self.node.mut_store().set_commit(state.commit);
            return Ok(());
        }
        let state = state.clone();
        self.node.mut_store().append(entries, Some(&state))
    }

    fn apply(&mut self, entries: Vec<Entry>, output: &mut Output) -> Result<(), MemberError> {
        if entries.is_empty() {
            return Ok(());
        }
        let keyspace = Arc::clone(&self.keyspace);
        let mut batch = keyspace.batch();
        for entry in entries {
            let at = Position {
                index: entry.index,
                term: entry.term,
            };
            match entry.entry_type() {
                EntryType::EntryNormal if entry.data.is_empty() => {}
                EntryType::EntryNormal => {
                    let command =
                        Command::decode(bytes::Bytes::from(entry.data)).map_err(|error| {
                            MemberError::Corrupt(format!(
                                "entry {} is not a command: {error}",
                                at.index
                            ))
                        })?;
                    let id = command.id;
                    if std::mem::take(&mut self.repeats) {
                        batch.apply(command.clone())?.ok();
                    }
                    output.outcomes.push((id, batch.apply(command)?));
                }
                EntryType::EntryConfChange => {
                    let outcome = self.apply_change(&entry.data, batch.metadata_mut())?;
                    output.membership.push(outcome);
                }
                EntryType::EntryConfChangeV2 => {
                    return Err(MemberError::Corrupt(format!(
                        "entry {} is a change of membership of an unknown kind",
                        at.index
                    )));
                }
            }
            batch.applied(at.index, at.term);
            self.applied = at;
        }
        output.leases.extend(batch.take_lease_changes());
        let history = batch.finish();
        output.history.revision = history.revision;
        output.history.events.extend(history.events);
        Ok(())
    }

    /// Changes of membership have to be durable as committed before anybody hears that they are: a
    /// member that hears of its removal ends, and could not help this one any more to find out again.
    fn persist_changes(&mut self, entries: &[Entry]) -> Result<(), MemberError> {
        let mut changes = entries
            .iter()
            .filter(|entry| entry.entry_type() != EntryType::EntryNormal);
        let Some(last) = changes.next_back() else {
            return Ok(());
        };
        let last = last.index;
        self.node.mut_store().persist_commit(last)
    }

    fn apply_change(
        &mut self,
        data: &[u8],
        metadata: &mut Metadata,
    ) -> Result<(u64, Result<Vec<MemberInfo>, RequestError>), MemberError> {
        let unreadable = |_| MemberError::Corrupt("a change of membership is unreadable".into());
        let mut conf_change: ConfChange = prost_of_raft::Message::decode(data)
            .map_err(|_| MemberError::Corrupt("a change of membership is unreadable".into()))?;
        let change = MembershipChange::decode(&conf_change.context[..]).map_err(unreadable)?;
        let outcome = change_members(metadata, &change);
        if outcome.is_err() {
            conf_change.node_id = raft::INVALID_ID;
        }
        self.removed |= metadata.removed_members.contains(&self.node.raft.id);
        let state = self.node.apply_conf_change(&conf_change)?;
        self.node.mut_store().set_conf_state(state.clone());
        metadata.consensus = Some(state.into());
        if self.removed && self.node.raft.state == StateRole::Leader {
            // Consensus would look for this member's own progress, which is gone. As a follower it
            // still helps the others, until they have heard of its removal.
            let term = self.node.raft.term;
            self.node.raft.become_follower(term, raft::INVALID_ID);
            self.node.raft.msgs.clear();
        }
        Ok((change.id, outcome.map(|()| metadata.members.clone())))
    }

    /// Consensus draws election timeouts from the thread's generator; this draws them from ours, so
    /// that a run can be repeated.
    fn draw_timeout(&mut self) {
        let raft = &mut self.node.raft;
        if self.drawn != (raft.term, raft.state) {
            self.drawn = (raft.term, raft.state);
            let least = raft.election_timeout();
            let most = 2 * least - 1;
            let span = (most - least).max(1) as u64;
            let draw = usize::try_from(self.random.next() % span).unwrap_or(0);
            raft.set_randomized_election_timeout(least + draw);
        }
    }
}

impl std::fmt::Debug for Member {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Member")
            .field("id", &self.node.raft.id)
            .field("status", &self.status())
            .finish_non_exhaustive()
    }
}

/// What a new member starts with, if it is one. Index 1 is the beginning itself: a member that
/// joins later has nothing, and is sent a snapshot.
fn first_metadata(options: &MemberOptions) -> Option<Metadata> {
    let (members, joins) = match &options.start {
        Start::Continue => return None,
        Start::New(members) => (members.clone(), false),
        Start::Join(members) => (members.clone(), true),
    };
    let mut metadata = Metadata {
        format: FORMAT,
        cluster_id: options.cluster_id,
        revision: 1,
        compact_revision: -1,
        members,
        ..Metadata::default()
    };
    if !joins {
        metadata.found();
    }
    Some(metadata)
}

fn change_members(metadata: &mut Metadata, change: &MembershipChange) -> Result<(), RequestError> {
    let member = change.member.clone().ok_or(RequestError::MemberNotFound)?;
    if metadata.removed_members.contains(&member.id) {
        return Err(RequestError::MemberNotFound);
    }
    let at = metadata
        .members
        .iter()
        .position(|known| known.id == member.id);
    let others_have_url = metadata.members.iter().any(|known| {
        known.id != member.id
            && known
                .peer_urls
                .iter()
                .any(|url| member.peer_urls.contains(url))
    });
    match (change.kind(), at) {
        (ChangeKind::Add, Some(_)) => return Err(RequestError::MemberExists),
        (ChangeKind::Add | ChangeKind::Update, _) if others_have_url => {
            return Err(RequestError::PeerUrlExists);
        }
        (ChangeKind::Add, None) => metadata.members.push(member),
        (_, None) => return Err(RequestError::MemberNotFound),
        (ChangeKind::Remove, Some(at)) => {
            metadata.members.remove(at);
            metadata.removed_members.push(member.id);
        }
        (ChangeKind::Update, Some(at)) => metadata.members[at].peer_urls = member.peer_urls,
        (ChangeKind::Promote, Some(at)) if metadata.members[at].is_learner => {
            metadata.members[at].is_learner = false;
        }
        (ChangeKind::Promote, Some(_)) => return Err(RequestError::NotLearner),
    }
    Ok(())
}

/// Xorshift: enough for election timeouts.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}
