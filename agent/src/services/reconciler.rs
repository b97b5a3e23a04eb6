//! Keeps the host's services as their objects and the health of guests say.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use keelson_api::{BackendStatus, ConditionStatus, Health, NetworkSpec, Service, set_condition};
use tokio::sync::Notify;

use super::backends::{Candidate, candidates, ports};
use super::probe::{Finding, Probe, Target};
use crate::{Agent, AgentError, error::Result};

/// How long it waits before it tries again what failed.
const RETRY: Duration = Duration::from_secs(2);

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
type Backends = Vec<(Candidate, Finding)>;

#[derive(Debug)]
struct Keeper {
    agent: Agent,
    wake: Arc<Notify>,
    /// By service and guest.
    probes: BTreeMap<(String, String), Probe>,
}

impl Keeper {
    async fn run(mut self) {
        loop {
            self.wake.notified().await;
            while let Err(error) = self.reconcile().await {
                tracing::warn!(%error, "services can't be put in force; trying again");
                tokio::time::sleep(RETRY).await;
            }
        }
    }

    async fn reconcile(&mut self) -> Result<()> {
        let mut services = Vec::new();
        let mut networks = BTreeMap::new();
        for (service, network, candidates) in self.look() {
            let backends = self.backends(&service, &network, candidates);
            networks.insert(service.spec.network.clone(), network);
            services.push((service, backends));
        }
        let known: Vec<_> = services
            .iter()
            .flat_map(|(service, backends)| {
                let name = &service.metadata.name;
                let guests = backends.iter();
                guests.map(move |(candidate, _)| (name.clone(), candidate.guest.clone()))
            })
            .collect();
        self.probes.retain(|key, _| known.contains(key));
        let done = self.put_in_force(&services, networks).await;
        for (service, backends) in services {
            self.report(&service, backends, &done).await?;
        }
        done
    }

    /// Every service whose network is there, with the guests that it is for.
    fn look(&self) -> Vec<(Service, NetworkSpec, Vec<Candidate>)> {
        let view = self.agent.view.read();
        let services = view.services().values();
        let found = services.filter_map(|service| {
            let network = view.networks().get(&service.spec.network)?;
            let candidates = candidates(service, &view);
            Some((service.clone(), network.spec.clone(), candidates))
        });
        found.collect()
    }

    /// Bridges first, so that an address that is answered for is one that works.
    async fn put_in_force(
        &self,
        services: &[(Service, Backends)],
        networks: BTreeMap<String, NetworkSpec>,
    ) -> Result<()> {
        let network = &self.agent.network;
        for (name, spec) in &networks {
            network.ensure_network(name, spec).await?;
        }
        let ports = services.iter().flat_map(|(service, backends)| {
            let healthy = backends
                .iter()
                .filter(|(_, found)| found.health == Health::Healthy);
            let serving: Vec<_> = healthy.map(|(candidate, _)| candidate).collect();
            ports(
                service,
                crate::host::network_number(&service.spec.network),
                &serving,
            )
        });
        let ports = ports.collect();
        network
            .set_services(networks.into_keys().collect(), ports)
            .await
    }

    /// The guests of a service; begins to check those that are new, and ends to check others.
    fn backends(
        &mut self,
        service: &Service,
        network: &NetworkSpec,
        candidates: Vec<Candidate>,
    ) -> Backends {
        let found = candidates.into_iter().map(|candidate| {
            let key = (service.metadata.name.clone(), candidate.guest.clone());
            if !candidate.runs {
                self.probes.remove(&key);
                let message = "the guest does not run".into();
                let health = Health::Stopped;
                return (candidate, Finding { health, message });
            }
            let gateway_v6 = network.gateway_v6().map(IpAddr::from);
            let gateway = network.gateway().map(IpAddr::from).or(gateway_v6);
            let (Some(check), Some(port), Some(address), Some(gateway)) = (
                service.spec.health_check,
                service.spec.checked_port(),
                candidate.main_address(),
                gateway,
            ) else {
                self.probes.remove(&key);
                let message = "the guest runs".into();
                let health = Health::Healthy;
                return (candidate, Finding { health, message });
            };
            let target = Target {
                address: SocketAddr::new(address, port),
                check,
                gateway,
            };
            let finding = self.finding(key, target, service);
            (candidate, finding)
        });
        found.collect()
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
            (None, Some(status)) if status.health != Health::Stopped => Some(Finding {
                health: status.health,
                message: status.message.clone(),
            }),
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

    async fn report(&self, service: &Service, backends: Backends, done: &Result<()>) -> Result<()> {
        let update = |service: &mut Service| {
            let before = std::mem::take(&mut service.status.backends);
            let statuses = backends.iter().map(|found| status(found, &before));
            service.status.backends = statuses.collect();
            let serving = backends
                .iter()
                .filter(|(_, found)| found.health == Health::Healthy);
            let serving = serving.count();
            let all = backends.len();
            let (status, reason, message) = match done {
                Err(error) => (ConditionStatus::False, error.reason(), error.to_string()),
                Ok(()) if all == 0 => (
                    ConditionStatus::False,
                    "NoGuests",
                    format!(
                        "no guest with an interface in {} is selected",
                        service.spec.network
                    ),
                ),
                Ok(()) if serving == 0 => (
                    ConditionStatus::False,
                    "NoneHealthy",
                    format!("none of {all} guests serves"),
                ),
                Ok(()) => (
                    ConditionStatus::True,
                    "Serving",
                    format!("{serving} of {all} guests serve"),
                ),
            };
            let conditions = &mut service.status.conditions;
            set_condition(conditions, "Ready", status, reason, &message);
        };
        let mut reported = service.clone();
        update(&mut reported);
        if reported == *service {
            return Ok(());
        }
        let name = &service.metadata.name;
        match self.agent.objects.update(name, update).await {
            Err(AgentError::NotFound { .. }) => Ok(()),
            other => other.map(drop),
        }
    }
}

fn status((candidate, found): &(Candidate, Finding), before: &[BackendStatus]) -> BackendStatus {
    let mut before = before.iter();
    let before = before.find(|backend| backend.guest == candidate.guest);
    let since = before
        .filter(|before| before.health == found.health)
        .map_or_else(Timestamp::now, |before| before.since);
    BackendStatus {
        guest: candidate.guest.clone(),
        interface: candidate.interface.clone(),
        address: candidate.main_address(),
        health: found.health,
        message: found.message.clone(),
        since,
    }
}
