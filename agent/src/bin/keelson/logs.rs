//! `keelson logs`

use std::io::{self, Write};

use clap::Args;
use futures::TryStreamExt;
use keelson_api::proto::LogsRequest;

use crate::client::Client;
use crate::failure::Failure;

/// Print the log of a guest's serial console.
#[derive(Args)]
pub struct Logs {
    /// The guest.
    name: String,
    /// Go on with what it prints from now on.
    #[arg(short, long)]
    follow: bool,
    /// Only the last so many lines.
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    tail: u32,
}

impl Logs {
    /// Runs the command.
    pub async fn run(self, client: &mut Client) -> Result<(), Failure> {
        let request = LogsRequest {
            name: self.name,
            follow: self.follow,
            tail_lines: self.tail,
        };
        let mut chunks = client.guests.logs(request).await?.into_inner();
        let mut stdout = io::stdout();
        while let Some(chunk) = chunks.try_next().await? {
            match stdout.write_all(&chunk.data).and_then(|()| stdout.flush()) {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                other => other?,
            }
        }
        Ok(())
    }
}
