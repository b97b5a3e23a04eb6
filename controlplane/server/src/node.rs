//! The member as the services see it: requests go to its thread, answers come back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use keelson_member::command::{Authority, Operation, Response};
use keelson_member::disk::Disk;
use keelson_member::keyspace::{Keyspace, Member as MemberInfo};
use keelson_member::replica::{Input, Progress, Replica, ReplicaOptions};
use keelson_member::watch::Watches;
use keelson_member::{
    ConsensusStatus, Member, MemberError, MembershipChange, PeerMessage, RequestError,
};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use crate::driver::{self, Request, Told};
use crate::maintenance;
use crate::metrics::Metrics;
use crate::stall::Pulse;

/// How often who waits looks whether the thread hangs.
const STALL_INTERVAL: Duration = Duration::from_millis(500);

/// Hands requests to the thread, and knows what it publishes.
#[derive(Clone)]
pub struct Node {
    inputs: Sender<Told>,
    shared: Arc<Shared>,
}

/// What the thread publishes.
pub struct Shared {
    keyspace: Arc<Keyspace>,
    watches: Arc<Watches>,
    status: Mutex<ConsensusStatus>,
    term: AtomicU64,
    alone: AtomicBool,
    lacks_room: AtomicBool,
    pulse: Pulse,
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
    pub id_prefix: u32,
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
    let replica_options = ReplicaOptions {
        tick_ms: u64::try_from(options.tick.as_millis()).unwrap_or(u64::MAX),
        election_ticks: options.election_ticks,
        id_prefix: options.id_prefix,
    };
    let replica = Replica::new(member, replica_options);
    let pulse = Pulse::new(options.tick * options.election_ticks);
    let shared = Arc::new(Shared {
        watches: Arc::clone(replica.watches()),
        keyspace: Arc::clone(&keyspace),
        status: Mutex::new(ConsensusStatus::default()),
        term: AtomicU64::new(0),
        alone: AtomicBool::new(false),
        lacks_room: AtomicBool::new(false),
        pulse: pulse.clone(),
        request_timeout: Duration::from_secs(5) + options.tick * options.election_ticks * 2,
    });
    let maintenance = maintenance::start(keyspace, disk, inputs.clone())?;
    let failure = driver::start(
        replica,
        options.tick,
        received,
        driver::Outputs {
            shared: Arc::clone(&shared),
            pulse,
            outbox,
            metrics,
            maintenance,
        },
    )?;
    Ok((Node { inputs, shared }, failure))
}

impl Shared {
    /// Publishes what the member knows of its cluster.
    pub fn publish(&self, status: ConsensusStatus) {
        *self.status.lock() = status;
        self.term.store(status.term, Ordering::Relaxed);
        self.alone.store(status.is_alone, Ordering::Release);
    }
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

    /// What the member knows of its cluster: of no leader, while its thread hangs.
    pub fn status(&self) -> ConsensusStatus {
        let status = *self.shared.status.lock();
        if self.is_stalled() {
            return ConsensusStatus {
                leader: 0,
                is_leader: false,
                ..status
            };
        }
        status
    }

    /// Whether the thread hangs, on the disk most likely. What needs it is refused meanwhile.
    pub fn is_stalled(&self) -> bool {
        self.shared.pulse.is_stalled()
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
        self.ask(|reply| Request::Propose(operation, authority, reply))
            .await
    }

    /// Changes the membership; answers with the members.
    pub async fn change(&self, change: MembershipChange) -> Result<Vec<MemberInfo>, RequestError> {
        self.ask(|reply| Request::Change(change, reply)).await
    }

    /// Waits until a read of the keyspace sees everything that was acknowledged before this call.
    pub async fn read_barrier(&self) -> Result<(), RequestError> {
        if self.shared.alone.load(Ordering::Acquire) {
            return Ok(());
        }
        self.ask(Request::Read).await
    }

    /// How far members follow, if this one leads.
    pub async fn progress(&self, id: u64) -> Result<Progress, RequestError> {
        self.ask(|reply| Request::Progress(id, reply)).await
    }

    /// Gives a lease its full time again, if this member leads: its seconds, or `None` if there is
    /// no such lease.
    pub async fn renew_lease(&self, id: i64) -> Result<Option<i64>, RequestError> {
        self.ask(|reply| Request::RenewLease(id, reply)).await
    }

    /// Milliseconds that a lease has left, if this member leads.
    pub async fn lease_remaining(&self, id: i64) -> Result<Option<u64>, RequestError> {
        self.ask(|reply| Request::LeaseRemaining(id, reply)).await
    }

    /// Says whether this member's disk is so full that its thread may wait for room.
    pub fn set_lacks_room(&self, lacks: bool) {
        self.shared.lacks_room.store(lacks, Ordering::Relaxed);
    }

    /// Whether what needs more room is to be refused.
    pub fn refuses_growth(&self) -> bool {
        self.shared.lacks_room.load(Ordering::Relaxed) || self.keyspace().refuses_growth()
    }

    /// Tells the thread something that needs no answer.
    pub fn tell(&self, input: Input) {
        // A thread that has ended said why, and the process is ending.
        let _ = self.inputs.send(Told::Input(input));
    }

    /// Ends the thread.
    pub fn stop(&self) {
        let _ = self.inputs.send(Told::Stop);
    }

    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T, RequestError>>) -> Request,
    ) -> Result<T, RequestError> {
        if self.is_stalled() {
            return Err(RequestError::NoLeader);
        }
        let (reply, mut answer) = oneshot::channel();
        self.inputs
            .send(Told::Request(request(reply)))
            .map_err(|_| RequestError::Stopped)?;
        let limit = Instant::now() + self.shared.request_timeout;
        loop {
            match tokio::time::timeout(STALL_INTERVAL, &mut answer).await {
                Ok(Ok(outcome)) => return outcome,
                Ok(Err(_)) => return Err(RequestError::Stopped),
                Err(_) if Instant::now() < limit && !self.is_stalled() => {}
                Err(_) => return Err(RequestError::TimedOut),
            }
        }
    }
}
