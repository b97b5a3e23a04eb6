//! Services: which guests answer for a virtual address, and which of those are healthy.

mod backends;
mod probe;
mod reconciler;

pub use reconciler::Services;

#[cfg(test)]
pub use backends::candidates;
