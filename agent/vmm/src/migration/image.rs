//! What goes over beside memory.

use std::path::Path;

use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};

use crate::config::GuestConfig;
use crate::snapshot::{FormatError, MachineState, SnapshotError, format};

/// What the source says first, so that a side that can't take the guest says so at once.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Hello {
    /// The version of the source's program.
    pub(crate) program: String,
    /// The guest's configuration at the source, in JSON.
    pub(crate) config: String,
    /// The CPUID of its first vCPU.
    pub(crate) cpuid: Vec<kvm_cpuid_entry2>,
}

/// The guest without its memory.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct MachineImage {
    /// The disks, in the configuration's order.
    pub(crate) disks: Vec<DiskIdentity>,
    pub(crate) machine: MachineState,
}

/// What a driver knows of its disk: the backend of the other side has to be the same, and is asked
/// when it is there, which is after the source's has gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DiskIdentity {
    /// What the driver was offered.
    pub(crate) features: u64,
    /// `struct virtio_blk_config`.
    pub(crate) config_space: Vec<u8>,
}

impl Hello {
    /// The bytes of a frame.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, FormatError> {
        format::encode(self)
    }

    /// What a frame's bytes say.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        format::decode(bytes)
    }

    /// The guest's configuration at the source.
    pub(crate) fn config(&self) -> Result<GuestConfig, SnapshotError> {
        GuestConfig::parse(
            self.config.as_bytes(),
            Path::new("the source's configuration"),
        )
        .map_err(|e| SnapshotError::Config(e.to_string()))
    }
}

impl MachineImage {
    /// The bytes of a frame.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, FormatError> {
        format::encode(self)
    }

    /// What a frame's bytes say, checked against the configuration of this side.
    pub(crate) fn decode(bytes: &[u8], config: &GuestConfig) -> Result<Self, FormatError> {
        let image: Self = format::decode(bytes)?;
        let refuse = |message: &str| Err(FormatError::Invalid(message.to_owned()));
        if image.disks.len() != config.disks.len() {
            return refuse("it has another number of disks");
        }
        image
            .machine
            .check(config.vcpus)
            .map_err(FormatError::Invalid)?;
        Ok(image)
    }
}
