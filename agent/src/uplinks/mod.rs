//! Uplinks: how guests reach what is outside, and which ports of the host lead to them.

mod keeper;
mod plan;
#[cfg(test)]
mod tests;

pub use keeper::Uplinks;
