//! What a host makes of networks, disks and security groups, and says in their status.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use keelson_api::{
    ConditionStatus, Disk, DiskSpec, Kind, Network, NetworkSpec, SecurityGroup, set_condition,
};
use tokio::time::Instant;

use crate::{Agent, error::Result};

/// How long after a failure on this host (a bridge that can't be made, an image that is missing) it is
/// tried again.
const TRY_AGAIN: Duration = Duration::from_secs(10);

/// What a host makes of networks, disks and security groups, and says in their status.
#[derive(Debug)]
pub struct Reports {
    agent: Agent,
    /// The networks whose bridges are there.
    bridged: BTreeMap<String, (NetworkSpec, String)>,
    /// What failed on this host.
    failed: BTreeSet<(Kind, String)>,
    tried: Instant,
    was_scheduler: bool,
}

impl Reports {
    /// Nothing is looked at yet.
    pub fn new(agent: &Agent) -> Self {
        Self {
            agent: agent.clone(),
            bridged: BTreeMap::new(),
            failed: BTreeSet::new(),
            tried: Instant::now(),
            was_scheduler: false,
        }
    }

    /// Looks at everything in the view, and removes the bridges of networks that are not.
    pub async fn begin(&mut self) -> Result<()> {
        self.bridged.clear();
        self.failed.clear();
        self.remove_bridges().await?;
        self.look_at_all().await
    }

    /// Looks at one object, which may be gone.
    ///
    /// # Errors
    /// Those of the store; what fails on this host is said in the object.
    pub async fn look_at(&mut self, kind: Kind, name: &str) -> Result<()> {
        self.failed.remove(&(kind, name.into()));
        match kind {
            Kind::Network => self.network(name).await,
            Kind::Disk => self.disk(name).await,
            Kind::SecurityGroup => self.group(name).await,
            Kind::Host | Kind::PortForward | Kind::Service | Kind::VirtualMachine => Ok(()),
        }
    }

    /// Tries again what failed on this host some time ago. An agent that has become the scheduler says what
    /// the one before it may not have.
    pub async fn try_again(&mut self) -> Result<()> {
        let is_scheduler = self.agent.fleet.is_scheduler();
        if is_scheduler && !std::mem::replace(&mut self.was_scheduler, is_scheduler) {
            return self.look_at_all().await;
        }
        self.was_scheduler = is_scheduler;
        if self.tried.elapsed() < TRY_AGAIN {
            return Ok(());
        }
        self.tried = Instant::now();
        for (kind, name) in self.failed.clone() {
            self.look_at(kind, &name).await?;
        }
        Ok(())
    }

    /// Whether this host may have to say something of a disk.
    pub fn may_concern(&self, disk: &Disk) -> bool {
        let fleet = &self.agent.fleet;
        let elsewhere = disk
            .spec
            .host
            .as_deref()
            .is_some_and(|host| host != fleet.host());
        fleet.is_exclusive() || !elsewhere
    }

    async fn look_at_all(&mut self) -> Result<()> {
        let names: Vec<_> = {
            let view = self.agent.view.read();
            let of = |kind: Kind, names: Vec<&String>| {
                let names = names.into_iter().cloned();
                names.map(|name| (kind, name)).collect::<Vec<_>>()
            };
            [
                of(Kind::Network, view.networks().keys().collect()),
                of(Kind::Disk, view.disks().keys().collect()),
                of(Kind::SecurityGroup, view.groups().keys().collect()),
            ]
            .concat()
        };
        for (kind, name) in names {
            self.look_at(kind, &name).await?;
        }
        Ok(())
    }

    /// Whether it is for this host to say what it observes of an object that several hosts see: two of
    /// them that observe different things would contradict each other for ever.
    fn reports(&self, disk: Option<&Disk>) -> bool {
        let fleet = &self.agent.fleet;
        let at_home = disk.is_some_and(|disk| disk.spec.host.as_deref() == Some(fleet.host()));
        let nowhere = disk.is_none_or(|disk| disk.spec.host.is_none());
        fleet.is_exclusive() || at_home || (nowhere && fleet.is_scheduler())
    }

    async fn network(&mut self, name: &str) -> Result<()> {
        let network = self.agent.view.read().networks().get(name).cloned();
        let Some(network) = network else {
            self.bridged.remove(name);
            return self.remove_bridges().await;
        };
        let device = match self.bridged.get(name) {
            Some((spec, device)) if *spec == network.spec => Ok(device.clone()),
            _ => self.bring_up(name, &network.spec).await,
        };
        match &device {
            Ok(device) => {
                let bridged = (network.spec.clone(), device.clone());
                self.bridged.insert(name.into(), bridged);
            }
            Err(error) => {
                self.bridged.remove(name);
                self.failed.insert((Kind::Network, name.into()));
                tracing::error!(network = name, %error, "the network is not there on this host");
            }
        }
        if !self.reports(None) {
            return Ok(());
        }
        let observe = |network: &mut Network| match &device {
            Ok(device) => {
                network.status.device = Some(device.clone());
                let conditions = &mut network.status.conditions;
                let message = "the host holds the gateway's address";
                set_condition(conditions, "Ready", ConditionStatus::True, "Up", message);
            }
            Err(error) => {
                let (reason, message) = (error.reason(), error.to_string());
                let conditions = &mut network.status.conditions;
                let status = ConditionStatus::False;
                set_condition(conditions, "Ready", status, reason, &message);
            }
        };
        self.agent
            .objects
            .observe(&network, observe)
            .await
            .map(drop)
    }

    /// Brings up what a network is on this host; the name of its bridge.
    async fn bring_up(&self, name: &str, network: &NetworkSpec) -> Result<String> {
        let device = self.agent.network.ensure_network(name, network).await?;
        self.agent.network.ensure_overlay(network).await?;
        Ok(device)
    }

    async fn remove_bridges(&self) -> Result<()> {
        let names: Vec<String> = self.agent.view.read().networks().keys().cloned().collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        self.agent.network.remove_networks_except(&names).await
    }

    async fn disk(&mut self, name: &str) -> Result<()> {
        let disk = self.agent.view.read().disks().get(name).cloned();
        let Some(disk) = disk.filter(|disk| self.reports(Some(disk))) else {
            return Ok(());
        };
        let found = find_image(&disk.spec);
        if found.is_err() {
            self.failed.insert((Kind::Disk, name.into()));
        }
        let observe = |disk: &mut Disk| {
            let (status, reason, message) = match &found {
                Ok(()) => (ConditionStatus::True, "Found", "the image is there".into()),
                Err((path, error)) => {
                    let message = format!("{}: {error}", path.display());
                    (ConditionStatus::False, "Missing", message)
                }
            };
            let conditions = &mut disk.status.conditions;
            set_condition(conditions, "Ready", status, reason, &message);
        };
        self.agent.objects.observe(&disk, observe).await.map(drop)
    }

    async fn group(&self, name: &str) -> Result<()> {
        let group = self.agent.view.read().groups().get(name).cloned();
        let Some(group) = group.filter(|_| self.reports(None)) else {
            return Ok(());
        };
        let observe = |group: &mut SecurityGroup| {
            let conditions = &mut group.status.conditions;
            let message = "the rules go to all interfaces that name the group";
            let status = ConditionStatus::True;
            set_condition(conditions, "Ready", status, "Accepted", message);
        };
        self.agent.objects.observe(&group, observe).await.map(drop)
    }
}

/// Looks for a disk's image, or for what it is made of when it is first used.
fn find_image(spec: &DiskSpec) -> std::result::Result<(), (PathBuf, std::io::Error)> {
    let found = |path: &PathBuf| match std::fs::metadata(path) {
        Ok(_) => Ok(()),
        Err(error) => Err((path.clone(), error)),
    };
    match (&spec.base, found(&spec.path)) {
        (Some(base), Err(_)) => match &base.path {
            Some(path) => found(path),
            // Its server is asked then, too.
            None => Ok(()),
        },
        (_, image) => image,
    }
}
