//! The connection between the two agents: TCP, with one line in each direction before the stream.

use std::io;
use std::time::Duration;

use rustix::net::sockopt;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

/// How long a greeting or its answer may take, and the way to the other host.
pub const GREETING_LIMIT: Duration = Duration::from_secs(10);
/// The longest line, in bytes.
const LINE_LIMIT: usize = 4096;
/// How long what was sent may stay unacknowledged, and how long a silent peer is trusted: the other host
/// may be gone.
const SILENCE_LIMIT: Duration = Duration::from_secs(10);
/// Bytes on their way through an agent, in each direction. As many as several records of TLS.
pub const COPY_BUFFER: usize = 128 << 10;
/// The version of this protocol.
pub const VERSION: u32 = 3;
/// The earliest version that a destination takes a guest by, so that guests can leave hosts that are yet to be upgraded.
pub const OLDEST_VERSION: u32 = 2;

/// The source's first line.
#[derive(Debug, Serialize, Deserialize)]
pub struct Greeting {
    /// [`VERSION`].
    pub version: u32,
    /// The guest's name.
    pub guest: String,
    /// The move's id.
    pub id: String,
    /// The ticket's token, or the one that came with the answer to that.
    pub token: String,
    /// What the connection is for.
    #[serde(default)]
    pub carries: Carries,
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Carries {
    /// The stream of the guest's virtual machine, both ways.
    #[default]
    Guest,
    /// The guest's flows, when it stands still.
    Flows,
}

/// The destination's answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// What the connection is for follows.
    Welcome {
        /// Of the guest's own connection: the token of the one for its flows, good for one connection.
        flows_token: Option<String>,
    },
    /// Why not.
    Refused(String),
}

/// Has the kernel end a connection whose other side is gone.
pub fn watch_over(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, SILENCE_LIMIT / 2)?;
    sockopt::set_tcp_keepintvl(stream, SILENCE_LIMIT / 5)?;
    let limit = u32::try_from(SILENCE_LIMIT.as_millis()).unwrap_or(u32::MAX);
    sockopt::set_tcp_user_timeout(stream, limit)?;
    Ok(())
}

/// Sends one line.
pub async fn send<T: Serialize, S: AsyncWrite + Unpin>(
    stream: &mut S,
    value: &T,
) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    stream.write_all(&line).await?;
    stream.flush().await
}

/// Reads one line, and nothing of what follows it.
pub async fn receive<T: DeserializeOwned, S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<T> {
    let mut line = Vec::new();
    let reading = async {
        loop {
            match stream.read_u8().await? {
                b'\n' => return Ok(()),
                _ if line.len() >= LINE_LIMIT => {
                    return Err(io::Error::other("the other side's line is too long"));
                }
                byte => line.push(byte),
            }
        }
    };
    tokio::time::timeout(GREETING_LIMIT, reading)
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    Ok(serde_json::from_slice(&line)?)
}
