//! A host of the fleet.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::metadata::{Condition, ObjectMeta};
use crate::{FieldError, MemorySize};

/// A host whose agent uses this state store. Its agent makes the object; people write its labels and
/// whether guests may be placed on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Host {
    /// Always [`crate::API_VERSION`].
    pub api_version: String,
    /// Always `Host`.
    pub kind: String,
    /// Its name, and the labels that guests select hosts by.
    pub metadata: ObjectMeta,
    /// What it is to be used for.
    #[serde(default)]
    pub spec: HostSpec,
    /// What its agent, and the scheduler, observed.
    #[serde(default)]
    pub status: HostStatus,
}

/// What a host is to be used for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct HostSpec {
    /// No further guests are placed on it: `keelson cordon`.
    #[serde(skip_serializing_if = "is_false")]
    pub unschedulable: bool,
    /// The guests that can run elsewhere are moved there: `keelson drain`.
    #[serde(skip_serializing_if = "is_false")]
    pub drain: bool,
    /// With `drain`: guests are shut down and started elsewhere, not moved while they run.
    #[serde(skip_serializing_if = "is_false")]
    pub no_live_migration: bool,
}

// Serde hands `skip_serializing_if` a reference.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_false(value: &bool) -> bool {
    !value
}

impl HostSpec {
    pub(crate) fn validate(self, errors: &mut Vec<FieldError>) {
        if self.drain && !self.unschedulable {
            errors.push(FieldError::new(
                "spec.drain",
                "goes with unschedulable: true; else guests would be placed there again",
            ));
        }
    }
}

/// What there is of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HostResources {
    /// Processors; of what can be allocated, virtual ones.
    pub cpus: u32,
    /// Memory.
    pub memory: MemorySize,
    /// Huge pages of 2 MiB.
    #[serde(default, rename = "hugepages2Mi")]
    pub hugepages_2mi: u64,
    /// Huge pages of 1 GiB.
    #[serde(default, rename = "hugepages1Gi")]
    pub hugepages_1gi: u64,
    /// The file system of `/var/lib/keelson`, or of the nearest folder above that there is.
    pub disk: MemorySize,
}

/// What is observed of a host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HostStatus {
    /// The agent's version.
    pub version: String,
    /// The kernel's release.
    pub kernel: String,
    /// All that the host has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub capacity: Option<HostResources>,
    /// What guests may have of it in sum.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allocatable: Option<HostResources>,
    /// Where guests come in that move to it while they run; nothing if it takes none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub migration_address: Option<String>,
    /// Where the hosts of networks that span hosts reach it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tunnel_address: Option<IpAddr>,
    /// `Ready`: its agent renews its lease.
    pub conditions: Vec<Condition>,
}
