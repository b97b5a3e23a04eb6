//! Three replicas, a leader that is cut off, and leases that the next one keeps alive meanwhile.

#![allow(clippy::unwrap_used)] // A test that can't go on panics.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use keelson_etcd_api::etcdserverpb as pb;
use keelson_member::command::Operation;
use keelson_member::disk::{Disk, Folder};
use keelson_member::keyspace::Member as MemberInfo;
use keelson_member::replica::{Answer, Effect, Input, Replica, ReplicaOptions, RequestId};
use keelson_member::{Limits, Member, MemberOptions, PeerMessage, Start};
use tempfile::TempDir;

const TICK_MS: u64 = 100;
const ELECTION_TICKS: u32 = 10;
const TTL_MS: u64 = 3000;

struct Cluster {
    _folders: Vec<TempDir>,
    replicas: BTreeMap<u64, Replica>,
    messages: VecDeque<PeerMessage>,
    /// Nothing goes to this member, and nothing comes from it.
    cut_off: Option<u64>,
    now: u64,
    next_request: u64,
    /// Keep-alives that are not answered: lease, and when it was called.
    asked: BTreeMap<RequestId, (i64, u64)>,
    /// By lease, the time before which it must not end.
    promised: BTreeMap<i64, u64>,
}

impl Cluster {
    fn new(seed: u64) -> Self {
        let mut folders = Vec::new();
        let mut replicas = BTreeMap::new();
        for id in 1..=3 {
            let folder = TempDir::new().unwrap();
            let disk: Arc<dyn Disk> = Arc::new(Folder::open(folder.path()).unwrap());
            let members = (1..=3).map(|id| MemberInfo {
                id,
                ..MemberInfo::default()
            });
            let options = MemberOptions {
                cluster_id: 1,
                id,
                start: Start::New(members.collect()),
                election_ticks: ELECTION_TICKS as usize,
                seed: seed * 8 + id * 2,
                cache_bytes: 64 << 10,
                limits: Limits {
                    segment_bytes: 64 << 10,
                    ..Limits::default()
                },
            };
            let options_of_replica = ReplicaOptions {
                tick_ms: TICK_MS,
                election_ticks: ELECTION_TICKS,
                id_prefix: u32::try_from(id).unwrap(),
            };
            let member = Member::open(&disk, &options).unwrap();
            replicas.insert(id, Replica::new(member, options_of_replica));
            folders.push(folder);
        }
        Self {
            _folders: folders,
            replicas,
            messages: VecDeque::new(),
            cut_off: None,
            now: 0,
            next_request: 0,
            asked: BTreeMap::new(),
            promised: BTreeMap::new(),
        }
    }

    /// The leader that the members which are not cut off follow.
    fn leader(&self) -> Option<u64> {
        let reachable = |id: &u64| self.cut_off != Some(*id);
        let mut leaders = self
            .replicas
            .iter()
            .filter(|(id, replica)| reachable(id) && replica.status().is_leader);
        leaders.next().map(|(id, _)| *id)
    }

    fn input(&mut self, to: u64, input: Input) {
        let mut effects = Vec::new();
        let replica = self.replicas.get_mut(&to).unwrap();
        let emit = &mut |effect| effects.push(effect);
        replica.handle(input, self.now, emit).unwrap();
        replica.advance(self.now, emit).unwrap();
        self.take(effects);
    }

    fn grant(&mut self, to: u64, id: i64) {
        self.next_request += 1;
        let grant = pb::LeaseGrantRequest {
            id,
            ttl: i64::try_from(TTL_MS / 1000).unwrap(),
        };
        let request = RequestId(self.next_request);
        self.input(
            to,
            Input::Propose(request, Operation::LeaseGrant(grant), None),
        );
        self.deliver();
    }

    fn keep_alive(&mut self, to: u64, id: i64) {
        self.next_request += 1;
        let request = RequestId(self.next_request);
        self.asked.insert(request, (id, self.now));
        self.input(to, Input::RenewLease(request, id));
    }

    /// A tick passes everywhere, and messages arrive until there are no more.
    fn tick(&mut self) {
        self.now += TICK_MS;
        let mut effects = Vec::new();
        for replica in self.replicas.values_mut() {
            replica.tick(self.now, &|_| true).unwrap();
            let emit = &mut |effect| effects.push(effect);
            replica.advance(self.now, emit).unwrap();
        }
        self.take(effects);
        self.deliver();
        self.check();
    }

    fn deliver(&mut self) {
        while let Some(message) = self.messages.pop_front() {
            let ends = [Some(message.from), Some(message.to)];
            if !ends.contains(&self.cut_off) {
                self.input(message.to, Input::Message(message));
            }
        }
    }

    fn take(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Send(message) => self.messages.push_back(message),
                Effect::Answer(request, Answer::Renewed(outcome)) => {
                    let (id, called) = self.asked.remove(&request).unwrap();
                    if let Ok(Some(_)) = outcome {
                        self.promised.insert(id, called + TTL_MS);
                    }
                }
                _ => {}
            }
        }
    }

    /// No lease is gone before its time.
    fn check(&self) {
        for (id, until) in &self.promised {
            for (member, replica) in &self.replicas {
                assert!(
                    self.now >= *until || replica.keyspace().lease(*id).is_some(),
                    "lease {id} is gone on member {member} at {}, promised until {until}",
                    self.now
                );
            }
        }
    }
}

/// The former leader's clock says that leases are over, one of them in the very tick in which it
/// steps down, while the next leader keeps them alive. What the former one decided must not reach
/// the next when they are together again.
#[test]
fn a_leader_that_steps_down_ends_no_leases() {
    for seed in 1..=8 {
        let mut cluster = Cluster::new(seed);
        while cluster.leader().is_none() {
            cluster.tick();
        }
        for _ in 0..10 {
            cluster.tick();
        }
        let former = cluster.leader().unwrap();
        let ids = 1..=20;
        for id in ids.clone() {
            cluster.grant(former, id);
            cluster.tick();
        }
        cluster.cut_off = Some(former);
        let leads = |cluster: &Cluster| cluster.replicas[&former].status().is_leader;
        for _ in 0..200 {
            if !leads(&cluster) && cluster.leader().is_some() {
                break;
            }
            cluster.tick();
            if let Some(next) = cluster.leader() {
                ids.clone().for_each(|id| cluster.keep_alive(next, id));
            }
        }
        for _ in 0..5 {
            let next = cluster.leader().unwrap();
            ids.clone().for_each(|id| cluster.keep_alive(next, id));
            cluster.tick();
        }
        let kept = cluster.promised.len();
        assert!(kept >= 10, "seed {seed}: only {kept} leases were kept");
        cluster.cut_off = None;
        for _ in 0..20 {
            cluster.tick();
        }
    }
}
