//! Guests that move while they run, as the task that keeps a guest does it (`guest/actor/migration.rs`).

use keelson_api::{MigrationPhase, VirtualMachine};

use super::event::{Event, Task};
use super::host::{Process, Stage};
use super::store::Request;
use super::{Planted, Simulation, host_name, number_of};
use crate::migration::transitions;

/// A guest that leaves a host, as that host's agent knows it.
#[derive(Clone, Debug)]
pub struct Departure {
    id: String,
    /// The lease on which the destination has prepared itself.
    lease: u64,
    state: DepartureState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DepartureState {
    Copying,
    /// All of it is at the destination.
    Loaded,
    Failed,
}

/// A guest that is to come to a host, as that host's agent knows it.
#[derive(Clone, Debug)]
pub struct Arrival {
    id: String,
    lease: u64,
    /// The store has answered that it knows.
    said: bool,
    /// The source's agent has connected.
    connected: bool,
}

/// A guest on its way.
#[derive(Clone, Debug)]
pub struct Passage {
    guest: usize,
    from: usize,
    to: usize,
    id: String,
}

impl Simulation {
    /// What the source does for a guest that runs.
    pub fn send(&mut self, host: usize, guest: usize, object: &VirtualMachine) {
        let Some(active) = transitions::active(object).cloned() else {
            // Whatever is sent is in vain.
            self.hosts[host].agent.departures.remove(&guest);
            return;
        };
        if active.phase == MigrationPhase::Moved {
            return self.request(host, guest, Request::Complete { id: active.id });
        }
        let departure = self.hosts[host].agent.departures.get(&guest).cloned();
        let departure = departure.filter(|departure| departure.id == active.id);
        let to = number_of(&active.destination);
        match departure.map(|departure| departure.state) {
            None if active.phase == MigrationPhase::Requested => {
                if self.leases[to].is_none() {
                    self.say_that_it_stays(host, guest, Some(active.id));
                }
            }
            None => self.depart(host, guest, to, active.id),
            Some(DepartureState::Copying) => {}
            Some(DepartureState::Loaded) => self.release(host, guest),
            Some(DepartureState::Failed) => self.say_that_it_stays(host, guest, Some(active.id)),
        }
    }

    fn say_that_it_stays(&mut self, host: usize, guest: usize, id: Option<String>) {
        self.request(host, guest, Request::Stay { id });
    }

    fn depart(&mut self, host: usize, guest: usize, to: usize, id: String) {
        let ticket = self.tickets[guest].clone();
        let ticket = ticket.filter(|ticket| {
            ticket.id == id && ticket.host == to && self.lease_lives(to, ticket.lease)
        });
        let expected = self.hosts[to].agent.arrivals.get_mut(&guest);
        let expected = expected.filter(|arrival| arrival.id == id && !arrival.connected);
        let (Some(ticket), Some(arrival)) = (ticket, expected) else {
            return self.say_that_it_stays(host, guest, Some(id));
        };
        arrival.connected = true;
        let departure = Departure {
            id: id.clone(),
            lease: ticket.lease,
            state: DepartureState::Copying,
        };
        self.hosts[host].agent.departures.insert(guest, departure);
        let takes = self.random.u64(100..4000);
        let passage = Passage {
            guest,
            from: host,
            to,
            id,
        };
        self.after(takes, Event::Sent(passage));
    }

    /// All of a guest is at the destination, if both agents have carried it.
    pub fn sent(&mut self, passage: &Passage) {
        let (guest, from, to) = (passage.guest, passage.from, passage.to);
        if let Some(left) = self.pause_left(from).max(self.pause_left(to)) {
            self.after(left, Event::Sent(passage.clone()));
            return;
        }
        let stage = |host: usize, stage: Stage| {
            let process = self.hosts[host].processes.get(&guest);
            process.is_some_and(|process| process.stage == stage && !process.dying)
        };
        let carried = self.carries(passage)
            && !self.is_cut(from)
            && !self.is_cut(to)
            && stage(from, Stage::Running)
            && stage(to, Stage::Waiting);
        if carried && let Some(process) = self.hosts[to].processes.get_mut(&guest) {
            process.stage = Stage::Arrived;
        }
        let departure = self.hosts[from].agent.departures.get_mut(&guest);
        if let Some(departure) = departure.filter(|departure| departure.id == passage.id) {
            departure.state = if carried {
                DepartureState::Loaded
            } else {
                DepartureState::Failed
            };
            self.tend(from, guest);
        }
        self.tend(to, guest);
    }

    /// Whether there is a connection between the agents on which a guest comes.
    fn carries(&self, passage: &Passage) -> bool {
        let (from, to) = (&self.hosts[passage.from], &self.hosts[passage.to]);
        let leaves = from.agent.departures.get(&passage.guest);
        let comes = to.agent.arrivals.get(&passage.guest);
        leaves.is_some_and(|departure| departure.id == passage.id)
            && comes.is_some_and(|arrival| arrival.id == passage.id && arrival.connected)
    }

    /// Makes a guest the destination's that stands still and is there as a whole.
    fn release(&mut self, host: usize, guest: usize) {
        if let Some(process) = self.hosts[host].processes.get_mut(&guest) {
            process.stage = Stage::Released;
        }
        self.hand_over_again(host, guest);
    }

    pub fn hand_over_again(&mut self, host: usize, guest: usize) {
        let agent = &self.hosts[host].agent;
        let departure = agent.departures.get(&guest).cloned();
        let own = agent.lease.filter(|_| self.lease_holds(host));
        let (Some(departure), Some((own, _))) = (departure, own) else {
            let object = self.guests[guest].0.clone();
            return self.take_back(host, guest, &object);
        };
        let request = Request::HandOver {
            id: departure.id,
            revision: self.guests[guest].1,
            leases: [own, departure.lease],
        };
        self.request(host, guest, request);
    }

    /// What the source does when it does not know whose a guest is that it has released.
    pub fn take_back(&mut self, host: usize, guest: usize, object: &VirtualMachine) {
        if self.planted == Planted::GoOnBeforeSaying {
            let departures = &mut self.hosts[host].agent.departures;
            if let Some(departure) = departures.get_mut(&guest) {
                departure.state = DepartureState::Failed;
            }
            return self.work_on(host, guest, 10..300, Task::TakeBack);
        }
        let id = transitions::active(object).map(|active| active.id.clone());
        self.say_that_it_stays(host, guest, id);
    }

    /// The object says that the guest stays, unless it has moved: then what is here of it is looked at anew.
    pub fn stays(&mut self, host: usize, guest: usize, here: bool) {
        self.hosts[host].agent.departures.remove(&guest);
        let stage = self.hosts[host].processes.get(&guest);
        let released = stage.is_some_and(|process| process.stage == Stage::Released);
        if here && released {
            return self.work_on(host, guest, 10..300, Task::TakeBack);
        }
        self.tend(host, guest);
    }

    /// Lets a guest go on that stands still in this stage, if it may run.
    pub fn go_on(&mut self, host: usize, guest: usize, from: Stage) {
        let process = self.hosts[host].processes.get(&guest).copied();
        let may_run = |process: &Process| {
            process.stage == from && !process.dying && self.may_run(host, process)
        };
        let Some(process) = process.filter(may_run) else {
            return;
        };
        let stage = Stage::Running;
        let running = Process { stage, ..process };
        self.hosts[host].processes.insert(guest, running);
        let count = match from {
            Stage::Released => &mut self.counts.taken_back,
            _ => &mut self.counts.landed,
        };
        *count += 1;
    }

    /// What a host does for a guest that is not placed there; `false` if nothing of it is to be there.
    pub fn receive(&mut self, host: usize, guest: usize, object: &VirtualMachine) -> bool {
        let name = host_name(host);
        let Some(active) = transitions::active(object).cloned() else {
            return false;
        };
        if !transitions::is_expected_on(object, &name) {
            return false;
        }
        let process = self.hosts[host].processes.get(&guest).copied();
        if self.planted == Planted::LandBeforePlaced
            && process.is_some_and(|process| process.stage == Stage::Arrived)
        {
            self.work_on(host, guest, 10..300, Task::Land);
            return true;
        }
        let arrival = self.hosts[host].agent.arrivals.get(&guest).cloned();
        let Some(arrival) = arrival.filter(|arrival| arrival.id == active.id && arrival.said)
        else {
            self.hosts[host].agent.arrivals.remove(&guest);
            // What an earlier agent prepared, or left when the guest went away.
            if process.is_some() {
                self.kill(host, guest);
            }
            if active.phase != MigrationPhase::Requested {
                self.say_that_it_stays(host, guest, Some(active.id));
            } else if process.is_none() {
                self.expect(host, guest, active.id);
            }
            return true;
        };
        let passage = Passage {
            guest,
            from: number_of(&active.source),
            to: host,
            id: active.id.clone(),
        };
        let cut = self.is_cut(passage.from) && self.random.bool();
        let ended = arrival.connected && (!self.carries(&passage) || cut);
        if process.is_none() || ended {
            self.say_that_it_stays(host, guest, Some(active.id));
        }
        true
    }

    /// Sets up what waits for a guest.
    fn expect(&mut self, host: usize, guest: usize, id: String) {
        let lease = self.hosts[host].agent.lease;
        let Some((lease, _)) = lease.filter(|_| self.lease_holds(host)) else {
            return self.say_that_it_stays(host, guest, Some(id));
        };
        let arrival = Arrival {
            id,
            lease,
            said: false,
            connected: false,
        };
        self.hosts[host].agent.arrivals.insert(guest, arrival);
        self.work_on(host, guest, 50..1500, Task::Prepare);
    }

    pub fn wait_for_guest(&mut self, host: usize, guest: usize) {
        let Some(arrival) = self.hosts[host].agent.arrivals.get(&guest).cloned() else {
            return;
        };
        let (id, lease) = (arrival.id, arrival.lease);
        if !self.may_start(host, guest, lease) {
            self.hosts[host].agent.arrivals.remove(&guest);
            return self.say_that_it_stays(host, guest, Some(id));
        }
        self.make_process(host, guest, Stage::Waiting, lease);
        self.request(host, guest, Request::LeaveTicket { id, lease });
    }

    pub fn ticket_left(&mut self, host: usize, guest: usize, left: bool) {
        match self.hosts[host].agent.arrivals.get(&guest).cloned() {
            Some(Arrival { id, lease, .. }) if left => {
                self.request(host, guest, Request::Prepared { id, lease });
            }
            _ => self.prepared(host, guest, false),
        }
    }

    pub fn prepared(&mut self, host: usize, guest: usize, done: bool) {
        let arrivals = &mut self.hosts[host].agent.arrivals;
        if done && let Some(arrival) = arrivals.get_mut(&guest) {
            arrival.said = true;
        } else if let Some(arrival) = arrivals.remove(&guest) {
            self.kill(host, guest);
            self.say_that_it_stays(host, guest, Some(arrival.id));
        }
    }

    pub fn land(&mut self, host: usize, guest: usize) {
        self.go_on(host, guest, Stage::Arrived);
        self.forget_moves(host, guest);
        // Its object says so with the next look.
        self.tend(host, guest);
    }
}
