//! The thread that drives the member: time, messages, proposals in; log, messages, answers out.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use keelson_etcd_api::etcdserverpb as pb;
use keelson_member::command::{Authority, Command, Operation, Response};
use keelson_member::disk::Disk;
use keelson_member::keyspace::{Keyspace, Member as MemberInfo, Metadata, StagedSnapshot};
use keelson_member::lessor::Lessor;
use keelson_member::watch::Watches;
use keelson_member::{
    ConsensusStatus, Member, MemberError, MembershipChange, Output, PeerMessage, RequestError,
};
use parking_lot::Mutex;
use prost::Message as _;
use tokio::sync::{mpsc, oneshot};

use crate::maintenance;
use crate::metrics::Metrics;

/// Inputs that are handled before the next sync.
const INPUTS_AT_ONCE: usize = 4096;
/// Clients that may wait for an answer at once.
const MAX_WAITERS: usize = 100_000;
/// Leases revoked at each tick.
const REVOCATIONS_AT_ONCE: usize = 1000;

/// What the thread is told.
pub enum Input {
    /// A command, and who wants it if that is not the member; the answer goes to the sender.
    Propose(
        Operation,
        Option<Authority>,
        oneshot::Sender<Result<Response, RequestError>>,
    ),
    /// A change of membership.
    Change(
        MembershipChange,
        oneshot::Sender<Result<Vec<MemberInfo>, RequestError>>,
    ),
    /// Answered when a read sees everything acknowledged before.
    Read(oneshot::Sender<Result<(), RequestError>>),
    /// From another member.
    Message(PeerMessage),
    /// A member can't be reached.
    Unreachable(u64),
    /// Leadership is to go to this member.
    Transfer(u64),
    /// A snapshot came from the leader: the message that offered it, and its data.
    Snapshot(Box<(PeerMessage, StagedSnapshot)>),
    /// A snapshot for this member was sent, or was not.
    SnapshotSent(u64, bool),
    /// The keyspace is on disk as of this metadata.
    Flushed(Box<Metadata>),
    /// A file for the log is prepared.
    Spare(String),
    /// A background task can't go on.
    Failed(MemberError),
    /// Asks how far members follow, this one above all.
    Progress(u64, oneshot::Sender<Result<Progress, RequestError>>),
    /// Ends the thread.
    Stop,
}

/// How far members follow the leader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// Whether the member that was asked about follows closely enough to vote.
    pub caught_up: bool,
    /// Members that the leader hears of, itself included.
    pub active: Vec<u64>,
}

/// Hands inputs to the thread, and knows what it publishes.
#[derive(Clone)]
pub struct Node {
    inputs: Sender<Input>,
    shared: Arc<Shared>,
}

struct Shared {
    keyspace: Arc<Keyspace>,
    watches: Arc<Watches>,
    lessor: Mutex<Lessor>,
    status: Mutex<ConsensusStatus>,
    term: AtomicU64,
    alone: AtomicBool,
    started: Instant,
    request_timeout: Duration,
}

/// How the thread runs.
#[derive(Debug, Clone, Copy)]
pub struct NodeOptions {
    /// Time of one tick.
    pub tick: Duration,
    /// Ticks until an election.
    pub election_ticks: u32,
    /// In the upper half of the ids of commands, so that members' ids differ.
    pub id_prefix: u64,
}

/// Starts the thread; messages to other members go to `outbox`. The receiver gets the reason if the
/// member fails.
pub fn start(
    member: Member,
    disk: Arc<dyn Disk>,
    options: NodeOptions,
    outbox: mpsc::UnboundedSender<PeerMessage>,
    metrics: Metrics,
) -> std::io::Result<(Node, oneshot::Receiver<MemberError>)> {
    let (inputs, received) = channel();
    let keyspace = Arc::clone(member.keyspace());
    let shared = Arc::new(Shared {
        watches: Watches::new(Arc::clone(&keyspace)),
        keyspace: Arc::clone(&keyspace),
        lessor: Mutex::new(Lessor::default()),
        status: Mutex::new(ConsensusStatus::default()),
        term: AtomicU64::new(0),
        alone: AtomicBool::new(false),
        started: Instant::now(),
        request_timeout: Duration::from_secs(5) + options.tick * options.election_ticks * 2,
    });
    let maintenance = maintenance::start(keyspace, disk, inputs.clone())?;
    let (failed, failure) = oneshot::channel();
    let driver = Driver {
        member,
        shared: Arc::clone(&shared),
        outbox,
        metrics,
        maintenance,
        waiters: HashMap::new(),
        changes: HashMap::new(),
        reads: HashMap::new(),
        new_reads: Vec::new(),
        held: Vec::new(),
        next_id: options.id_prefix << 32,
        options,
        batch: Vec::new(),
        flush_to: 0,
        is_full: false,
        ticks_left: None,
    };
    std::thread::Builder::new()
        .name("member".into())
        .spawn(move || {
            if let Err(error) = driver.run(&received) {
                let _ = failed.send(error);
            }
        })?;
    Ok((Node { inputs, shared }, failure))
}

impl Node {
    /// The keyspace, for reads.
    pub fn keyspace(&self) -> &Arc<Keyspace> {
        &self.shared.keyspace
    }

    /// The watches.
    pub fn watches(&self) -> &Arc<Watches> {
        &self.shared.watches
    }

    /// What the member knows of its cluster.
    pub fn status(&self) -> ConsensusStatus {
        *self.shared.status.lock()
    }

    /// The current term.
    pub fn term(&self) -> u64 {
        self.shared.term.load(Ordering::Relaxed)
    }

    /// Replicates a command, of this member itself if no authority is given, and answers with its
    /// outcome.
    pub async fn propose(
        &self,
        operation: Operation,
        authority: Option<Authority>,
    ) -> Result<Response, RequestError> {
        self.ask(|reply| Input::Propose(operation, authority, reply))
            .await
    }

    /// Changes the membership; answers with the members.
    pub async fn change(&self, change: MembershipChange) -> Result<Vec<MemberInfo>, RequestError> {
        self.ask(|reply| Input::Change(change, reply)).await
    }

    /// Waits until a read of the keyspace sees everything that was acknowledged before this call.
    pub async fn read_barrier(&self) -> Result<(), RequestError> {
        if self.shared.alone.load(Ordering::Acquire) {
            return Ok(());
        }
        self.ask(Input::Read).await
    }

    /// How far members follow, if this one leads.
    pub async fn progress(&self, id: u64) -> Result<Progress, RequestError> {
        self.ask(|reply| Input::Progress(id, reply)).await
    }

    /// Tells the thread something that needs no answer.
    pub fn tell(&self, input: Input) {
        // A thread that has ended said why, and the process is ending.
        let _ = self.inputs.send(input);
    }

    /// Gives a lease its full time again, if this member leads: its seconds, or `None` if there is
    /// no such lease.
    pub fn renew_lease(&self, id: i64) -> Result<Option<i64>, RequestError> {
        let mut lessor = self.shared.lessor.lock();
        if !lessor.is_primary() {
            return Err(RequestError::NotLeader);
        }
        let Some((record, _)) = self.shared.keyspace.lease(id) else {
            return Ok(None);
        };
        lessor.renew(id, record.granted, self.now());
        Ok(Some(record.granted))
    }

    /// Milliseconds that a lease has left, if this member leads.
    pub fn lease_remaining(&self, id: i64) -> Result<Option<u64>, RequestError> {
        let lessor = self.shared.lessor.lock();
        if !lessor.is_primary() {
            return Err(RequestError::NotLeader);
        }
        Ok(lessor.remaining(id, self.now()))
    }

    async fn ask<T>(
        &self,
        input: impl FnOnce(oneshot::Sender<Result<T, RequestError>>) -> Input,
    ) -> Result<T, RequestError> {
        let (reply, answer) = oneshot::channel();
        self.inputs
            .send(input(reply))
            .map_err(|_| RequestError::Stopped)?;
        match tokio::time::timeout(self.shared.request_timeout, answer).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(RequestError::Stopped),
            Err(_) => Err(RequestError::TimedOut),
        }
    }

    fn now(&self) -> u64 {
        milliseconds(self.shared.started)
    }
}

fn milliseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

struct Driver {
    member: Member,
    shared: Arc<Shared>,
    outbox: mpsc::UnboundedSender<PeerMessage>,
    metrics: Metrics,
    maintenance: maintenance::Handle,
    waiters: HashMap<u64, Waiter>,
    changes: HashMap<u64, oneshot::Sender<Result<Vec<MemberInfo>, RequestError>>>,
    /// Reads that wait for consensus, by the id of their round.
    reads: HashMap<u64, Vec<oneshot::Sender<Result<(), RequestError>>>>,
    new_reads: Vec<oneshot::Sender<Result<(), RequestError>>>,
    /// Proposals that wait for a leader.
    held: Vec<Vec<u8>>,
    next_id: u64,
    options: NodeOptions,
    batch: Vec<Input>,
    /// The keyspace is to be flushed at least up to this log index: a snapshot before a member was
    /// added is of no use to it.
    flush_to: u64,
    /// The disk is so slow that no more is taken until it has caught up.
    is_full: bool,
    /// Ticks until this member, which was removed, ends.
    ticks_left: Option<u32>,
}

/// Who waits for a command, and the lease that it ends, if it does.
struct Waiter {
    reply: oneshot::Sender<Result<Response, RequestError>>,
    revokes: Option<i64>,
}

impl Driver {
    fn run(mut self, inputs: &Receiver<Input>) -> Result<(), MemberError> {
        let mut next_tick = Instant::now() + self.options.tick;
        self.advance()?;
        loop {
            match inputs.recv_timeout(next_tick.saturating_duration_since(Instant::now())) {
                Ok(input) => self.batch.push(input),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
            self.batch.extend(inputs.try_iter().take(INPUTS_AT_ONCE));
            let mut batch = std::mem::take(&mut self.batch);
            for input in batch.drain(..) {
                if self.handle(input)? {
                    return Ok(());
                }
            }
            self.batch = batch;
            // A thread that was held up does not catch up on ticks: others may think it dead, it
            // must not think so of them.
            if Instant::now() >= next_tick {
                next_tick = Instant::now() + self.options.tick;
                self.tick()?;
            }
            self.ask_for_reads();
            self.advance()?;
        }
    }

    /// Returns whether the thread is to end.
    fn handle(&mut self, input: Input) -> Result<bool, MemberError> {
        match input {
            Input::Propose(operation, authority, reply) => {
                self.propose(operation, authority, reply);
            }
            Input::Change(mut change, reply) => {
                change.id = self.new_id();
                match self.member.propose_change(&change) {
                    Ok(()) => drop(self.changes.insert(change.id, reply)),
                    Err(error) => drop(reply.send(Err(error))),
                }
            }
            Input::Read(reply) => self.new_reads.push(reply),
            Input::Message(message) => self.member.step(message),
            Input::Unreachable(id) => self.member.report_unreachable(id),
            Input::Transfer(id) => self.member.transfer_leader(id),
            Input::Snapshot(snapshot) => {
                let (message, staged) = *snapshot;
                self.member.step_snapshot(message, staged)?;
                // Before anything else is heard: it belongs to this message.
                self.advance()?;
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
            Input::Progress(id, reply) => {
                let progress = Progress {
                    caught_up: self.member.is_caught_up(id),
                    active: self.member.active_members(),
                };
                let leads = self.member.status().is_leader;
                let _ = reply.send(leads.then_some(progress).ok_or(RequestError::NotLeader));
            }
            Input::Stop => return Ok(true),
        }
        Ok(false)
    }

    fn propose(
        &mut self,
        operation: Operation,
        authority: Option<Authority>,
        reply: oneshot::Sender<Result<Response, RequestError>>,
    ) {
        if self.waiters.len() >= MAX_WAITERS || self.is_full {
            self.metrics.proposals_failed.inc();
            let _ = reply.send(Err(RequestError::TooManyRequests));
            return;
        }
        let id = self.new_id();
        let revokes = match &operation {
            Operation::LeaseRevoke(revoke) => Some(revoke.id),
            _ => None,
        };
        let command = Command {
            id,
            operation: Some(operation),
            authority,
        };
        self.waiters.insert(id, Waiter { reply, revokes });
        self.submit(command.encode_to_vec());
    }

    fn submit(&mut self, command: Vec<u8>) {
        if self.member.status().leader == 0 {
            self.held.push(command);
        } else if self.member.propose(command).is_err() {
            // Leadership is being handed over: the client tries again when it hears nothing.
            self.metrics.proposals_failed.inc();
            tracing::debug!("a proposal was dropped");
        }
    }

    fn tick(&mut self) -> Result<(), MemberError> {
        if let Some(left) = &mut self.ticks_left {
            *left = left.checked_sub(1).ok_or(MemberError::Removed)?;
        }
        self.member.tick();
        if self.member.status().leader != 0 {
            for command in std::mem::take(&mut self.held) {
                self.submit(command);
            }
        }
        let now = milliseconds(self.shared.started);
        let expired = self.shared.lessor.lock().expired(now, REVOCATIONS_AT_ONCE);
        for id in expired {
            let id_of_command = self.new_id();
            let command = Command {
                id: id_of_command,
                operation: Some(Operation::LeaseRevoke(pb::LeaseRevokeRequest { id })),
                authority: None,
            };
            self.submit(command.encode_to_vec());
        }
        // Reads whose round was lost ask again; clients that gave up are forgotten.
        for (_, waiting) in self.reads.drain() {
            self.new_reads.extend(waiting);
        }
        self.new_reads.retain(|reply| !reply.is_closed());
        self.waiters.retain(|_, waiter| !waiter.reply.is_closed());
        self.changes.retain(|_, reply| !reply.is_closed());
        self.wake_maintenance();
        Ok(())
    }

    fn wake_maintenance(&mut self) {
        self.metrics
            .proposals_pending
            .set(i64::try_from(self.waiters.len()).unwrap_or(i64::MAX));
        self.maintenance.wake(maintenance::Wanted {
            spares: self.member.log().missing_spares(),
            flush: self.flush_to > 0,
        });
    }

    /// One round of consensus serves every read that waits.
    fn ask_for_reads(&mut self) {
        if self.new_reads.is_empty() {
            return;
        }
        let id = self.new_id();
        if self.member.read_index(id) {
            self.reads.insert(id, std::mem::take(&mut self.new_reads));
        }
    }

    fn advance(&mut self) -> Result<(), MemberError> {
        let outbox = &self.outbox;
        let output = self
            .member
            .advance(&mut |message| drop(outbox.send(message)))?;
        self.publish_status();
        self.answer(output);
        let (flush, full) = self.shared.keyspace.unflushed();
        self.is_full = full;
        if self.flush_to > 0 || flush {
            self.wake_maintenance();
        }
        Ok(())
    }

    fn answer(&mut self, output: Output) {
        let now = milliseconds(self.shared.started);
        if output.removed && self.ticks_left.is_none() {
            // The others are to hear that it is so.
            self.ticks_left = Some(self.options.election_ticks);
        }
        if let Some(revision) = output.installed {
            self.shared.watches.jump(revision);
        }
        // Watches see a change no later than who made it: a client that watches its own writes
        // expects no more than that.
        if output.history.revision > 0 {
            self.shared.watches.publish(output.history);
        }
        for (id, outcome) in output.outcomes {
            if let Ok(Response::LeaseGrant(grant)) = &outcome {
                self.shared.lessor.lock().renew(grant.id, grant.ttl, now);
            }
            let Some(waiter) = self.waiters.remove(&id) else {
                continue;
            };
            if let (Some(lease), Ok(_)) = (waiter.revokes, &outcome) {
                self.shared.lessor.lock().remove(lease);
            }
            let _ = waiter.reply.send(outcome);
        }
        for (id, outcome) in output.membership {
            self.flush_to = self.member.status().applied;
            if let Some(reply) = self.changes.remove(&id) {
                let _ = reply.send(outcome);
            }
        }
        for id in output.reads {
            for reply in self.reads.remove(&id).into_iter().flatten() {
                let _ = reply.send(Ok(()));
            }
        }
    }

    fn publish_status(&mut self) {
        let status = self.member.status();
        let mut published = self.shared.status.lock();
        if status.is_leader != published.is_leader {
            let mut lessor = self.shared.lessor.lock();
            if status.is_leader {
                let leases = self.shared.keyspace.leases();
                let leases = leases.into_iter().map(|(id, record)| {
                    let remaining = if record.remaining > 0 {
                        record.remaining
                    } else {
                        record.granted
                    };
                    (id, remaining)
                });
                lessor.promote(leases, milliseconds(self.shared.started));
            } else {
                lessor.demote();
            }
        }
        if status.leader != published.leader {
            self.metrics.leader_changes.inc();
            tracing::info!(leader = %format_args!("{:x}", status.leader), term = status.term, "leader changed");
        }
        *published = status;
        self.shared.term.store(status.term, Ordering::Relaxed);
        self.shared.alone.store(status.is_alone, Ordering::Release);
    }

    fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }
}
