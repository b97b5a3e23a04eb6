//! The store: leases, and what agents write into objects, each in a transaction with what the real one
//! compares.

use keelson_api::{MigrationPhase, PlacementState};

use super::event::Event;
use super::{HOSTS, Simulation, TTL_MS, host_name, is_leasable};
use crate::fleet::claim::{claim, epoch_of, is_placed_on};
use crate::migration::{FlowCount, transitions};

/// What an agent writes into a guest's object.
#[derive(Clone, Debug)]
pub enum Request {
    /// It starts the guest: of which epoch, on which lease.
    Claim { epoch: Option<u64>, lease: u64 },
    /// What lets the source send the guest of a move, attached to this lease.
    LeaveTicket { id: String, lease: u64 },
    /// It waits for the guest of a move, on this lease.
    Prepared { id: String, lease: u64 },
    /// The guest of a move is the destination's, if the object has this revision and both leases live.
    HandOver {
        id: String,
        revision: i64,
        leases: [u64; 2],
    },
    /// The guest of a move, if there is any, stays where it is.
    Stay { id: Option<String> },
    /// The guest of a move runs.
    Complete { id: String },
}

/// What it hears of it.
#[derive(Clone, Copy, Debug)]
pub enum Answer {
    /// Whether the guest is its to start, on this lease.
    Claimed(Option<u64>),
    /// Whether the lease was still there.
    TicketLeft(bool),
    Prepared(bool),
    HandedOver(bool),
    /// It was not handed over since its object had changed, and it is to be tried again.
    Changed,
    /// It is said that the guest stays; whether it is placed on this host.
    Stays(bool),
    Completed,
}

/// What a destination leaves for the source: the move, and its own lease, with which this ends.
#[derive(Clone, Debug)]
pub struct Ticket {
    pub id: String,
    pub host: usize,
    pub lease: u64,
}

impl Simulation {
    pub fn expire(&mut self) {
        for host in 0..HOSTS {
            if self.leases[host].is_some_and(|(_, end)| end <= self.now) {
                self.leases[host] = None;
                self.dismiss(host);
            }
        }
    }

    /// What was attached to a host's lease is gone with it.
    fn dismiss(&mut self, host: usize) {
        if self.elected.is_some_and(|(elected, _)| elected == host) {
            self.elected = None;
        }
    }

    pub fn renewal(&mut self, host: usize, known: Option<u64>, sent: u64) {
        if self.is_cut(host) {
            return;
        }
        // One that ended is given anew: the host registers again. So does an agent that was started anew,
        // whose predecessor's lease ends then.
        let follows = self.leases[host].filter(|_| known.is_some());
        let number = if let Some((number, _)) = follows {
            number
        } else {
            self.dismiss(host);
            self.number()
        };
        self.leases[host] = Some((number, self.now + TTL_MS));
        let delay = self.delay();
        self.after(delay, Event::Renewed(host, number, sent));
    }

    pub fn lease_lives(&self, host: usize, lease: u64) -> bool {
        self.leases[host].is_some_and(|(number, _)| number == lease)
    }

    /// A guest's object was written.
    pub fn changed(&mut self, guest: usize) {
        self.revision += 1;
        self.guests[guest].1 = self.revision;
        for host in 0..HOSTS {
            let delay = self.delay();
            self.after(delay, Event::Told(host, guest));
        }
    }

    pub fn request_arrives(&mut self, host: usize, guest: usize, number: u64, request: &Request) {
        if self.is_cut(host) {
            return;
        }
        let before = self.guests[guest].0.clone();
        let answer = self.carry_out(host, guest, request);
        // A transaction that compares leases writes also what stays the same (`ObjectStore::update_when`).
        let compared = matches!(
            answer,
            Answer::Claimed(Some(_)) | Answer::Prepared(true) | Answer::HandedOver(true)
        );
        if compared || self.guests[guest].0 != before {
            self.changed(guest);
        }
        let delay = self.delay();
        self.after(delay, Event::Answer(host, guest, number, answer));
    }

    fn carry_out(&mut self, host: usize, guest: usize, request: &Request) -> Answer {
        let terms = if is_leasable(guest) {
            PlacementState::Leased
        } else {
            PlacementState::Held
        };
        let name = host_name(host);
        match request {
            Request::Claim { epoch, lease } => {
                let lives = self.lease_lives(host, *lease);
                let object = &mut self.guests[guest].0;
                let claimed = lives && claim(object, &name, *epoch, terms);
                Answer::Claimed(claimed.then_some(*lease))
            }
            Request::LeaveTicket { id, lease } => {
                let lives = self.lease_lives(host, *lease);
                if lives {
                    let (id, lease) = (id.clone(), *lease);
                    self.tickets[guest] = Some(Ticket { id, host, lease });
                }
                Answer::TicketLeft(lives)
            }
            Request::Prepared { id, lease } => {
                let lives = self.lease_lives(host, *lease);
                let object = &mut self.guests[guest].0;
                Answer::Prepared(lives && transitions::prepare(object, id, terms))
            }
            Request::HandOver {
                id,
                revision,
                leases,
            } => self.hand_over(host, guest, id, *revision, *leases),
            Request::Stay { id } => {
                let object = &mut self.guests[guest].0;
                if let Some(id) = id {
                    transitions::stay(object, id, MigrationPhase::Failed, "");
                }
                Answer::Stays(is_placed_on(object, &name))
            }
            Request::Complete { id } => {
                transitions::complete(&mut self.guests[guest].0, id, None);
                Answer::Completed
            }
        }
    }

    fn hand_over(
        &mut self,
        host: usize,
        guest: usize,
        id: &str,
        revision: i64,
        leases: [u64; 2],
    ) -> Answer {
        if self.guests[guest].1 != revision {
            return Answer::Changed;
        }
        let destination = transitions::active(&self.guests[guest].0)
            .map(|active| super::number_of(&active.destination));
        let live = self.lease_lives(host, leases[0])
            && destination.is_some_and(|destination| self.lease_lives(destination, leases[1]));
        let object = &mut self.guests[guest].0;
        let epoch = epoch_of(object);
        let done = live
            && transitions::hand_over(object, &host_name(host), epoch, id, 0, FlowCount::default());
        self.counts.handed_over += u64::from(done);
        Answer::HandedOver(done)
    }
}
