//! What a disk is made of.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::refuse;
use crate::Error;
use crate::disk::SERIAL_SIZE;
use crate::image::DirectMode;
use crate::rate_limit::Limits;
use crate::remote::{ClientOptions, FetchOptions};

/// What a disk is made of, and how it is served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// Its name in this process.
    pub id: String,
    /// The Unix socket to listen on.
    pub socket: PathBuf,
    /// What holds the data.
    pub contents: Contents,
    /// Whether writes are refused.
    #[serde(default)]
    pub read_only: bool,
    /// Virtqueues, 1 to 64.
    #[serde(default = "one")]
    pub queues: u16,
    /// Most descriptors in a virtqueue, a power of two from 4 to 1024.
    #[serde(default = "largest_queue")]
    pub queue_size: u16,
    /// The serial number that the guest sees, up to 20 bytes.
    #[serde(default)]
    pub serial: String,
    /// Whether to go around the page cache.
    #[serde(default)]
    pub direct: DirectMode,
    /// Whether the device of a raw image is polled instead of raising interrupts.
    #[serde(default, skip_serializing_if = "is_false")]
    pub io_poll: bool,
    /// Its limits.
    #[serde(default, skip_serializing_if = "Limits::is_unlimited")]
    pub limits: Limits,
    /// The group with which it shares limits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// How a base on a server is fetched.
    #[serde(default, skip_serializing_if = "BaseSpec::is_default")]
    pub base: BaseSpec,
}

/// How an overlay's base on a server is fetched.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BaseSpec {
    /// Certificates (PEM) to trust instead of the system's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// Also fetch what the guest hasn't asked for, at this many bytes a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fill_bytes_per_second: Option<u64>,
    /// After how many seconds a request that waits for the server fails; 30 unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_seconds: Option<u64>,
}

impl BaseSpec {
    /// Whether nothing is given.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// The options that it stands for.
    pub fn fetch_options(&self) -> FetchOptions {
        let defaults = FetchOptions::default();
        let patience = self.timeout_seconds.map(Duration::from_secs);
        FetchOptions {
            client: ClientOptions {
                ca_file: self.ca_file.clone(),
            },
            patience: patience.unwrap_or(defaults.patience),
            fill: self.fill_bytes_per_second,
        }
    }
}

/// What holds a disk's data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Contents {
    /// A raw file or a block device.
    Raw(PathBuf),
    /// An overlay, made by `keelson-blk image create`.
    Overlay(PathBuf),
    /// Nothing, of this many bytes.
    Null(u64),
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_false(value: &bool) -> bool {
    !value
}

fn one() -> u16 {
    1
}

fn largest_queue() -> u16 {
    1024
}

/// Says what is wrong with a disk, or what its serial number is in the protocol.
pub(super) fn check(spec: &DiskSpec) -> Result<[u8; SERIAL_SIZE], Error> {
    let id = &spec.id;
    if id.is_empty() || id.len() > 256 {
        return Err(refuse(id, "a disk's name has 1 to 256 bytes"));
    }
    if !(1..=64).contains(&spec.queues) {
        return Err(refuse(id, "a disk has 1 to 64 queues"));
    }
    if !spec.queue_size.is_power_of_two() || !(4..=1024).contains(&spec.queue_size) {
        return Err(refuse(
            id,
            "a queue's size is a power of two from 4 to 1024",
        ));
    }
    if spec.io_poll && !matches!(spec.contents, Contents::Raw(_)) {
        return Err(refuse(
            id,
            "only raw images and block devices can be polled",
        ));
    }
    check_limits(id, spec.limits)?;
    if spec
        .base
        .timeout_seconds
        .is_some_and(|seconds| !(1..=3600).contains(&seconds))
    {
        return Err(refuse(id, "a request waits 1 to 3600 seconds for a server"));
    }
    let mut serial = [0; SERIAL_SIZE];
    let field = serial.get_mut(..spec.serial.len());
    let field = field.ok_or_else(|| refuse(id, "a serial number has at most 20 bytes"))?;
    field.copy_from_slice(spec.serial.as_bytes());
    Ok(serial)
}

/// Says what is wrong with limits.
pub(super) fn check_limits(id: &str, limits: Limits) -> Result<(), Error> {
    let rates = [limits.bytes, limits.operations];
    if rates.into_iter().flatten().any(|rate| rate.per_second == 0) {
        return Err(refuse(
            id,
            "a limit is at least 1 a second; leave it out to lift it",
        ));
    }
    Ok(())
}
