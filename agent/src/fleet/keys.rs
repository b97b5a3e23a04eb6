//! Where leases stand in the state store: beside the objects, so that who watches those is not woken.

use keelson_api::API_VERSION;

/// Below this is one key for each host, attached to the lease that its agent renews.
pub fn hosts() -> String {
    format!("/{API_VERSION}/leases/hosts/")
}

/// The key of one host.
pub fn host(name: &str) -> String {
    hosts() + name
}

/// The key of the agent that places guests, attached to its host's lease.
pub fn scheduler() -> String {
    format!("/{API_VERSION}/leases/scheduler")
}
