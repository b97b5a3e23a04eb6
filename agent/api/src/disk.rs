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
    /// Every host finds the same bytes at `path`: a file system or a block device that hosts share.
    /// Only guests whose disks are all shared can run on another host.
    #[serde(default, skip_serializing_if = "is_false")]
    pub shared: bool,
    /// The host that has it, where it isn't shared; that of the agent that it was applied with where
    /// not given. Nothing where the state store belongs to one host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
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
    /// Its path on the host, absolute. Either this or `url`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// The address of a raw image on an HTTP or HTTPS server, of which is fetched what guests read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// How its bytes are to be understood.
    #[serde(default)]
    pub format: DiskFormat,
    /// With `url`: the SHA-256 of the manifest beside the image, in lowercase hexadecimal digits.
    /// Without it, the manifest is taken as the server has it when the disk is first used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manifest_sha256: Option<String>,
    /// With `url`: what the server sends is taken without checksums.
    #[serde(default, skip_serializing_if = "is_false")]
    pub without_checksums: bool,
    /// With `url`: certificates (PEM) to trust instead of the system's, a file on the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// With `url`: what guests have not asked for is fetched as well, at this many bytes a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fill_bytes_per_second: Option<MemorySize>,
}

impl DiskBase {
    /// Whether an overlay of the one is an overlay of the other.
    pub fn is_same_image(&self, other: &Self) -> bool {
        let image = |base: &Self| (base.path.clone(), base.url.clone(), base.format);
        image(self) == image(other)
    }

    fn validate(&self, disk: &std::path::Path, errors: &mut Vec<FieldError>) {
        let mut refuse = |field: &str, message: &str| {
            errors.push(FieldError::new(format!("spec.base{field}"), message));
        };
        let of_servers = [
            (".manifestSha256", self.manifest_sha256.is_some()),
            (".withoutChecksums", self.without_checksums),
            (".caFile", self.ca_file.is_some()),
            (".fillBytesPerSecond", self.fill_bytes_per_second.is_some()),
        ];
        match (&self.path, &self.url) {
            (Some(path), None) => {
                if path == disk {
                    refuse(".path", "is the disk itself");
                }
                for (field, _) in of_servers.iter().filter(|(_, given)| *given) {
                    refuse(field, "goes with a url only");
                }
                absolute_path("spec.base.path", path, errors);
                return;
            }
            (None, Some(url)) if url.starts_with("https://") || url.starts_with("http://") => {}
            (None, Some(_)) => refuse(".url", "has to start with https:// or http://"),
            _ => refuse("", "takes either a path or a url"),
        }
        if self.format != DiskFormat::Raw {
            refuse(".format", "is not raw, but images on servers have to be");
        }
        let digest = self.manifest_sha256.as_deref();
        let digits = |text: &str| {
            text.len() == 64 && text.bytes().all(|byte| b"0123456789abcdef".contains(&byte))
        };
        if digest.is_some_and(|text| !digits(text)) {
            refuse(
                ".manifestSha256",
                "is no SHA-256: 64 lowercase hexadecimal digits",
            );
        }
        if digest.is_some() && self.without_checksums {
            refuse(".withoutChecksums", "goes without a manifestSha256");
        }
        if self
            .fill_bytes_per_second
            .is_some_and(|rate| rate.bytes() == 0)
        {
            refuse(
                ".fillBytesPerSecond",
                "is 0; leave it out to fetch only what is read",
            );
        }
        if let Some(file) = &self.ca_file {
            absolute_path("spec.base.caFile", file, errors);
        }
    }
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

#[allow(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_false(value: &bool) -> bool {
    !value
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
        if self.shared && self.host.is_some() {
            let message = "is given, but a shared disk is on every host; leave one of both out";
            errors.push(FieldError::new("spec.host", message));
        }
        if let Some(base) = &self.base {
            base.validate(&self.path, errors);
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
