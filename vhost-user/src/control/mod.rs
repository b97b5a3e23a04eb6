//! The control socket: lines of JSON on a Unix stream, as keelson-vmm's.
//!
//! Each request line gets one response line, in order: `{"ok":…}` or `{"error":{…}}`. The socket
//! is for this user only.

mod client;
mod descriptor;
mod prometheus;
mod protocol;
mod server;

pub use client::{ControlError, call};
pub use protocol::{ErrorBody, MAX_LINE, Request, Response};
pub use server::ControlServer;
