//! The end of a run: everything is healed, and has to become whole again.

use keelson_checker::{Limits, Outcome, Verdict, check};
use keelson_member::keyspace::{LeaseRecord, Metadata};

use crate::settings::{MILLISECOND, RECOVERY};
use crate::world::{Happening, World};

/// How the check at the end may search.
const LIMITS: Limits = Limits {
    steps: 5_000_000,
    states: 500_000,
};

impl World {
    /// No more faults: what is down starts, what is cut is joined, disks have room.
    pub(crate) fn heal(&mut self) {
        self.note(format_args!("everything is healed"));
        self.healed = true;
        self.network.heal();
        for number in 0..self.machines.len() {
            self.machines[number].disk.set_full(false);
            if self.machines[number].disk.is_stopped() || !self.machines[number].is_up() {
                self.plan(100 * MILLISECOND, Happening::Start(number));
            } else {
                self.machines[number].disk.set_fuse(u64::MAX);
            }
        }
        for watcher in 0..self.watchers.len() {
            self.plan(100 * MILLISECOND, Happening::Watcher(watcher));
        }
        if !self.settings.changes_members {
            self.plan(0, Happening::Admin);
        }
        self.probed = false;
        self.plan(500 * MILLISECOND, Happening::Client(0));
        self.healed_at = self.now;
    }

    /// A client's answer after everything is healed.
    pub(crate) fn probe_heard(&mut self, index: usize, outcome: &Outcome) {
        if matches!(outcome, Outcome::Ok(_)) && index == 0 {
            self.probed = true;
        }
    }

    /// Whether the run is over: all is quiet, or the time for it is.
    pub(crate) fn is_over(&mut self) -> bool {
        let unfinished = self.unfinished();
        if unfinished.is_none() {
            return true;
        }
        if self.now > self.healed_at + RECOVERY {
            let what = unfinished.unwrap_or_default();
            self.fail(format!(
                "{} s after everything was healed, {what}",
                RECOVERY / 1_000_000
            ));
        }
        false
    }

    fn unfinished(&self) -> Option<String> {
        if !self.probed {
            return Some("no put has succeeded".into());
        }
        if !self.clients_are_idle() {
            return Some("a client still waits".into());
        }
        if !self.holders_are_idle() {
            return Some("a lease has not ended".into());
        }
        let members = self.newest_members().unwrap_or_default();
        let mut applied = Vec::new();
        let mut leases = 0;
        for (number, machine) in self.machines.iter().enumerate() {
            if !members.iter().any(|member| member.id == machine.member) {
                continue;
            }
            let Some(process) = &machine.process else {
                return Some(format!("m{number} does not run"));
            };
            if !process.requests.is_empty() {
                return Some(format!("a request waits in m{number}"));
            }
            applied.push((process.replica.status().applied, number));
            leases += process.replica.keyspace().leases().len();
        }
        // One that was granted after its holder had given up on it.
        if leases > 0 {
            return Some("a lease that nobody holds has not ended".into());
        }
        let mut listed = members.iter().filter(|member| {
            let mut machines = self.machines.iter();
            !machines.any(|machine| machine.member == member.id)
        });
        if let Some(member) = listed.find(|member| member.name.is_empty()) {
            return Some(format!("member {:x} was never started", member.id));
        }
        if applied.iter().any(|(index, _)| *index != applied[0].0) {
            return Some(format!("members have applied {applied:?}"));
        }
        if !self.watchers_are_idle() {
            return Some("a watcher has not been told everything".into());
        }
        None
    }

    /// Compares the members with each other, and the history with what a store may show.
    pub(crate) fn judge(&mut self) {
        if self.failure.is_some() {
            return;
        }
        let digests = self.digests();
        if let Some(((_, first), rest)) = digests.split_first() {
            for (number, digest) in rest {
                if digest != first {
                    self.fail(format!("m{number} differs:\n{digest:?}\n{first:?}"));
                    return;
                }
            }
            self.end_watches(first.metadata.revision);
            if !first.leases.is_empty() {
                self.fail(format!("leases are left: {:?}", first.leases));
            }
        }
        let report = check(&self.history, &LIMITS);
        for (rule, verdict) in &report.verdicts {
            match verdict {
                Verdict::Holds => {}
                Verdict::Broken(violation) => self.fail(format!("{rule}: {violation}")),
                Verdict::Undecided(why) => {
                    self.note(format_args!("{rule} is undecided: {why}"));
                    self.undecided = true;
                }
            }
        }
    }

    /// What each member holds.
    fn digests(&mut self) -> Vec<(usize, Digest)> {
        let members = self.newest_members().unwrap_or_default();
        let mut digests = Vec::new();
        for (number, machine) in self.machines.iter().enumerate() {
            let Some(process) = &machine.process else {
                continue;
            };
            let keyspace = process.replica.keyspace();
            let metadata = keyspace.metadata();
            if !members.iter().any(|member| member.id == machine.member) {
                continue; // removed, and about to hear of it
            }
            let mut leases = keyspace.leases();
            leases.sort_unstable_by_key(|(id, _)| *id);
            let hash = match keyspace.hash(0) {
                Ok((hash, _, _)) => hash,
                // It was not found before, and is told now.
                Err(_) if keyspace.damage().is_some() && self.is_damaged(number) => continue,
                Err(_) => 0,
            };
            digests.push((
                number,
                Digest {
                    hash,
                    metadata,
                    leases,
                },
            ));
        }
        digests
    }

    /// Stops every process without notice.
    pub(crate) fn shut_down(&mut self) {
        for machine in &mut self.machines {
            machine.disk.stop();
            machine.process = None;
        }
    }
}

/// What a member holds.
#[derive(Debug, PartialEq)]
struct Digest {
    hash: u32,
    metadata: Metadata,
    leases: Vec<(i64, LeaseRecord)>,
}
