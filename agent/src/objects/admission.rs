//! Admission: a manifest is checked whole, against everything there is, before anything of it is
//! written; then it is written whole.

use std::cell::OnceCell;
use std::collections::BTreeSet;

use jiff::Timestamp;
use keelson_api::{
    Disk, DiskStatus, Host, HostStatus, Kind, Network, NetworkStatus, Object, Phase,
    PlacementState, PortForwardStatus, PowerState, SecurityGroup, SecurityGroupStatus, Service,
    ServiceStatus, VirtualMachine, VirtualMachineStatus,
};
use serde_json::Value;

use super::allocation::{Allocation, holder};
use super::store::{ObjectStore, World};
use super::{checks, uplink_checks};
use crate::fleet::Fleet;
use crate::host::Inventory;
use crate::{AgentError, error::Result};

/// How often admission is tried against others' admissions.
const ATTEMPTS: usize = 20;

/// What applying did to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It is new.
    Created,
    /// Its spec or metadata changed.
    Configured,
    /// It was so already.
    Unchanged,
}

/// What applying did to one object of a manifest.
#[derive(Clone, Debug)]
pub struct Applied {
    /// What was done.
    pub action: Action,
    /// The object as it is now.
    pub object: Object,
}

/// Decides on changes of objects.
#[derive(Clone, Copy, Debug)]
pub struct Admission<'a> {
    /// Where the objects are.
    pub objects: &'a ObjectStore,
    /// What this host has.
    pub inventory: &'a Inventory,
    /// This host among others.
    pub fleet: &'a Fleet,
}

impl Admission<'_> {
    /// Creates or replaces all objects of a manifest, or none.
    ///
    /// # Errors
    /// [`AgentError::Manifest`] or [`AgentError::Invalid`] where an object is wrong by itself,
    /// [`AgentError::Precondition`] where it does not fit to the host or to other objects, and
    /// [`AgentError::Conflict`].
    pub async fn apply(&self, documents: &[Value], dry_run: bool) -> Result<Vec<Applied>> {
        let objects = read(documents)?;
        for _ in 0..ATTEMPTS {
            let world = self.objects.world().await?;
            let applied = self.merge(&world, &objects)?;
            let changed: Vec<_> = applied
                .iter()
                .filter(|applied| applied.action != Action::Unchanged)
                .map(|applied| applied.object.clone())
                .collect();
            if dry_run || changed.is_empty() || self.objects.commit(&world, &changed).await? {
                return Ok(applied);
            }
        }
        Err(AgentError::Conflict("the objects".into()))
    }

    /// Deletes an object that nothing refers to. A guest is only marked: it goes when its teardown
    /// is complete.
    ///
    /// # Errors
    /// [`AgentError::NotFound`], [`AgentError::Precondition`] with what refers to it, and
    /// [`AgentError::Conflict`].
    pub async fn delete(&self, kind: Kind, name: &str) -> Result<()> {
        if kind == Kind::VirtualMachine {
            let mark = |guest: &mut VirtualMachine| {
                guest
                    .metadata
                    .deletion_timestamp
                    .get_or_insert_with(Timestamp::now);
            };
            return self.objects.update(name, mark).await.map(drop);
        }
        for _ in 0..ATTEMPTS {
            let world = self.objects.world().await?;
            if !world.objects.contains_key(&(kind, name.into())) {
                return Err(AgentError::NotFound {
                    kind,
                    name: name.into(),
                });
            }
            let users: Vec<_> = world
                .objects
                .values()
                .filter(|stored| references(&stored.object).any(|r| r == (kind, name)))
                .map(|stored| {
                    let name = &stored.object.metadata().name;
                    format!("{}/{name}", stored.object.kind())
                })
                .collect();
            if kind == Kind::Host {
                self.check_host_is_gone(name).await?;
            }
            if !users.is_empty() {
                let users = users.join(", ");
                return Err(AgentError::Precondition(vec![format!(
                    "{kind}/{name} is used by {users}; delete that first"
                )]));
            }
            if self.objects.commit_deletion(&world, kind, name).await? {
                return Ok(());
            }
        }
        Err(AgentError::Conflict(format!("{kind}/{name}")))
    }

    async fn check_host_is_gone(&self, name: &str) -> Result<()> {
        let registered = !self.fleet.is_exclusive() && self.fleet.is_registered(name).await?;
        if registered || name == self.fleet.host() {
            return Err(AgentError::Precondition(vec![format!(
                "Host/{name} has an agent that renews its lease; drain it and stop its agent first"
            )]));
        }
        Ok(())
    }

    /// Gives every object the history and allocations of its predecessor, and checks the result
    /// against the host and against everything else.
    fn merge(&self, world: &World, objects: &[Object]) -> Result<Vec<Applied>> {
        let mut errors = Vec::new();
        let ports = OnceCell::new();
        let ports = self.fleet.is_exclusive().then_some(&ports);
        let mut merged: Vec<_> = objects
            .iter()
            .map(|object| inherit(world, object.clone(), &mut errors))
            .collect();
        let mut after = world.clone();
        for object in &merged {
            let key = (object.kind(), object.metadata().name.clone());
            let revision = after.objects.get(&key).map_or(0, |stored| stored.revision);
            let stored = super::Stored {
                object: object.clone(),
                revision,
            };
            after.objects.insert(key, stored);
        }
        let given: BTreeSet<_> = merged
            .iter()
            .map(|o| (o.kind(), o.metadata().name.clone()))
            .collect();
        let others = after
            .objects
            .iter()
            .filter(|(key, _)| !given.contains(*key));
        let mut allocation = Allocation::of(others.map(|(_, stored)| &stored.object));
        // Those that ask for certain addresses first, so that nobody else is given these.
        let mut order: Vec<&mut Object> = merged.iter_mut().collect();
        order.sort_by_key(|object| wants_allocation(object));
        for object in order {
            let identity = format!("{}/{}", object.kind(), object.metadata().name);
            let mut report = |field: &str, message: String| {
                errors.push(format!("{identity}: {field}: {message}"));
            };
            match object {
                Object::Disk(disk) => {
                    let before = match world.get::<Disk>(&disk.metadata.name) {
                        Some(Object::Disk(before)) => Some(before),
                        _ => None,
                    };
                    self.place_disk(disk, &after, &mut report);
                    if let Some(before) = &before {
                        checks::place_unchanged(before, disk, world, &mut report);
                    }
                    if disk.spec.shared || self.is_here(disk.spec.host.as_deref()) {
                        checks::disk(disk, before.as_ref(), &mut report);
                    } else {
                        checks::disk_elsewhere(disk, before.as_ref(), &mut report);
                    }
                }
                Object::Host(_) => {}
                Object::Network(network) => {
                    checks::network(network, &after, &mut report);
                    uplink_checks::network(network, &after, ports, &mut report);
                    if let Err(message) = allocation.take_vni(network) {
                        report("spec.overlay.vni", message);
                    }
                }
                Object::PortForward(forward) => {
                    uplink_checks::port_forward(forward, &after, ports, &mut report);
                }
                Object::SecurityGroup(group) => {
                    checks::security_group(group, &after, &mut report);
                }
                Object::Service(service) => {
                    checks::service(service, &after, &mut report);
                    allocate_service(service, &after, &mut allocation, &mut report);
                }
                Object::VirtualMachine(guest) => {
                    let before = match world.get::<VirtualMachine>(&guest.metadata.name) {
                        Some(Object::VirtualMachine(before)) => Some(before),
                        _ => None,
                    };
                    self.check_guest(guest, &after, &mut report);
                    self.check_placement(guest, before.as_ref(), &after, &mut report);
                    allocate(guest, &after, &mut allocation, &mut report);
                }
            }
        }
        if !errors.is_empty() {
            return Err(AgentError::Precondition(errors));
        }
        Ok(merged
            .into_iter()
            .map(|object| finish(world, object))
            .collect())
    }

    fn check_guest(
        &self,
        guest: &VirtualMachine,
        after: &World,
        report: &mut impl FnMut(&str, String),
    ) {
        if self.is_here(guest.spec.host.as_deref()) {
            if guest.spec.memory.bytes() > self.inventory.memory_bytes {
                report(
                    "spec.memory",
                    format!(
                        "is {}; this host has {}",
                        guest.spec.memory,
                        self.inventory.memory()
                    ),
                );
            }
            checks::file("spec.kernel.image", &guest.spec.kernel.image, report);
            if let Some(initrd) = &guest.spec.kernel.initrd {
                checks::file("spec.kernel.initrd", initrd, report);
            }
        }
        for (index, disk) in guest.spec.disks.iter().enumerate() {
            if after.get::<Disk>(&disk.disk).is_none() {
                let field = format!("spec.disks[{index}].disk");
                report(&field, checks::missing(Kind::Disk, &disk.disk));
            }
        }
        for (index, interface) in guest.spec.interfaces.iter().enumerate() {
            for (position, group) in interface.security_groups.iter().enumerate() {
                if after.get::<SecurityGroup>(group).is_none() {
                    let field = format!("spec.interfaces[{index}].securityGroups[{position}]");
                    report(&field, checks::missing(Kind::SecurityGroup, group));
                }
            }
        }
    }
}

impl Admission<'_> {
    /// Whether what is on the host `host` can be looked at here.
    fn is_here(&self, host: Option<&str>) -> bool {
        self.fleet.is_exclusive() || host == Some(self.fleet.host())
    }

    /// A disk that isn't shared is on one host: this one, unless it says another one.
    fn place_disk(&self, disk: &mut Disk, after: &World, report: &mut impl FnMut(&str, String)) {
        if self.fleet.is_exclusive() || disk.spec.shared {
            return;
        }
        let host = disk
            .spec
            .host
            .get_or_insert_with(|| self.fleet.host().to_owned());
        if after.get::<Host>(host).is_none() {
            let message = checks::no_such_host(host);
            report("spec.host", message);
        }
    }

    /// Whether there is a host that the guest can be placed on, as far as that does not change from day
    /// to day.
    fn check_placement(
        &self,
        guest: &VirtualMachine,
        before: Option<&VirtualMachine>,
        after: &World,
        report: &mut impl FnMut(&str, String),
    ) {
        let spec = &guest.spec;
        if self.fleet.is_exclusive() {
            if spec
                .host
                .as_deref()
                .is_some_and(|host| host != self.fleet.host())
            {
                let message = format!(
                    "is another host than this one, {}, to which the state store belongs",
                    self.fleet.host()
                );
                report("spec.host", message);
            }
            return;
        }
        checks::disks_on_one_host(guest, after, report);
        let placement = before.and_then(|before| before.status.placement.as_ref());
        if let (Some(placement), Some(host)) = (placement, &spec.host)
            && placement.host != *host
            && matches!(
                placement.state,
                PlacementState::Held | PlacementState::Leased
            )
        {
            let message = format!(
                "is {host}, but it runs on {}; stop it first",
                placement.host
            );
            report("spec.host", message);
        }
        let hosts: Vec<Host> = after
            .of_kind(Kind::Host)
            .filter_map(|stored| match &stored.object {
                Object::Host(host) => Some(host.clone()),
                _ => None,
            })
            .collect();
        checks::fits_a_host(guest, &hosts, report);
    }
}

/// Reads and checks the objects of a manifest, each by itself.
fn read(documents: &[Value]) -> Result<Vec<Object>> {
    let mut objects = Vec::new();
    let mut errors = Vec::new();
    let mut seen = BTreeSet::new();
    for document in documents {
        let object = Object::from_json(document)?;
        let identity = format!("{}/{}", object.kind(), object.metadata().name);
        errors.extend(
            object
                .validate()
                .iter()
                .map(|error| format!("{identity}: {error}")),
        );
        if !seen.insert(identity.clone()) {
            errors.push(format!(
                "{identity}: metadata.name: stands in the manifest twice"
            ));
        }
        objects.push(object);
    }
    if errors.is_empty() {
        Ok(objects)
    } else {
        Err(AgentError::Invalid(errors))
    }
}

/// Takes over what an earlier version of the object has and a manifest does not say.
fn inherit(world: &World, mut object: Object, errors: &mut Vec<String>) -> Object {
    let key = (object.kind(), object.metadata().name.clone());
    let Some(known) = world.objects.get(&key).map(|stored| &stored.object) else {
        let metadata = object.metadata_mut();
        metadata.uid = uuid::Uuid::new_v4().to_string();
        metadata.generation = 1;
        metadata.creation_timestamp = Some(Timestamp::now());
        metadata.deletion_timestamp = None;
        metadata.resource_version = String::new();
        clear_status(&mut object);
        return object;
    };
    if known.metadata().deletion_timestamp.is_some() {
        errors.push(format!(
            "{}/{}: is being deleted; apply it again later",
            key.0, key.1
        ));
    }
    let labels = object.metadata().labels.clone();
    let annotations = object.metadata().annotations.clone();
    *object.metadata_mut() = known.metadata().clone();
    object.metadata_mut().labels = labels;
    object.metadata_mut().annotations = annotations;
    object.take_status(known);
    match (&mut object, known) {
        (Object::VirtualMachine(guest), Object::VirtualMachine(known)) => {
            inherit_allocations(guest, known);
        }
        (Object::Service(service), Object::Service(known)) => {
            let (spec, known) = (&mut service.spec, &known.spec);
            if spec.network == known.network {
                spec.address = spec.address.or(known.address);
                spec.address_v6 = spec.address_v6.or(known.address_v6);
            }
        }
        (Object::Network(network), Object::Network(known)) => {
            if let (Some(overlay), Some(known)) = (&mut network.spec.overlay, known.spec.overlay) {
                overlay.vni = overlay.vni.or(known.vni);
            }
        }
        // A disk that says nothing stays where it is.
        (Object::Disk(disk), Object::Disk(known)) if !disk.spec.shared => {
            disk.spec.host = disk.spec.host.take().or_else(|| known.spec.host.clone());
        }
        _ => {}
    }
    object
}

fn clear_status(object: &mut Object) {
    match object {
        Object::Host(host) => host.status = HostStatus::default(),
        Object::Disk(disk) => disk.status = DiskStatus::default(),
        Object::Network(network) => network.status = NetworkStatus::default(),
        Object::PortForward(forward) => forward.status = PortForwardStatus::default(),
        Object::SecurityGroup(group) => group.status = SecurityGroupStatus::default(),
        Object::Service(service) => service.status = ServiceStatus::default(),
        Object::VirtualMachine(guest) => guest.status = VirtualMachineStatus::default(),
    }
}

/// An interface that asks for no address keeps the one that it was given.
fn inherit_allocations(guest: &mut VirtualMachine, known: &VirtualMachine) {
    for interface in &mut guest.spec.interfaces {
        let before =
            known.spec.interfaces.iter().find(|before| {
                before.name == interface.name && before.network == interface.network
            });
        if let Some(before) = before {
            interface.address = interface.address.or(before.address);
            interface.address_v6 = interface.address_v6.or(before.address_v6);
            interface.mac = interface.mac.or(before.mac);
        }
    }
}

fn allocate(
    guest: &mut VirtualMachine,
    after: &World,
    allocation: &mut Allocation,
    report: &mut impl FnMut(&str, String),
) {
    for index in 0..guest.spec.interfaces.len() {
        let interface = guest.spec.interfaces[index].clone();
        let field = format!("spec.interfaces[{index}]");
        let Some(Object::Network(network)) = after.get::<Network>(&interface.network) else {
            report(
                &format!("{field}.network"),
                checks::missing(Kind::Network, &interface.network),
            );
            continue;
        };
        let named = holder(guest, &interface);
        match allocation.take_address(named.clone(), interface.address, &network) {
            Ok(address) => guest.spec.interfaces[index].address = address,
            Err(message) => report(&format!("{field}.address"), message),
        }
        match allocation.take_mac(guest, &interface) {
            Ok(mac) => guest.spec.interfaces[index].mac = Some(mac),
            Err(message) => report(&format!("{field}.mac"), message),
        }
        // With its MAC address, of which SLAAC makes this one.
        let interface = guest.spec.interfaces[index].clone();
        let slaac = interface
            .mac
            .and_then(|mac| network.spec.slaac_address(mac));
        let refused = checks::refuse_slaac(&network.spec, &interface);
        let wanted = interface.address_v6.or(slaac);
        let taken = match refused {
            Some(problem) => Err(problem),
            None => allocation.take_address_v6(named, wanted, &network),
        };
        match taken {
            Ok(address) => guest.spec.interfaces[index].address_v6 = address,
            Err(message) => report(&format!("{field}.addressV6"), message),
        }
    }
}

/// How many addresses an object is to be given, those of IPv4 before all: not every network has IPv6.
fn wants_allocation(object: &Object) -> u8 {
    let wants = |ipv4: bool, ipv6: bool| u8::from(ipv4) * 2 + u8::from(ipv6);
    match object {
        Object::VirtualMachine(guest) => {
            let interfaces = &guest.spec.interfaces;
            wants(
                interfaces
                    .iter()
                    .any(|interface| interface.address.is_none()),
                interfaces
                    .iter()
                    .any(|interface| interface.address_v6.is_none()),
            )
        }
        Object::Service(service) => wants(
            service.spec.address.is_none(),
            service.spec.address_v6.is_none(),
        ),
        Object::Network(network) => wants(
            network
                .spec
                .overlay
                .is_some_and(|overlay| overlay.vni.is_none()),
            false,
        ),
        _ => 0,
    }
}

fn allocate_service(
    service: &mut Service,
    after: &World,
    allocation: &mut Allocation,
    report: &mut impl FnMut(&str, String),
) {
    let name = &service.spec.network;
    let Some(Object::Network(network)) = after.get::<Network>(name) else {
        report("spec.network", checks::missing(Kind::Network, name));
        return;
    };
    let holder = format!("Service/{}", service.metadata.name);
    match allocation.take_address(holder.clone(), service.spec.address, &network) {
        Ok(address) => service.spec.address = address,
        Err(message) => report("spec.address", message),
    }
    match allocation.take_address_v6(holder, service.spec.address_v6, &network) {
        Ok(address) => service.spec.address_v6 = address,
        Err(message) => report("spec.addressV6", message),
    }
}

/// Compares with the earlier version and counts the generation.
fn finish(world: &World, mut object: Object) -> Applied {
    let key = (object.kind(), object.metadata().name.clone());
    let Some(known) = world.objects.get(&key).map(|stored| &stored.object) else {
        return Applied {
            action: Action::Created,
            object,
        };
    };
    let same_spec = object.same_spec(known);
    let same = same_spec && object.metadata() == known.metadata();
    if !same_spec {
        object.metadata_mut().generation += 1;
    }
    Applied {
        action: if same {
            Action::Unchanged
        } else {
            Action::Configured
        },
        object,
    }
}

/// What an object refers to.
fn references(object: &Object) -> impl Iterator<Item = (Kind, &str)> {
    let guest = match object {
        Object::VirtualMachine(guest) => Some(guest),
        _ => None,
    };
    let group = match object {
        Object::SecurityGroup(group) => Some(group),
        _ => None,
    };
    let groups = group.into_iter().flat_map(|group| {
        let others = group.spec.references();
        // A group whose rules name itself does not stand in its own way.
        others
            .map(|(_, name)| name)
            .filter(|name| *name != group.metadata.name)
            .map(|name| (Kind::SecurityGroup, name))
    });
    let guests = guest.into_iter().flat_map(|guest| {
        let disks = guest
            .spec
            .disks
            .iter()
            .map(|disk| (Kind::Disk, disk.disk.as_str()));
        let interfaces = guest.spec.interfaces.iter().flat_map(|interface| {
            let groups = interface.security_groups.iter();
            groups
                .map(|group| (Kind::SecurityGroup, group.as_str()))
                .chain([(Kind::Network, interface.network.as_str())])
        });
        disks.chain(interfaces)
    });
    let in_network = match object {
        Object::Service(service) => Some((Kind::Network, service.spec.network.as_str())),
        Object::PortForward(forward) => Some((Kind::Network, forward.spec.network.as_str())),
        _ => None,
    };
    guests.chain(groups).chain(in_network)
}

/// Sets the desired power state of a guest.
///
/// # Errors
/// [`AgentError::NotFound`], [`AgentError::Precondition`] where it is being deleted.
pub async fn set_power_state(
    objects: &ObjectStore,
    name: &str,
    power_state: PowerState,
) -> Result<Object> {
    let mut deleting = false;
    let change = |guest: &mut VirtualMachine| {
        deleting = guest.metadata.deletion_timestamp.is_some();
        // A guest that ended by itself should run already; a new generation starts it again.
        let start_again = power_state == PowerState::Running
            && matches!(guest.status.phase, Phase::Stopped | Phase::Failed);
        if !deleting && (guest.spec.power_state != power_state || start_again) {
            guest.spec.power_state = power_state;
            guest.metadata.generation += 1;
        }
    };
    let stored = objects.update(name, change).await?;
    if deleting {
        let message = format!("VirtualMachine/{name} is being deleted");
        return Err(AgentError::Precondition(vec![message]));
    }
    Ok(Object::VirtualMachine(stored.object))
}
