//! Metrics of uplinks.

use prometheus::core::Collector;
use prometheus::proto::MetricFamily;

use super::Tallies;
use crate::{Agent, AgentError, error::Result};

/// What was translated at each address of an uplink.
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
    let mut families = translated.packets.collect();
    families.extend(translated.bytes.collect());
    Ok(families)
}
