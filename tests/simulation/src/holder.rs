//! Clients that hold leases: they attach a key, keep the lease alive for a while, and then see it end.

use keelson_checker::{
    KeepAlive, Keys, LeaseTimes, Operation, Outcome, Put, Range, Request, Response,
};

use crate::server::{Arrival, Call, Reply};
use crate::settings::{MILLISECOND, SECOND};
use crate::world::{Caller, Happening, World};

/// A lease may end this much later than its time: elections give it its whole time again, and
/// there may be no leader for as long as there are faults.
const ALLOWANCE: u64 = 120 * SECOND;

/// Someone who holds one lease after the other.
#[derive(Debug)]
pub(crate) struct Holder {
    client: u64,
    machine: usize,
    waiting: Option<Waiting>,
    requests: u64,
    step: Step,
    lease: LeaseTimes,
    /// Its time to live, in seconds.
    ttl: i64,
    /// Keep-alives that are left.
    left: u64,
    revokes: bool,
}

#[derive(Debug)]
struct Waiting {
    number: u64,
    call: u64,
    asked: Call,
}

/// What a holder does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Grant,
    Attach,
    KeepAlive,
    Revoke,
    /// Looks whether the key is still there.
    Look,
}

impl World {
    pub(crate) fn add_holder(&mut self) {
        let client = self.new_client_number();
        let machine = self.any_machine();
        self.holders.push(Holder {
            client,
            machine,
            waiting: None,
            requests: 0,
            step: Step::Grant,
            lease: no_lease(),
            ttl: 0,
            left: 0,
            revokes: false,
        });
        let first = self.random.between(500, 3000) * MILLISECOND;
        self.plan(first, Happening::Holder(self.holders.len() - 1));
    }

    /// A holder asks for its next thing.
    pub(crate) fn step_holder(&mut self, index: usize) {
        if self.holders[index].waiting.is_some() {
            return;
        }
        if self.random.percent(10) || self.machines[self.holders[index].machine].member == 0 {
            self.holders[index].machine = self.any_machine();
        }
        let asked = match self.holders[index].step {
            Step::Grant => {
                if self.healed {
                    return;
                }
                let id = i64::try_from(self.random.below(1 << 40)).unwrap_or(1) + 1;
                let ttl = self.random.between(1, 5);
                let holder = &mut self.holders[index];
                holder.ttl = i64::try_from(ttl).unwrap_or(1);
                holder.left = self.random.below(12);
                holder.revokes = self.random.percent(20);
                holder.lease = LeaseTimes { id, ..no_lease() };
                Call::Kv(Request::LeaseGrant(id), holder.ttl)
            }
            Step::Attach => {
                let id = self.holders[index].lease.id;
                let put = Put {
                    key: key_of(id),
                    value: "held".into(),
                    lease: id,
                    prev_kv: false,
                };
                Call::Kv(Request::Put(put), 0)
            }
            Step::KeepAlive => Call::KeepAlive(self.holders[index].lease.id),
            Step::Revoke => {
                let now = self.now;
                let lease = &mut self.holders[index].lease;
                lease.revoked.get_or_insert(now);
                Call::Kv(Request::LeaseRevoke(lease.id), 0)
            }
            Step::Look => {
                let key = key_of(self.holders[index].lease.id);
                Call::Kv(Request::Range(Range::of(Keys::One(key))), 0)
            }
        };
        let holder = &mut self.holders[index];
        holder.requests += 1;
        let (number, machine) = (holder.requests, holder.machine);
        holder.waiting = Some(Waiting {
            number,
            call: self.now,
            asked: asked.clone(),
        });
        self.note(format_args!("holder {index} → m{machine}: {asked:?}"));
        let caller = Caller::Holder(index, number);
        let arrival = Arrival {
            call: asked,
            from: None,
        };
        let delay = self.network.latency();
        self.plan(
            delay,
            Happening::Request(machine, caller, Box::new(arrival)),
        );
        let patience = self.random.between(500, 9000) * MILLISECOND;
        self.plan(patience, Happening::GiveUp(caller));
    }

    /// Something came back for a holder.
    pub(crate) fn holder_heard(&mut self, index: usize, number: u64, reply: Reply) {
        let holder = &mut self.holders[index];
        if holder
            .waiting
            .as_ref()
            .is_none_or(|waiting| waiting.number != number)
        {
            return;
        }
        let Some(waiting) = holder.waiting.take() else {
            return;
        };
        self.note(format_args!("holder {index} ← {reply:?}"));
        match waiting.asked.clone() {
            Call::Kv(request, _) => self.holder_heard_kv(index, &waiting, request, reply),
            _ => self.holder_kept_alive(index, &waiting, &reply),
        }
        let holder = &self.holders[index];
        let ttl = u64::try_from(holder.ttl).unwrap_or(1) * SECOND;
        let delay = match holder.step {
            Step::KeepAlive => self.random.between(ttl / 6, ttl / 2),
            Step::Look => self.random.between(20, 600) * MILLISECOND,
            _ => self.random.between(1, 100) * MILLISECOND,
        };
        self.plan(delay, Happening::Holder(index));
    }

    fn holder_heard_kv(&mut self, index: usize, waiting: &Waiting, request: Request, reply: Reply) {
        let now = self.now;
        let outcome = match reply {
            Reply::Kv(outcome) => outcome,
            Reply::Refused => Outcome::Failed,
            _ => Outcome::Unknown,
        };
        self.history.operations.push(Operation {
            client: self.holders[index].client,
            call: waiting.call,
            end: now,
            request,
            outcome: outcome.clone(),
        });
        if outcome == Outcome::Unknown {
            self.holders[index].client = self.new_client_number();
        }
        let known = matches!(outcome, Outcome::Ok(_) | Outcome::Refused(_));
        if !known {
            self.holders[index].machine = self.any_machine();
        }
        let holder = &mut self.holders[index];
        let asked = u64::try_from(holder.ttl).unwrap_or(0) * SECOND;
        match (holder.step, &outcome) {
            (Step::Grant, Outcome::Failed) => {}
            (Step::Grant, _) => {
                let granted = matches!(outcome, Outcome::Ok(_));
                holder.lease.keep_alives.push(KeepAlive {
                    call: waiting.call,
                    end: now,
                    promised: granted.then_some(asked),
                    asked,
                });
                holder.step = Step::Attach;
            }
            (Step::Attach, Outcome::Ok(_)) => {
                holder.step = if holder.left > 0 {
                    Step::KeepAlive
                } else {
                    Step::Look
                };
            }
            (Step::Attach, Outcome::Refused(_)) => {
                // It was not granted after all, or has ended.
                if holder
                    .lease
                    .keep_alives
                    .iter()
                    .any(|kept| kept.promised.is_some())
                {
                    holder.lease.gone = Some(now);
                }
                self.finish_lease(index);
            }
            (Step::Revoke, _) if known => holder.step = Step::Look,
            (Step::Look, Outcome::Ok(Response::Range { result, .. })) => {
                if result.count == 0 {
                    holder.lease.gone = Some(now);
                    self.finish_lease(index);
                } else {
                    holder.lease.alive = Some(waiting.call);
                }
            }
            _ => {}
        }
    }

    fn holder_kept_alive(&mut self, index: usize, waiting: &Waiting, reply: &Reply) {
        let now = self.now;
        let answer = match reply {
            Reply::KeptAlive(Ok(ttl)) => Some(*ttl),
            _ => None,
        };
        let machine = self.any_machine();
        let holder = &mut self.holders[index];
        if answer == Some(0) {
            holder.lease.gone = Some(now);
            self.finish_lease(index);
            return;
        }
        if answer.is_none() {
            holder.machine = machine;
        }
        holder.lease.keep_alives.push(KeepAlive {
            call: waiting.call,
            end: now,
            promised: answer.map(|ttl| u64::try_from(ttl).unwrap_or(0) * SECOND),
            asked: u64::try_from(holder.ttl).unwrap_or(0) * SECOND,
        });
        holder.left = holder.left.saturating_sub(1);
        if holder.left == 0 || self.healed {
            holder.step = if holder.revokes {
                Step::Revoke
            } else {
                Step::Look
            };
        }
    }

    fn finish_lease(&mut self, index: usize) {
        let holder = &mut self.holders[index];
        holder.step = Step::Grant;
        let lease = std::mem::replace(&mut holder.lease, no_lease());
        self.history.leases.push(self.lease_by_true_time(lease));
    }

    /// Leases live by a leader's clock: it may run a little fast, and have jumped ahead.
    fn lease_by_true_time(&self, mut lease: LeaseTimes) -> LeaseTimes {
        for kept in &mut lease.keep_alives {
            kept.promised = kept
                .promised
                .map(|promised| (promised - promised / 1000).saturating_sub(self.jumped));
        }
        lease
    }

    /// Whether every holder has seen its last lease end.
    pub(crate) fn holders_are_idle(&self) -> bool {
        self.holders
            .iter()
            .all(|holder| holder.waiting.is_none() && holder.step == Step::Grant)
    }
}

fn no_lease() -> LeaseTimes {
    LeaseTimes {
        id: 0,
        keep_alives: Vec::new(),
        revoked: None,
        gone: None,
        alive: None,
        allowance: ALLOWANCE,
    }
}

fn key_of(lease: i64) -> bytes::Bytes {
    format!("lease/{lease:x}").into()
}
