//! Watches the objects and keeps one actor per guest, and the host's networks, as they desire.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::StreamExt;
use keelson_api::{ConditionStatus, Disk, Kind, Network, Object, SecurityGroup, set_condition};

use crate::guest::{GuestActor, GuestMailbox, Memberships, Runtime, memberships};
use crate::objects::{Change, World};
use crate::services::Services;
use crate::{Agent, AgentError, error::Result};

/// How long the loop waits before it reads everything again after the store failed.
const RETRY: Duration = Duration::from_secs(1);
/// How often the loop shows that it lives though nothing changes.
const HEARTBEAT: Duration = Duration::from_secs(2);

/// Watches the objects and keeps one actor per guest, and the host's networks, as they desire.
#[derive(Debug)]
pub struct Reconciler {
    agent: Agent,
    guests: BTreeMap<String, GuestMailbox>,
    /// Of each guest; when they change, the rules of others change.
    memberships: BTreeMap<String, Memberships>,
    services: Services,
    beats: Arc<AtomicU64>,
}

impl Reconciler {
    /// A reconciler that has not looked yet.
    pub fn new(agent: Agent) -> Self {
        Self {
            services: Services::start(agent.clone()),
            agent,
            guests: BTreeMap::new(),
            memberships: BTreeMap::new(),
            beats: Arc::default(),
        }
    }

    /// Counts up while the loop lives, for a watchdog.
    pub fn beats(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.beats)
    }

    /// Reads everything, then follows the changes; begins again whenever that fails. Never ends.
    pub async fn run(mut self) {
        loop {
            if let Err(error) = self.list_and_watch().await {
                tracing::warn!(%error, "the objects can't be followed; trying again");
            }
            self.beats.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn list_and_watch(&mut self) -> Result<()> {
        let fleet = self.agent.fleet.clone();
        let lease = fleet.lease_id();
        let world = self.agent.objects.world().await?;
        let mut changes = self.agent.objects.watch(None, world.revision).await?;
        self.reconcile_all(&world).await?;
        loop {
            self.beats.fetch_add(1, Ordering::Relaxed);
            let change = tokio::select! {
                change = changes.next() => change,
                () = tokio::time::sleep(HEARTBEAT) => continue,
                // What could not be started for want of a lease can be now.
                () = fleet.another_lease(lease), if !fleet.is_exclusive() => return Ok(()),
            };
            let Some(change) = change else { return Ok(()) };
            let (change, _) = change?;
            match change.kind() {
                Kind::Service => self.services.wake(),
                Kind::VirtualMachine => {
                    self.services.wake();
                    if self.concerns_this_host(&change) {
                        self.wake_guest(change.name());
                    }
                    if self.note_memberships(&change) {
                        self.wake_all();
                    }
                }
                // An object that guests refer to: few, and rarely changed.
                Kind::Host => self.note_host(&change),
                Kind::Disk | Kind::Network | Kind::SecurityGroup => {
                    let world = self.agent.objects.world().await?;
                    self.reconcile_all(&world).await?;
                }
            }
        }
    }

    async fn reconcile_all(&mut self, world: &World) -> Result<()> {
        self.reconcile_networks(world).await?;
        self.remove_stray_ports(world).await?;
        self.report_references(world).await?;
        self.services.wake();
        let in_store = world.of_kind(Kind::VirtualMachine);
        let here = in_store.filter(|stored| match &stored.object {
            Object::VirtualMachine(guest) => self.agent.fleet.is_here(guest),
            _ => false,
        });
        let mut names: BTreeSet<_> = here
            .map(|stored| stored.object.metadata().name.clone())
            .collect();
        // Guests whose objects were deleted while no agent looked.
        names.extend(Runtime::known_guests(&self.agent));
        for name in names {
            self.wake_guest(&name);
        }
        Ok(())
    }

    fn wake_guest(&mut self, name: &str) {
        self.guests.retain(|_, mailbox| !mailbox.is_finished());
        if !self.guests.get(name).is_some_and(GuestMailbox::wake) {
            let mailbox = GuestActor::spawn(self.agent.clone(), name);
            self.guests.insert(name.into(), mailbox);
        }
    }

    fn wake_all(&self) {
        for mailbox in self.guests.values() {
            // One that has ended has nothing here that could be changed.
            let _ = mailbox.wake();
        }
    }

    /// Whether a guest is placed here, or something of it is left here.
    fn concerns_this_host(&self, change: &Change) -> bool {
        let fleet = &self.agent.fleet;
        let placed = match change {
            Change::Set(object) => match object.as_ref() {
                Object::VirtualMachine(guest) => fleet.is_here(guest),
                _ => false,
            },
            Change::Gone(..) => false,
        };
        placed || self.guests.contains_key(change.name())
    }

    fn note_host(&self, change: &Change) {
        let Change::Set(object) = change else { return };
        if let Object::Host(host) = object.as_ref()
            && host.metadata.name == self.agent.fleet.host()
            && self.agent.fleet.set_draining(host.spec.drain)
        {
            self.wake_all();
        }
    }

    /// Whether it is for this host to say what it observes of an object that several hosts see: two of
    /// them that observe different things would contradict each other for ever.
    fn reports(&self, disk: Option<&Disk>) -> bool {
        let fleet = &self.agent.fleet;
        let at_home = disk.is_some_and(|disk| disk.spec.host.as_deref() == Some(fleet.host()));
        let nowhere = disk.is_none_or(|disk| disk.spec.host.is_none());
        fleet.is_exclusive() || at_home || (nowhere && fleet.is_scheduler())
    }

    /// Whether other addresses are in security groups than before.
    fn note_memberships(&mut self, change: &Change) -> bool {
        let now = match change {
            Change::Set(object) => match object.as_ref() {
                Object::VirtualMachine(guest) => memberships(guest),
                _ => return false,
            },
            Change::Gone(..) => Memberships::new(),
        };
        let before = if now.is_empty() {
            self.memberships.remove(change.name())
        } else {
            self.memberships.insert(change.name().into(), now.clone())
        };
        before.unwrap_or_default() != now
    }

    async fn reconcile_networks(&self, world: &World) -> Result<()> {
        let mut names = Vec::new();
        for stored in world.of_kind(Kind::Network) {
            let Object::Network(network) = &stored.object else {
                continue;
            };
            let name = network.metadata.name.as_str();
            names.push(name);
            let ensured = self.agent.network.ensure_network(name, &network.spec).await;
            if !self.reports(None) {
                if let Err(error) = ensured {
                    tracing::error!(network = name, %error, "the network is not there on this host");
                }
                continue;
            }
            let update = |network: &mut Network| match &ensured {
                Ok(device) => {
                    network.status.device = Some(device.clone());
                    let conditions = &mut network.status.conditions;
                    let message = "the host holds the gateway's address";
                    set_condition(conditions, "Ready", ConditionStatus::True, "Up", message);
                }
                Err(error) => {
                    let (reason, message) = (error.reason(), error.to_string());
                    let conditions = &mut network.status.conditions;
                    set_condition(
                        conditions,
                        "Ready",
                        ConditionStatus::False,
                        reason,
                        &message,
                    );
                }
            };
            ignore_gone(self.agent.objects.update(name, update).await.map(drop))?;
        }
        self.agent.network.remove_networks_except(&names).await
    }

    /// Removes TAP devices of guests that neither are in the store nor were started.
    async fn remove_stray_ports(&self, world: &World) -> Result<()> {
        let mut ports = Vec::new();
        for stored in world.of_kind(Kind::VirtualMachine) {
            let Object::VirtualMachine(guest) = &stored.object else {
                continue;
            };
            let name = &guest.metadata.name;
            let interfaces = guest.spec.interfaces.iter().map(|i| i.name.clone());
            let observed = guest.status.interfaces.iter().map(|i| i.name.clone());
            ports.extend(
                interfaces
                    .chain(observed)
                    .map(|interface| (name.clone(), interface)),
            );
        }
        if Runtime::known_guests(&self.agent).iter().all(|guest| {
            world
                .objects
                .contains_key(&(Kind::VirtualMachine, guest.clone()))
        }) {
            self.agent.network.remove_ports_except(&ports).await?;
        }
        Ok(())
    }

    /// Says on disks and security groups that they are taken note of.
    async fn report_references(&self, world: &World) -> Result<()> {
        for stored in world.objects.values() {
            let name = stored.object.metadata().name.as_str();
            let updated = match &stored.object {
                Object::Disk(disk) if !self.reports(Some(disk)) => Ok(()),
                Object::Disk(_) => {
                    let update = |disk: &mut Disk| {
                        let image = std::fs::metadata(&disk.spec.path);
                        // An overlay that was never used is created when it is.
                        let found = match (&disk.spec.base, image) {
                            (Some(base), Err(_)) => match &base.path {
                                Some(path) => std::fs::metadata(path)
                                    .map(drop)
                                    .map_err(|error| (path.clone(), error)),
                                // Its server is asked then, too.
                                None => Ok(()),
                            },
                            (_, image) => image
                                .map(drop)
                                .map_err(|error| (disk.spec.path.clone(), error)),
                        };
                        let conditions = &mut disk.status.conditions;
                        match found {
                            Ok(()) => set_condition(
                                conditions,
                                "Ready",
                                ConditionStatus::True,
                                "Found",
                                "the image is there",
                            ),
                            Err((path, error)) => set_condition(
                                conditions,
                                "Ready",
                                ConditionStatus::False,
                                "Missing",
                                &format!("{}: {error}", path.display()),
                            ),
                        };
                    };
                    self.agent.objects.update(name, update).await.map(drop)
                }
                Object::SecurityGroup(_) => {
                    let update = |group: &mut SecurityGroup| {
                        let conditions = &mut group.status.conditions;
                        let message = "the rules go to all interfaces that name the group";
                        set_condition(
                            conditions,
                            "Ready",
                            ConditionStatus::True,
                            "Accepted",
                            message,
                        );
                    };
                    self.agent.objects.update(name, update).await.map(drop)
                }
                Object::Host(_)
                | Object::Network(_)
                | Object::Service(_)
                | Object::VirtualMachine(_) => Ok(()),
            };
            ignore_gone(updated)?;
        }
        Ok(())
    }
}

fn ignore_gone(result: Result<()>) -> Result<()> {
    match result {
        Err(AgentError::NotFound { .. }) => Ok(()),
        other => other,
    }
}
