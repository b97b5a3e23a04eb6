//! What is said about disks and interfaces that come and go.

use serde::{Deserialize, Serialize};

/// What device the guest is to let go of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemovalRequest {
    /// The disk's or interface's `id`.
    pub id: String,
    /// How long the guest may take, in milliseconds, at most [`MAX_RELEASE_MS`]. Later it may still let go,
    /// of which [`super::Event::DeviceRemoved`] tells.
    #[serde(default = "default_release_ms")]
    pub timeout_ms: u64,
}

/// The most of [`RemovalRequest::timeout_ms`].
pub const MAX_RELEASE_MS: u64 = 10 * 60 * 1000;

const fn default_release_ms() -> u64 {
    10_000
}

impl RemovalRequest {
    /// Of this device, with the time that a guest usually has.
    pub fn of(id: impl Into<String>) -> Self {
        Self {
            id: id.into(),
            timeout_ms: default_release_ms(),
        }
    }
}

/// The answer to a request that added a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceAdded {
    /// The PCI slot that it is in.
    pub slot: u8,
}

/// The answer to [`super::Request::Devices`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DevicesAnswer {
    /// Disks, then interfaces, in the order of the configuration.
    pub devices: Vec<PluggedDevice>,
}

/// A disk or an interface that the guest has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PluggedDevice {
    /// Its `id`.
    pub id: String,
    /// What it is.
    pub kind: DeviceKind,
    /// The PCI slot that it is in.
    pub slot: u8,
    /// The guest was asked to let go of it, and has not.
    pub leaving: bool,
}

/// What can come and go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceKind {
    /// A disk.
    Disk,
    /// A network interface.
    Interface,
}
