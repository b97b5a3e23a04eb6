//! Keeps the host's source NAT and forwards as objects and devices say.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use keelson_api::{ConditionStatus, Network, PortForward, Resource, set_condition};
use keelson_ebpf::SourceNat;
use tokio::sync::Notify;

use super::plan::{Finding, Plan, Surroundings, Target, WantedForward};
use crate::host::{
    HostNetwork, HostPorts, UplinkDevice, Watched, follow_devices, route_ipv4, route_ipv6,
};
use crate::objects::interface_of;
use crate::view::KnownGuest;
use crate::{Agent, error::Result};

/// How long it waits before it tries again what failed.
const RETRY: Duration = Duration::from_secs(2);
/// The condition of a network that says how its uplink is.
const UPLINK_READY: &str = "UplinkReady";

/// Tells the task that keeps the uplinks to look again.
#[derive(Clone, Debug)]
pub struct Uplinks {
    wake: Arc<Notify>,
}

impl Uplinks {
    /// Starts the task, which looks when it is first told to. It ends with the runtime.
    pub fn start(agent: Agent) -> Self {
        let wake = Arc::new(Notify::new());
        let keeper = Keeper {
            agent,
            wake: Arc::clone(&wake),
            watched: Watched::default(),
            follows: false,
            applied: None,
        };
        tokio::spawn(keeper.run());
        Self { wake }
    }

    /// Something about networks, forwards or guests may have changed.
    pub fn wake(&self) {
        self.wake.notify_one();
    }
}

/// What was put in force; if nothing of it changes, neither do the maps.
#[derive(Debug, PartialEq, Eq)]
struct Applied {
    source_nat: Vec<SourceNat>,
    forwards: Vec<keelson_ebpf::PortForward>,
    routed: Vec<String>,
    devices: BTreeMap<String, UplinkDevice>,
}

#[derive(Debug)]
struct Keeper {
    agent: Agent,
    wake: Arc<Notify>,
    watched: Watched,
    /// Whether the devices are followed: from the first that somebody names on.
    follows: bool,
    applied: Option<Applied>,
}

impl Keeper {
    async fn run(mut self) {
        loop {
            self.wake.notified().await;
            while let Err(error) = self.reconcile().await {
                tracing::warn!(%error, "uplinks can't be put in force; trying again");
                self.applied = None;
                tokio::time::sleep(RETRY).await;
            }
        }
    }

    async fn reconcile(&mut self) -> Result<()> {
        let (networks, forwards) = self.look();
        let with_uplink = networks.iter().filter_map(|n| n.spec.uplink.as_ref());
        let names: BTreeSet<String> = with_uplink.map(|uplink| uplink.device.clone()).collect();
        // Before they are looked at, so that no change is missed.
        self.watched.lock().clone_from(&names);
        if !names.is_empty() && !std::mem::replace(&mut self.follows, true) {
            tokio::spawn(follow(self.watched.clone(), Arc::clone(&self.wake)));
        }
        let surroundings = self.surroundings(&names).await?;
        let plan = Plan::new(&networks, &forwards, &surroundings);
        let done = self.put_in_force(&plan, &networks, surroundings).await;
        let failed = done.as_ref().err().map(|error| Finding {
            status: ConditionStatus::False,
            reason: error.reason(),
            message: error.to_string(),
            addresses: Vec::new(),
        });
        for network in &networks {
            let found = plan.networks.get(&network.metadata.name);
            let found = found.map(|found| failed.as_ref().unwrap_or(found));
            self.report_network(network, found).await?;
        }
        for forward in &forwards {
            if let Some(found) = plan.port_forwards.get(&forward.object.metadata.name) {
                let found = failed.as_ref().unwrap_or(found);
                self.report_forward(&forward.object, found).await?;
            }
        }
        done
    }

    /// All networks, and the forwards to guests of this host.
    fn look(&self) -> (Vec<Network>, Vec<WantedForward>) {
        let view = self.agent.view.read();
        let networks = view.networks().values().cloned().collect();
        let forwards = view.forwards().values().filter_map(|forward| {
            let guest = view.guest(&forward.spec.guest);
            // Of a guest that is gone the host says it that has no others beside it.
            let is_mine = guest.map_or_else(|| self.reports(), KnownGuest::is_here);
            if !is_mine {
                return None;
            }
            let interface = guest.and_then(|guest| interface_of(forward, &guest.interfaces));
            let target = interface.map(|interface| Target {
                device: HostNetwork::device_of(&forward.spec.guest, &interface.name),
                has_ipv4: interface.address.is_some(),
                has_ipv6: interface.address_v6.is_some(),
                runs: guest.is_some_and(|guest| guest.runs),
            });
            Some(WantedForward {
                object: forward.clone(),
                target,
            })
        });
        (networks, forwards.collect())
    }

    async fn surroundings(&self, names: &BTreeSet<String>) -> Result<Surroundings> {
        let network = &self.agent.network;
        let mut devices = BTreeMap::new();
        for name in names {
            if let Some(device) = network.uplink_device(name).await? {
                devices.insert(name.clone(), device);
            }
        }
        let in_use = network.external_use().await?.into_iter();
        Ok(Surroundings {
            devices,
            in_use: in_use.map(|used| (used.uplink, used.address)).collect(),
            ports: HostPorts::read()?,
        })
    }

    async fn put_in_force(
        &mut self,
        plan: &Plan,
        networks: &[Network],
        surroundings: Surroundings,
    ) -> Result<()> {
        let wanted = Applied {
            source_nat: plan.source_nat.clone(),
            forwards: plan.forwards.clone(),
            routed: plan.routed.clone(),
            devices: surroundings.devices,
        };
        if self.applied.as_ref() == Some(&wanted) {
            return Ok(());
        }
        let nothing = wanted.source_nat.is_empty() && wanted.forwards.is_empty();
        if nothing && self.applied.is_none() && surroundings.in_use.is_empty() {
            // Most hosts have no uplinks at all.
            return Ok(());
        }
        let routed = networks
            .iter()
            .filter(|network| plan.routed.contains(&network.metadata.name));
        for network in routed {
            self.route(network).await?;
        }
        let source_nat = plan.source_nat.clone();
        let missing = self
            .agent
            .network
            .set_nat(source_nat, plan.forwards.clone())
            .await?;
        // A device that went away meanwhile has woken this task by then.
        tracing::debug!(?missing, "source NAT and forwards are in force");
        self.applied = Some(wanted);
        Ok(())
    }

    /// Has the host route between a network and its uplink.
    async fn route(&self, network: &Network) -> Result<()> {
        let (name, spec) = (&network.metadata.name, &network.spec);
        let Some(uplink) = &spec.uplink else {
            return Ok(());
        };
        let bridge = self.agent.network.ensure_network(name, spec).await?;
        if spec.subnet.is_some() {
            route_ipv4(&bridge)?;
            route_ipv4(&uplink.device)?;
        }
        if spec.subnet_v6.is_some() {
            route_ipv6()?;
        }
        Ok(())
    }

    /// Whether it is for this host to say what it observes of what several hosts see.
    fn reports(&self) -> bool {
        let fleet = &self.agent.fleet;
        fleet.is_exclusive() || fleet.is_scheduler()
    }

    async fn report_network(&self, network: &Network, found: Option<&Finding>) -> Result<()> {
        if !self.reports() {
            return Ok(());
        }
        let observe = |network: &mut Network| {
            let conditions = &mut network.status.conditions;
            match found {
                Some(found) => say(conditions, UPLINK_READY, found),
                None => conditions.retain(|condition| condition.kind != UPLINK_READY),
            }
        };
        let changed = self.agent.objects.observe(network, observe).await?;
        if let Some(found) = found.filter(|_| changed) {
            self.record(network, UPLINK_READY, found).await;
        }
        Ok(())
    }

    async fn report_forward(&self, forward: &PortForward, found: &Finding) -> Result<()> {
        let observe = |forward: &mut PortForward| {
            say(&mut forward.status.conditions, "Ready", found);
            forward.status.addresses.clone_from(&found.addresses);
        };
        if self.agent.objects.observe(forward, observe).await? {
            self.record(forward, "Ready", found).await;
        }
        Ok(())
    }

    async fn record<T: Resource>(&self, object: &T, kind: &'static str, found: &Finding) {
        let (name, events) = (&object.metadata().name, &self.agent.events);
        let message = format!("{kind}: {}", found.message);
        match found.status {
            ConditionStatus::True => events.normal(T::KIND, name, found.reason, message).await,
            _ => events.warning(T::KIND, name, found.reason, message).await,
        }
    }
}

fn say(conditions: &mut Vec<keelson_api::Condition>, kind: &str, found: &Finding) {
    set_condition(conditions, kind, found.status, found.reason, &found.message);
}

/// Follows the devices for as long as the runtime lives.
async fn follow(watched: Watched, wake: Arc<Notify>) {
    loop {
        if let Err(error) = follow_devices(watched.clone(), Arc::clone(&wake)).await {
            tracing::warn!(%error, "network devices can't be followed; trying again");
        }
        tokio::time::sleep(RETRY).await;
    }
}
