//! Net.
/// Tap error.
#[derive(Debug, thiserror::Error)]
#[error("todo")]
pub struct TapError;
