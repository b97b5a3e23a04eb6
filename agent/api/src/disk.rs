//! A disk image or block device that guests can attach.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::metadata::{Condition, ObjectMeta};
use crate::object::absolute_path;
use crate::{FieldError, MemorySize};

/// The most virtqueues that keelson-vmm gives one disk.
const QUEUE_LIMIT: u16 = 16;

/// An image or block device on the host, served to a guest by keelson-blk.
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
    /// An image file or a block device on the host, absolute.
    pub path: PathBuf,
    /// How the image's bytes are to be understood: `overlay` where a base is given, else `raw`. It is
    /// never guessed, since a guest could make a raw image look like an overlay of any file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<DiskFormat>,
    /// The image that the disk is an overlay of. Where there is nothing at `path`, the overlay is
    /// created when the disk is first used. Can't be changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<DiskBase>,
    /// The disk's size. A smaller image is made as large, also while a guest uses it. Can't shrink.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<MemorySize>,
    /// Guests can only read it; several guests may then share it.
    #[serde(default)]
    pub read_only: bool,
    /// Virtqueues, each with its own worker: 1 to 16.
    #[serde(default = "one")]
    pub queues: u16,
    /// What a guest may do in a second. Can be changed while a guest uses the disk.
    #[serde(default, skip_serializing_if = "DiskLimits::is_unlimited")]
    pub limits: DiskLimits,
    /// How what guests write is encrypted. Can't be changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encryption: Option<DiskEncryption>,
}

/// How an image's bytes are to be understood.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum DiskFormat {
    /// The disk's bytes, one after the other.
    #[default]
    Raw,
    /// What `keelson-blk image create` makes.
    Overlay,
}

/// The image that an overlay stands on. It is only read, and must not change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DiskBase {
    /// Its path on the host, absolute.
    pub path: PathBuf,
    /// How its bytes are to be understood.
    #[serde(default)]
    pub format: DiskFormat,
}

/// Averages that a disk keeps to; a tenth of a second's worth may be taken at once after idle time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct DiskLimits {
    /// Bytes read and written, such as `100Mi`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<MemorySize>,
    /// Requests of any kind.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operations_per_second: Option<u64>,
}

impl DiskLimits {
    /// Whether nothing is limited.
    pub fn is_unlimited(&self) -> bool {
        *self == Self::default()
    }
}

/// AES-XTS on sectors of 512 bytes, as dm-crypt's `aes-xts-plain64`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DiskEncryption {
    /// The file on the host that holds the key: 32 random bytes for AES-128 or 64 for AES-256, and
    /// nothing else. It is handed to keelson-blk as an open descriptor.
    pub key_file: PathBuf,
}

fn one() -> u16 {
    1
}

impl DiskSpec {
    /// Whether the image is an overlay.
    pub fn is_overlay(&self) -> bool {
        self.base.is_some() || self.format == Some(DiskFormat::Overlay)
    }

    pub(crate) fn validate(&self, errors: &mut Vec<FieldError>) {
        absolute_path("spec.path", &self.path, errors);
        if let Some(base) = &self.base {
            absolute_path("spec.base.path", &base.path, errors);
            if base.path == self.path {
                errors.push(FieldError::new("spec.base.path", "is the disk itself"));
            }
            if self.format == Some(DiskFormat::Raw) {
                let message = "is raw, but a disk with a base is an overlay; leave the format out";
                errors.push(FieldError::new("spec.format", message));
            }
        }
        if let Some(encryption) = &self.encryption {
            absolute_path("spec.encryption.keyFile", &encryption.key_file, errors);
        }
        if self.size.is_some_and(|size| size.bytes() == 0) {
            errors.push(FieldError::new(
                "spec.size",
                "is 0; leave it out or give a size",
            ));
        }
        let rates = [
            (
                "bytesPerSecond",
                self.limits.bytes_per_second.map(MemorySize::bytes),
            ),
            ("operationsPerSecond", self.limits.operations_per_second),
        ];
        for (field, rate) in rates {
            if rate == Some(0) {
                errors.push(FieldError::new(
                    format!("spec.limits.{field}"),
                    "is 0; leave it out to lift the limit",
                ));
            }
        }
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
