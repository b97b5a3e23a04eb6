//! Leases end when their time is over: never before what a client was promised, whoever leads.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

use std::collections::BTreeMap;

use keelson_member::keyspace::{LeaseChange, LeaseRecord};
use keelson_member::lessor::{COVER_MS, KeepAlive, Lessor};
use proptest::prelude::*;

const STEP: u64 = 500;
const GRACE: u64 = 1000;

fn record(granted: i64) -> LeaseRecord {
    LeaseRecord {
        granted,
        remaining: 0,
        granted_at: 5,
    }
}

fn empty() -> Lessor {
    Lessor::new([], STEP)
}

/// Lets time pass in ticks.
fn pass(lessor: &mut Lessor, from: u64, to: u64) {
    for now in (from..=to).step_by(100) {
        lessor.tick(now);
    }
}

#[test]
fn a_follower_knows_how_long_a_lease_has_left() {
    let mut follower = empty();
    follower.apply(&LeaseChange::Granted(1, record(30)));
    pass(&mut follower, 0, 15_000);
    follower.promote(GRACE);
    assert_eq!(follower.remaining(1, 15_000), Some(15_000));
    pass(&mut follower, 15_100, 29_900);
    assert!(follower.due(10).is_empty());
    pass(&mut follower, 30_000, 30_000);
    assert_eq!(follower.due(10), [(1, 5)]);
}

#[test]
fn a_restarted_member_knows_it_from_a_checkpoint() {
    let mut leader = empty();
    leader.promote(0);
    leader.apply(&LeaseChange::Granted(1, record(60)));
    let mut told = Vec::new();
    for now in (0..=60_000).step_by(100) {
        leader.tick(now);
        told.extend(leader.checkpoints(10));
    }
    let expected: Vec<_> = (1..12).map(|twelfth| (1, 60 - 5 * twelfth)).collect();
    assert_eq!(told, expected);
    let stored = LeaseRecord {
        remaining: 20,
        ..record(60)
    };
    let restarted = Lessor::new([(1, stored)], STEP);
    assert_eq!(restarted.remaining(1, 0), Some(20_000));
    // Without one, it may just have been renewed.
    let restarted = Lessor::new([(1, record(60))], STEP);
    assert_eq!(restarted.remaining(1, 0), Some(60_000 + COVER_MS));
}

#[test]
fn time_in_which_nobody_could_be_heard_does_not_count() {
    let mut leader = empty();
    leader.promote(0);
    leader.apply(&LeaseChange::Granted(1, record(10)));
    pass(&mut leader, 0, 5000);
    // The process is stopped for a minute.
    leader.tick(65_000);
    assert!(leader.due(10).is_empty());
    assert_eq!(leader.remaining(1, 65_000), Some(5000 - STEP));
}

#[test]
fn an_end_is_proposed_again_only_while_the_lease_is_there() {
    let mut leader = empty();
    leader.promote(0);
    leader.apply(&LeaseChange::Granted(1, record(1)));
    pass(&mut leader, 0, 1000);
    assert_eq!(leader.due(10), [(1, 5)]);
    assert_eq!(leader.keep_alive(1, 1000), KeepAlive::Ending);
    pass(&mut leader, 1100, 3900);
    assert!(leader.due(10).is_empty());
    pass(&mut leader, 4000, 4000);
    assert_eq!(leader.due(10), [(1, 5)]);
    leader.apply(&LeaseChange::Ended(1));
    pass(&mut leader, 4100, 20_000);
    assert!(leader.due(10).is_empty());
    assert_eq!(leader.keep_alive(1, 20_000), KeepAlive::Gone);
}

#[test]
fn a_new_leader_waits_for_clients_to_find_it() {
    let mut follower = empty();
    follower.apply(&LeaseChange::Granted(1, record(1)));
    pass(&mut follower, 0, 2000);
    follower.promote(GRACE);
    assert!(follower.due(10).is_empty());
    pass(&mut follower, 2100, 2900);
    assert!(matches!(
        follower.keep_alive(1, 2900),
        KeepAlive::Renewed {
            ttl: 1,
            replicate_first: true,
            ..
        }
    ));
    pass(&mut follower, 3000, 3800);
    assert!(follower.due(10).is_empty());
    pass(&mut follower, 3900, 3900);
    assert_eq!(follower.due(10).len(), 1);
}

/// What may happen to a cluster of three.
#[derive(Debug, Clone)]
enum Step {
    /// Milliseconds pass, in ticks; each member hears of the log's tail or does not.
    Pass(u16, [bool; 3]),
    KeepAlive(i64),
    /// The renewal that is wanted is committed, or lost.
    Renewal(bool),
    Lead(usize),
    Restart(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1..40_u16, any::<[bool; 3]>()).prop_map(|(ticks, hear)| Step::Pass(ticks * 100, hear)),
        4 => (1..4_i64).prop_map(Step::KeepAlive),
        4 => any::<bool>().prop_map(Step::Renewal),
        1 => (0..3_usize).prop_map(Step::Lead),
        1 => (0..3_usize).prop_map(Step::Restart),
    ]
}

/// Three lessors over one log; what clients were promised.
struct Model {
    now: u64,
    log: Vec<LeaseChange>,
    lessors: Vec<Lessor>,
    applied: [usize; 3],
    leader: usize,
    wanted: Vec<i64>,
    waiting: Vec<i64>,
    promised: BTreeMap<i64, u64>,
}

impl Model {
    fn hear(&mut self, at: usize) {
        for change in &self.log[self.applied[at]..] {
            self.lessors[at].apply(change);
        }
        self.applied[at] = self.log.len();
    }

    fn tick(&mut self, hear: [bool; 3]) {
        self.now += 100;
        for lessor in &mut self.lessors {
            lessor.tick(self.now);
        }
        let checkpoints = self.lessors[self.leader].checkpoints(10);
        self.log.extend(
            checkpoints
                .into_iter()
                .map(|(id, remaining)| LeaseChange::Checkpoint(id, remaining)),
        );
        for (id, _) in self.lessors[self.leader].due(10) {
            let promised = self.promised.remove(&id).unwrap();
            assert!(
                promised <= self.now,
                "lease {id} was promised until {promised}, ends at {}",
                self.now
            );
            self.log.push(LeaseChange::Ended(id));
        }
        for (at, hears) in hear.into_iter().enumerate() {
            if hears || at == self.leader {
                self.hear(at);
            }
        }
    }

    fn renewal(&mut self, committed: bool) {
        let proposed = self.now;
        let wanted = std::mem::take(&mut self.wanted);
        let waiting = std::mem::take(&mut self.waiting);
        if !committed {
            return;
        }
        self.log
            .extend(wanted.iter().map(|id| LeaseChange::Renewed(*id)));
        self.hear(self.leader);
        for id in wanted {
            self.lessors[self.leader].cover(id, proposed);
        }
        for id in waiting {
            let renewed = self.lessors[self.leader].keep_alive(id, proposed);
            if let KeepAlive::Renewed { ttl, .. } = renewed {
                let until = proposed + u64::try_from(ttl).unwrap() * 1000;
                let promised = self.promised.get_mut(&id).unwrap();
                *promised = until.max(*promised);
            }
        }
    }

    fn keep_alive(&mut self, id: i64) {
        let renewed = self.lessors[self.leader].keep_alive(id, self.now);
        let KeepAlive::Renewed {
            ttl,
            replicate_first,
            replicate,
        } = renewed
        else {
            return;
        };
        if replicate {
            self.wanted.push(id);
        }
        if replicate_first {
            self.waiting.push(id);
        } else {
            let until = self.now + u64::try_from(ttl).unwrap() * 1000;
            let promised = self.promised.get_mut(&id).unwrap();
            *promised = until.max(*promised);
        }
    }

    fn lead(&mut self, leader: usize) {
        self.renewal(false);
        self.lessors[self.leader].demote();
        self.leader = leader;
        self.hear(leader);
        self.lessors[leader].promote(GRACE);
    }

    /// What a restarted member has: as its keyspace, replayed.
    fn restart(&mut self, at: usize) {
        if at == self.leader {
            self.lead((at + 1) % 3);
        }
        let mut records = BTreeMap::new();
        for change in &self.log[..self.applied[at]] {
            match change {
                LeaseChange::Granted(id, record) => drop(records.insert(*id, *record)),
                LeaseChange::Ended(id) => drop(records.remove(id)),
                LeaseChange::Renewed(id) => {
                    if let Some(record) = records.get_mut(id) {
                        record.remaining = 0;
                    }
                }
                LeaseChange::Checkpoint(id, left) => {
                    if let Some(record) = records.get_mut(id) {
                        record.remaining = *left;
                    }
                }
            }
        }
        self.lessors[at] = Lessor::new(records, STEP);
        self.lessors[at].tick(self.now);
    }
}

proptest! {
    /// Whatever happens, no leader ends a lease before the time that its client was promised.
    #[test]
    fn no_lease_ends_early(steps in prop::collection::vec(step(), 1..60)) {
        let mut model = Model {
            now: 0,
            log: [(1, 2), (2, 8), (3, 30)]
                .map(|(id, ttl)| LeaseChange::Granted(id, record(ttl)))
                .into(),
            lessors: (0..3).map(|_| empty()).collect(),
            applied: [0; 3],
            leader: 0,
            wanted: Vec::new(),
            waiting: Vec::new(),
            promised: [(1, 2000), (2, 8000), (3, 30_000)].into(),
        };
        model.lead(0);
        for step in steps {
            match step {
                Step::Pass(time, hear) => (0..time / 100).for_each(|_| model.tick(hear)),
                Step::KeepAlive(id) => model.keep_alive(id),
                Step::Renewal(committed) => model.renewal(committed),
                Step::Lead(leader) => model.lead(leader),
                Step::Restart(at) => model.restart(at),
            }
        }
        // With nobody left who renews, every lease ends, in time.
        let longest = model.promised.values().max().copied().unwrap_or(0);
        let slack = COVER_MS + GRACE + STEP;
        let end = longest.max(model.now) + slack + 31_000;
        while model.now < end {
            model.tick([true; 3]);
        }
        prop_assert!(model.promised.is_empty(), "{:?} at {}", model.promised, model.now);
    }
}
