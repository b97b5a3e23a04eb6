//! The API socket: the requests and responses, and the server that answers them.

mod protocol;
mod server;
mod shared;

pub use protocol::{
    Acknowledged, AfterSnapshot, BalloonAnswer, BalloonStatistics, ErrorBody, Event, ExitReason,
    ExitStatus, GuestState, MAX_LINE, Request, Response, SnapshotKind, SnapshotRequest,
    SnapshotTaken, Status,
};
pub(crate) use server::{ApiServer, ApiThread};
pub(crate) use shared::{Answer, Control, ControlSender, Reply, SharedState};
