//! Runs the real `keelsond` and `keelson` with payload guests (`tests/payload`) on this machine's
//! `/dev/kvm`.
//!
//! Each test has its own agent, with folders, pins, and a network namespace of its own, so tests run
//! side by side. What is missing (`/dev/kvm`, root, built programs) makes a test fail with a sentence
//! that says so.
//!
//! The functions here panic where a test can't go on, as assertions do.

mod fleet;
mod host;
mod link;
mod lost_host;
mod manifest;
mod metrics;
mod moves;

pub use fleet::{
    Fleet, LEASE_SECONDS, cluster, cluster_with, migration_settings, settings, shared_disk,
};
pub use host::{Host, Said};
pub use link::Link;
pub use lost_host::{Loss, counting};
pub use manifest::{Guest, disk, network, security_group};
pub use metrics::metrics;
pub use moves::{DESTINATION_POINTS, SOURCE_POINTS};
