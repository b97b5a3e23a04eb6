//! Services: which guests answer for a virtual address, and which of those are healthy.

mod backends;
mod drain;
mod probe;
mod reconciler;
mod report;
mod traffic;

pub use reconciler::Services;
pub use traffic::{Traffic, traffic};

#[cfg(test)]
pub use backends::candidates;
