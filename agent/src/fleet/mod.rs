//! Hosts that share a state store act as one: each renews a lease, one of them places guests, and a
//! guest that may be started elsewhere is killed before its host's lease ends.
//!
//! `docs/fleet.md` has the argument why one disk is never written by two guests. In short:
//!
//! * A host starts a guest only by a transaction that finds the guest placed on it and its own lease
//!   alive, and that says in the object under which terms it runs.
//! * The scheduler places a guest elsewhere only by a transaction that finds the host's lease ended and
//!   those terms to be [`Leased`](keelson_api::PlacementState::Leased).
//! * Whatever runs under these terms is killed, by the [`guard`], at a time that comes before the
//!   lease's end on every clock.

pub mod claim;
mod clock;
pub mod guard;
mod keys;
mod membership;
mod register;
mod scheduler;
#[cfg(test)]
mod simulation;

pub use clock::{Instant, LeaseTerms};
pub use guard::Guard;
pub use keys::host as host_key;
pub use membership::{Fleet, LeaseCheck};
pub use scheduler::{choose_destination, is_movable};
