//! Keeps what the eBPF programs know of guests of other hosts, in networks that span hosts, as the objects
//! say it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use keelson_ebpf::RemoteInterface;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::view::View;
use crate::{Agent, error::Result};

/// How long it waits before it tries again what failed.
const RETRY: Duration = Duration::from_secs(5);

/// Tells the task that keeps the guests of other hosts what to look at.
#[derive(Clone, Debug)]
pub struct Overlays {
    changed: Arc<Mutex<Changed>>,
    wake: Arc<Notify>,
}

/// What is to be looked at.
#[derive(Debug, Default)]
struct Changed {
    all: bool,
    guests: BTreeSet<String>,
}

impl Overlays {
    /// Starts the task, which looks when it is first told to. It ends with the runtime.
    pub fn start(agent: Agent) -> Self {
        let overlays = Self {
            changed: Arc::default(),
            wake: Arc::default(),
        };
        tokio::spawn(overlays.clone().run(agent));
        overlays
    }

    /// Networks may have changed, or everything.
    pub fn look_at_all(&self) {
        self.changed.lock().all = true;
        self.wake.notify_one();
    }

    /// These guests may have come to another host, changed there, or left it.
    pub fn look_at(&self, guests: BTreeSet<String>) {
        if !guests.is_empty() {
            self.changed.lock().guests.extend(guests);
            self.wake.notify_one();
        }
    }

    async fn run(self, agent: Agent) {
        // Whether any network spans hosts: else nobody needs to know where guests are.
        let mut spans_hosts = false;
        loop {
            self.wake.notified().await;
            let changed = std::mem::take(&mut *self.changed.lock());
            if !changed.all && !spans_hosts {
                continue;
            }
            if let Err(error) = reconcile(&agent, changed, &mut spans_hosts).await {
                tracing::warn!(%error, "guests of other hosts can't be made known; trying again");
                tokio::time::sleep(RETRY).await;
                self.look_at_all();
            }
        }
    }
}

async fn reconcile(agent: &Agent, changed: Changed, spans_hosts: &mut bool) -> Result<()> {
    let network = &agent.network;
    if !changed.all {
        for guest in changed.guests {
            let interfaces = interfaces(&agent.view.read(), &guest);
            network.set_remote(guest, interfaces).await?;
        }
        return Ok(());
    }
    let (overlays, guests) = {
        let view = agent.view.read();
        let guests = view.remote_guests().map(|guest| {
            let interfaces = interfaces(&view, guest);
            (guest.clone(), interfaces)
        });
        let guests = guests.filter(|(_, interfaces)| !interfaces.is_empty());
        (overlays(&view), guests.collect())
    };
    *spans_hosts = !overlays.is_empty();
    network.set_overlays(&overlays, guests).await?;
    if overlays.is_empty() {
        network.remove_tunnel().await
    } else {
        network.ensure_tunnel().await
    }
}

/// The networks that span hosts, with their VXLAN network identifiers.
fn overlays(view: &View) -> BTreeMap<String, u32> {
    let networks = view.networks().iter();
    networks
        .filter_map(|(name, network)| Some((name.clone(), network.spec.overlay?.vni?)))
        .collect()
}

/// The interfaces that a guest has in networks that span hosts, if it is on another host.
fn interfaces(view: &View, guest: &str) -> Vec<RemoteInterface> {
    let Some((guest, host)) = view.remote_guest(guest) else {
        return Vec::new();
    };
    let interfaces = guest.interfaces.iter();
    interfaces
        .filter_map(|interface| {
            let network = view.networks().get(&interface.network)?;
            Some(RemoteInterface {
                network: crate::host::network_number(&interface.network),
                vni: network.spec.overlay?.vni?,
                mac: keelson_ebpf::MacAddress(interface.mac?.0),
                ipv4: interface.address,
                ipv6: interface.address_v6,
                host,
            })
        })
        .collect()
}
