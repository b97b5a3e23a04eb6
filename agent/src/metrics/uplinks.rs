//! Metrics of uplinks and services.

use std::collections::BTreeMap;

use keelson_api::Health;
use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{IntGaugeVec, Opts};

use super::Tallies;
use crate::{Agent, AgentError, error::Result};

/// What was translated at each address of an uplink, and how many guests serve each service.
pub async fn collect(agent: &Agent) -> Result<Vec<MetricFamily>> {
    let failed = |error: prometheus::Error| {
        AgentError::io("make metrics of uplinks")(std::io::Error::other(error))
    };
    let translated = Tallies::new(
        "uplink_",
        "What was translated at an address of an uplink",
        &["uplink", "address", "direction"],
    )
    .map_err(failed)?;
    for used in agent.network.external_use().await? {
        let address = used.address.to_string();
        for (direction, tally) in [
            ("to-uplink", &used.to_uplink),
            ("from-uplink", &used.from_uplink),
        ] {
            translated.set(&[&used.uplink, &address, direction], tally);
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
    let mut families = translated.packets.collect();
    families.extend(translated.bytes.collect());
    families.extend(backends.collect());
    Ok(families)
}

/// How many guests of each service are in each state.
fn counted(agent: &Agent) -> Vec<(String, &'static str, i64)> {
    let view = agent.view.read();
    let mut counted = Vec::new();
    for (name, service) in view.services() {
        let states = ["healthy", "unknown", "unhealthy", "stopped"].map(|state| (state, 0));
        let mut states = BTreeMap::from(states);
        for backend in &service.status.backends {
            let state = match backend.health {
                Health::Healthy => "healthy",
                Health::Unknown => "unknown",
                Health::Unhealthy => "unhealthy",
                Health::Stopped => "stopped",
            };
            *states.entry(state).or_default() += 1;
        }
        let of_service = states.into_iter();
        counted.extend(of_service.map(|(state, count)| (name.clone(), state, count)));
    }
    counted
}
