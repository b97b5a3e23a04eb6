//! The devices that a guest may have beside disks and interfaces.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ConfigError, check_range, check_socket, field};

/// The least memory that a balloon must leave to the guest, in MiB.
const MIN_LEFT_MIB: u64 = super::MIN_MEMORY_MIB;
/// `_` and the largest port, behind the socket's path.
const PORT_SUFFIX: usize = 11;

/// A memory balloon (virtio 1.2, 5.5).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonConfig {
    /// What the guest is to give back at first, in MiB; it must keep 16 MiB. Changed by the API.
    #[serde(default)]
    pub size_mib: u64,
    /// The guest may take memory back when it would have to kill a process otherwise.
    #[serde(default = "yes")]
    pub deflate_on_oom: bool,
    /// The guest tells which of its memory is free, and the host takes that until it is touched.
    #[serde(default = "yes")]
    pub free_page_reporting: bool,
    /// The guest tells how it uses its memory.
    #[serde(default = "yes")]
    pub statistics: bool,
}

const fn yes() -> bool {
    true
}

impl Default for BalloonConfig {
    fn default() -> Self {
        Self {
            size_mib: 0,
            deflate_on_oom: true,
            free_page_reporting: true,
            statistics: true,
        }
    }
}

impl BalloonConfig {
    pub(super) fn validate(&self, memory_mib: u64) -> Result<(), ConfigError> {
        Self::check_size("balloon.size_mib", self.size_mib, memory_mib)
    }

    /// Checks a size of the balloon of a guest with so much memory.
    pub(crate) fn check_size(
        field: &str,
        size_mib: u64,
        memory_mib: u64,
    ) -> Result<(), ConfigError> {
        check_range(field, size_mib, 0, memory_mib.saturating_sub(MIN_LEFT_MIB))
    }

    /// `size_mib` in the device's unit, pages of 4 KiB.
    pub(crate) fn pages(size_mib: u64) -> u32 {
        // The largest memory has 2^30 pages.
        u32::try_from(size_mib << 8).unwrap_or(u32::MAX)
    }
}

/// A socket device (virtio 1.2, 5.10), with Unix sockets on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context identifier, 3 to 4294967294. It need not be unique on the host.
    #[serde(default = "first_cid")]
    pub cid: u32,
    /// The Unix stream socket that the VMM listens on, for the host to say `CONNECT PORT`. At its
    /// path with `_PORT` behind it listens whom the guest reaches at a port of the host.
    pub socket: PathBuf,
}

const fn first_cid() -> u32 {
    3
}

impl VsockConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let most = u64::from(u32::MAX) - 1;
        check_range("vsock.cid", u64::from(self.cid), 3, most)?;
        check_socket("vsock.socket", &self.socket)?;
        let length = self.socket.as_os_str().len() + PORT_SUFFIX;
        if length > super::MAX_SOCKET_PATH {
            return Err(field(
                "vsock.socket",
                format!(
                    "with `_PORT` behind it the path has {length} bytes, and a Unix socket's has at \
                     most {}",
                    super::MAX_SOCKET_PATH
                ),
            ));
        }
        Ok(())
    }
}

/// A panic device (QEMU, docs/specs/pvpanic.rst).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PanicConfig {
    /// What follows from a panic, beside an event; by default nothing, for the guest's own `panic=`
    /// decides.
    #[serde(default)]
    pub action: EndAction,
}

/// A watchdog (Intel 6300ESB).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WatchdogConfig {
    /// What follows, beside an event, when the guest doesn't answer for it in time; by default the
    /// guest is reset.
    #[serde(default = "reset")]
    pub action: EndAction,
}

const fn reset() -> EndAction {
    EndAction::Reset
}

impl Default for WatchdogConfig {
    fn default() -> Self {
        Self { action: reset() }
    }
}

/// What follows from a guest's panic, or from its watchdog.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndAction {
    /// Nothing.
    #[default]
    None,
    /// The guest is reset, as if it had asked for it.
    Reset,
    /// The process ends, with the reason `guest_panic` or `watchdog`.
    Exit,
}

/// Whether the kernel moves an interface's packets (`/dev/vhost-net`), or a thread of the process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VhostUse {
    /// The kernel if it can.
    #[default]
    Auto,
    /// The kernel; it is an error if it can't.
    On,
    /// A thread.
    Off,
}

/// The device that is a guest's console.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConsoleDevice {
    /// COM1, a 16550A (`ttyS0` of Linux).
    #[default]
    Serial,
    /// A virtio console (virtio 1.2, 5.3; `hvc0` of Linux), which takes a slot of the PCI bus.
    Virtio,
}

impl ConsoleDevice {
    // Serde hands `skip_serializing_if` a reference.
    #[allow(clippy::trivially_copy_pass_by_ref)]
    pub(super) fn is_serial(&self) -> bool {
        *self == Self::Serial
    }
}

impl fmt::Display for ConsoleDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Serial => "serial",
            Self::Virtio => "virtio",
        })
    }
}
