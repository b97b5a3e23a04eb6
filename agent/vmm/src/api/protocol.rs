//! What goes over the API socket: newline-delimited JSON on a Unix stream.
//!
//! Each request line gets one response line, in order. After `subscribe` the connection also
//! carries one line per event.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::RemovalRequest;
#[cfg(doc)]
use super::{DeviceAdded, DevicesAnswer};
use crate::config::{DiskConfig, InterfaceConfig};

pub use crate::migration::{MigrationLimits, MigrationPhase, MigrationStatus};
pub use crate::virtio::balloon::BalloonStatistics;

/// The longest line in either direction, in bytes with its newline.
pub const MAX_LINE: usize = 16 * 1024;

/// A request line: `{"request":"status"}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// What the guest does now. Answered with [`Status`].
    Status,
    /// Press the ACPI power button: a guest that obeys it shuts down.
    PowerButton,
    /// Reset the guest at once, as its reset button would.
    Reset,
    /// End the guest at once.
    Kill,
    /// Stop the vCPUs and the devices until [`Request::Resume`].
    Pause,
    /// Let a paused guest go on.
    Resume,
    /// Take a snapshot. Answered with [`SnapshotTaken`], when it is on the disk.
    Snapshot(SnapshotRequest),
    /// What the guest's balloon has, and how the guest uses its memory. Answered with
    /// [`BalloonAnswer`].
    Balloon,
    /// Ask the guest to give more memory back, or to take some of it again.
    ResizeBalloon {
        /// What it is to give back in all, in MiB; at least 16 MiB must be left.
        size_mib: u64,
    },
    /// The terminal that shows the console has another size, which a virtio console tells its guest.
    ResizeConsole {
        /// Characters in a line.
        columns: u16,
        /// Lines.
        rows: u16,
    },
    /// Send every later [`Event`] on this connection.
    Subscribe,
    /// Send the guest, while it runs, to another process. After the answer the connection is the stream
    /// ([`crate::migration::stream`]), both ways.
    Migrate(MigrationLimits),
    /// Take a guest, in a process that was started for that. After the answer the connection is the
    /// stream, both ways.
    Receive,
    /// How the latest migration gets on. Answered with [`MigrationStatus`].
    Migration,
    /// The other side has the guest: from now on it stays stopped here until it is told to
    /// [`Request::Resume`] or ended, whatever becomes of the other side.
    ReleaseMigration,
    /// Let the guest stay here. Possible until it has been released.
    CancelMigration,
    /// Add a disk, whose backend listens. Answered with [`DeviceAdded`], when the guest has been told.
    AddDisk(DiskConfig),
    /// Add an interface. The descriptor of its TAP comes with the request's first byte (`SCM_RIGHTS`):
    /// attached, with a header of 12 bytes (`TUNSETVNETHDRSZ`). Answered with [`DeviceAdded`].
    AddInterface(InterfaceConfig),
    /// Ask the guest to let go of a disk or an interface. Answered when it has.
    RemoveDevice(RemovalRequest),
    /// Which disks and interfaces there are. Answered with [`DevicesAnswer`].
    Devices,
}

/// What snapshot to take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// The directory to take it to, as the VMM's process sees it: empty, or not there yet.
    pub directory: PathBuf,
    /// What of the guest's memory it has.
    #[serde(default)]
    pub kind: SnapshotKind,
    /// What a running guest does after it. A paused one stays paused.
    #[serde(default)]
    pub then: AfterSnapshot,
}

/// The answer to [`Request::Balloon`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonAnswer {
    /// What the guest is to give back, in bytes.
    pub wanted_bytes: u64,
    /// What it says it has given back, in bytes.
    pub actual_bytes: u64,
    /// Free memory that it has reported since it booted or was restored, in bytes; the same memory counts
    /// as often as it was reported.
    pub reported_bytes: u64,
    /// How it uses its memory, if it said so.
    pub statistics: Option<BalloonStatistics>,
    /// How long ago it said that, in milliseconds.
    pub statistics_age_ms: Option<u64>,
}

/// What of the guest's memory a snapshot has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotKind {
    /// All of it.
    #[default]
    Full,
    /// What changed since the snapshot before, which it needs to be restored.
    Differential,
}

/// What a running guest does after a snapshot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AfterSnapshot {
    /// It goes on.
    #[default]
    Resume,
    /// It stays paused, with its disks as they are in the snapshot.
    Pause,
}

/// The answer to [`Request::Snapshot`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotTaken {
    /// Bytes of memory that it has.
    pub memory_bytes: u64,
    /// How long the guest stood still, in microseconds; up to now if it stays paused.
    pub paused_us: u64,
}

/// A response line: `{"ok":{…}}` or `{"error":{…}}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response<T> {
    /// The request was done.
    Ok(T),
    /// The request was refused.
    Error(ErrorBody),
}

/// Why a request was refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// A stable word for programs: `bad_request`, `not_running`, `too_many_clients`,
    /// `not_paused`, `pause_failed`, `snapshot_failed`, `no_balloon`, `no_console_size`, `out_of_range`,
    /// `migrating`, `migration_failed`, `not_migrating`, `not_loaded`, `released`, `paused`, `incoming`,
    /// `not_incoming`, `out_of_memory`; of devices `name_taken`, `no_free_slot`, `invalid_device`,
    /// `backend_unusable`, `memory_not_shared`, `no_descriptor`, `hotplug_failed`, `no_device`, `busy`,
    /// `not_released`.
    pub kind: String,
    /// One sentence for people.
    pub message: String,
}

/// The empty answer of requests that only acknowledge.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acknowledged {}

/// Where the guest is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestState {
    /// The VMM sets the guest up, or boots it again.
    Starting,
    /// The process waits for a guest of another one, or takes it.
    Incoming,
    /// A guest of another process is there, and stands still until it is told to go on.
    Arrived,
    /// The vCPUs run.
    Running,
    /// The vCPUs and the devices stand still.
    Paused,
    /// The power button was pressed or the guest is being ended.
    Stopping,
    /// The guest ended as it or somebody asked; the process is about to exit.
    Stopped,
    /// The guest ended by an error; the process is about to exit.
    Failed,
}

/// Why the guest ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// The guest powered itself off (ACPI S5).
    Shutdown,
    /// The guest rebooted, and the configuration says to exit then.
    Reboot,
    /// `kill` was requested, or the process got SIGTERM or SIGINT.
    Killed,
    /// A vCPU triple-faulted.
    TripleFault,
    /// The guest's kernel panicked, and the configuration says to exit then.
    GuestPanic,
    /// The watchdog was not fed in time, and the configuration says to exit then.
    Watchdog,
    /// The VMM or KVM failed; the message says how.
    Error,
}

impl ExitReason {
    /// Whether neither the guest nor anybody else wanted that end.
    pub const fn is_failure(self) -> bool {
        match self {
            Self::Shutdown | Self::Reboot | Self::Killed => false,
            Self::TripleFault | Self::GuestPanic | Self::Watchdog | Self::Error => true,
        }
    }
}

/// How the guest ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitStatus {
    /// The kind of end.
    pub reason: ExitReason,
    /// One sentence.
    pub message: String,
}

/// The answer to [`Request::Status`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The guest's name, from its configuration.
    pub name: String,
    /// Where the guest is in its life.
    pub state: GuestState,
    /// The VMM's process id.
    pub process_id: u32,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// How often the guest was booted by this process: 1 after the first start.
    pub boots: u64,
    /// When the process started the guest, in milliseconds since the Unix epoch.
    pub started_at_unix_ms: u64,
    /// How the guest ended, once it has.
    pub exit: Option<ExitStatus>,
}

/// An event line, sent to subscribed connections.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The guest's state changed.
    State {
        /// The new state.
        state: GuestState,
        /// When, in milliseconds since the Unix epoch.
        unix_ms: u64,
    },
    /// The guest boots again in the same process.
    Reboot,
    /// A disk's backend went away: the disk answers nothing until another takes over.
    DiskDisconnected {
        /// The disk's `id`.
        id: String,
    },
    /// Another backend took over a disk, with the requests that were under way.
    DiskReconnected {
        /// The disk's `id`.
        id: String,
    },
    /// A disk or an interface was added.
    DeviceAdded {
        /// Its `id`.
        id: String,
    },
    /// The guest has let go of a disk or an interface, which is gone.
    DeviceRemoved {
        /// Its `id`.
        id: String,
    },
    /// The guest's kernel panicked, as it told the panic device.
    GuestPanic {
        /// It goes on with a crash kernel, which was loaded for that.
        crash_loaded: bool,
    },
    /// The guest has not fed its watchdog in time.
    Watchdog,
    /// The guest ended; the process is about to exit.
    Exit {
        /// The kind of end.
        reason: ExitReason,
        /// One sentence.
        message: String,
    },
}
