//! What a host keeps in mind of a guest, its own or another host's.

use std::collections::{BTreeMap, BTreeSet};

use keelson_api::{Interface, Kind, Phase, VirtualMachine};

use crate::guest::{Memberships, memberships_of};

/// What a host keeps in mind of a guest, its own or another host's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownGuest {
    /// Its labels, by which services select it.
    pub labels: BTreeMap<String, String>,
    /// Its interfaces.
    pub interfaces: Vec<Interface>,
    /// Whether it runs, and is to go on.
    pub runs: bool,
    /// Whether it runs, and is about to stop.
    pub stops: bool,
    /// Where it is, if that is another host.
    pub host: Option<String>,
    /// What it refers to, if it is a guest of this host.
    references: BTreeSet<(Kind, String)>,
}

/// What of a guest makes a difference to services.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AsBackend<'a> {
    labels: &'a BTreeMap<String, String>,
    interfaces: &'a [Interface],
    runs: bool,
    stops: bool,
    is_here: bool,
    host: Option<&'a str>,
}

impl KnownGuest {
    /// What is kept of a guest; more of one that is here.
    pub fn new(guest: &VirtualMachine, is_here: bool) -> Self {
        let phase = guest.status.phase;
        let runs = phase == Phase::Running;
        let is_to_go = guest.metadata.deletion_timestamp.is_some();
        Self {
            labels: guest.metadata.labels.clone(),
            interfaces: guest.spec.interfaces.clone(),
            runs: runs && !is_to_go,
            stops: phase == Phase::Stopping || runs && is_to_go,
            host: if is_here { None } else { host_of(guest) },
            references: if is_here {
                references(guest)
            } else {
                BTreeSet::new()
            },
        }
    }

    /// The objects that it refers to, if it is a guest of this host.
    pub fn references(&self) -> &BTreeSet<(Kind, String)> {
        &self.references
    }

    /// Whether it is a guest of this host; of one without interfaces and disks nobody asks.
    pub fn is_here(&self) -> bool {
        !self.references.is_empty()
    }

    /// The networks that it has interfaces in.
    pub fn networks(&self) -> impl Iterator<Item = &str> {
        let interfaces = self.interfaces.iter();
        interfaces.map(|interface| interface.network.as_str())
    }

    /// Which of its addresses are in which groups.
    pub fn memberships(&self) -> Memberships {
        memberships_of(&self.interfaces)
    }

    /// What makes a difference to the tunnel between hosts.
    pub fn as_remote(&self) -> (Option<&str>, &[Interface]) {
        (self.host.as_deref(), &self.interfaces)
    }

    /// What makes a difference to services.
    pub fn as_backend(&self) -> AsBackend<'_> {
        AsBackend {
            labels: &self.labels,
            interfaces: &self.interfaces,
            runs: self.runs,
            stops: self.stops,
            is_here: self.is_here(),
            host: self.host.as_deref(),
        }
    }
}

/// The host that a guest is placed on.
fn host_of(guest: &VirtualMachine) -> Option<String> {
    let placed = guest.status.placement.as_ref();
    let placed = placed.map(|placement| placement.host.clone());
    placed.or_else(|| guest.status.host.clone())
}

fn references(guest: &VirtualMachine) -> BTreeSet<(Kind, String)> {
    let mut references = BTreeSet::new();
    for attachment in &guest.spec.disks {
        references.insert((Kind::Disk, attachment.disk.clone()));
    }
    for interface in &guest.spec.interfaces {
        references.insert((Kind::Network, interface.network.clone()));
        for group in &interface.security_groups {
            references.insert((Kind::SecurityGroup, group.clone()));
        }
    }
    references
}
