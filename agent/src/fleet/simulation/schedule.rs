//! The scheduler: each host has one, and one of them is elected.

use keelson_api::VirtualMachine;

use super::event::Event;
use super::{GUESTS, HOSTS, Planted, Simulation, host_name, number_of};
use crate::fleet::scheduler::tests::disk;
use crate::fleet::scheduler::{Decision, View};

/// What a scheduler wants to write: the guest as it makes it, of which revision, why, and in which term.
#[derive(Debug)]
pub struct Write {
    after: VirtualMachine,
    revision: i64,
    decision: Decision,
    term: u64,
}

impl Simulation {
    pub fn schedule(&mut self, host: usize) {
        let again = self.random.u64(50..600);
        self.after(again, Event::Schedule(host));
        if self.is_paused(host) || self.is_cut(host) {
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
            let to = (0..HOSTS).map(host_name).rfind(|to| view.is_alive(to));
            decision = Decision::Place {
                host: to.unwrap_or_default(),
                lost: Some(placement.host),
            };
        }
        let after = decision.carry_out(&object);
        if after != object {
            let delay = self.delay();
            let write = Write {
                after,
                revision,
                decision,
                term,
            };
            self.after(delay, Event::Write(host, Box::new(write)));
        }
    }

    fn view(&self) -> View {
        let mut view = View::default();
        for (host, lease) in self.hosts.iter().zip(&self.leases) {
            view.set_host(host.object.clone());
            view.set_alive(&host.object.metadata.name, lease.is_some());
        }
        for (at, (guest, revision)) in self.guests.iter().enumerate() {
            view.set_disk(&format!("d{at}"), disk(true, None));
            view.set_guest(guest.clone(), *revision);
        }
        view
    }

    /// A transaction of the scheduler, with what the real one compares.
    pub fn write(&mut self, from: usize, write: Write) {
        let alive = |name: &str| self.leases[number_of(name)].is_some();
        let compares = match &write.decision {
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
        let at = number_of(&write.after.metadata.name);
        let in_office = self.elected == Some((from, write.term));
        let unchanged = self.guests[at].1 == write.revision;
        if self.is_cut(from) || !in_office || !compares || !unchanged {
            return;
        }
        let failed_over = matches!(write.decision, Decision::Place { lost: Some(_), .. });
        self.counts.failovers += u64::from(failed_over);
        self.guests[at].0 = write.after;
        self.changed(at);
    }
}
