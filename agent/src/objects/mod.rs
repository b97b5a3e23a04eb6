//! Objects in the state store: reading, watching, and admitting changes.

mod admission;
mod allocation;
mod checks;
mod observe;
mod store;
mod uplink_checks;

pub use admission::{Action, Admission, set_power_state};
pub use store::{Change, ObjectStore, Stored, World};
pub use uplink_checks::interface_of;
