//! The API socket: the requests and responses, and the server that answers them.

mod protocol;

pub use protocol::{
    Acknowledged, ErrorBody, Event, ExitReason, ExitStatus, GuestState, MAX_LINE, Request,
    Response, Status,
};
