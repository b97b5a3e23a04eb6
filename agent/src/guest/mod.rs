//! One guest on this host: what it needs, its processes, and the actor that keeps them as desired.

mod actor;
mod cloud_init;
mod device;
mod disk_backend;
mod disk_image;
mod exit;
mod groups;
mod jail;
mod layer;
mod machine;
mod mailbox;
mod movable;
mod paths;
mod plan;
mod runtime;
mod served_disks;
mod simulated;
mod snapshots;
mod status;
mod usage;

pub use actor::{GuestActor, is_resting};
pub use groups::{Memberships, memberships_of, rule_counters};
pub use layer::{GuestLayer, GuestProcesses};
pub use machine::Machine;
pub use mailbox::GuestMailbox;
pub use paths::GuestPaths;
pub use served_disks::{ServedDisk, served_disks, snapshot};
pub use simulated::SimulatedGuests;
pub use snapshots::{GuestSnapshots, SnapshotEntry};
pub use usage::usage;
