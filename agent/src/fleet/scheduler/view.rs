//! The fleet as the scheduler knows it, and where a guest should go.

use std::collections::{BTreeMap, BTreeSet};

use keelson_api::{
    DiskSpec, Failover, Host, Object, Phase, Placement, PlacementState, PowerState, VirtualMachine,
};
use keelson_controlplane::Revision;

use super::decision::Decision;
use super::resources::Resources;
use crate::guest::is_resting;
use crate::migration::transitions;

/// The fleet as the scheduler knows it. It is told every change; what it works out for a guest depends
/// on the number of hosts, not of guests.
#[derive(Clone, Debug, Default)]
pub struct View {
    hosts: BTreeMap<String, Host>,
    /// Hosts whose lease lasts.
    alive: BTreeSet<String>,
    guests: BTreeMap<String, (VirtualMachine, Revision)>,
    disks: BTreeMap<String, DiskSpec>,
    loads: BTreeMap<String, Load>,
}

/// What is placed on a host.
#[derive(Clone, Debug, Default)]
struct Load {
    guests: BTreeSet<String>,
    /// Those of them that want to be apart from others: few.
    apart: BTreeSet<String>,
    used: Resources,
}

/// Whether a guest can run on another host than the one that it is on.
pub fn is_movable<'a>(
    guest: &VirtualMachine,
    disks: impl IntoIterator<Item = &'a DiskSpec>,
) -> bool {
    guest.spec.host.is_none() && disks.into_iter().all(|disk| disk.shared)
}

impl View {
    /// Notes an object as it was at `revision`, if it concerns who places guests.
    pub fn set(&mut self, object: Object, revision: Revision) {
        match object {
            Object::Host(host) => self.set_host(host),
            Object::Disk(disk) => self.set_disk(&disk.metadata.name, disk.spec),
            Object::VirtualMachine(guest) => self.set_guest(guest, revision),
            Object::Network(_)
            | Object::PortForward(_)
            | Object::SecurityGroup(_)
            | Object::Service(_) => {}
        }
    }

    /// Notes a host as it is now.
    pub fn set_host(&mut self, host: Host) {
        self.hosts.insert(host.metadata.name.clone(), host);
    }

    /// Notes that there is no such host.
    pub fn remove_host(&mut self, name: &str) {
        self.hosts.remove(name);
    }

    /// Notes whether a host's lease lasts; whether that is new.
    pub fn set_alive(&mut self, name: &str, alive: bool) -> bool {
        if alive {
            self.alive.insert(name.into())
        } else {
            self.alive.remove(name)
        }
    }

    /// Whether a host's lease lasts.
    pub fn is_alive(&self, name: &str) -> bool {
        self.alive.contains(name)
    }

    /// Notes a disk as it is now.
    pub fn set_disk(&mut self, name: &str, disk: DiskSpec) {
        self.disks.insert(name.into(), disk);
    }

    /// Notes a guest as it was at `revision`; an older state than the known one is left aside.
    pub fn set_guest(&mut self, guest: VirtualMachine, revision: Revision) {
        let name = guest.metadata.name.clone();
        if self
            .guests
            .get(&name)
            .is_some_and(|(_, known)| *known >= revision)
        {
            return;
        }
        self.remove_guest(&name);
        for host in loads_of(&guest) {
            let load = self.loads.entry(host.into()).or_default();
            load.guests.insert(name.clone());
            if !guest.spec.anti_affinity.is_empty() {
                load.apart.insert(name.clone());
            }
            load.used = load.used.plus(Resources::of_guest(&guest.spec));
        }
        self.guests.insert(name, (guest, revision));
    }

    /// Notes that there is no such guest.
    pub fn remove_guest(&mut self, name: &str) {
        let Some((guest, _)) = self.guests.remove(name) else {
            return;
        };
        for host in loads_of(&guest) {
            if let Some(load) = self.loads.get_mut(host) {
                load.guests.remove(name);
                load.apart.remove(name);
                load.used = load.used.minus(Resources::of_guest(&guest.spec));
            }
        }
    }

    /// A guest, and the revision that it is known of.
    pub fn guest(&self, name: &str) -> Option<&(VirtualMachine, Revision)> {
        self.guests.get(name)
    }

    /// The names of all guests.
    pub fn guest_names(&self) -> impl Iterator<Item = &String> {
        self.guests.keys()
    }

    /// The names of all hosts that have ever come up.
    pub fn host_names(&self) -> impl Iterator<Item = &String> {
        self.hosts.keys()
    }

    /// The guests that are placed on a host.
    pub fn guests_on(&self, host: &str) -> impl Iterator<Item = &String> {
        self.loads
            .get(host)
            .into_iter()
            .flat_map(|load| &load.guests)
    }

    /// What is used of a host.
    pub fn used(&self, host: &str) -> Resources {
        self.loads
            .get(host)
            .map(|load| load.used)
            .unwrap_or_default()
    }

    /// What is to be done for a guest.
    pub fn decide(&self, name: &str) -> Decision {
        let Some((guest, _)) = self.guests.get(name) else {
            return Decision::Nothing;
        };
        let placement = guest.status.placement.as_ref();
        let current = placement.filter(|placement| placement.state != PlacementState::Released);
        if guest.metadata.deletion_timestamp.is_some() {
            return self.decide_deleted(guest, current);
        }
        let wants = guest.spec.power_state == PowerState::Running && !is_resting(guest);
        match current {
            None if runs_unplaced(guest) => Decision::Nothing,
            None if wants => self.place(guest, None),
            None if guest.spec.power_state == PowerState::Stopped => Decision::Rest,
            Some(placement) if !self.is_alive(&placement.host) => {
                self.decide_lost(guest, placement, wants)
            }
            // Nothing runs there, and it is to run somewhere else.
            Some(placement)
                if placement.state == PlacementState::Assigned
                    && guest
                        .spec
                        .host
                        .as_ref()
                        .is_some_and(|host| *host != placement.host) =>
            {
                self.place(guest, None)
            }
            None | Some(_) => Decision::Nothing,
        }
    }

    fn decide_deleted(&self, guest: &VirtualMachine, current: Option<&Placement>) -> Decision {
        match current {
            None if !runs_unplaced(guest) => Decision::Remove { lost: None },
            Some(placement) if !self.is_alive(&placement.host) => {
                // Nothing of it runs any more; or an operator, who deleted the host, says so.
                let is_over = placement.state != PlacementState::Held;
                if is_over || !self.hosts.contains_key(&placement.host) {
                    return Decision::Remove {
                        lost: Some(placement.host.clone()),
                    };
                }
                let host = placement.host.clone();
                let message = format!(
                    "its host {host} is lost to the fleet, and it may run there; it is deleted when the \
                     host comes back, or when Host/{host} is deleted"
                );
                Decision::Stay { host, message }
            }
            _ => Decision::Nothing,
        }
    }

    /// What becomes of a guest whose host's lease has ended.
    fn decide_lost(&self, guest: &VirtualMachine, placement: &Placement, wants: bool) -> Decision {
        let stays = |message: &str| Decision::Stay {
            host: placement.host.clone(),
            message: format!(
                "its host {} is lost to the fleet; {message}",
                placement.host
            ),
        };
        if placement.state == PlacementState::Held {
            return stays(match guest.spec.failover {
                Failover::Never => {
                    "whether it runs is not known, and it is not started elsewhere (spec.failover)"
                }
                Failover::Restart => {
                    "it is not started elsewhere, since it has a disk that isn't shared, or spec.host"
                }
            });
        }
        if !wants {
            return Decision::Nothing;
        }
        if !self.is_movable(guest) {
            return stays("it has a disk that isn't shared, or spec.host");
        }
        self.place(guest, Some(placement.host.clone()))
    }

    /// Whether it can run on another host.
    pub fn is_movable(&self, guest: &VirtualMachine) -> bool {
        let disks: Option<Vec<_>> = guest
            .spec
            .disks
            .iter()
            .map(|attachment| self.disks.get(&attachment.disk))
            .collect();
        disks.is_some_and(|disks| is_movable(guest, disks))
    }

    /// Where a guest that runs can go on: on the host that is `wanted`, or on the best one.
    ///
    /// # Errors
    /// Why it can't, for people.
    pub fn destination(&self, name: &str, wanted: Option<&str>) -> Result<String, String> {
        let Some((guest, _)) = self.guests.get(name) else {
            return Err("there is no such guest".into());
        };
        if let Some(host) = &guest.spec.host {
            return Err(format!(
                "it is to be on {host} and nowhere else (spec.host)"
            ));
        }
        for attachment in &guest.spec.disks {
            if !self
                .disks
                .get(&attachment.disk)
                .is_some_and(|disk| disk.shared)
            {
                let disk = &attachment.disk;
                return Err(format!("Disk/{disk} is on its host alone (spec.shared)"));
            }
        }
        let placement = guest.status.placement.as_ref();
        let current = placement.map_or("", |placement| placement.host.as_str());
        if let Some(wanted) = wanted {
            if wanted == current {
                return Err(format!("it is on {wanted}"));
            }
            let host = self.hosts.get(wanted);
            let host = host.ok_or_else(|| format!("there is no Host/{wanted}"))?;
            let score = self.receiving_score(guest, host);
            return score
                .map(|_| wanted.to_owned())
                .map_err(|refusal| format!("Host/{wanted} is {refusal}"));
        }
        let others = self
            .hosts
            .values()
            .filter(|host| host.metadata.name != current);
        self.choose(others, |host| self.receiving_score(guest, host))
    }

    fn receiving_score(&self, guest: &VirtualMachine, host: &Host) -> Result<u64, String> {
        if host.status.migration_address.is_none() {
            return Err("without migration_listen in its configuration".into());
        }
        self.score(guest, host)
    }

    fn place(&self, guest: &VirtualMachine, lost: Option<String>) -> Decision {
        match self.choose(self.hosts.values(), |host| self.score(guest, host)) {
            Ok(host) => Decision::Place { host, lost },
            Err(message) => Decision::Wait { message, lost },
        }
    }

    /// The host with the best score; or why none has one.
    fn choose<'a>(
        &'a self,
        hosts: impl Iterator<Item = &'a Host>,
        score: impl Fn(&Host) -> Result<u64, String>,
    ) -> Result<String, String> {
        let mut count = 0;
        let mut refusals: BTreeMap<String, usize> = BTreeMap::new();
        let mut best: Option<(u64, std::cmp::Reverse<usize>, &str)> = None;
        for host in hosts {
            count += 1;
            let name = host.metadata.name.as_str();
            match score(host) {
                Ok(share) => {
                    let guests = self.loads.get(name).map_or(0, |load| load.guests.len());
                    let candidate = (share, std::cmp::Reverse(guests), name);
                    // Of equals the first by name.
                    if best.is_none_or(|(s, g, _)| (s, g) < (candidate.0, candidate.1)) {
                        best = Some(candidate);
                    }
                }
                Err(refusal) => *refusals.entry(refusal).or_default() += 1,
            }
        }
        if let Some((_, _, host)) = best {
            return Ok(host.into());
        }
        let reasons: Vec<_> = refusals
            .iter()
            .map(|(refusal, count)| format!("{count} {refusal}"))
            .collect();
        Err(format!(
            "none of {count} hosts takes it: {}",
            reasons.join(", ")
        ))
    }

    /// How much of a host would be left if it took the guest, in thousandths.
    ///
    /// # Errors
    /// Why it can't take the guest.
    fn score(&self, guest: &VirtualMachine, host: &Host) -> Result<u64, String> {
        let name = host.metadata.name.as_str();
        let spec = &guest.spec;
        if !self.is_alive(name) {
            return Err("lost".into());
        }
        if host.spec.unschedulable {
            return Err("cordoned".into());
        }
        if spec.host.as_ref().is_some_and(|wanted| wanted != name) {
            return Err("not its spec.host".into());
        }
        let labels = &host.metadata.labels;
        if !has_labels(labels, &spec.host_selector) {
            return Err("without the labels of its hostSelector".into());
        }
        for attachment in &spec.disks {
            let Some(disk) = self.disks.get(&attachment.disk) else {
                return Err(format!("without Disk/{}", attachment.disk));
            };
            let elsewhere = disk.host.as_ref().is_some_and(|host| host != name);
            if !disk.shared && elsewhere {
                return Err(format!("without Disk/{}", attachment.disk));
            }
        }
        if self.has_opponent(guest, name) {
            return Err("with a guest that it is to be apart from".into());
        }
        let all = host.status.allocatable.as_ref().map(Resources::of_host);
        let all = all.unwrap_or_default();
        let needs = Resources::of_guest(spec);
        let free = all.minus(self.used(name));
        match free.lacks(&needs) {
            Some(what) => Err(format!("with too little {what}")),
            None => Ok(free.minus(needs).free_share(&all)),
        }
    }

    /// Whether one of two guests wants to be apart from the other, which is on the host.
    fn has_opponent(&self, guest: &VirtualMachine, host: &str) -> bool {
        let Some(load) = self.loads.get(host) else {
            return false;
        };
        let others = if guest.spec.anti_affinity.is_empty() {
            &load.apart
        } else {
            &load.guests
        };
        let others = others.iter().filter(|name| **name != guest.metadata.name);
        let mut others = others.filter_map(|name| self.guests.get(name));
        let against = |one: &VirtualMachine, other: &VirtualMachine| {
            let labels = &one.spec.anti_affinity;
            !labels.is_empty() && has_labels(&other.metadata.labels, labels)
        };
        others.any(|(other, _)| against(guest, other) || against(other, guest))
    }
}

fn has_labels(labels: &BTreeMap<String, String>, wanted: &BTreeMap<String, String>) -> bool {
    wanted
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
}

/// The hosts whose resources a guest takes: while it moves, those of both.
fn loads_of(guest: &VirtualMachine) -> impl Iterator<Item = &str> {
    let placed = load_of(guest);
    let destination = transitions::active(guest).map(|active| active.destination.as_str());
    let other = destination.filter(|destination| placed.is_some_and(|host| host != *destination));
    placed.into_iter().chain(other)
}

/// The host whose resources a guest takes where it is placed.
fn load_of(guest: &VirtualMachine) -> Option<&str> {
    match &guest.status.placement {
        Some(placement) if placement.state == PlacementState::Released => None,
        Some(placement) => {
            let idle = placement.state == PlacementState::Assigned
                && guest.spec.power_state == PowerState::Stopped;
            (!idle).then_some(placement.host.as_str())
        }
        None if runs_unplaced(guest) => guest.status.host.as_deref(),
        None => None,
    }
}

/// Whether it was started by an agent that knew of no placement, and takes it over.
fn runs_unplaced(guest: &VirtualMachine) -> bool {
    let phase = guest.status.phase;
    guest.status.placement.is_none()
        && guest.status.host.is_some()
        && matches!(
            phase,
            Phase::Starting | Phase::Running | Phase::Paused | Phase::Stopping
        )
}
