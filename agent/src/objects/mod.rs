//! Objects in the state store: reading, watching, and admitting changes.

mod admission;
mod allocation;
mod checks;
mod store;

pub use admission::{Action, Admission, set_power_state};
pub use store::{Change, ObjectStore, Stored, World};
