//! A host: its clock, its lease, its processes and the guard.

use std::collections::BTreeMap;
use std::time::Duration;

use keelson_api::Host;
use serde_json::json;

use super::actor::Agent;
use super::event::Event;
use super::{LeaseTerms, Planted, Simulation, TTL_MS};
use crate::fleet::Instant;
use crate::fleet::guard::{Deadline, Step};
use crate::fleet::scheduler::View;

#[derive(Debug)]
pub struct SimulatedHost {
    /// Local milliseconds at time zero, and local milliseconds in a million.
    pub offset: u64,
    pub rate: u64,
    /// Until when its agent does nothing, and until when no message passes.
    pub paused: u64,
    pub cut: u64,
    pub agent: Agent,
    guard: Deadline,
    /// By guest.
    pub processes: BTreeMap<usize, Process>,
    /// Its object in the store.
    pub object: Host,
    /// The store as this host's scheduler saw it last.
    pub view: View,
}

/// A guest's virtual machine, with its disks' backends if there are any.
#[derive(Clone, Copy, Debug)]
pub struct Process {
    pub number: u64,
    /// Whether it may run only as long as a lease of its host lasts, and which: that of its claim, or that of the agent that
    /// found it when it came up.
    pub leased: bool,
    pub lease: u64,
    pub dying: bool,
    pub stage: Stage,
}

/// Where a virtual machine is in a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Its guest runs, maybe while it is being sent.
    Running,
    /// Its guest stands still until somebody says where it goes on.
    Released,
    /// It waits for its guest.
    Waiting,
    /// All of its guest is there, and stands still.
    Arrived,
}

impl Process {
    /// Whether its guest's disks change: until it is gone, if it is being killed.
    pub fn writes(&self) -> bool {
        self.stage == Stage::Running
    }
}

impl SimulatedHost {
    pub fn new(name: &str, random: &mut fastrand::Rng) -> Self {
        let object = json!({
            "apiVersion": keelson_api::API_VERSION, "kind": "Host",
            "metadata": { "name": name },
            "status": {
                "version": "", "kernel": "", "conditions": [],
                "allocatable": { "cpus": 99, "memory": "99Gi", "disk": "0Mi" },
            },
        });
        Self {
            offset: random.u64(0..100_000_000),
            // Half a percent; crystals are a hundred times better.
            rate: random.u64(995_000..=1_005_000),
            paused: 0,
            cut: 0,
            agent: Agent::default(),
            guard: Deadline::new(Instant::since_boot(Duration::ZERO)),
            processes: BTreeMap::new(),
            object: serde_json::from_value(object).unwrap(),
            view: View::default(),
        }
    }
}

impl Simulation {
    pub fn is_cut(&self, host: usize) -> bool {
        self.hosts[host].cut > self.now
    }

    pub fn is_paused(&self, host: usize) -> bool {
        self.hosts[host].paused > self.now
    }

    /// After how long the host's agent, which does nothing now, goes on exactly where it was: with this or
    /// that first.
    pub fn pause_left(&mut self, host: usize) -> Option<u64> {
        let left = self.hosts[host].paused.checked_sub(self.now)?;
        (left > 0).then(|| left + self.random.u64(0..20))
    }

    /// Whether the lease that the agent believes in can be counted on now.
    pub fn lease_holds(&self, host: usize) -> bool {
        let local = self.local(host);
        let lease = self.hosts[host].agent.lease;
        lease.is_some_and(|(_, deadline)| local < deadline)
    }

    /// Whether a process may run on as far as its host's lease goes.
    pub fn may_run(&self, host: usize, process: &Process) -> bool {
        let lease = self.hosts[host].agent.lease;
        let same = lease.is_some_and(|(lease, _)| lease == process.lease);
        !process.leased || (same && self.lease_holds(host))
    }

    pub fn renewed(&mut self, host: usize, lease: u64, sent: u64) {
        if let Some(left) = self.pause_left(host) {
            self.after(left, Event::Renewed(host, lease, sent));
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
        if host.agent.lease.is_none() {
            // The agent has come up, and finds what runs.
            for process in host.processes.values_mut() {
                process.lease = lease;
            }
        }
        let later = host.agent.lease.is_none_or(|(_, known)| known < deadline);
        if later {
            host.agent.lease = Some((lease, deadline));
        }
    }

    pub fn guard(&mut self, host: usize) {
        self.fence_if_due(host);
        // Its timer is late by as much as a loaded machine makes it.
        let again = self.random.u64(20..120);
        self.after(again, Event::Guard(host));
    }

    fn fence_if_due(&mut self, host: usize) {
        let now = self.local(host);
        if self.hosts[host].guard.step(now) != Step::Fence {
            return;
        }
        let processes = self.hosts[host].processes.iter();
        let leased = processes.filter(|(_, process)| process.leased);
        let leased: Vec<_> = leased.map(|(guest, _)| *guest).collect();
        self.hosts[host].guard.fenced(now, !leased.is_empty());
        for guest in leased {
            self.kill(host, guest);
        }
    }

    /// Makes a process for a guest that has none on this host, which was permitted by this lease.
    pub fn make_process(&mut self, host: usize, guest: usize, stage: Stage, lease: u64) {
        let process = Process {
            number: self.number(),
            leased: super::is_leasable(guest),
            lease,
            dying: false,
            stage,
        };
        self.hosts[host].processes.entry(guest).or_insert(process);
    }

    /// Kills a guest's process, if there is one.
    pub fn kill(&mut self, host: usize, guest: usize) {
        let Some(process) = self.hosts[host].processes.get_mut(&guest) else {
            return;
        };
        if std::mem::replace(&mut process.dying, true) {
            return;
        }
        let number = process.number;
        let takes = self.random.u64(0..300);
        self.after(takes, Event::Dead(host, guest, number));
    }

    pub fn dead(&mut self, host: usize, guest: usize, number: u64) {
        let processes = &mut self.hosts[host].processes;
        if processes
            .get(&guest)
            .is_some_and(|process| process.number == number)
        {
            processes.remove(&guest);
        }
    }
}
