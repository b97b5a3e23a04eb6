//! Who adds, promotes, removes and replaces members, and starts those that were added.

use keelson_member::Start;
use keelson_member::keyspace::Member as MemberInfo;

use crate::server::{Arrival, Call, Reply};
use crate::settings::MILLISECOND;
use crate::world::{Caller, Happening, World};

/// Voters that there are at most.
const MOST_VOTERS: usize = 5;

/// One who changes the membership, one change at a time.
#[derive(Debug, Default)]
pub(crate) struct Admin {
    requests: u64,
    waiting: bool,
    /// Members that were added so far.
    added: u64,
}

impl World {
    /// The next change; and members that are listed and have no process get one.
    pub(crate) fn step_admin(&mut self) {
        let next = self.random.between(300, 3000) * MILLISECOND;
        self.plan(next, Happening::Admin);
        let Some(members) = self.newest_members() else {
            return;
        };
        self.start_added(&members);
        // Who changes members while one is damaged may leave too few to rebuild it.
        let damaged = (0..self.machines.len()).any(|number| self.is_damaged(number));
        if self.healed || self.admin.waiting || damaged {
            return;
        }
        let Some(call) = self.next_change(&members) else {
            return;
        };
        self.admin.requests += 1;
        self.admin.waiting = true;
        let number = self.any_machine();
        self.note(format_args!("admin → m{number}: {call:?}"));
        let caller = Caller::Admin(self.admin.requests);
        let arrival = Arrival { call, from: None };
        let delay = self.network.latency();
        self.plan(delay, Happening::Request(number, caller, Box::new(arrival)));
        let patience = self.random.between(2000, 9000) * MILLISECOND;
        self.plan(patience, Happening::GiveUp(caller));
    }

    pub(crate) fn admin_heard(&mut self, number: u64, reply: Reply) {
        if self.admin.requests != number || !self.admin.waiting {
            return;
        }
        self.admin.waiting = false;
        self.note(format_args!("admin ← {reply:?}"));
        if let Reply::Members(Ok(members)) = reply {
            self.counts.changes += 1;
            self.start_added(&members);
        }
    }

    /// The members as the process knows them that has applied most.
    pub(crate) fn newest_members(&self) -> Option<Vec<MemberInfo>> {
        let processes = self.machines.iter().filter_map(|machine| {
            let process = machine.process.as_ref()?;
            Some(process.replica.keyspace().metadata())
        });
        processes
            .max_by_key(|metadata| metadata.applied_index)
            .map(|metadata| metadata.members)
    }

    /// Members that were added and never started get a machine's empty disk.
    fn start_added(&mut self, members: &[MemberInfo]) {
        for member in members {
            let at = self
                .machines
                .iter()
                .position(|machine| member.peer_urls.contains(&machine.url));
            let Some(number) = at else {
                continue;
            };
            let running = self.machines[number].member;
            if running == member.id || !member.name.is_empty() {
                continue;
            }
            // Another one that is known as removed may still run there: its URL goes to the new one.
            if running != 0 && members.iter().any(|other| other.id == running) {
                continue;
            }
            if self.machines[number].process.is_some() {
                self.crash(number, crate::disk::Loss::Nothing);
            }
            self.provision(number, member.id, Start::Join(members.to_vec()));
        }
    }

    fn next_change(&mut self, members: &[MemberInfo]) -> Option<Call> {
        let voters: Vec<&MemberInfo> = members.iter().filter(|member| !member.is_learner).collect();
        let learner = members.iter().find(|member| member.is_learner);
        // A member whose disk is of no use any more has to go.
        let lost = members.iter().find(|member| {
            !member.name.is_empty()
                && !self
                    .machines
                    .iter()
                    .any(|machine| machine.member == member.id)
        });
        if let Some(lost) = lost {
            return Some(Call::Remove(lost.id));
        }
        let free: Vec<usize> = (0..self.machines.len())
            .filter(|number| {
                let url = &self.machines[*number].url;
                self.machines[*number].member == 0
                    && !members.iter().any(|member| member.peer_urls.contains(url))
            })
            .collect();
        match self.random.below(10) {
            0..4 if learner.is_some() => learner.map(|learner| Call::Promote(learner.id)),
            0..4 if !free.is_empty() && voters.len() < MOST_VOTERS => {
                Some(self.adding(&free, true))
            }
            4 if !free.is_empty() && voters.len() < MOST_VOTERS => Some(self.adding(&free, false)),
            5..7 if voters.len() > 1 => Some(Call::Remove(self.random.pick(&voters).id)),
            7 => learner.map(|learner| Call::Remove(learner.id)),
            _ => None,
        }
    }

    fn adding(&mut self, free: &[usize], is_learner: bool) -> Call {
        let number = *self.random.pick(free);
        self.admin.added += 1;
        Call::Add(MemberInfo {
            id: 100 + self.admin.added,
            peer_urls: vec![self.machines[number].url.clone()],
            is_learner,
            ..MemberInfo::default()
        })
    }
}
