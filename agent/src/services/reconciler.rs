//! Keeps the host's services as their objects and the health of guests say.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use keelson_api::{BackendStatus, Health, NetworkSpec, Service};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::backends::{Candidate, Place, candidates, former, ports};
use super::drain::Drain;
use super::probe::{Finding, Probe, Target};
use super::report::Report;
use crate::{Agent, AgentError, error::Result};

/// How long it waits before it tries again what failed.
const RETRY: Duration = Duration::from_secs(2);

/// The least time between two writes of one service's status by this host.
const WRITE_INTERVAL: Duration = Duration::from_secs(1);

/// Tells the task that keeps the services to look again.
#[derive(Clone, Debug)]
pub struct Services {
    wake: Arc<Notify>,
}

impl Services {
    /// Starts the task, which looks when it is first told to. It ends with the runtime.
    pub fn start(agent: Agent) -> Self {
        let wake = Arc::new(Notify::new());
        let keeper = Keeper {
            agent,
            wake: Arc::clone(&wake),
            probes: BTreeMap::new(),
            written: BTreeMap::new(),
            drain: None,
        };
        tokio::spawn(keeper.run());
        Self { wake }
    }

    /// Something about services, guests or networks may have changed.
    pub fn wake(&self) {
        self.wake.notify_one();
    }
}

/// The guests of a service, with their health.
pub type Backends = Vec<(Candidate, Finding)>;

#[derive(Debug)]
struct Keeper {
    agent: Agent,
    wake: Arc<Notify>,
    /// By service and guest.
    probes: BTreeMap<(String, String), Probe>,
    /// When each service's status was last written here.
    written: BTreeMap<String, Instant>,
    /// What is in force, as far as that is known, and who drains.
    drain: Option<Drain>,
}

impl Keeper {
    async fn run(mut self) {
        loop {
            let drained = async {
                match &self.drain {
                    Some(drain) => drain.next().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.wake.notified() => {}
                () = drained => {}
            }
            while let Err(error) = self.reconcile().await {
                tracing::warn!(%error, "services can't be put in force; trying again");
                tokio::time::sleep(RETRY).await;
            }
        }
    }

    async fn reconcile(&mut self) -> Result<()> {
        let mut drain = match self.drain.take() {
            Some(drain) => drain,
            None => self.adopt().await?,
        };
        let done = self.reconcile_draining(&mut drain).await;
        self.drain = Some(drain);
        done
    }

    /// What an earlier agent left in force.
    async fn adopt(&self) -> Result<Drain> {
        let mut drain = Drain::default();
        drain.note(&self.agent.network.services().await?);
        Ok(drain)
    }

    async fn reconcile_draining(&mut self, drain: &mut Drain) -> Result<()> {
        let mut services = Vec::new();
        // By their bridges guests reach forwards of their own host.
        let mut networks = self.with_uplink();
        for (service, network, candidates) in self.look(drain) {
            let backends = self.backends(&service, &network, candidates, drain);
            networks.insert(service.spec.network.clone(), network);
            services.push((service, backends));
        }
        let known: BTreeSet<_> = services
            .iter()
            .flat_map(|(service, backends)| {
                let name = &service.metadata.name;
                let guests = backends.iter();
                guests.map(move |(candidate, _)| (name.clone(), candidate.guest.clone()))
            })
            .collect();
        self.probes.retain(|key, _| known.contains(key));
        drain.retain(&known);
        let names: BTreeSet<_> = services.iter().map(|(s, _)| &s.metadata.name).collect();
        self.written.retain(|name, _| names.contains(name));
        let done = self.put_in_force(&services, networks, drain).await;
        for (service, mut backends) in services {
            backends.retain(|(candidate, _)| candidate.selected);
            self.report(&service, backends, &done).await?;
        }
        done
    }

    /// Every service whose network is there, with the guests that it is for, and those that it was for and has as
    /// backends.
    fn look(&self, drain: &Drain) -> Vec<(Service, NetworkSpec, Vec<Candidate>)> {
        let view = self.agent.view.read();
        let services = view.services().values();
        let found = services.filter_map(|service| {
            let network = view.networks().get(&service.spec.network)?;
            let mut candidates = candidates(service, &view);
            candidates.extend(former(service, &view, &drain.held(service)));
            Some((service.clone(), network.spec.clone(), candidates))
        });
        found.collect()
    }

    fn with_uplink(&self) -> BTreeMap<String, NetworkSpec> {
        let view = self.agent.view.read();
        let networks = view.networks().iter();
        let networks = networks.filter(|(_, network)| network.spec.uplink.is_some());
        networks
            .map(|(name, network)| (name.clone(), network.spec.clone()))
            .collect()
    }

    /// Bridges first, so that an address that is answered for is one that works.
    async fn put_in_force(
        &self,
        services: &[(Service, Backends)],
        networks: BTreeMap<String, NetworkSpec>,
        drain: &mut Drain,
    ) -> Result<()> {
        let network = &self.agent.network;
        for (name, spec) in &networks {
            network.ensure_network(name, spec).await?;
        }
        let ports = services.iter().flat_map(|(service, backends)| {
            // Guests of another host are reached in networks that span hosts only.
            let spans = networks.get(&service.spec.network);
            let spans = spans.is_some_and(|network| network.overlay.is_some());
            let with = |health| {
                let reached = backends.iter().filter(move |(candidate, found)| {
                    found.health == health && (spans || candidate.place == Place::Here)
                });
                reached.map(|(candidate, _)| candidate).collect::<Vec<_>>()
            };
            ports(
                service,
                crate::host::network_number(&service.spec.network),
                &with(Health::Healthy),
                &with(Health::Draining),
            )
        });
        let ports: Vec<_> = ports.collect();
        let bridged = networks.into_keys().collect();
        let done = network.set_services(bridged, ports.clone()).await;
        // What was done of it before it failed is known to the maps alone.
        let in_force = match &done {
            Ok(()) => ports,
            Err(_) => network.services().await?,
        };
        drain.note(&in_force);
        done
    }

    /// The guests of a service, with what this host found out about its own and others about theirs; begins to
    /// check those that are new, and ends to check others, those that drain among them: that they take no more
    /// connections is what they are about.
    fn backends(
        &mut self,
        service: &Service,
        network: &NetworkSpec,
        candidates: Vec<Candidate>,
        drain: &mut Drain,
    ) -> Backends {
        let found = candidates.into_iter().map(|candidate| {
            let drains = drain.judge(service, &candidate);
            let finding = match &candidate.place {
                _ if let Some(finding) = drains => finding,
                _ if !candidate.runs => stopped("the guest does not run"),
                Place::OnLost(host) => stopped(&format!("the lease of its host {host} has ended")),
                Place::Nowhere => stopped("the guest is on no host"),
                Place::Here => return self.own_backend(service, network, candidate),
                Place::On(host) if service.spec.health_check.is_some() => {
                    found_elsewhere(service, &candidate, host)
                }
                Place::On(_) => runs(),
            };
            self.probes.remove(&key(service, &candidate));
            (candidate, finding)
        });
        found.collect()
    }

    /// A guest of this host that runs.
    fn own_backend(
        &mut self,
        service: &Service,
        network: &NetworkSpec,
        candidate: Candidate,
    ) -> (Candidate, Finding) {
        let key = key(service, &candidate);
        let gateway_v6 = network.gateway_v6().map(IpAddr::from);
        let gateway = network.gateway().map(IpAddr::from).or(gateway_v6);
        let (Some(check), Some(port), Some(address), Some(gateway)) = (
            service.spec.health_check,
            service.spec.checked_port(),
            candidate.main_address(),
            gateway,
        ) else {
            self.probes.remove(&key);
            return (candidate, runs());
        };
        let target = Target {
            address: SocketAddr::new(address, port),
            check,
            gateway,
        };
        let finding = self.finding(key, target, service);
        (candidate, finding)
    }

    fn finding(&mut self, key: (String, String), target: Target, service: &Service) -> Finding {
        let before = self.probes.get(&key);
        if let Some(probe) = before.filter(|probe| probe.target == target) {
            return probe.finding();
        }
        // What an earlier agent or check found holds until the new one says otherwise.
        let earlier = service.status.backends.iter();
        let mut earlier = earlier.filter(|backend| backend.guest == key.1);
        let earlier = earlier.find(|backend| backend.address == Some(target.address.ip()));
        let earlier = match (before, earlier) {
            (Some(probe), _) => Some(probe.finding()),
            (None, Some(status)) => held_until_checked(status),
            _ => None,
        };
        let finding = earlier.unwrap_or_else(|| Finding {
            health: Health::Unknown,
            message: format!("{target} is yet to be checked"),
        });
        let probe = Probe::start(target, finding.clone(), Arc::clone(&self.wake));
        self.probes.insert(key, probe);
        finding
    }

    /// Writes what this host has to say of a service, if that is anything new, and not more often than it may.
    async fn report(
        &mut self,
        service: &Service,
        backends: Backends,
        done: &Result<()>,
    ) -> Result<()> {
        let fleet = &self.agent.fleet;
        let report = Report {
            host: (!fleet.is_exclusive()).then(|| fleet.host().to_owned()),
            speaks: fleet.is_exclusive() || fleet.is_scheduler(),
            backends,
            done,
        };
        let mut reported = service.clone();
        report.apply(&mut reported);
        if reported == *service {
            return Ok(());
        }
        let name = &service.metadata.name;
        let now = Instant::now();
        let due = self
            .written
            .get(name)
            .map(|written| *written + WRITE_INTERVAL);
        if let Some(due) = due.filter(|due| *due > now) {
            let wake = Arc::clone(&self.wake);
            tokio::spawn(async move {
                tokio::time::sleep_until(due).await;
                wake.notify_one();
            });
            return Ok(());
        }
        self.written.insert(name.clone(), now);
        let update = |service: &mut Service| report.apply(service);
        match self.agent.objects.update(name, update).await {
            Err(AgentError::NotFound { .. }) => Ok(()),
            other => other.map(drop),
        }
    }
}

fn key(service: &Service, candidate: &Candidate) -> (String, String) {
    (service.metadata.name.clone(), candidate.guest.clone())
}

/// What holds of a guest that is yet to be checked, by what was said of it. One that drained was healthy when it began
/// to, and has its flows if their time was not over.
fn held_until_checked(said: &BackendStatus) -> Option<Finding> {
    match said.health {
        Health::Stopped | Health::Drained => None,
        Health::Draining => Some(Finding {
            health: Health::Healthy,
            message: "it serves again, and is yet to be checked".into(),
        }),
        health => Some(Finding {
            health,
            message: said.message.clone(),
        }),
    }
}

fn runs() -> Finding {
    Finding {
        health: Health::Healthy,
        message: "the guest runs".into(),
    }
}

fn stopped(why: &str) -> Finding {
    Finding {
        health: Health::Stopped,
        message: why.into(),
    }
}

/// What a guest's own host says of it; while it moves from one to another, what the one before said.
fn found_elsewhere(service: &Service, candidate: &Candidate, host: &str) -> Finding {
    let mut said = service.status.backends.iter();
    let said = said.find(|backend| {
        backend.guest == candidate.guest && backend.address == candidate.main_address()
    });
    match said {
        Some(said) if !matches!(said.health, Health::Stopped | Health::Drained) => Finding {
            health: said.health,
            message: said.message.clone(),
        },
        _ => Finding {
            health: Health::Unknown,
            message: format!("its host {host} is yet to check it"),
        },
    }
}
