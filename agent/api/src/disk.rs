//! A disk image or block device that guests can attach.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::FieldError;
use crate::metadata::{Condition, ObjectMeta};
use crate::object::absolute_path;

/// The most virtqueues that keelson-vmm gives one disk.
const QUEUE_LIMIT: u16 = 16;

/// A raw image or block device on the host, served to a guest by keelson-blk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Disk {
    /// Always [`crate::API_VERSION`].
    pub api_version: String,
    /// Always `Disk`.
    pub kind: String,
    /// The name by which guests refer to it.
    pub metadata: ObjectMeta,
    /// What the disk is.
    pub spec: DiskSpec,
    /// What the agent observed.
    #[serde(default)]
    pub status: DiskStatus,
}

/// What a disk is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DiskSpec {
    /// A raw image file or a block device on the host, absolute.
    pub path: PathBuf,
    /// Guests can only read it; several guests may then share it.
    #[serde(default)]
    pub read_only: bool,
    /// Virtqueues, each with its own worker: 1 to 16.
    #[serde(default = "one")]
    pub queues: u16,
}

fn one() -> u16 {
    1
}

impl DiskSpec {
    pub(crate) fn validate(&self, errors: &mut Vec<FieldError>) {
        absolute_path("spec.path", &self.path, errors);
        if !(1..=QUEUE_LIMIT).contains(&self.queues) {
            errors.push(FieldError::new(
                "spec.queues",
                format!("is {}; give 1 to {QUEUE_LIMIT}", self.queues),
            ));
        }
    }
}

/// What the agent observed of a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DiskStatus {
    /// `Ready`: the image can be served.
    pub conditions: Vec<Condition>,
}
