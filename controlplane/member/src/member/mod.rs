//! One member: consensus over the log, applied to the keyspace.
//!
//! A member is told what happened (time passed, a message came, a client wants something) and then
//! [`Member::advance`]d; it has no thread, socket or clock of its own.

mod advance;
mod membership;
mod status;

use std::collections::BTreeMap;
use std::sync::Arc;

use raft::eraftpb::{ConfState, Entry, Message, MessageType};
use raft::{Config, ProgressState, RawNode, ReadOnlyOption, SnapshotStatus, StateRole};

pub use self::advance::Output;
pub use self::membership::{ChangeKind, MembershipChange};
pub use self::status::ConsensusStatus;
use crate::disk::Disk;
use crate::guard;
use crate::keyspace::{
    FORMAT, Keyspace, Member as MemberInfo, Metadata, StagedSnapshot, remove_incoming,
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
