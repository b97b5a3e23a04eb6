//! Fleets on a simulated store, with clocks that drift, processes that pause, and messages that are late
//! or lost; guests move while they run. Whatever happens, a disk has one writer at a time; when all is well
//! again, every guest runs, and no move is under way.
//!
//! What is simulated: time, the store's transactions and leases, processes, what agents send each other. What
//! is real: when guests are killed ([`LeaseTerms`]), the guard's decisions, the scheduler's, what hosts write
//! into objects, and what a move makes of them.

mod actor;
mod event;
mod faults;
mod host;
mod migration;
mod schedule;
mod store;

use std::time::Duration;

use keelson_api::VirtualMachine;
use serde_json::json;

use self::event::{Event, Queue};
use self::host::{Process, SimulatedHost};
use self::store::Ticket;
use super::scheduler::tests::guest;
use super::{Instant, LeaseTerms};
use crate::migration::transitions;

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
    /// A source that does not know whether it has handed a guest over lets it go on, and writes that into the
    /// object then.
    GoOnBeforeSaying,
    /// A destination lets a guest go on when all of it is there, wherever it is placed.
    LandBeforePlaced,
}

#[derive(Debug)]
struct Simulation {
    random: fastrand::Rng,
    planted: Planted,
    now: u64,
    numbers: u64,
    queue: Queue,
    hosts: Vec<SimulatedHost>,
    /// The store: objects with revisions, for each host its lease's number and end, and for each guest what
    /// its destination left for its source.
    guests: Vec<(VirtualMachine, i64)>,
    leases: Vec<Option<(u64, u64)>>,
    tickets: Vec<Option<Ticket>>,
    revision: i64,
    /// The host that is elected, and the number of its term.
    elected: Option<(usize, u64)>,
    counts: Counts,
}

/// What has happened, to see that it does.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    /// Guests that were placed elsewhere, since their host was lost.
    failovers: u64,
    /// Guests that were handed over while they stood still, and those of them that went on.
    handed_over: u64,
    landed: u64,
    /// Guests that were released, and went on where they were.
    taken_back: u64,
}

impl Simulation {
    fn new(seed: u64, planted: Planted) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let hosts = (0..HOSTS)
            .map(|host| SimulatedHost::new(&host_name(host), &mut random))
            .collect();
        let guests = (0..GUESTS).map(|at| {
            // Every other one may run without its host's lease.
            let failover = if is_leasable(at) { "Restart" } else { "Never" };
            let more = json!({
                "failover": failover,
                "disks": [{ "name": "a", "disk": format!("d{at}") }],
            });
            (guest(&format!("g{at}"), &more), 1)
        });
        let mut simulation = Self {
            random,
            planted,
            now: 0,
            numbers: 0,
            queue: Queue::default(),
            hosts,
            guests: guests.collect(),
            leases: vec![None; HOSTS],
            tickets: vec![None; GUESTS],
            revision: 1,
            elected: None,
            counts: Counts::default(),
        };
        for host in 0..HOSTS {
            simulation.after(host as u64, Event::Agent(host));
            simulation.after(500, Event::Schedule(host));
            simulation.after(1, Event::Guard(host));
        }
        simulation.after(3000, Event::Operator);
        simulation.after(5000, Event::Fault);
        simulation
    }

    fn after(&mut self, milliseconds: u64, event: Event) {
        self.queue.push(self.now + milliseconds, event);
    }

    fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
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

    fn run(mut self) -> Result<Counts, String> {
        while let Some((at, event)) = self.queue.pop() {
            if at > FAULTS_MS + RECOVERY_MS {
                break;
            }
            self.now = at;
            self.expire();
            self.handle(event);
            self.check()?;
        }
        for (at, (guest, _)) in self.guests.iter().enumerate() {
            let processes = self.hosts.iter().map(|host| host.processes.get(&at));
            let running = processes.filter(|process| process.is_some_and(Process::writes));
            if running.count() != 1 {
                return Err(format!(
                    "{at} does not run in the end: {:?}; {:?}",
                    guest.status, self.hosts
                ));
            }
            if let Some(active) = transitions::active(guest) {
                return Err(format!("{at} moves for ever: {active:?}"));
            }
        }
        Ok(self.counts)
    }

    /// One writer for each guest's disk.
    fn check(&self) -> Result<(), String> {
        for guest in 0..GUESTS {
            let writes = |host: &usize| {
                let process = self.hosts[*host].processes.get(&guest);
                process.is_some_and(Process::writes)
            };
            let hosts: Vec<_> = (0..HOSTS).filter(writes).collect();
            if hosts.len() > 1 {
                let status = &self.guests[guest].0.status;
                return Err(format!(
                    "at {} ms guest {guest} runs on {hosts:?}; {:?}, {:?}",
                    self.now, status.placement, status.migration
                ));
            }
        }
        Ok(())
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Agent(host) => self.agent(host),
            Event::Renewal(host, known, sent) => self.renewal(host, known, sent),
            Event::Renewed(host, lease, sent) => self.renewed(host, lease, sent),
            Event::Told(host, guest) => self.tend(host, guest),
            Event::Request(host, guest, number, request) => {
                self.request_arrives(host, guest, number, &request);
            }
            Event::Answer(host, guest, number, answer) => {
                self.answer_arrives(host, guest, number, answer);
            }
            Event::Done(host, guest, number, task) => self.done(host, guest, number, task),
            Event::Sent(passage) => self.sent(&passage),
            Event::Guard(host) => self.guard(host),
            Event::Dead(host, guest, number) => self.dead(host, guest, number),
            Event::Schedule(host) => self.schedule(host),
            Event::Write(host, write) => self.write(host, *write),
            Event::Operator => self.operator(),
            Event::Fault => self.fault(),
        }
    }
}

/// Whether a guest runs on its host's lease, so that it is started elsewhere if that ends.
fn is_leasable(guest: usize) -> bool {
    guest.is_multiple_of(2)
}

fn host_name(host: usize) -> String {
    format!("h{host}")
}

/// The number in a name.
fn number_of(name: &str) -> usize {
    name[1..].parse().unwrap()
}

fn seeds() -> std::ops::Range<u64> {
    let count = std::env::var("KEELSON_SEEDS").ok();
    0..count.and_then(|count| count.parse().ok()).unwrap_or(100)
}

#[test]
fn a_disk_has_one_writer_and_every_guest_runs_in_the_end() {
    let mut sum = Counts::default();
    for seed in seeds() {
        match Simulation::new(seed, Planted::Nothing).run() {
            Ok(counts) => sum.add(counts),
            Err(error) => panic!("seed {seed}: {error}"),
        }
    }
    println!("{sum:?}");
    assert!(sum.failovers > 50, "{sum:?}");
    assert!(sum.handed_over > 50 && sum.landed > 50, "{sum:?}");
    assert!(sum.taken_back > 5, "{sum:?}");
}

#[test]
fn what_is_wrong_on_purpose_is_found() {
    for planted in [
        Planted::DeadlineFromAnswer,
        Planted::StartWithoutLook,
        Planted::StartOnAnotherLease,
        Planted::MoveHeld,
        Planted::GoOnBeforeSaying,
        Planted::LandBeforePlaced,
    ] {
        let found = (0..300).find_map(|seed| {
            let error = Simulation::new(seed, planted).run().err()?;
            Some((seed, error))
        });
        let (seed, error) = found.unwrap_or_else(|| panic!("{planted:?} is not found"));
        assert!(error.contains("runs on"), "{planted:?}: {error}");
        println!("{planted:?}: seed {seed}");
    }
}

impl Counts {
    fn add(&mut self, other: Self) {
        self.failovers += other.failovers;
        self.handed_over += other.handed_over;
        self.landed += other.landed;
        self.taken_back += other.taken_back;
    }
}
