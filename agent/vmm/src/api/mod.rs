//! The API socket: the requests and responses, and the server that answers them.

mod connection;
mod hotplug;
mod protocol;
mod server;
mod shared;

pub(crate) use connection::Connection;
pub use hotplug::{
    DeviceAdded, DeviceKind, DevicesAnswer, MAX_RELEASE_MS, PluggedDevice, RemovalRequest,
};
pub use protocol::{
    Acknowledged, AfterSnapshot, BalloonAnswer, BalloonStatistics, ErrorBody, Event, ExitReason,
    ExitStatus, GuestState, MAX_LINE, MigrationLimits, MigrationPhase, MigrationStatus, Request,
    Response, SnapshotKind, SnapshotRequest, SnapshotTaken, Status,
};
pub(crate) use server::{ApiServer, ApiThread};
pub(crate) use shared::{Answer, Control, ControlSender, Hotplug, Reply, SharedState};
