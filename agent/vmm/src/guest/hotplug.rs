//! Disks and interfaces that come and go while the guest runs.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::life::Guest;
use super::migration::Run;
use super::requests::acknowledge;
use crate::api::{
    DeviceAdded, DeviceKind, DevicesAnswer, Event, Hotplug, MAX_RELEASE_MS, PluggedDevice,
    RemovalRequest, Reply,
};
use crate::config::{DiskConfig, GuestConfig, InterfaceConfig, VhostUse};
use crate::error::VmmError;
use crate::machine::Machine;
use crate::virtio::net::Tap;

/// Removals that are waited for at once; as many as there are slots.
const MAX_REMOVALS: usize = 32;

/// A removal that somebody waits for.
pub(super) struct Removal {
    slot: u8,
    id: String,
    until: Instant,
    limit: Duration,
    reply: Reply,
}

impl Guest<'_> {
    /// Does what was asked about devices.
    pub(super) fn hotplug(&mut self, machine: &mut Machine, run: &Run, request: Hotplug) {
        if let Some(reason) = run.refusal().filter(|_| request.changes()) {
            return request.refuse("migrating", reason);
        }
        match request {
            Hotplug::AddDisk(disk, reply) => self.add_disk(machine, &disk, reply),
            Hotplug::AddInterface(interface, tap, reply) => {
                self.add_interface(machine, &interface, tap, reply);
            }
            Hotplug::Remove(request, reply) => {
                self.remove_device(machine, run.paused, request, reply);
            }
            Hotplug::Devices(reply) => self.devices(machine, reply),
        }
    }

    fn add_disk(&mut self, machine: &mut Machine, disk: &DiskConfig, reply: Reply) {
        let mut config = self.config.clone();
        config.disks.push(disk.clone());
        if let Err(refusal) = self.check_addition(&config, &disk.id) {
            return refusal.send(reply);
        }
        match machine.add_disk(disk, &self.host, &self.reporters) {
            Ok(slot) => self.added(config, &disk.id, slot, reply),
            Err(e) => Refusal::of(&e).send(reply),
        }
    }

    fn add_interface(
        &mut self,
        machine: &mut Machine,
        interface: &InterfaceConfig,
        tap: Option<OwnedFd>,
        reply: Reply,
    ) {
        let Some(tap) = tap else {
            let message = "the TAP's descriptor has to come with the request (SCM_RIGHTS)";
            return reply.refuse("no_descriptor", message);
        };
        if interface.queues.unwrap_or(1) != 1 || interface.vhost == VhostUse::On {
            let message = "an interface that is added has one queue pair, which a thread serves";
            return reply.refuse("invalid_device", message);
        }
        let mut config = self.config.clone();
        config.interfaces.push(interface.clone());
        if let Err(refusal) = self.check_addition(&config, &interface.id) {
            return refusal.send(reply);
        }
        let added = Tap::of_descriptor(tap, &interface.tap)
            .map_err(VmmError::from)
            .and_then(|tap| {
                let tap = Arc::new(tap);
                let slot = machine.add_interface(interface, Arc::clone(&tap), &self.host)?;
                Ok((tap, slot))
            });
        match added {
            Ok((tap, slot)) => {
                self.host.taps.push(tap);
                self.added(config, &interface.id, slot, reply);
            }
            Err(e) => Refusal::of(&e).send(reply),
        }
    }

    fn added(&mut self, config: GuestConfig, id: &str, slot: u8, reply: Reply) {
        self.config = config;
        tracing::info!(id, slot, "added a device");
        self.shared.emit(Event::DeviceAdded { id: id.to_owned() });
        reply.send(Ok(serde_json::json!(DeviceAdded { slot })));
    }

    fn check_addition(&self, config: &GuestConfig, id: &str) -> Result<(), Refusal> {
        if self.has_device(id) {
            let message = format!("the guest has a device `{id}` already");
            return Err(Refusal("name_taken", message));
        }
        if config.has_too_many_devices() {
            return Err(Refusal::of(&VmmError::NoFreeSlot));
        }
        let valid = config.validate();
        valid.map_err(|e| Refusal("invalid_device", e.to_string()))
    }

    fn remove_device(
        &mut self,
        machine: &Machine,
        paused: bool,
        request: RemovalRequest,
        reply: Reply,
    ) {
        let RemovalRequest { id, timeout_ms } = request;
        if paused {
            let message = "the guest is paused and can't let go of anything: resume it first";
            return reply.refuse("paused", message);
        }
        if timeout_ms > MAX_RELEASE_MS {
            let message = format!("timeout_ms: {timeout_ms} is more than {MAX_RELEASE_MS}");
            return reply.refuse("out_of_range", message);
        }
        if self.removals.len() >= MAX_REMOVALS {
            return reply.refuse("busy", format!("{MAX_REMOVALS} removals are waited for"));
        }
        match machine.ask_to_release(&id) {
            Ok(Some(slot)) => {
                let limit = Duration::from_millis(timeout_ms);
                self.removals.push(Removal {
                    slot,
                    id,
                    until: Instant::now() + limit,
                    limit,
                    reply,
                });
            }
            Ok(None) => {
                reply.refuse("no_device", format!("the guest has no device `{id}`"));
            }
            Err(e) => Refusal::of(&e).send(reply),
        }
    }

    /// The guest has let go of what was in a slot.
    pub(super) fn ejected(&mut self, machine: &mut Machine, slot: u8) {
        if let Some(id) = machine.take_down(slot) {
            self.removed(slot, &id);
        }
    }

    /// A device is gone.
    pub(super) fn removed(&mut self, slot: u8, id: &str) {
        self.config.disks.retain(|disk| disk.id != id);
        let mut interfaces = self.config.interfaces.iter();
        if let Some(index) = interfaces.position(|interface| interface.id == id) {
            self.config.interfaces.remove(index);
            self.host.taps.remove(index);
        }
        tracing::info!(id, slot, "removed a device");
        self.shared.emit(Event::DeviceRemoved { id: id.to_owned() });
        let (done, waiting) = std::mem::take(&mut self.removals)
            .into_iter()
            .partition(|removal| removal.slot == slot);
        self.removals = waiting;
        for removal in done {
            acknowledge(removal.reply);
        }
    }

    /// When the next removal has taken too long.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.removals.iter().map(|removal| removal.until).min()
    }

    /// Answers those who have waited long enough. The guest may let go later.
    pub(super) fn give_up_removals(&mut self) {
        let now = Instant::now();
        let (late, waiting) = std::mem::take(&mut self.removals)
            .into_iter()
            .partition(|removal| removal.until <= now);
        self.removals = waiting;
        for Removal {
            id, limit, reply, ..
        } in late
        {
            let message = format!(
                "the guest has not let go of `{id}` within {} s: is it in use there, or the guest \
                 not up yet? It may still do so",
                limit.as_secs_f64()
            );
            reply.refuse("not_released", message);
        }
    }

    fn devices(&self, machine: &Machine, reply: Reply) {
        let leaving: BTreeSet<u8> = machine.leaving().into_iter().collect();
        let disks = self.config.disks.iter().map(|disk| &disk.id);
        let interfaces = self.config.interfaces.iter().map(|interface| &interface.id);
        let all = disks
            .map(|id| (id, DeviceKind::Disk))
            .chain(interfaces.map(|id| (id, DeviceKind::Interface)));
        let devices = all.filter_map(|(id, kind)| {
            let slot = machine.slot_of(id)?;
            Some(PluggedDevice {
                id: id.clone(),
                kind,
                slot,
                leaving: leaving.contains(&slot),
            })
        });
        let devices = devices.collect();
        reply.send(Ok(serde_json::json!(DevicesAnswer { devices })));
    }

    fn has_device(&self, id: &str) -> bool {
        let config = &self.config;
        let mut interfaces = config.interfaces.iter();
        config.disks.iter().any(|disk| disk.id == id)
            || interfaces.any(|interface| interface.id == id)
    }
}

/// Why a device can't be added or removed: a word for programs, and a sentence.
struct Refusal(&'static str, String);

impl Refusal {
    fn of(error: &VmmError) -> Self {
        let kind = match error {
            VmmError::NoFreeSlot => "no_free_slot",
            VmmError::MemoryNotShared => "memory_not_shared",
            VmmError::Disk(_) | VmmError::Tap(_) => "backend_unusable",
            _ => "hotplug_failed",
        };
        Self(kind, error.to_string())
    }

    fn send(self, reply: Reply) {
        reply.refuse(self.0, self.1);
    }
}
