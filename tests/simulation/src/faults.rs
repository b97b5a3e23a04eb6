//! What goes wrong.

use std::collections::BTreeSet;

use keelson_member::replica::Input;

use crate::disk::Loss;
use crate::settings::{ELECTION_TICKS, Fault, MILLISECOND, SECOND, TICK};
use crate::world::{Happening, Passing, World};

impl World {
    /// The next fault.
    pub(crate) fn cause_fault(&mut self) {
        if self.healed {
            return;
        }
        let interval = self.settings.fault_interval;
        let next = self.random.between(interval / 4, interval * 2);
        self.plan(next, Happening::Fault);
        let fault = *self.random.pick(&self.settings.faults.clone());
        let number = self.any_machine();
        self.counts.faults += 1;
        self.note(format_args!("fault: {fault:?} (m{number})"));
        match fault {
            Fault::Partition => self.partition(number),
            Fault::Kill => {
                if self.machines[number].is_up() {
                    self.crash(number, Loss::Nothing);
                }
            }
            Fault::PowerLoss => {
                let calls = self.random.below(60);
                self.machines[number].disk.set_fuse(calls);
            }
            Fault::Blackout => self.blackout(),
            Fault::Pause => {
                let time = self.random.between(100, 4000) * MILLISECOND;
                self.pause(number, time);
            }
            Fault::Stall => {
                let time = self.random.between(200, 5000) * MILLISECOND;
                self.machines[number].disk.stall(time);
            }
            Fault::FullDisk => {
                self.machines[number].disk.set_full(true);
                let time = self.random.between(500, 5000) * MILLISECOND;
                self.plan(time, Happening::EndOf(Passing::FullDisk(number)));
            }
            Fault::ClockJump => {
                let time = self.random.between(100, 8000) * MILLISECOND;
                // A member that was held up does not count all of that time.
                self.jumped += time.min(u64::from(ELECTION_TICKS) * TICK / 2);
                self.machines[number].clock.jump(time);
            }
            Fault::Transfer => self.transfer(),
            Fault::FlipBits => self.flip_bits(number),
        }
    }

    /// Every machine loses power.
    pub(crate) fn blackout(&mut self) {
        for number in 0..self.machines.len() {
            if self.machines[number].is_up() {
                let loss = *self.random.pick(&[Loss::Some, Loss::Unsynced]);
                self.crash(number, loss);
            }
        }
    }

    /// Something is over.
    pub(crate) fn end(&mut self, passing: Passing) {
        match passing {
            Passing::Cut(number) => self.network.end_cut(number),
            Passing::FullDisk(number) => self.machines[number].disk.set_full(false),
        }
    }

    fn partition(&mut self, number: usize) {
        let count = self.machines.len();
        let both = self.random.percent(70);
        let outgoing = self.random.percent(50);
        let mut inside = BTreeSet::from([number]);
        while self.random.percent(30) {
            inside.insert(self.random.index(count));
        }
        let mut directions = BTreeSet::new();
        for one in &inside {
            for other in (0..count).filter(|other| !inside.contains(other)) {
                if both || outgoing {
                    directions.insert((*one, other));
                }
                if both || !outgoing {
                    directions.insert((other, *one));
                }
            }
        }
        let cut = self.network.cut(directions);
        let time = self.random.between(200, 6000) * MILLISECOND;
        self.plan(time.min(6 * SECOND), Happening::EndOf(Passing::Cut(cut)));
    }

    /// Leadership goes to another member.
    pub(crate) fn transfer(&mut self) {
        let leader = self.machines.iter().position(|machine| {
            machine
                .process
                .as_ref()
                .is_some_and(|process| process.replica.status().is_leader)
        });
        let Some(number) = leader else {
            return;
        };
        let boot = self.machines[number].boot;
        let Some(process) = self.process(number, boot) else {
            return;
        };
        let members = process.replica.keyspace().metadata().members;
        let voters: Vec<u64> = members
            .iter()
            .filter(|member| !member.is_learner)
            .map(|member| member.id)
            .collect();
        if voters.is_empty() {
            return;
        }
        let target = *self.random.pick(&voters);
        self.input(number, boot, Input::Transfer(target));
    }
}
