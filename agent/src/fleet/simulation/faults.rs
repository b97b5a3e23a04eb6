//! What goes wrong, and what people ask for meanwhile.

use jiff::Timestamp;
use keelson_api::{Migration, MigrationLimits, MigrationPhase, PlacementState};

use super::actor::Agent;
use super::event::Event;
use super::{FAULTS_MS, GUESTS, HOSTS, Simulation, host_name};
use crate::migration::transitions;

impl Simulation {
    pub fn fault(&mut self) {
        if self.now >= FAULTS_MS {
            return;
        }
        let host = self.random.usize(0..HOSTS);
        let until = self.now + self.random.u64(100..30_000);
        match self.random.u8(0..6) {
            0 => self.hosts[host].cut = until,
            1 => self.hosts[host].paused = until,
            // It crashes: nothing is left of it for a while.
            2 => {
                self.hosts[host].processes.clear();
                self.hosts[host].agent = Agent::default();
                self.hosts[host].paused = until;
            }
            // Its agent ends and another one starts; processes go on, and so does the guard.
            3 => {
                self.hosts[host].agent = Agent::default();
                self.hosts[host].paused = self.now + self.random.u64(100..3000);
            }
            4 => {
                let guest = self.random.usize(0..GUESTS);
                self.hosts[host].processes.remove(&guest);
            }
            _ => {
                self.hosts[host].paused = until;
                self.hosts[host].cut = until;
            }
        }
        let next = self.random.u64(500..8000);
        self.after(next, Event::Fault);
    }

    pub fn operator(&mut self) {
        if self.now >= FAULTS_MS {
            return;
        }
        let next = self.random.u64(200..2000);
        self.after(next, Event::Operator);
        let guest = self.random.usize(0..GUESTS);
        let object = &mut self.guests[guest].0;
        let Some(active) = transitions::active(object).map(|active| active.id.clone()) else {
            return self.ask_for_move(guest);
        };
        if self.random.u8(0..4) == 0
            && transitions::stay(object, &active, MigrationPhase::Canceled, "")
        {
            self.changed(guest);
        }
    }

    /// As `keelson migrate` does, to any host.
    fn ask_for_move(&mut self, guest: usize) {
        let to = self.random.usize(0..HOSTS);
        let id = self.number().to_string();
        let object = &mut self.guests[guest].0;
        let Some(placement) = object.status.placement.clone() else {
            return;
        };
        let runs = matches!(
            placement.state,
            PlacementState::Held | PlacementState::Leased
        );
        let source = super::number_of(&placement.host);
        let alive = self.leases[source].is_some() && self.leases[to].is_some();
        if !runs || !alive || source == to {
            return;
        }
        object.status.migration = Some(Migration {
            id,
            source: placement.host,
            destination: host_name(to),
            phase: MigrationPhase::Requested,
            requested_at: Timestamp::UNIX_EPOCH,
            ended_at: None,
            limits: MigrationLimits::default(),
            terms: None,
            progress: None,
            downtime_milliseconds: None,
            flows_moved: None,
            flows_left: None,
            message: String::new(),
        });
        self.changed(guest);
    }
}
