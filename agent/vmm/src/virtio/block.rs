//! Disk.
/// Backend error.
#[derive(Debug, thiserror::Error)]
#[error("todo")]
pub struct BackendError;
