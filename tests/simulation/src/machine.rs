//! Machines and their processes: the part of `keelson-state` that is threads and a clock there.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use keelson_member::command::Operation;
use keelson_member::disk::Disk;
use keelson_member::keyspace::Member as MemberInfo;
use keelson_member::rebuild::{self, Opening};
use keelson_member::replica::{
    Effect, Input, Job, Maintenance, Replica, ReplicaOptions, RequestId, Wanted,
};
use keelson_member::{Identity, MemberError, MemberOptions, Start};

use crate::clock::Clock;
use crate::disk::{Loss, SimulatedDisk};
use crate::rebuild::Rebuilding;
use crate::server::Pending;
use crate::settings::{ELECTION_TICKS, MILLISECOND, Plant, SECOND, SERVER_TIMEOUT, TICK};
use crate::watcher::Session;
use crate::world::{CLUSTER, Caller, Happening, World};

/// Memory for the storage engine's cache.
const CACHE_BYTES: usize = 256 * 1024;

/// A place where a member may be, known by its URL.
pub(crate) struct Machine {
    pub(crate) url: String,
    pub(crate) disk: SimulatedDisk,
    pub(crate) clock: Clock,
    /// The member that is to run here; 0 if there is none.
    pub(crate) member: u64,
    /// How the member begins, for as long as its disk does not say.
    start: Start,
    pub(crate) process: Option<Process>,
    /// Times that a process was started here.
    pub(crate) boot: u64,
    /// What its disk loses before the next start.
    loss: Loss,
    /// It was found damaged, and is not rebuilt yet.
    pub(crate) damaged: bool,
    pub(crate) rebuilding: Option<Rebuilding>,
}

/// A running member.
pub(crate) struct Process {
    pub(crate) replica: Replica,
    maintenance: Maintenance,
    jobs: VecDeque<Job>,
    inbox: Vec<Input>,
    run_planned: bool,
    /// Its thread is in a call until then.
    busy_until: u64,
    pub(crate) requests: BTreeMap<RequestId, Pending>,
    next_request: u64,
    /// By watcher.
    pub(crate) sessions: BTreeMap<usize, Session>,
    /// Where members were when they sent something.
    pub(crate) heard: BTreeMap<u64, usize>,
    /// The number of the snapshot that is being received.
    pub(crate) receiving: Option<u64>,
}

impl Machine {
    /// Whether a process runs.
    pub(crate) fn is_up(&self) -> bool {
        self.process.is_some() || self.rebuilding.is_some()
    }
}

impl Process {
    /// A number for a request of this process.
    pub(crate) fn request(&mut self, pending: Pending) -> RequestId {
        self.next_request += 1;
        let id = RequestId(self.next_request);
        self.requests.insert(id, pending);
        id
    }

    /// What the cluster knows of a member that is at this URL.
    fn knows(&self, id: u64) -> Option<MemberInfo> {
        let members = self.replica.keyspace().metadata().members;
        members.into_iter().find(|member| member.id == id)
    }
}

impl World {
    /// The first members, on the first machines; some more machines are empty.
    pub(crate) fn found(&mut self, members: usize) {
        for number in 0..members + 3 {
            let disk = SimulatedDisk::new(self.random.fork());
            disk.set_lie(self.settings.lie());
            let drift = i64::try_from(self.random.below(401)).unwrap_or(0) - 200;
            self.machines.push(Machine {
                url: format!("http://m{number}:2380"),
                disk,
                clock: Clock::new(self.random.below(1000 * SECOND), drift),
                member: 0,
                start: Start::Continue,
                process: None,
                boot: 0,
                loss: Loss::Nothing,
                damaged: false,
                rebuilding: None,
            });
        }
        let founders: Vec<MemberInfo> = (0..members)
            .map(|number| MemberInfo {
                id: number as u64 + 1,
                name: format!("m{number}"),
                peer_urls: vec![self.machines[number].url.clone()],
                ..MemberInfo::default()
            })
            .collect();
        for (number, founder) in founders.iter().enumerate() {
            self.provision(number, founder.id, Start::New(founders.clone()));
        }
    }

    /// A machine gets an empty disk and a member to run.
    pub(crate) fn provision(&mut self, number: usize, member: u64, start: Start) {
        self.note(format_args!("m{number} is to run member {member:x}"));
        let disk = SimulatedDisk::new(self.random.fork());
        disk.set_lie(self.settings.lie());
        let machine = &mut self.machines[number];
        machine.disk = disk;
        machine.member = member;
        machine.start = start;
        machine.damaged = false;
        machine.rebuilding = None;
        machine.loss = Loss::Nothing;
        let delay = self.random.between(1, 500) * MILLISECOND;
        self.plan(delay, Happening::Start(number));
    }

    /// A process starts, if the machine is to run a member and has none.
    pub(crate) fn start(&mut self, number: usize) {
        let machine = &mut self.machines[number];
        if machine.member == 0 || machine.is_up() {
            return;
        }
        machine.disk.boot(machine.loss);
        machine.loss = Loss::Nothing;
        machine.boot += 1;
        let boot = machine.boot;
        self.note(format_args!("m{number} starts"));
        let seed = self.random.number();
        let id_prefix = u32::try_from(self.random.below(1 << 32)).unwrap_or(0);
        match self.open(number, seed) {
            Ok((identity, Opening::Damaged(reason))) => {
                self.begin_rebuild(number, identity, &reason);
            }
            Ok((_, Opening::Whole(member))) => {
                let options = ReplicaOptions {
                    tick_ms: TICK / 1000,
                    election_ticks: ELECTION_TICKS,
                    id_prefix,
                };
                let machine = &mut self.machines[number];
                let elapsed = machine.disk.take_elapsed();
                machine.process = Some(Process {
                    replica: Replica::new(*member, options),
                    maintenance: Maintenance::new(id_prefix),
                    jobs: VecDeque::new(),
                    inbox: Vec::new(),
                    run_planned: true,
                    busy_until: self.now + elapsed,
                    requests: BTreeMap::new(),
                    next_request: 0,
                    sessions: BTreeMap::new(),
                    heard: BTreeMap::new(),
                    receiving: None,
                });
                self.plan(elapsed, Happening::Run(number, boot));
                let phase = self.random.below(TICK);
                self.plan(elapsed + phase, Happening::Tick(number, boot));
                self.plan(elapsed, Happening::Introduce(number, boot));
            }
            Err(error) => self.process_failed(number, &error),
        }
    }

    fn open(&mut self, number: usize, seed: u64) -> Result<(Identity, Opening), MemberError> {
        let limits = self.settings.limits;
        let others = self.machines.iter().filter(|machine| machine.member != 0);
        let others = others.count() > 1;
        let machine = &self.machines[number];
        let disk: Arc<dyn Disk> = Arc::new(machine.disk.clone());
        let stored = match Identity::load(&*disk) {
            Err(error) if error.is_damage() && machine.disk.has_flipped_bits() => {
                let identity = self.empty_folder(number)?;
                return Ok((identity, Opening::Damaged(error.to_string())));
            }
            stored => stored?,
        };
        let (identity, start) = if let Some(identity) = stored.filter(Identity::has_begun) {
            (identity, Start::Continue)
        } else {
            let identity = Identity::new(CLUSTER, machine.member);
            identity.beginning().store(&*disk)?;
            (identity, machine.start.clone())
        };
        let begins = !matches!(start, Start::Continue);
        let options = MemberOptions {
            cluster_id: identity.cluster_id,
            id: identity.member_id,
            start,
            election_ticks: ELECTION_TICKS as usize,
            seed,
            cache_bytes: CACHE_BYTES,
            limits,
        };
        let opening = rebuild::open(&disk, &options, others)?;
        if begins && matches!(opening, Opening::Whole(_)) {
            identity.store(&*disk)?;
        }
        Ok((identity, opening))
    }

    /// The running process of this boot.
    pub(crate) fn process(&mut self, number: usize, boot: u64) -> Option<&mut Process> {
        let machine = &mut self.machines[number];
        machine.process.as_mut().filter(|_| machine.boot == boot)
    }

    /// A process is told something.
    pub(crate) fn input(&mut self, number: usize, boot: u64, input: Input) {
        let now = self.now;
        let Some(process) = self.process(number, boot) else {
            return;
        };
        process.inbox.push(input);
        if !process.run_planned {
            process.run_planned = true;
            let delay = process.busy_until.saturating_sub(now);
            self.plan(delay, Happening::Run(number, boot));
        }
    }

    pub(crate) fn run_process(&mut self, number: usize, boot: u64) {
        let now = self.now;
        let Some(process) = self.process(number, boot) else {
            return;
        };
        if process.busy_until > now {
            let delay = process.busy_until - now;
            self.plan(delay, Happening::Run(number, boot));
            return;
        }
        process.run_planned = false;
        let inbox = std::mem::take(&mut process.inbox);
        self.drive(number, boot, inbox, false);
    }

    pub(crate) fn tick(&mut self, number: usize, boot: u64) {
        let now = self.now;
        let Some(process) = self.process(number, boot) else {
            return;
        };
        if process.busy_until > now {
            let delay = process.busy_until - now;
            self.plan(delay, Happening::Tick(number, boot));
            return;
        }
        self.expire_requests(number, boot);
        if let Some(process) = self.process(number, boot) {
            let inbox = std::mem::take(&mut process.inbox);
            self.drive(number, boot, inbox, true);
        }
        self.plan(TICK, Happening::Tick(number, boot));
    }

    /// Does what the driver's thread does in one round.
    fn drive(&mut self, number: usize, boot: u64, inbox: Vec<Input>, tick: bool) {
        let machine = &mut self.machines[number];
        let clock = machine.clock.milliseconds(self.now);
        let Some(process) = &mut machine.process else {
            return;
        };
        let disk = machine.disk.clone();
        disk.take_elapsed();
        let mut effects = Vec::new();
        let mut emit = |effect| effects.push((disk.elapsed(), effect));
        let replica = &mut process.replica;
        let mut outcome = Ok(());
        for input in inbox {
            outcome = outcome.and_then(|()| replica.handle(input, clock, &mut emit));
        }
        if tick {
            let requests = &process.requests;
            outcome = outcome
                .and_then(|()| replica.tick(clock, &|request| requests.contains_key(&request)));
        }
        outcome = outcome.and_then(|()| replica.advance(clock, &mut emit));
        let elapsed = disk.take_elapsed();
        process.busy_until = self.now + elapsed;
        for (offset, effect) in effects {
            self.perform(number, boot, offset, effect);
        }
        if let Err(error) = outcome {
            self.process_failed(number, &error);
        } else {
            self.wake_sessions(number, boot);
        }
    }

    fn perform(&mut self, number: usize, boot: u64, offset: u64, effect: Effect) {
        match effect {
            Effect::Status(status) => {
                self.note(format_args!("m{number} {status:?}"));
                if status.is_leader && self.settings.plant == Some(Plant::RevokeLeasesOnElection) {
                    self.revoke_all_leases(number, boot);
                }
            }
            Effect::Send(message) => self.send(number, offset, message),
            Effect::Answer(request, answer) => {
                self.plan(
                    offset + 10,
                    Happening::Answer(number, boot, request, Box::new(answer)),
                );
            }
            Effect::Maintain(wanted) => self.maintain(number, boot, offset, wanted),
        }
    }

    fn maintain(&mut self, number: usize, boot: u64, offset: u64, wanted: Wanted) {
        let delay = offset + self.random.between(1, 20) * MILLISECOND;
        let Some(process) = self.process(number, boot) else {
            return;
        };
        if !process.jobs.is_empty() {
            return; // it is at work, and is told again at the next tick
        }
        let keyspace = Arc::clone(process.replica.keyspace());
        process.jobs = process.maintenance.plan(wanted, &keyspace).into();
        if !process.jobs.is_empty() {
            self.plan(delay, Happening::Job(number, boot));
        }
    }

    pub(crate) fn run_job(&mut self, number: usize, boot: u64) {
        let machine = &mut self.machines[number];
        let disk = machine.disk.clone();
        let Some(process) = machine.process.as_mut().filter(|_| machine.boot == boot) else {
            return;
        };
        let Some(job) = process.jobs.pop_front() else {
            return;
        };
        let what = match &job {
            Job::Flush(_) => "flushes",
            Job::PrepareSpare(_) => "prepares a file",
            Job::ClearCompacted(_) => "removes compacted versions",
            Job::Verify(_) => "verifies blocks",
        };
        let keyspace = Arc::clone(process.replica.keyspace());
        disk.take_elapsed();
        let outcome = process.maintenance.run(job, &keyspace, &disk);
        let elapsed = disk.take_elapsed();
        let more = !process.jobs.is_empty();
        self.note(format_args!("m{number} {what}"));
        match outcome {
            Ok(Some(input)) => {
                self.plan(elapsed, Happening::Input(number, boot, Box::new(input)));
            }
            Ok(None) => {}
            Err(error) => {
                self.process_failed(number, &error);
                return;
            }
        }
        if more {
            let delay = elapsed + self.random.between(0, 5) * MILLISECOND;
            self.plan(delay, Happening::Job(number, boot));
        }
    }

    /// Until the cluster has heard this member's name, it says it.
    pub(crate) fn introduce(&mut self, number: usize, boot: u64) {
        let member = self.machines[number].member;
        let deadline = self.now + SERVER_TIMEOUT;
        let Some(process) = self.process(number, boot) else {
            return;
        };
        if let Some(known) = process.knows(member)
            && known.name.is_empty()
        {
            let described = MemberInfo {
                id: member,
                name: format!("m{number}"),
                ..MemberInfo::default()
            };
            let request = process.request(Pending::unheard(deadline));
            let input = Input::Propose(request, Operation::Member(described), None);
            self.input(number, boot, input);
        }
        self.plan(SECOND, Happening::Introduce(number, boot));
    }

    /// A process has ended by itself: because the power was lost, or for a reason.
    pub(crate) fn process_failed(&mut self, number: usize, error: &MemberError) {
        self.note(format_args!("m{number} ends: {error}"));
        let machine = &self.machines[number];
        if machine.disk.is_stopped() {
            let loss = *self.random.pick(&[Loss::Some, Loss::Some, Loss::Unsynced]);
            self.crash(number, loss);
            return;
        }
        if matches!(error, MemberError::Removed) {
            self.crash(number, Loss::Nothing);
            self.machines[number].member = 0;
            return;
        }
        if machine.disk.is_full() {
            self.crash(number, Loss::Nothing);
        } else if error.is_damage() && self.is_damaged(number) {
            // A server that is damaged starts anew in the same process.
            let noted = rebuild::note(&self.machines[number].disk, error, true);
            match noted {
                Ok(()) => self.crash(number, Loss::Nothing),
                Err(error) => self.process_failed(number, &error),
            }
        } else {
            self.fail(format!("m{number} ended: {error}"));
        }
    }

    /// A process ends at once; what waits for it hears so. It starts again a while later.
    pub(crate) fn crash(&mut self, number: usize, loss: Loss) {
        let machine = &mut self.machines[number];
        // What is dropped must not write any more.
        machine.disk.stop();
        machine.rebuilding = None;
        machine.loss = loss;
        let Some(process) = machine.process.take() else {
            let delay = self.random.between(100, 3000) * MILLISECOND;
            self.plan(delay, Happening::Start(number));
            return;
        };
        self.note(format_args!("m{number} is down, its disk loses: {loss:?}"));
        self.counts.crashes += 1;
        let callers: Vec<Caller> = process
            .requests
            .values()
            .map(|pending| pending.caller)
            .collect();
        for caller in callers {
            self.connection_lost(caller);
        }
        let watchers: Vec<usize> = process.sessions.keys().copied().collect();
        for watcher in watchers {
            self.stream_lost(watcher);
        }
        drop(process);
        let delay = self.random.between(100, 3000) * MILLISECOND;
        self.plan(delay, Happening::Start(number));
    }

    /// A process does nothing for a while.
    pub(crate) fn pause(&mut self, number: usize, microseconds: u64) {
        let now = self.now;
        if let Some(process) = &mut self.machines[number].process {
            process.busy_until = process.busy_until.max(now + microseconds);
        }
    }
}
