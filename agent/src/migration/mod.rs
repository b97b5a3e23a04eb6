//! Live migration: guests go on on another host without being shut down.
//!
//! A request stands in the guest's object (`status.migration`). The destination's agent prepares a
//! virtual machine that waits, and leaves a [`Ticket`] in the state store; the source's agent connects to
//! it and carries the guest's memory over ([`Departure`], [`Arrival`]). When the other side has all of it,
//! the source stops the guest's disk backends and places the guest on the destination in one transaction,
//! which compares the leases of both. Until then it goes on at the source whatever fails, and from then on
//! it is the destination's. What of it is done by the task that keeps the guest is in
//! `guest/actor/migration.rs`; `docs/fleet.md` has the argument why it is safe.

mod arrival;
mod connection;
mod departure;
mod flows;
mod request;
mod ticket;
mod tls;
pub mod transitions;

pub use arrival::{Arrival, ArrivalState, Arrivals};
pub use departure::{Departure, DepartureState};
pub use flows::{FLOWS_TIME_LIMIT, FlowCount, GuestFlows};
pub use request::{cancel, request};
pub use ticket::Ticket;
pub use tls::MigrationTls;

use std::sync::Arc;

/// Wakes the task that keeps a guest.
pub type Ring = Arc<dyn Fn() + Send + Sync>;
