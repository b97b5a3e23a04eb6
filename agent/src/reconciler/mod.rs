//! Watches the objects and keeps one actor per guest, and the host's networks, as they desire.

mod reports;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::StreamExt;
use keelson_api::{DeviceKind, Kind, Object};
use tokio::time::MissedTickBehavior;

use self::reports::Reports;
use crate::guest::{GuestActor, GuestMailbox};
use crate::objects::{Change, World};
use crate::overlays::Overlays;
use crate::services::Services;
use crate::uplinks::Uplinks;
use crate::view::{Affected, View};
use crate::{Agent, error::Result};

/// How long the loop waits before it reads everything again after the store failed.
const RETRY: Duration = Duration::from_secs(1);
/// How often the loop shows that it lives though nothing changes.
const HEARTBEAT: Duration = Duration::from_secs(2);

/// Watches the objects and keeps one actor per guest, and the host's networks, as they desire.
#[derive(Debug)]
pub struct Reconciler {
    agent: Agent,
    guests: BTreeMap<String, GuestMailbox>,
    services: Services,
    /// Whether this agent placed the fleet's guests when that was last looked at.
    was_scheduler: bool,
    uplinks: Uplinks,
    overlays: Overlays,
    reports: Reports,
    beats: Arc<AtomicU64>,
}

impl Reconciler {
    /// A reconciler that has not looked yet.
    pub fn new(agent: Agent) -> Self {
        Self {
            services: Services::start(agent.clone()),
            was_scheduler: false,
            uplinks: Uplinks::start(agent.clone()),
            overlays: Overlays::start(agent.clone()),
            reports: Reports::new(&agent),
            agent,
            guests: BTreeMap::new(),
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
        let mut batches = self.agent.objects.watch_batches(world.revision).await?;
        self.begin_with(world).await?;
        let mut heart = tokio::time::interval(HEARTBEAT);
        heart.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.beats.fetch_add(1, Ordering::Relaxed);
            let batch = tokio::select! {
                batch = batches.next() => batch,
                _ = heart.tick() => {
                    self.guests.retain(|_, mailbox| !mailbox.is_finished());
                    self.note_scheduler();
                    self.reports.try_again().await?;
                    continue;
                }
                // What could not be started for want of a lease can be now.
                () = fleet.another_lease(lease), if !fleet.is_exclusive() => return Ok(()),
            };
            let Some(batch) = batch else { return Ok(()) };
            self.note(batch?).await?;
        }
    }

    /// An agent that has become the scheduler says what of services the one before it may not have.
    fn note_scheduler(&mut self) {
        let is_scheduler = self.agent.fleet.is_scheduler();
        if is_scheduler && !std::mem::replace(&mut self.was_scheduler, is_scheduler) {
            self.services.wake();
        }
        self.was_scheduler = is_scheduler;
    }

    /// Takes over what was read as a whole.
    async fn begin_with(&mut self, world: World) -> Result<()> {
        let mut view = View::default();
        for stored in world.objects.values() {
            let is_here = self.is_here(&stored.object);
            view.set(stored.object.clone(), is_here);
        }
        *self.agent.view.write() = view;
        self.overlays.look_at_all();
        self.reports.begin().await?;
        self.remove_stray_ports(&world).await?;
        self.services.wake();
        self.uplinks.wake();
        let here = world.of_kind(Kind::VirtualMachine);
        let here =
            here.filter(|stored| self.is_here(&stored.object) || self.is_expected(&stored.object));
        let mut names: BTreeSet<_> = here
            .map(|stored| stored.object.metadata().name.clone())
            .collect();
        // Guests whose objects were deleted while no agent looked.
        names.extend(self.agent.guests.known_guests(&self.agent.config));
        for name in names {
            self.wake_guest(&name);
        }
        Ok(())
    }

    /// Takes over what one revision changed: first all of it, so that nobody sees a part.
    async fn note(&mut self, changes: Vec<Change>) -> Result<()> {
        let mut affected = Affected::default();
        {
            let mut view = self.agent.view.write();
            for change in &changes {
                let found = match change {
                    Change::Set(object) => view.set((**object).clone(), self.is_here(object)),
                    Change::Gone(kind, name) => view.remove(*kind, name),
                };
                affected.guests.extend(found.guests);
                affected.services |= found.services;
                affected.uplinks |= found.uplinks;
                affected.remote.extend(found.remote);
                affected.overlays |= found.overlays;
            }
        }
        // Before a guest that comes from another host is started here.
        if affected.overlays {
            self.overlays.look_at_all();
        }
        self.overlays.look_at(affected.remote);
        for change in &changes {
            let name = change.name();
            match change.kind() {
                Kind::PortForward | Kind::Service => {}
                Kind::VirtualMachine => {
                    if self.concerns_this_host(change) {
                        self.wake_guest(name);
                    }
                }
                Kind::Host => self.note_host(change),
                kind @ (Kind::Disk | Kind::Network | Kind::SecurityGroup) => {
                    self.reports.look_at(kind, name).await?;
                }
            }
        }
        for name in &affected.guests {
            self.wake_guest(name);
        }
        if affected.services {
            self.services.wake();
        }
        if affected.uplinks {
            self.uplinks.wake();
        }
        Ok(())
    }

    fn wake_guest(&mut self, name: &str) {
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

    /// Whether it is for this host to do something about an object.
    fn is_here(&self, object: &Object) -> bool {
        match object {
            Object::VirtualMachine(guest) => self.agent.fleet.is_here(guest),
            Object::Disk(disk) => self.reports.may_concern(disk),
            _ => true,
        }
    }

    /// Whether a guest is to come here while it runs.
    fn is_expected(&self, object: &Object) -> bool {
        matches!(object, Object::VirtualMachine(guest) if self.agent.fleet.is_expected(guest))
    }

    /// Whether a guest is placed here or is to come here, or something of it is left here.
    fn concerns_this_host(&self, change: &Change) -> bool {
        let placed = match change {
            Change::Set(object) => self.is_here(object) || self.is_expected(object),
            Change::Gone(..) => false,
        };
        let actor = self.guests.get(change.name());
        placed || actor.is_some_and(|mailbox| !mailbox.is_finished())
    }

    fn note_host(&self, change: &Change) {
        let Change::Set(object) = change else { return };
        if let Object::Host(host) = object.as_ref()
            && host.metadata.name == self.agent.fleet.host()
            && self.agent.fleet.set_use(host.spec)
        {
            self.wake_all();
        }
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
            // Those that a guest has not let go of, too.
            let devices = guest.status.devices.iter();
            let devices = devices.filter(|device| device.kind == DeviceKind::Interface);
            let observed = guest.status.interfaces.iter().map(|i| i.name.clone());
            let observed = observed.chain(devices.map(|device| device.name.clone()));
            ports.extend(
                interfaces
                    .chain(observed)
                    .map(|interface| (name.clone(), interface)),
            );
        }
        let mut known = self
            .agent
            .guests
            .known_guests(&self.agent.config)
            .into_iter();
        if known.all(|guest| world.objects.contains_key(&(Kind::VirtualMachine, guest))) {
            self.agent.network.remove_ports_except(&ports).await?;
        }
        Ok(())
    }
}
