//! The disks and interfaces of a guest that runs, which may come and go.

use serde::{Deserialize, Serialize};

/// A disk or an interface of a guest that runs, as it is in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeviceStatus {
    /// What it is.
    pub kind: DeviceKind,
    /// Its name in the guest's manifest.
    pub name: String,
    /// Whether the guest has it.
    pub state: DeviceState,
    /// Why it has not come or gone yet, in one CamelCase word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The same for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// What can come and go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum DeviceKind {
    /// A disk.
    Disk,
    /// A network interface.
    Interface,
}

/// Whether a guest has a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// It has it.
    Attached,
    /// It is to get it.
    Attaching,
    /// It is to let go of it.
    Detaching,
}
