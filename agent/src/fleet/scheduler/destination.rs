//! Where a guest that runs could go on.

use keelson_controlplane::StateStoreExt;

use super::View;
use super::leader::host_of;
use crate::fleet::keys;
use crate::{Agent, error::Result};

/// The host that a guest that runs is to move to: the one that is `wanted`, or the one that the scheduler
/// would choose. Inside, `Err` says why there is none.
///
/// # Errors
/// [`crate::AgentError::State`].
pub async fn choose_destination(
    agent: &Agent,
    guest: &str,
    wanted: Option<&str>,
) -> Result<std::result::Result<String, String>> {
    let (fleet, objects, _) = agent.fleet_parts();
    let world = objects.world().await?;
    let leases = fleet.store().list(keys::hosts().as_bytes()).await?;
    let mut view = View::default();
    for kv in &leases.kvs {
        view.set_alive(&host_of(&kv.key), true);
    }
    for stored in world.objects.into_values() {
        view.set(stored.object, stored.revision);
    }
    Ok(view.destination(guest, wanted))
}
