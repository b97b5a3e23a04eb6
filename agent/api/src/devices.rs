//! Devices that a guest may have beside disks and interfaces.

use serde::{Deserialize, Serialize};

use crate::FieldError;
use crate::units::MemorySize;

/// What a balloon must leave to the guest.
const BALLOON_LEAVES_MIB: u64 = 16;

/// Devices that a guest may have beside disks and interfaces; each is there if it is given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Devices {
    /// A memory balloon, with which the guest gives the host what it does not need.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balloon: Option<Balloon>,
    /// A socket device: the host reaches the guest's ports by a Unix socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock: Option<Vsock>,
    /// A panic device, by which the guest's kernel tells of its panic.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub panic: Option<PanicDevice>,
    /// A watchdog, which the guest has to feed once it has started it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub watchdog: Option<Watchdog>,
    /// A virtio console (`hvc0` of Linux), which is typed into instead of the serial port, and is told the
    /// terminal's size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub console: Option<VirtioConsole>,
}

/// A memory balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Balloon {
    /// What the guest is to give back when it starts.
    pub size: MemorySize,
    /// The guest may take memory back when it would have to kill a process otherwise.
    pub deflate_on_oom: bool,
    /// The guest tells which of its memory is free, and the host takes that until it is touched.
    pub free_page_reporting: bool,
}

impl Default for Balloon {
    fn default() -> Self {
        Self {
            size: MemorySize::ZERO,
            deflate_on_oom: true,
            free_page_reporting: true,
        }
    }
}

/// A socket device. Its socket is `vsock.sock` in the guest's folder of the run directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Vsock {
    /// The guest's context identifier, 3 to 4294967294; others may have the same.
    pub cid: u32,
}

impl Default for Vsock {
    fn default() -> Self {
        Self { cid: 3 }
    }
}

/// A panic device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct PanicDevice {
    /// What follows, beside an event.
    pub action: EndAction,
}

/// A watchdog.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Watchdog {
    /// What follows, beside an event.
    pub action: EndAction,
}

impl Default for Watchdog {
    fn default() -> Self {
        Self {
            action: EndAction::Reset,
        }
    }
}

/// A virtio console.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VirtioConsole {}

/// What follows from a guest's panic, or from its watchdog.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum EndAction {
    /// Nothing.
    #[default]
    None,
    /// The guest is reset.
    Reset,
    /// The guest ends as one that failed, and its restart policy decides.
    End,
}

impl Devices {
    pub(crate) fn count(&self) -> usize {
        let there = [
            self.balloon.is_some(),
            self.vsock.is_some(),
            self.panic.is_some(),
            self.watchdog.is_some(),
            self.console.is_some(),
        ];
        there.into_iter().filter(|there| *there).count()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.count() == 0
    }

    pub(crate) fn validate(&self, memory: MemorySize, errors: &mut Vec<FieldError>) {
        if let Some(balloon) = self.balloon
            && balloon.size.mib() + BALLOON_LEAVES_MIB > memory.mib()
        {
            errors.push(FieldError::new(
                "spec.devices.balloon.size",
                format!(
                    "is {}; leave at least {BALLOON_LEAVES_MIB}Mi of the guest's {memory}",
                    balloon.size
                ),
            ));
        }
        if let Some(vsock) = self.vsock
            && !(3..u32::MAX).contains(&vsock.cid)
        {
            errors.push(FieldError::new(
                "spec.devices.vsock.cid",
                format!("is {}; give 3 to {}", vsock.cid, u32::MAX - 1),
            ));
        }
    }
}
