//! What this host knows of all objects, from its watch of them, and who of its guests depends on what.
//!
//! The agent reads all objects once, and then is told changes. What a change costs it depends on the guests
//! here that depend on what changed, not on how many objects there are: so a change of an address wakes
//! the guests whose rules name its group, and nobody else. Of guests on other hosts it keeps only what
//! rules and services need.

mod hosts;
mod known_guest;
mod relations;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use keelson_api::{
    Disk, Kind, Network, Object, PortForward, SecurityGroup, Service, VirtualMachine,
};
use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};

pub use known_guest::KnownGuest;
use relations::Relations;

/// The view that the parts of an agent share.
#[derive(Clone, Debug, Default)]
pub struct SharedView(Arc<RwLock<View>>);

impl SharedView {
    /// For looking something up; nothing may be awaited meanwhile.
    pub fn read(&self) -> RwLockReadGuard<'_, View> {
        self.0.read()
    }

    /// For noting a change; nothing may be awaited meanwhile.
    pub fn write(&self) -> RwLockWriteGuard<'_, View> {
        self.0.write()
    }
}

/// What this host knows of all objects.
#[derive(Debug, Default)]
pub struct View {
    disks: BTreeMap<String, Disk>,
    networks: BTreeMap<String, Network>,
    groups: BTreeMap<String, SecurityGroup>,
    services: BTreeMap<String, Service>,
    forwards: BTreeMap<String, PortForward>,
    guests: BTreeMap<String, KnownGuest>,
    /// Where the tunnels of hosts end.
    tunnels: BTreeMap<String, IpAddr>,
    /// Hosts whose lease has not ended.
    present: BTreeSet<String>,
    /// Guests of other hosts, by host.
    placed: Relations<String>,
    /// Guests of this host, by each object that they refer to.
    users: Relations<(Kind, String)>,
    /// Guests of all hosts, by network.
    attached: Relations<String>,
    /// Groups, by each group that their rules name.
    naming: Relations<String>,
    /// Services, by network.
    serving: Relations<String>,
    /// Forwards, by the guests that they lead to.
    forwarding: Relations<String>,
    /// The addresses in each group, and in how many interfaces each stands.
    members: BTreeMap<String, BTreeMap<IpAddr, usize>>,
}

/// What has to look again after a change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Affected {
    /// Guests of this host that depend on what changed.
    pub guests: BTreeSet<String>,
    /// The services.
    pub services: bool,
    /// Source NAT and forwarded ports.
    pub uplinks: bool,
    /// Guests that other hosts have or had, and whose place or addresses changed.
    pub remote: BTreeSet<String>,
    /// The networks that span hosts.
    pub overlays: bool,
}

impl View {
    /// Notes an object as it is now; `is_here` says of a guest whether this host runs it, and of a disk
    /// whether this host may have to report on it.
    pub fn set(&mut self, object: Object, is_here: bool) -> Affected {
        match object {
            Object::VirtualMachine(guest) => self.set_guest(&guest, is_here),
            Object::Disk(disk) => self.set_disk(disk, is_here),
            Object::Network(network) => self.set_network(network),
            Object::SecurityGroup(group) => self.set_group(group),
            Object::Service(service) => self.set_service(service),
            Object::PortForward(forward) => self.set_forward(forward),
            Object::Host(host) => self.set_host(&host),
        }
    }

    /// Notes that there is no such object.
    pub fn remove(&mut self, kind: Kind, name: &str) -> Affected {
        match kind {
            Kind::VirtualMachine => {
                let before = self.guests.remove(name);
                self.replace_guest(name, before.as_ref(), None)
            }
            Kind::Disk => {
                self.disks.remove(name);
                self.affected_users(kind, name)
            }
            Kind::Network => {
                let before = self.networks.remove(name).map(|before| before.spec);
                let before = before.as_ref();
                Affected {
                    services: self.serving.has(name)
                        || before.is_some_and(|before| before.uplink.is_some()),
                    uplinks: before.is_some_and(|before| before.uplink.is_some()),
                    overlays: before.is_some_and(|before| before.overlay.is_some()),
                    ..self.affected_users(kind, name)
                }
            }
            Kind::SecurityGroup => {
                if let Some(before) = self.groups.remove(name) {
                    self.naming.remove(name, named_by(&before));
                }
                self.affected_users(kind, name)
            }
            Kind::Service => {
                if let Some(before) = self.services.remove(name) {
                    self.serving.remove(name, [before.spec.network]);
                }
                Affected {
                    services: true,
                    ..Affected::default()
                }
            }
            Kind::PortForward => {
                if let Some(before) = self.forwards.remove(name) {
                    self.forwarding.remove(name, [before.spec.guest]);
                }
                Affected {
                    uplinks: true,
                    ..Affected::default()
                }
            }
            Kind::Host => self.set_host_facts(name, None, false),
        }
    }

    /// The disks that this host may have to report on, by name.
    pub fn disks(&self) -> &BTreeMap<String, Disk> {
        &self.disks
    }

    /// All networks, by name.
    pub fn networks(&self) -> &BTreeMap<String, Network> {
        &self.networks
    }

    /// All security groups, by name.
    pub fn groups(&self) -> &BTreeMap<String, SecurityGroup> {
        &self.groups
    }

    /// All services, by name.
    pub fn services(&self) -> &BTreeMap<String, Service> {
        &self.services
    }

    /// All forwards of ports, by name.
    pub fn forwards(&self) -> &BTreeMap<String, PortForward> {
        &self.forwards
    }

    /// What is known of a guest, of any host.
    pub fn guest(&self, name: &str) -> Option<&KnownGuest> {
        self.guests.get(name)
    }

    /// The guests that have an interface in a network, by name.
    pub fn guests_in(&self, network: &str) -> impl Iterator<Item = (&String, &KnownGuest)> {
        let names = self.attached.of(network);
        names.filter_map(|name| self.guests.get_key_value(name))
    }

    /// The names of the guests of other hosts.
    pub fn remote_guests(&self) -> impl Iterator<Item = &String> {
        let guests = self.guests.iter();
        guests
            .filter(|(_, guest)| guest.host.is_some())
            .map(|(name, _)| name)
    }

    /// A guest of another host, and where its host's tunnel ends; `None` where either is not known.
    pub fn remote_guest(&self, name: &str) -> Option<(&KnownGuest, IpAddr)> {
        let guest = self.guests.get(name)?;
        let tunnel = self.tunnels.get(guest.host.as_ref()?)?;
        Some((guest, *tunnel))
    }

    /// The addresses of the interfaces that are in a group, of all guests.
    pub fn members(&self, group: &str) -> impl Iterator<Item = IpAddr> {
        let members = self.members.get(group).into_iter();
        members.flat_map(|addresses| addresses.keys().copied())
    }

    fn set_guest(&mut self, guest: &VirtualMachine, is_here: bool) -> Affected {
        let name = guest.metadata.name.as_str();
        let now = KnownGuest::new(guest, is_here);
        if self.guests.get(name) == Some(&now) {
            return Affected::default();
        }
        let before = self.guests.insert(name.into(), now.clone());
        self.replace_guest(name, before.as_ref(), Some(&now))
    }

    fn replace_guest(
        &mut self,
        name: &str,
        before: Option<&KnownGuest>,
        now: Option<&KnownGuest>,
    ) -> Affected {
        let of =
            |guest: Option<&KnownGuest>| guest.map(KnownGuest::memberships).unwrap_or_default();
        let (left, joined) = (of(before), of(now));
        let mut changed = BTreeSet::new();
        for (group, address) in left.difference(&joined) {
            self.forget_member(group, address);
            changed.insert(group.clone());
        }
        for (group, address) in joined.difference(&left) {
            let addresses = self.members.entry(group.clone()).or_default();
            *addresses.entry(*address).or_default() += 1;
            changed.insert(group.clone());
        }
        let networks = [before, now].into_iter().flatten();
        let mut networks = networks.flat_map(KnownGuest::networks);
        let changed_as_backend =
            before.map(KnownGuest::as_backend) != now.map(KnownGuest::as_backend);
        let moved = before.map(KnownGuest::is_here) != now.map(KnownGuest::is_here);
        let affected = Affected {
            guests: changed
                .iter()
                .flat_map(|group| self.naming.of(group))
                .flat_map(|group| self.users.of(&(Kind::SecurityGroup, group.clone())))
                .cloned()
                .collect(),
            services: changed_as_backend && networks.any(|network| self.serving.has(network)),
            uplinks: (changed_as_backend || moved) && self.forwarding.has(name),
            remote: if before.map(KnownGuest::as_remote) == now.map(KnownGuest::as_remote) {
                BTreeSet::new()
            } else {
                BTreeSet::from([name.to_owned()])
            },
            overlays: false,
        };
        if let Some(before) = before {
            self.users.remove(name, before.references().iter().cloned());
            self.attached
                .remove(name, before.networks().map(str::to_owned));
            self.placed.remove(name, before.host.clone());
        }
        if let Some(now) = now {
            self.users.add(name, now.references().iter().cloned());
            self.attached.add(name, now.networks().map(str::to_owned));
            self.placed.add(name, now.host.clone());
        }
        affected
    }

    fn forget_member(&mut self, group: &str, address: &IpAddr) {
        let Some(addresses) = self.members.get_mut(group) else {
            return;
        };
        if let Some(count) = addresses.get_mut(address) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                addresses.remove(address);
            }
        }
        if addresses.is_empty() {
            self.members.remove(group);
        }
    }

    fn set_disk(&mut self, disk: Disk, is_here: bool) -> Affected {
        let name = disk.metadata.name.clone();
        let before = self.disks.get(&name);
        // What an agent observes of it changes nothing for guests.
        let same = before.is_some_and(|before| before.spec == disk.spec);
        if is_here {
            self.disks.insert(name.clone(), disk);
        } else {
            self.disks.remove(&name);
        }
        if same {
            return Affected::default();
        }
        self.affected_users(Kind::Disk, &name)
    }

    fn set_network(&mut self, network: Network) -> Affected {
        let name = network.metadata.name.clone();
        let spec = network.spec.clone();
        let before = self.networks.insert(name.clone(), network);
        if before.as_ref().is_some_and(|before| before.spec == spec) {
            return Affected::default();
        }
        let had_uplink = before
            .as_ref()
            .is_some_and(|before| before.spec.uplink.is_some());
        Affected {
            services: self.serving.has(&name) || had_uplink || spec.uplink.is_some(),
            uplinks: had_uplink || spec.uplink.is_some(),
            overlays: before.and_then(|before| before.spec.overlay) != spec.overlay,
            ..self.affected_users(Kind::Network, &name)
        }
    }

    fn set_group(&mut self, group: SecurityGroup) -> Affected {
        let name = group.metadata.name.clone();
        let (spec, named) = (group.spec.clone(), named_by(&group));
        let before = self.groups.insert(name.clone(), group);
        if before.as_ref().is_some_and(|before| before.spec == spec) {
            return Affected::default();
        }
        if let Some(before) = before {
            self.naming.remove(&name, named_by(&before));
        }
        self.naming.add(&name, named);
        self.affected_users(Kind::SecurityGroup, &name)
    }

    fn set_service(&mut self, service: Service) -> Affected {
        let name = service.metadata.name.clone();
        let spec = service.spec.clone();
        let found = service.status.backends.clone();
        let before = self.services.insert(name.clone(), service);
        // What other hosts found out about their guests is what this one goes by.
        let is_same = |before: &Service| before.spec == spec && before.status.backends == found;
        if before.as_ref().is_some_and(is_same) {
            return Affected::default();
        }
        if let Some(before) = before {
            self.serving.remove(&name, [before.spec.network]);
        }
        self.serving.add(&name, [spec.network]);
        Affected {
            services: true,
            ..Affected::default()
        }
    }

    fn set_forward(&mut self, forward: PortForward) -> Affected {
        let name = forward.metadata.name.clone();
        let spec = forward.spec.clone();
        let before = self.forwards.insert(name.clone(), forward);
        if before.as_ref().is_some_and(|before| before.spec == spec) {
            return Affected::default();
        }
        if let Some(before) = before {
            self.forwarding.remove(&name, [before.spec.guest]);
        }
        self.forwarding.add(&name, [spec.guest]);
        Affected {
            uplinks: true,
            ..Affected::default()
        }
    }

    fn affected_users(&self, kind: Kind, name: &str) -> Affected {
        Affected {
            guests: self.users.of(&(kind, name.to_owned())).cloned().collect(),
            ..Affected::default()
        }
    }
}

/// The groups that a group's rules name.
fn named_by(group: &SecurityGroup) -> BTreeSet<String> {
    let references = group.spec.references();
    references.map(|(_, group)| group.to_owned()).collect()
}
