//! `keelson net`

mod capture;
mod counters;
mod packets;
mod services;
mod trace;
mod trace_service;
mod trace_uplink;

use clap::Subcommand;

use crate::client::Client;
use crate::failure::Failure;

/// Show what guests' networks do.
#[derive(Subcommand)]
pub enum Net {
    /// Packets and bytes by interface, direction and reason; without a guest, those at uplinks.
    Counters(counters::Counters),
    /// Packets and bytes of services, by backend.
    Services(services::Services),
    /// A guest's flows; with --follow, those that begin and end.
    Flows(packets::Flows),
    /// Each packet that is dropped from now on, and why.
    Drops(packets::Drops),
    /// Capture the packets of a guest's interface.
    Capture(capture::Capture),
    /// Say which rule decides about a new connection, and why.
    Trace(trace::Trace),
}

impl Net {
    /// Runs the command.
    pub async fn run(self, client: &mut Client) -> Result<(), Failure> {
        match self {
            Self::Counters(command) => command.run(client).await,
            Self::Services(command) => command.run(client).await,
            Self::Flows(command) => command.run(client).await,
            Self::Drops(command) => command.run(client).await,
            Self::Capture(command) => command.run(client).await,
            Self::Trace(command) => command.run(client).await,
        }
    }
}
