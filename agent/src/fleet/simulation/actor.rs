//! What an agent does for each of its guests: one thing after the other.

use std::collections::BTreeMap;

use keelson_api::VirtualMachine;

use super::event::{Event, Task};
use super::host::Stage;
use super::migration::{Arrival, Departure};
use super::store::{Answer, Request};
use super::{GUESTS, Planted, Simulation, host_name, is_leasable};
use crate::fleet::Instant;
use crate::fleet::claim::{epoch_of, is_placed_on};

/// How long it waits for an answer of the store, which may do all the same what it was asked.
const TIMEOUT_MS: u64 = 1500;

/// What an agent knows, which is gone when it ends.
#[derive(Debug, Default)]
pub struct Agent {
    /// The lease that it believes in, and its local deadline.
    pub lease: Option<(u64, Instant)>,
    /// What it does for a guest now: the number of that, and until when it waits for it.
    work: BTreeMap<usize, (u64, u64)>,
    /// Guests that it starts, each by the lease that its claim compared.
    claimed: BTreeMap<usize, u64>,
    /// Guests that leave this host, and those that are to come.
    pub departures: BTreeMap<usize, Departure>,
    pub arrivals: BTreeMap<usize, Arrival>,
}

impl Simulation {
    pub fn agent(&mut self, host: usize) {
        if let Some(left) = self.pause_left(host) {
            self.after(left, Event::Agent(host));
            return;
        }
        let sent = self.local(host).time_since_boot();
        let known = self.hosts[host].agent.lease.map(|(lease, _)| lease);
        if !self.is_cut(host) {
            let sent = u64::try_from(sent.as_micros()).unwrap();
            let delay = self.delay();
            self.after(delay, Event::Renewal(host, known, sent));
        }
        for guest in 0..GUESTS {
            self.tend(host, guest);
        }
        let interval = self.random.u64(1500..2500);
        self.after(interval, Event::Agent(host));
    }

    /// Looks at a guest's object, and at what is here of the guest, and does the next thing.
    pub fn tend(&mut self, host: usize, guest: usize) {
        let here = &self.hosts[host];
        let work = here.agent.work.get(&guest);
        let busy = work.is_some_and(|(_, until)| *until > self.now);
        let process = here.processes.get(&guest).copied();
        let dies = process.is_some_and(|process| process.dying);
        // It looks at nothing before it has its host's place in the fleet.
        let joined = here.agent.lease.is_some();
        if busy || dies || !joined || self.is_cut(host) || self.is_paused(host) {
            return;
        }
        let object = self.guests[guest].0.clone();
        if is_placed_on(&object, &host_name(host)) {
            if process.is_some_and(|process| !self.may_run(host, &process)) {
                return self.kill(host, guest);
            }
            return match process.map(|process| process.stage) {
                None => self.claim(host, guest, &object),
                Some(Stage::Running) => self.send(host, guest, &object),
                Some(Stage::Released) => self.take_back(host, guest, &object),
                Some(Stage::Arrived) => self.work_on(host, guest, 10..300, Task::Land),
                // It was placed here though it has no guest.
                Some(Stage::Waiting) => self.kill(host, guest),
            };
        }
        if !self.receive(host, guest, &object) {
            self.forget_moves(host, guest);
            self.kill(host, guest);
        }
    }

    fn claim(&mut self, host: usize, guest: usize, object: &VirtualMachine) {
        self.forget_moves(host, guest);
        if let Some((lease, _)) = self.hosts[host].agent.lease {
            let epoch = epoch_of(object);
            self.request(host, guest, Request::Claim { epoch, lease });
        }
    }

    pub fn forget_moves(&mut self, host: usize, guest: usize) {
        let agent = &mut self.hosts[host].agent;
        agent.departures.remove(&guest);
        agent.arrivals.remove(&guest);
    }

    /// Asks something of the store. Whatever it waited for before, it waits for no more.
    pub fn request(&mut self, host: usize, guest: usize, request: Request) {
        let number = self.number();
        let until = self.now + TIMEOUT_MS;
        self.hosts[host].agent.work.insert(guest, (number, until));
        let delay = self.delay();
        self.after(delay, Event::Request(host, guest, number, request));
    }

    /// Does something on its host, which takes so long.
    pub fn work_on(&mut self, host: usize, guest: usize, takes: std::ops::Range<u64>, task: Task) {
        let number = self.number();
        let work = &mut self.hosts[host].agent.work;
        work.insert(guest, (number, u64::MAX));
        let takes = self.random.u64(takes);
        self.after(takes, Event::Done(host, guest, number, task));
    }

    /// Whether this is what the agent waits for, and it does no more.
    fn ends_work(&mut self, host: usize, guest: usize, number: u64) -> bool {
        let work = &mut self.hosts[host].agent.work;
        let waited_for = work.get(&guest).is_some_and(|(known, _)| *known == number);
        if waited_for {
            work.remove(&guest);
        }
        waited_for
    }

    pub fn answer_arrives(&mut self, host: usize, guest: usize, number: u64, answer: Answer) {
        if let Some(left) = self.pause_left(host) {
            self.after(left, Event::Answer(host, guest, number, answer));
            return;
        }
        if self.is_cut(host) || !self.ends_work(host, guest, number) {
            return;
        }
        match answer {
            Answer::Claimed(Some(lease)) => {
                self.hosts[host].agent.claimed.insert(guest, lease);
                let longest = if self.random.bool() { 100 } else { 3000 };
                self.work_on(host, guest, 10..longest, Task::Start);
            }
            Answer::TicketLeft(left) => self.ticket_left(host, guest, left),
            Answer::Prepared(done) => self.prepared(host, guest, done),
            Answer::HandedOver(true) => {
                self.forget_moves(host, guest);
                self.kill(host, guest);
            }
            Answer::HandedOver(false) => {
                let object = self.guests[guest].0.clone();
                self.take_back(host, guest, &object);
            }
            Answer::Changed => self.hand_over_again(host, guest),
            Answer::Stays(here) => self.stays(host, guest, here),
            Answer::Claimed(None) | Answer::Completed => {}
        }
    }

    pub fn done(&mut self, host: usize, guest: usize, number: u64, task: Task) {
        if let Some(left) = self.pause_left(host) {
            self.after(left, Event::Done(host, guest, number, task));
            return;
        }
        if !self.ends_work(host, guest, number) {
            return;
        }
        match task {
            Task::Start => self.start(host, guest),
            Task::Prepare => self.wait_for_guest(host, guest),
            Task::Land => self.land(host, guest),
            Task::TakeBack => self.go_on(host, guest, Stage::Released),
        }
    }

    fn start(&mut self, host: usize, guest: usize) {
        let claimed = self.hosts[host].agent.claimed.remove(&guest);
        if let Some(lease) = claimed.filter(|lease| self.may_start(host, guest, *lease)) {
            self.make_process(host, guest, Stage::Running, lease);
        }
    }

    /// The look at the lease when a process exists and waits for the go-ahead.
    pub fn may_start(&self, host: usize, guest: usize, compared: u64) -> bool {
        let lease = self.hosts[host].agent.lease;
        let same = lease.is_some_and(|(lease, _)| lease == compared)
            || (lease.is_some() && self.planted == Planted::StartOnAnotherLease);
        let holds = same && self.lease_holds(host);
        holds || !is_leasable(guest) || self.planted == Planted::StartWithoutLook
    }
}
