//! Fleets on a simulated store, with clocks that drift, processes that pause, and messages that are late
//! or lost. Whatever happens, a disk has one writer at a time; when all is well again, every guest runs.
//!
//! What is simulated: time, the store's transactions and leases, processes. What is real: when guests are
//! killed ([`LeaseTerms`]), the guard's decisions, the scheduler's, and what hosts write into objects.

use std::collections::{BTreeMap, BinaryHeap};
use std::time::Duration;

use keelson_api::{Host, PlacementState, VirtualMachine};
use serde_json::json;

use super::claim::{claim, epoch_of, is_placed_on};
use super::guard::{Deadline, Step};
use super::scheduler::tests::{disk, guest};
use super::scheduler::{Decision, View};
use super::{Instant, LeaseTerms};

const HOSTS: usize = 3;
const GUESTS: usize = 4;
const TTL_MS: u64 = 10_000;
/// How long faults go on, and how long the fleet has to recover.
const FAULTS_MS: u64 = 120_000;
const RECOVERY_MS: u64 = 60_000;

/// What is wrong with a fleet on purpose, to see that it is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Planted {
    Nothing,
    /// The deadline counts from the answer, and has no margin.
    DeadlineFromAnswer,
    /// A host does not look at its lease before it starts a process.
    StartWithoutLook,
    /// It takes any lease that it has then for the one that it compared.
    StartOnAnotherLease,
    /// The scheduler moves also what its host may go on running.
    MoveHeld,
}

/// What happens at some time, to which host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// The agent sends a renewal, and looks at what it is to run.
    Agent(usize),
    /// A renewal, sent at this local time, is at the store.
    Renewal(usize, u64),
    /// The answer is at the agent.
    Renewed(usize, u64, u64),
    /// A claim of a guest is at the store: of which epoch, on which lease.
    Claim(usize, usize, Option<u64>, u64),
    /// The agent hears that its claim was granted.
    Granted(usize, usize, u64),
    /// The agent's process for the guest begins to run.
    Start(usize, usize),
    Guard(usize),
    /// A process that was killed is gone.
    Dead(usize, usize, u64),
    /// The scheduler on a host looks at what it knows, which may be old.
    Schedule(usize),
    /// Its decision is at the store.
    Write(usize, Box<(VirtualMachineBox, i64, DecisionBox, u64)>),
    Fault,
}

/// For the queue's order, which is by time and number alone.
#[derive(Clone, Debug)]
struct VirtualMachineBox(VirtualMachine);
#[derive(Clone, Debug)]
struct DecisionBox(Decision);

macro_rules! without_order {
    ($type:ident) => {
        impl PartialEq for $type {
            fn eq(&self, _: &Self) -> bool {
                true
            }
        }
        impl Eq for $type {}
        impl PartialOrd for $type {
            fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
                Some(self.cmp(other))
            }
        }
        impl Ord for $type {
            fn cmp(&self, _: &Self) -> std::cmp::Ordering {
                std::cmp::Ordering::Equal
            }
        }
    };
}
without_order!(VirtualMachineBox);
without_order!(DecisionBox);

#[derive(Debug)]
struct SimulatedHost {
    /// Local milliseconds at time zero, and local milliseconds in a million.
    offset: u64,
    rate: u64,
    /// Until when its agent does nothing, and until when no message passes.
    paused: u64,
    cut: u64,
    /// The lease that the agent believes in, and its local deadline.
    lease: Option<(u64, Instant)>,
    guard: Deadline,
    /// By guest: when the process was started, on which terms, and whether it is dying.
    processes: BTreeMap<usize, Process>,
    /// Guests that are being set up, each by the lease that its claim compared.
    starting: BTreeMap<usize, u64>,
    /// The store as this host's scheduler saw it last.
    view: View,
}

#[derive(Clone, Copy, Debug)]
struct Process {
    number: u64,
    leased: bool,
    dying: bool,
}

#[derive(Debug)]
struct Simulation {
    random: fastrand::Rng,
    planted: Planted,
    now: u64,
    numbers: u64,
    queue: BinaryHeap<std::cmp::Reverse<(u64, u64, Event)>>,
    hosts: Vec<SimulatedHost>,
    /// The store: objects with revisions, and for each host its lease's number and end.
    guests: Vec<(VirtualMachine, i64)>,
    leases: Vec<Option<(u64, u64)>>,
    revision: i64,
    /// The host that is elected, and the number of its term.
    elected: Option<(usize, u64)>,
    moves: u64,
}

impl Simulation {
    fn new(seed: u64, planted: Planted) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let hosts = (0..HOSTS).map(|_| SimulatedHost {
            offset: random.u64(0..100_000_000),
            // Half a percent; crystals are a hundred times better.
            rate: random.u64(995_000..=1_005_000),
            paused: 0,
            cut: 0,
            lease: None,
            guard: Deadline::new(Instant::since_boot(Duration::ZERO)),
            processes: BTreeMap::new(),
            starting: BTreeMap::new(),
            view: View::default(),
        });
        let hosts = hosts.collect();
        let guests = (0..GUESTS).map(|at| {
            // Every other one may run without its host's lease.
            let failover = if at % 2 == 0 { "Restart" } else { "Never" };
            let more = json!({
                "failover": failover,
                "disks": [{ "name": "a", "disk": format!("d{at}") }],
            });
            (guest(&format!("g{at}"), &more), 1)
        });
        let guests = guests.collect();
        let mut simulation = Self {
            random,
            planted,
            now: 0,
            numbers: 0,
            queue: BinaryHeap::new(),
            hosts,
            guests,
            leases: vec![None; HOSTS],
            revision: 1,
            elected: None,
            moves: 0,
        };
        for host in 0..HOSTS {
            simulation.after(host as u64, Event::Agent(host));
            simulation.after(500, Event::Schedule(host));
            simulation.after(1, Event::Guard(host));
        }
        simulation.after(5000, Event::Fault);
        simulation
    }

    fn after(&mut self, milliseconds: u64, event: Event) {
        self.numbers += 1;
        let at = self.now + milliseconds;
        self.queue
            .push(std::cmp::Reverse((at, self.numbers, event)));
    }

    fn local(&self, host: usize) -> Instant {
        let host = &self.hosts[host];
        // In microseconds, so that rates matter.
        let since = self.now * host.rate / 1000;
        Instant::since_boot(Duration::from_micros(host.offset * 1000 + since))
    }

    fn delay(&mut self) -> u64 {
        if self.random.u8(0..20) == 0 {
            self.random.u64(0..4000)
        } else {
            self.random.u64(1..40)
        }
    }

    fn is_cut(&self, host: usize) -> bool {
        self.hosts[host].cut > self.now
    }

    fn run(mut self) -> Result<u64, String> {
        while let Some(std::cmp::Reverse((at, _, event))) = self.queue.pop() {
            if at > FAULTS_MS + RECOVERY_MS {
                break;
            }
            self.now = at;
            self.expire();
            self.handle(event);
            self.check()?;
        }
        for (at, (guest, _)) in self.guests.iter().enumerate() {
            let running = self
                .hosts
                .iter()
                .filter(|host| host.processes.contains_key(&at));
            if running.count() != 1 {
                return Err(format!(
                    "{} does not run in the end: {:?}",
                    at, guest.status
                ));
            }
        }
        Ok(self.moves)
    }

    /// One writer for each guest's disk.
    fn check(&self) -> Result<(), String> {
        for guest in 0..GUESTS {
            let hosts: Vec<_> = (0..HOSTS)
                .filter(|host| self.hosts[*host].processes.contains_key(&guest))
                .collect();
            if hosts.len() > 1 {
                let placement = &self.guests[guest].0.status.placement;
                return Err(format!(
                    "at {} ms guest {guest} runs on {hosts:?}; {placement:?}",
                    self.now
                ));
            }
        }
        Ok(())
    }

    fn expire(&mut self) {
        for host in 0..HOSTS {
            if self.leases[host].is_some_and(|(_, end)| end <= self.now) {
                self.leases[host] = None;
                if self.elected.is_some_and(|(elected, _)| elected == host) {
                    self.elected = None;
                }
            }
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Agent(host) => self.agent(host),
            Event::Renewal(host, sent) => self.renewal(host, sent),
            Event::Renewed(host, lease, sent) => self.renewed(host, lease, sent),
            Event::Claim(host, guest, epoch, lease) => self.claim(host, guest, epoch, lease),
            Event::Granted(host, guest, lease) => self.granted(host, guest, lease),
            Event::Start(host, guest) => self.start(host, guest),
            Event::Guard(host) => self.guard(host),
            Event::Dead(host, guest, number) => {
                let processes = &mut self.hosts[host].processes;
                if processes
                    .get(&guest)
                    .is_some_and(|process| process.number == number)
                {
                    processes.remove(&guest);
                }
            }
            Event::Schedule(host) => self.schedule(host),
            Event::Write(host, write) => {
                let (guest, revision, decision, term) = *write;
                self.write(host, guest.0, revision, &decision.0, term);
            }
            Event::Fault => self.fault(),
        }
    }

    fn fault(&mut self) {
        if self.now < FAULTS_MS {
            let host = self.random.usize(0..HOSTS);
            let until = self.now + self.random.u64(100..30_000);
            match self.random.u8(0..4) {
                0 => self.hosts[host].cut = until,
                1 => self.hosts[host].paused = until,
                // It crashes: nothing is left of it for a while.
                2 => {
                    self.hosts[host].processes.clear();
                    self.hosts[host].starting.clear();
                    self.hosts[host].lease = None;
                    self.hosts[host].paused = until;
                }
                _ => {
                    self.hosts[host].paused = until;
                    self.hosts[host].cut = until;
                }
            }
            let next = self.random.u64(500..8000);
            self.after(next, Event::Fault);
        }
    }

    fn agent(&mut self, host: usize) {
        let paused = self.hosts[host].paused;
        if paused > self.now {
            // It goes on exactly where it was.
            self.after(paused - self.now, Event::Agent(host));
            return;
        }
        let sent = self.local(host).time_since_boot();
        let delay = self.delay();
        if !self.is_cut(host) {
            let sent = u64::try_from(sent.as_micros()).unwrap();
            self.after(delay, Event::Renewal(host, sent));
            self.look(host);
        }
        let interval = self.random.u64(1500..2500);
        self.after(interval, Event::Agent(host));
    }

    /// What an actor does: starts what is placed here, kills what isn't.
    fn look(&mut self, host: usize) {
        for guest in 0..GUESTS {
            let object = &self.guests[guest].0;
            let here = is_placed_on(object, &format!("h{host}"));
            let epoch = epoch_of(object);
            let process = self.hosts[host].processes.get(&guest).copied();
            if let Some(process) = process.filter(|process| !here && !process.dying) {
                self.kill(host, guest, process);
            }
            let starting = self.hosts[host].starting.contains_key(&guest);
            if here
                && process.is_none()
                && !starting
                && let Some((lease, _)) = self.hosts[host].lease
            {
                let delay = self.delay();
                self.after(delay, Event::Claim(host, guest, epoch, lease));
            }
        }
    }

    fn kill(&mut self, host: usize, guest: usize, process: Process) {
        let known = self.hosts[host].processes.get_mut(&guest);
        if let Some(known) = known {
            known.dying = true;
        }
        let takes = self.random.u64(0..300);
        self.after(takes, Event::Dead(host, guest, process.number));
    }

    fn renewal(&mut self, host: usize, sent: u64) {
        if self.is_cut(host) {
            return;
        }
        // One that ended is given anew: the host registers again.
        self.numbers += 1;
        let number = self.leases[host].map_or(self.numbers, |(number, _)| number);
        self.leases[host] = Some((number, self.now + TTL_MS));
        let delay = self.delay();
        self.after(delay, Event::Renewed(host, number, sent));
    }

    fn renewed(&mut self, host: usize, lease: u64, sent: u64) {
        let paused = self.hosts[host].paused;
        if paused > self.now {
            self.after(paused - self.now, Event::Renewed(host, lease, sent));
            return;
        }
        let terms = LeaseTerms::new(Duration::from_millis(TTL_MS));
        let deadline = match self.planted {
            Planted::DeadlineFromAnswer => self.local(host).plus(Duration::from_millis(TTL_MS)),
            _ => terms.deadline(Instant::since_boot(Duration::from_micros(sent))),
        };
        self.fence_if_due(host);
        let host = &mut self.hosts[host];
        host.guard.extend(deadline);
        let later = host.lease.is_none_or(|(_, known)| known < deadline);
        if later {
            host.lease = Some((lease, deadline));
        }
    }

    fn claim(&mut self, host: usize, guest: usize, epoch: Option<u64>, lease: u64) {
        if self.is_cut(host) {
            return;
        }
        let alive = self.leases[host].is_some_and(|(number, _)| number == lease);
        if !alive {
            return;
        }
        let (object, revision) = &mut self.guests[guest];
        let state = if guest.is_multiple_of(2) {
            PlacementState::Leased
        } else {
            PlacementState::Held
        };
        if claim(object, &format!("h{host}"), epoch, state) {
            self.revision += 1;
            *revision = self.revision;
            let delay = self.delay();
            self.after(delay, Event::Granted(host, guest, lease));
        }
    }

    fn granted(&mut self, host: usize, guest: usize, lease: u64) {
        let paused = self.hosts[host].paused;
        if paused > self.now {
            self.after(paused - self.now, Event::Granted(host, guest, lease));
            return;
        }
        if self.is_cut(host) || self.hosts[host].processes.contains_key(&guest) {
            return;
        }
        self.hosts[host].starting.insert(guest, lease);
        // Disk images are opened, devices are made.
        let takes = self.random.u64(10..3000);
        self.after(takes, Event::Start(host, guest));
    }

    fn start(&mut self, host: usize, guest: usize) {
        let paused = self.hosts[host].paused;
        if paused > self.now {
            self.after(paused - self.now, Event::Start(host, guest));
            return;
        }
        let Some(claimed) = self.hosts[host].starting.remove(&guest) else {
            return;
        };
        let leased = guest.is_multiple_of(2);
        let local = self.local(host);
        let holds = self.hosts[host].lease.is_some_and(|(lease, deadline)| {
            let same = lease == claimed || self.planted == Planted::StartOnAnotherLease;
            same && local < deadline
        });
        if leased && !holds && self.planted != Planted::StartWithoutLook {
            return;
        }
        self.numbers += 1;
        let process = Process {
            number: self.numbers,
            leased,
            dying: false,
        };
        self.hosts[host].processes.entry(guest).or_insert(process);
    }

    fn guard(&mut self, host: usize) {
        self.fence_if_due(host);
        // Its timer is late by as much as a loaded machine makes it.
        let again = self.random.u64(20..120);
        self.after(again, Event::Guard(host));
    }

    fn fence_if_due(&mut self, host: usize) {
        let now = self.local(host);
        if self.hosts[host].guard.step(now) == Step::Fence {
            let leased: Vec<_> = self.hosts[host]
                .processes
                .iter()
                .filter(|(_, process)| process.leased)
                .map(|(guest, process)| (*guest, *process))
                .collect();
            self.hosts[host].guard.fenced(now, !leased.is_empty());
            for (guest, process) in leased {
                if !process.dying {
                    self.kill(host, guest, process);
                }
            }
        }
    }

    fn schedule(&mut self, host: usize) {
        let again = self.random.u64(200..1500);
        self.after(again, Event::Schedule(host));
        if self.hosts[host].paused > self.now || self.is_cut(host) {
            return;
        }
        let Some((lease, _)) = self.leases[host] else {
            return;
        };
        let term = match self.elected {
            None => {
                self.elected = Some((host, lease));
                lease
            }
            Some((elected, term)) if elected == host => term,
            // Now and then it still believes in an office that it has lost.
            Some(_) if self.random.u8(0..4) == 0 => 0,
            Some(_) => return,
        };
        // What it knows may be old.
        if self.random.bool() {
            self.hosts[host].view = self.view();
        }
        let guest = self.random.usize(0..GUESTS);
        let name = format!("g{guest}");
        let view = &self.hosts[host].view;
        let Some((object, revision)) = view.guest(&name).cloned() else {
            return;
        };
        let mut decision = view.decide(&name);
        if self.planted == Planted::MoveHeld && matches!(decision, Decision::Stay { .. }) {
            let placement = object.status.placement.clone().unwrap();
            let mut hosts = (0..HOSTS).map(|at| format!("h{at}"));
            let to = hosts.rfind(|to| view.is_alive(to));
            decision = Decision::Place {
                host: to.unwrap_or_default(),
                lost: Some(placement.host),
            };
        }
        let after = decision.carry_out(&object);
        if after != object {
            let delay = self.delay();
            let write = (
                VirtualMachineBox(after),
                revision,
                DecisionBox(decision),
                term,
            );
            self.after(delay, Event::Write(host, Box::new(write)));
        }
    }

    fn view(&self) -> View {
        let mut view = View::default();
        for host in 0..HOSTS {
            let name = format!("h{host}");
            let object = json!({
                "apiVersion": keelson_api::API_VERSION, "kind": "Host",
                "metadata": { "name": name },
                "status": {
                    "version": "", "kernel": "", "conditions": [],
                    "allocatable": { "cpus": 99, "memory": "99Gi", "disk": "0Mi" },
                },
            });
            let object: Host = serde_json::from_value(object).unwrap();
            view.set_host(object);
            view.set_alive(&name, self.leases[host].is_some());
        }
        for (at, (guest, revision)) in self.guests.iter().enumerate() {
            view.set_disk(&format!("d{at}"), disk(true, None));
            view.set_guest(guest.clone(), *revision);
        }
        view
    }

    /// A transaction of the scheduler, with what the real one compares.
    fn write(
        &mut self,
        from: usize,
        after: VirtualMachine,
        revision: i64,
        decision: &Decision,
        term: u64,
    ) {
        let number = |name: &str| name.trim_start_matches('h').parse::<usize>().unwrap();
        let alive = |name: &str| self.leases[number(name)].is_some();
        let compares = match decision {
            Decision::Place { host, lost } => {
                let ended = lost.as_deref().is_none_or(|lost| !alive(lost));
                alive(host) && ended
            }
            Decision::Wait {
                lost: Some(host), ..
            }
            | Decision::Stay { host, .. } => !alive(host),
            _ => true,
        };
        let at = after
            .metadata
            .name
            .trim_start_matches('g')
            .parse::<usize>()
            .unwrap();
        let in_office = self.elected == Some((from, term));
        if self.is_cut(from) || !in_office || !compares || self.guests[at].1 != revision {
            return;
        }
        self.moves += u64::from(matches!(decision, Decision::Place { lost: Some(_), .. }));
        self.revision += 1;
        self.guests[at] = (after, self.revision);
    }
}

fn seeds() -> std::ops::Range<u64> {
    let count = std::env::var("KEELSON_SEEDS").ok();
    0..count.and_then(|count| count.parse().ok()).unwrap_or(100)
}

#[test]
fn a_disk_has_one_writer_and_every_guest_runs_in_the_end() {
    let mut moves = 0;
    for seed in seeds() {
        match Simulation::new(seed, Planted::Nothing).run() {
            Ok(count) => moves += count,
            Err(error) => panic!("seed {seed}: {error}"),
        }
    }
    assert!(moves > 50, "only {moves} guests failed over");
}

#[test]
fn what_is_wrong_on_purpose_is_found() {
    for planted in [
        Planted::DeadlineFromAnswer,
        Planted::StartWithoutLook,
        Planted::StartOnAnotherLease,
        Planted::MoveHeld,
    ] {
        let found = (0..300).find(|seed| Simulation::new(*seed, planted).run().is_err());
        assert!(found.is_some(), "{planted:?} is not found in 300 seeds");
        println!("{planted:?}: seed {}", found.unwrap_or_default());
    }
}
