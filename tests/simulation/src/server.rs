//! The services of a member: what `keelson-state` does with a request before and after its member's
//! thread.

use std::sync::Arc;

use keelson_checker::{Outcome, Request};
use keelson_etcd_api::etcdserverpb as pb;
use keelson_member::command::{Authority, Operation, Rebuild};
use keelson_member::keyspace::{Keyspace, Member as MemberInfo};
use keelson_member::replica::membership::{check_adding_voter, check_removing_voter};
use keelson_member::replica::{Answer, Input, Progress, RequestId};
use keelson_member::{ChangeKind, Failure, MembershipChange, RequestError};

use crate::settings::{Plant, SERVER_TIMEOUT};
use crate::translate;
use crate::world::{Caller, Happening, World};

/// What a client wants.
#[derive(Debug, Clone)]
pub enum Call {
    /// A request of the KV service, or about leases; the time to live of a lease that is granted.
    Kv(Request, i64),
    /// Gives a lease its time again.
    KeepAlive(i64),
    /// How members follow the leader: asked by other members.
    Progress(u64),
    /// A new member.
    Add(MemberInfo),
    /// The end of one.
    Remove(u64),
    /// A learner becomes a voter.
    Promote(u64),
    /// Everything, for a member that is rebuilt.
    Rebuild(Rebuild),
}

/// A request that arrives at a machine, from a client or from another machine.
#[derive(Debug)]
pub struct Arrival {
    pub(crate) call: Call,
    pub(crate) from: Option<usize>,
}

/// What comes back.
#[derive(Debug)]
pub enum Reply {
    /// To [`Call::Kv`].
    Kv(Outcome),
    /// To [`Call::KeepAlive`]: seconds; 0 if there is no such lease.
    KeptAlive(Result<i64, RequestError>),
    /// To [`Call::Progress`].
    Progress(Result<Progress, RequestError>),
    /// To changes of membership: the members.
    Members(Result<Vec<MemberInfo>, RequestError>),
    /// To [`Call::Rebuild`], if it is refused.
    Rebuild(Result<(), RequestError>),
    /// The server was not there.
    Refused,
    /// The connection was lost.
    Lost,
    /// The client has waited long enough.
    GaveUp,
}

/// A request that waits in a process.
#[derive(Debug)]
pub struct Pending {
    pub(crate) caller: Caller,
    call: Call,
    stage: Stage,
    /// When the server gives up.
    deadline: u64,
}

/// What it waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Consensus, before anything is read.
    Barrier,
    /// What the leader knows of members.
    Progress,
    /// The outcome.
    Outcome,
}

impl Pending {
    /// A request of the process itself.
    pub(crate) fn unheard(deadline: u64) -> Self {
        Self {
            caller: Caller::Nobody,
            call: Call::Progress(0),
            stage: Stage::Outcome,
            deadline,
        }
    }
}

impl World {
    /// A request arrives.
    pub(crate) fn serve(&mut self, number: usize, caller: Caller, arrival: Arrival) {
        let Arrival { call, from } = arrival;
        if let Some(from) = from
            && !self.network.reaches(from, number)
        {
            return; // the caller gives up some time
        }
        let boot = self.machines[number].boot;
        let deadline = self.now + SERVER_TIMEOUT;
        let member = self.machines[number].member;
        let plant = self.settings.plant;
        let Some(process) = self.process(number, boot) else {
            self.answer_caller(number, caller, Reply::Refused);
            return;
        };
        let keyspace = Arc::clone(process.replica.keyspace());
        let alone = process.replica.status().is_alone;
        let mut pending = Pending {
            caller,
            call: call.clone(),
            stage: Stage::Outcome,
            deadline,
        };
        let input: Box<dyn FnOnce(RequestId) -> Input> = match call {
            Call::Kv(Request::Range(range), _) => {
                let at_once =
                    range.serializable || alone || plant == Some(Plant::ReadWithoutQuorum);
                if at_once {
                    let reply = read(&keyspace, &range);
                    self.answer_caller(number, caller, reply);
                    return;
                }
                pending.stage = Stage::Barrier;
                Box::new(Input::Read)
            }
            Call::Kv(request, ttl) => {
                let refused = keyspace.is_learner(member);
                match translate::operation(&request, ttl) {
                    Some(operation) if !refused => {
                        Box::new(|id| Input::Propose(id, operation, Some(Authority::default())))
                    }
                    _ => {
                        self.answer_caller(number, caller, Reply::Kv(Outcome::Failed));
                        return;
                    }
                }
            }
            Call::KeepAlive(id) => Box::new(move |request| Input::RenewLease(request, id)),
            Call::Progress(id) => Box::new(move |request| Input::Progress(request, id)),
            Call::Add(_) | Call::Remove(_) | Call::Promote(_) => {
                pending.stage = Stage::Barrier;
                Box::new(Input::Read)
            }
            Call::Rebuild(rebuild) => {
                let removed = keyspace.metadata().removed_members;
                if removed.contains(&rebuild.member_id) {
                    let refused = Reply::Rebuild(Err(RequestError::MemberNotFound));
                    self.answer_caller(number, caller, refused);
                    return;
                }
                Box::new(move |id| Input::Propose(id, Operation::Rebuild(rebuild), None))
            }
        };
        let request = process.request(pending);
        self.input(number, boot, input(request));
    }

    /// The member's thread has answered a request.
    pub(crate) fn answered(
        &mut self,
        number: usize,
        boot: u64,
        request: RequestId,
        answer: Answer,
    ) {
        let Some(process) = self.process(number, boot) else {
            return;
        };
        let keyspace = Arc::clone(process.replica.keyspace());
        let Some(pending) = process.requests.remove(&request) else {
            return;
        };
        let caller = pending.caller;
        let reply = match (&pending.call, answer) {
            (Call::Kv(Request::Range(range), _), Answer::Read) => read(&keyspace, range),
            (Call::Kv(..), Answer::Outcome(outcome)) => Reply::Kv(match outcome {
                Ok(response) => Outcome::Ok(translate::response(response)),
                Err(error) => translate::failure(&error),
            }),
            (Call::Rebuild(rebuild), Answer::Outcome(Ok(_))) => {
                if let Caller::Rebuilt(machine, its_boot, _) = caller {
                    self.send_rebuild((number, boot), (machine, its_boot), rebuild.number);
                }
                return;
            }
            (Call::Rebuild(_), Answer::Outcome(Err(_))) => {
                Reply::Rebuild(Err(RequestError::TimedOut))
            }
            (Call::KeepAlive(id), Answer::Renewed(Err(RequestError::NotLeader)))
                if !matches!(caller, Caller::Member(..)) =>
            {
                let call = Call::KeepAlive(*id);
                self.forward(number, boot, pending, call);
                return;
            }
            (Call::KeepAlive(_), Answer::Renewed(renewed)) => {
                Reply::KeptAlive(renewed.map(|ttl| ttl.unwrap_or(0)))
            }
            (Call::Progress(_), Answer::Progress(progress)) => Reply::Progress(progress),
            (_, Answer::Read) => {
                self.change_may_begin(number, boot, pending);
                return;
            }
            (_, Answer::Progress(Err(RequestError::NotLeader))) => {
                let call = Call::Progress(pending.subject());
                self.forward(number, boot, pending, call);
                return;
            }
            (_, Answer::Progress(progress)) => {
                self.progress_known(number, boot, pending, progress);
                return;
            }
            (_, Answer::Members(members)) => Reply::Members(members),
            _ => return,
        };
        self.answer_caller(number, caller, reply);
    }

    /// What another member answered for a request of a client here.
    pub(crate) fn forwarded_heard(
        &mut self,
        number: usize,
        boot: u64,
        request: RequestId,
        reply: Reply,
    ) {
        let Some(process) = self.process(number, boot) else {
            return;
        };
        let Some(pending) = process.requests.remove(&request) else {
            return;
        };
        match reply {
            Reply::KeptAlive(_) => self.answer_caller(number, pending.caller, reply),
            Reply::Progress(progress) => self.progress_known(number, boot, pending, progress),
            _ => {
                let timed_out = Err(RequestError::TimedOut);
                let reply = match pending.call {
                    Call::KeepAlive(_) => Reply::KeptAlive(timed_out),
                    _ => Reply::Members(Err(RequestError::TimedOut)),
                };
                self.answer_caller(number, pending.caller, reply);
            }
        }
    }

    /// The server gives up on requests that have waited long.
    pub(crate) fn expire_requests(&mut self, number: usize, boot: u64) {
        let now = self.now;
        let Some(process) = self.process(number, boot) else {
            return;
        };
        let expired: Vec<RequestId> = process
            .requests
            .iter()
            .filter(|(_, pending)| pending.deadline <= now)
            .map(|(id, _)| *id)
            .collect();
        let expired: Vec<Pending> = expired
            .into_iter()
            .filter_map(|id| process.requests.remove(&id))
            .collect();
        for pending in expired {
            let timed_out = RequestError::TimedOut;
            let reply = match pending.call {
                Call::Kv(..) => Reply::Kv(Outcome::Unknown),
                Call::KeepAlive(_) => Reply::KeptAlive(Err(timed_out)),
                Call::Progress(_) => Reply::Progress(Err(timed_out)),
                Call::Rebuild(_) => Reply::Rebuild(Err(timed_out)),
                Call::Add(_) | Call::Remove(_) | Call::Promote(_) => Reply::Members(Err(timed_out)),
            };
            self.answer_caller(number, pending.caller, reply);
        }
    }

    /// The process that a request was sent to is gone.
    pub(crate) fn connection_lost(&mut self, caller: Caller) {
        let delay = self.network.latency();
        self.plan(delay, Happening::Reply(caller, Box::new(Reply::Lost)));
    }

    /// A planted bug: a new leader ends every lease.
    pub(crate) fn revoke_all_leases(&mut self, number: usize, boot: u64) {
        let deadline = self.now + SERVER_TIMEOUT;
        let Some(process) = self.process(number, boot) else {
            return;
        };
        for (id, _) in process.replica.keyspace().leases() {
            let Some(process) = self.process(number, boot) else {
                return;
            };
            let request = process.request(Pending::unheard(deadline));
            let revoke = Operation::LeaseRevoke(pb::LeaseRevokeRequest { id });
            self.input(number, boot, Input::Propose(request, revoke, None));
        }
    }

    fn answer_caller(&mut self, number: usize, caller: Caller, reply: Reply) {
        if let Caller::Member(machine, ..) | Caller::Rebuilt(machine, ..) = caller
            && !self.network.reaches(number, machine)
        {
            return;
        }
        let delay = self.network.latency();
        self.plan(delay, Happening::Reply(caller, Box::new(reply)));
    }

    /// Asks the leader for what this member can't do itself.
    fn forward(&mut self, number: usize, boot: u64, pending: Pending, call: Call) {
        let Some(process) = self.process(number, boot) else {
            return;
        };
        let leader = process.replica.status().leader;
        let caller = pending.caller;
        let kept_alive = matches!(pending.call, Call::KeepAlive(_));
        let request = process.request(pending);
        let Some(to) = self.machine_of(number, leader) else {
            if let Some(process) = self.process(number, boot) {
                process.requests.remove(&request);
            }
            let no_leader = RequestError::NoLeader;
            let reply = if kept_alive {
                Reply::KeptAlive(Err(no_leader))
            } else {
                Reply::Members(Err(no_leader))
            };
            self.answer_caller(number, caller, reply);
            return;
        };
        let arrival = Arrival {
            call,
            from: Some(number),
        };
        let delay = self.network.latency();
        let caller = Caller::Member(number, boot, request);
        self.plan(delay, Happening::Request(to, caller, Box::new(arrival)));
    }

    /// A change of membership, after a linearizable look at the members.
    fn change_may_begin(&mut self, number: usize, boot: u64, mut pending: Pending) {
        let Some(process) = self.process(number, boot) else {
            return;
        };
        let members = process.replica.keyspace().metadata().members;
        let known = |id: u64| members.iter().find(|member| member.id == id);
        let learners = members.iter().filter(|member| member.is_learner).count();
        let refusal = match &pending.call {
            Call::Add(member) if member.is_learner => {
                (learners > 0).then_some(RequestError::TooManyLearners)
            }
            Call::Remove(id) => known(*id).is_none().then_some(RequestError::MemberNotFound),
            Call::Promote(id) => match known(*id) {
                None => Some(RequestError::MemberNotFound),
                Some(member) if !member.is_learner => Some(RequestError::NotLearner),
                Some(_) => None,
            },
            _ => None,
        };
        if let Some(error) = refusal {
            self.answer_caller(number, pending.caller, Reply::Members(Err(error)));
            return;
        }
        let is_learner = match &pending.call {
            Call::Add(member) => member.is_learner,
            Call::Remove(id) => known(*id).is_some_and(|member| member.is_learner),
            _ => false,
        };
        if is_learner {
            self.change(number, boot, pending);
            return;
        }
        pending.stage = Stage::Progress;
        let subject = pending.subject();
        if let Some(process) = self.process(number, boot) {
            let request = process.request(pending);
            self.input(number, boot, Input::Progress(request, subject));
        }
    }

    fn progress_known(
        &mut self,
        number: usize,
        boot: u64,
        pending: Pending,
        progress: Result<Progress, RequestError>,
    ) {
        let Some(process) = self.process(number, boot) else {
            return;
        };
        let members = process.replica.keyspace().metadata().members;
        let allowed = progress.and_then(|progress| match &pending.call {
            Call::Add(_) => check_adding_voter(&members, &progress.active),
            Call::Remove(id) => check_removing_voter(&members, *id, &progress.active),
            Call::Promote(_) if !progress.caught_up => Err(RequestError::LearnerNotReady),
            _ => Ok(()),
        });
        match allowed {
            Ok(()) => self.change(number, boot, pending),
            Err(error) => {
                self.answer_caller(number, pending.caller, Reply::Members(Err(error)));
            }
        }
    }

    fn change(&mut self, number: usize, boot: u64, mut pending: Pending) {
        let Some(process) = self.process(number, boot) else {
            return;
        };
        let members = process.replica.keyspace().metadata().members;
        let known = |id: u64| members.iter().find(|member| member.id == id).cloned();
        let (kind, member) = match &pending.call {
            Call::Add(member) => (ChangeKind::Add, Some(member.clone())),
            Call::Remove(id) => (ChangeKind::Remove, known(*id)),
            Call::Promote(id) => {
                let promoted = known(*id).map(|member| MemberInfo {
                    is_learner: false,
                    ..member
                });
                (ChangeKind::Promote, promoted)
            }
            _ => return,
        };
        if member.is_none() {
            let refused = Reply::Members(Err(RequestError::MemberNotFound));
            self.answer_caller(number, pending.caller, refused);
            return;
        }
        pending.stage = Stage::Outcome;
        let request = process.request(pending);
        let change = MembershipChange {
            id: 0,
            kind: kind.into(),
            member,
        };
        self.input(number, boot, Input::Change(request, change));
    }
}

impl Pending {
    /// The member that a change is about; 0 if it is not there yet.
    fn subject(&self) -> u64 {
        match self.call {
            Call::Remove(id) | Call::Promote(id) | Call::Progress(id) => id,
            _ => 0,
        }
    }
}

fn read(keyspace: &Keyspace, range: &keelson_checker::Range) -> Reply {
    let read = keyspace.range(&Authority::default(), &translate::range(range));
    Reply::Kv(match read {
        Ok(response) => Outcome::Ok(translate::range_response(response)),
        Err(Failure::Request(error)) => translate::failure(&error),
        Err(Failure::Member(_)) => Outcome::Unknown,
    })
}
