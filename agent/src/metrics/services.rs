//! Metrics of services.

use std::collections::BTreeMap;

use keelson_api::Health;
use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{IntGaugeVec, Opts};

use super::Tallies;
use crate::services::traffic;
use crate::{Agent, AgentError, error::Result};

/// How many guests serve each service, and what went between them and the clients here. The eBPF network bounds
/// how many backends are counted one by one, and with that how many lines there are.
pub async fn collect(agent: &Agent) -> Result<Vec<MetricFamily>> {
    let failed = |error: prometheus::Error| {
        AgentError::io("make metrics of services")(std::io::Error::other(error))
    };
    let served = Tallies::new(
        "service_",
        "What went between a service's backend and its clients on this host or behind it",
        &["service", "port", "backend", "direction"],
    )
    .map_err(failed)?;
    for traffic in traffic(agent).await? {
        let port = traffic.port.to_string();
        let backend = traffic.backend.as_deref().unwrap_or_default();
        for (direction, tally) in [
            ("to-backend", &traffic.to_backend),
            ("from-backend", &traffic.from_backend),
        ] {
            // Both versions of IP, and what has no backend, are added up.
            served.set(&[&traffic.service, &port, backend, direction], tally);
        }
    }
    let backends = Opts::new(
        "keelson_network_service_backends",
        "Guests that a service is for, by whether they serve.",
    );
    let backends = IntGaugeVec::new(backends, &["service", "health"]).map_err(failed)?;
    for (service, health, count) in counted(agent) {
        let labels = [service.as_str(), health];
        backends.with_label_values(&labels).set(count);
    }
    let mut families = served.packets.collect();
    families.extend(served.bytes.collect());
    families.extend(backends.collect());
    Ok(families)
}

/// How many guests of each service are in each state.
fn counted(agent: &Agent) -> Vec<(String, &'static str, i64)> {
    let view = agent.view.read();
    let mut counted = Vec::new();
    for (name, service) in view.services() {
        let states = [
            "healthy",
            "unknown",
            "unhealthy",
            "stopped",
            "draining",
            "drained",
        ];
        let mut states = BTreeMap::from(states.map(|state| (state, 0)));
        for backend in &service.status.backends {
            let state = match backend.health {
                Health::Healthy => "healthy",
                Health::Unknown => "unknown",
                Health::Unhealthy => "unhealthy",
                Health::Stopped => "stopped",
                Health::Draining => "draining",
                Health::Drained => "drained",
            };
            *states.entry(state).or_default() += 1;
        }
        let of_service = states.into_iter();
        counted.extend(of_service.map(|(state, count)| (name.clone(), state, count)));
    }
    counted
}
