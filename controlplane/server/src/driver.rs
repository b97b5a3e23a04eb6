//! The thread that drives the replica: gives it the time and what comes, and does what it emits.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use keelson_member::command::{Authority, Operation, Response};
use keelson_member::keyspace::Member as MemberInfo;
use keelson_member::replica::{Answer, Effect, Input, Progress, Replica, RequestId, Statistics};
use keelson_member::{MemberError, MembershipChange, PeerMessage, RequestError};
use tokio::sync::{mpsc, oneshot};

use crate::maintenance;
use crate::metrics::Metrics;
use crate::node::Shared;
use crate::stall::Pulse;

/// Inputs that are handled before the next sync.
const INPUTS_AT_ONCE: usize = 4096;

/// What the thread is told.
pub enum Told {
    /// A request that someone waits for.
    Request(Request),
    /// Anything else.
    Input(Input),
    /// Ends the thread.
    Stop,
}

/// Where an answer goes.
type Reply<T> = oneshot::Sender<Result<T, RequestError>>;

/// Requests, as the inputs of the same names, each with the sender of its answer.
pub enum Request {
    /// A command, and who wants it if that is not the member.
    Propose(Operation, Option<Authority>, Reply<Response>),
    /// A change of membership.
    Change(MembershipChange, Reply<Vec<MemberInfo>>),
    /// A read.
    Read(Reply<()>),
    /// The renewal of a lease.
    RenewLease(i64, Reply<Option<i64>>),
    /// How long a lease has left.
    LeaseRemaining(i64, Reply<Option<u64>>),
    /// How far members follow.
    Progress(u64, Reply<Progress>),
}

/// Where effects go.
pub struct Outputs {
    /// Shows that the thread goes on.
    pub pulse: Pulse,
    /// What others read.
    pub shared: Arc<Shared>,
    /// Messages to other members.
    pub outbox: mpsc::UnboundedSender<PeerMessage>,
    /// What is counted.
    pub metrics: Metrics,
    /// The thread for slow work.
    pub maintenance: maintenance::Handle,
}

struct Driver {
    replica: Replica,
    outputs: Outputs,
    waiters: Waiters,
    started: Instant,
    counted: Statistics,
}

/// Who waits for which request.
#[derive(Default)]
struct Waiters {
    next: u64,
    replies: HashMap<RequestId, Waiting>,
}

/// Where the answer goes, by its kind.
enum Waiting {
    Outcome(Reply<Response>),
    Members(Reply<Vec<MemberInfo>>),
    Read(Reply<()>),
    Renewed(Reply<Option<i64>>),
    Remaining(Reply<Option<u64>>),
    Progress(Reply<Progress>),
}

/// Starts the thread. The receiver gets the reason if the member fails.
pub fn start(
    replica: Replica,
    tick: Duration,
    inputs: Receiver<Told>,
    outputs: Outputs,
) -> std::io::Result<oneshot::Receiver<MemberError>> {
    let (failed, failure) = oneshot::channel();
    let driver = Driver {
        replica,
        outputs,
        waiters: Waiters::default(),
        started: Instant::now(),
        counted: Statistics::default(),
    };
    std::thread::Builder::new()
        .name("member".into())
        .spawn(move || {
            if let Err(error) = driver.run(&inputs, tick) {
                let _ = failed.send(error);
            }
        })?;
    Ok(failure)
}

impl Driver {
    fn run(mut self, inputs: &Receiver<Told>, tick: Duration) -> Result<(), MemberError> {
        let mut next_tick = Instant::now() + tick;
        let mut batch = Vec::new();
        self.advance()?;
        loop {
            self.outputs.pulse.beat();
            match inputs.recv_timeout(next_tick.saturating_duration_since(Instant::now())) {
                Ok(told) => batch.push(told),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
            batch.extend(inputs.try_iter().take(INPUTS_AT_ONCE));
            for told in batch.drain(..) {
                let input = match told {
                    Told::Request(request) => self.waiters.add(request),
                    Told::Input(input) => input,
                    Told::Stop => return Ok(()),
                };
                let (now, emit) = (self.now(), &mut emitter(&self.outputs, &mut self.waiters));
                self.replica.handle(input, now, emit)?;
            }
            // A thread that was held up does not catch up on ticks: others may think it dead, it
            // must not think so of them.
            if Instant::now() >= next_tick {
                next_tick = Instant::now() + tick;
                self.tick()?;
            }
            self.advance()?;
        }
    }

    fn tick(&mut self) -> Result<(), MemberError> {
        let now = self.now();
        self.waiters.forget_closed();
        let replies = &self.waiters.replies;
        let is_waiting = |request: RequestId| replies.contains_key(&request);
        self.replica.tick(now, &is_waiting)
    }

    fn advance(&mut self) -> Result<(), MemberError> {
        let now = self.now();
        self.replica
            .advance(now, &mut emitter(&self.outputs, &mut self.waiters))?;
        self.count();
        Ok(())
    }

    fn count(&mut self) {
        let (counted, now) = (self.counted, self.replica.statistics());
        let metrics = &self.outputs.metrics;
        metrics
            .proposals_pending
            .set(i64::try_from(now.proposals_pending).unwrap_or(i64::MAX));
        metrics
            .proposals_failed
            .inc_by(now.proposals_failed - counted.proposals_failed);
        metrics
            .leader_changes
            .inc_by(now.leader_changes - counted.leader_changes);
        self.counted = now;
    }

    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

fn emitter(outputs: &Outputs, waiters: &mut Waiters) -> impl FnMut(Effect) {
    move |effect| match effect {
        Effect::Status(status) => outputs.shared.publish(status),
        Effect::Send(message) => drop(outputs.outbox.send(message)),
        Effect::Answer(request, answer) => waiters.answer(request, answer),
        Effect::Maintain(wanted) => outputs.maintenance.wake(wanted),
    }
}

impl Waiters {
    /// Notes who waits, and gives the request its id.
    fn add(&mut self, request: Request) -> Input {
        self.next += 1;
        let id = RequestId(self.next);
        let (input, waiting) = match request {
            Request::Propose(operation, authority, reply) => (
                Input::Propose(id, operation, authority),
                Waiting::Outcome(reply),
            ),
            Request::Change(change, reply) => (Input::Change(id, change), Waiting::Members(reply)),
            Request::Read(reply) => (Input::Read(id), Waiting::Read(reply)),
            Request::RenewLease(lease, reply) => {
                (Input::RenewLease(id, lease), Waiting::Renewed(reply))
            }
            Request::LeaseRemaining(lease, reply) => {
                (Input::LeaseRemaining(id, lease), Waiting::Remaining(reply))
            }
            Request::Progress(member, reply) => {
                (Input::Progress(id, member), Waiting::Progress(reply))
            }
        };
        self.replies.insert(id, waiting);
        input
    }

    /// Answers, if the client still waits.
    fn answer(&mut self, request: RequestId, answer: Answer) {
        match (self.replies.remove(&request), answer) {
            (Some(Waiting::Outcome(reply)), Answer::Outcome(outcome)) => {
                drop(reply.send(outcome));
            }
            (Some(Waiting::Members(reply)), Answer::Members(members)) => {
                drop(reply.send(members));
            }
            (Some(Waiting::Read(reply)), Answer::Read) => drop(reply.send(Ok(()))),
            (Some(Waiting::Renewed(reply)), Answer::Renewed(renewed)) => {
                drop(reply.send(renewed));
            }
            (Some(Waiting::Remaining(reply)), Answer::Remaining(remaining)) => {
                drop(reply.send(remaining));
            }
            (Some(Waiting::Progress(reply)), Answer::Progress(progress)) => {
                drop(reply.send(progress));
            }
            // The client gave up.
            _ => {}
        }
    }

    fn forget_closed(&mut self) {
        self.replies.retain(|_, waiting| match waiting {
            Waiting::Outcome(reply) => !reply.is_closed(),
            Waiting::Members(reply) => !reply.is_closed(),
            Waiting::Read(reply) => !reply.is_closed(),
            Waiting::Renewed(reply) => !reply.is_closed(),
            Waiting::Remaining(reply) => !reply.is_closed(),
            Waiting::Progress(reply) => !reply.is_closed(),
        });
    }
}
