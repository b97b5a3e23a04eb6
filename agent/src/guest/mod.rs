//! One guest on this host: what it needs, its processes, and the actor that keeps them as desired.

mod actor;
mod disk_backend;
mod disk_image;
mod groups;
mod jail;
mod machine;
mod paths;
mod plan;
mod runtime;
mod served_disks;
mod snapshots;
mod status;

pub use actor::{GuestActor, GuestMailbox};
pub use groups::{Memberships, memberships, rule_counters};
pub use machine::Machine;
pub use paths::GuestPaths;
pub use runtime::Runtime;
pub use served_disks::{ServedDisk, served_disks, snapshot};
pub use snapshots::{GuestSnapshots, SnapshotEntry};
