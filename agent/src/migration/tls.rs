//! Connections between agents: with TLS where the configuration has certificates, and then with nothing
//! else.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use keelson_tls::tokio_rustls::rustls::pki_types::ServerName;
use keelson_tls::tokio_rustls::{TlsAcceptor, TlsConnector};
use keelson_tls::{ClientTls, ServerTls, TlsFiles};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

use super::Ticket;
use super::connection::{Answer, GREETING_LIMIT, receive, send, watch_over};
use crate::config::Config;
use crate::error::Result;

/// What TLS begins with: a record of its handshake (RFC 8446, 5.1). A greeting begins otherwise.
const HANDSHAKE_RECORD: u8 = 22;

/// How long, and with how much more that it says, a side that was refused may take to read why.
const FAREWELL_LIMIT: Duration = Duration::from_secs(1);
const FAREWELL_BYTES: u64 = 64 << 10;

/// A connection to another agent.
pub type Connection = Box<dyn Duplex>;

/// A stream in both directions.
pub trait Duplex: AsyncRead + AsyncWrite + fmt::Debug + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + fmt::Debug + Send + Unpin> Duplex for T {}

/// The certificates of a host whose guests move by TLS. Each side shows one.
#[derive(Clone, Debug)]
pub struct MigrationTls {
    server: ServerTls,
    client: ClientTls,
}

impl MigrationTls {
    /// What the configuration says; `None` if it has no certificates.
    ///
    /// # Errors
    /// [`AgentError::Tls`](crate::AgentError::Tls) says which file is missing or wrong.
    pub fn of(config: &Config) -> Result<Option<Self>> {
        let files = TlsFiles {
            certificate: config.migration_cert_file.clone(),
            key: config.migration_key_file.clone(),
            client_auth: config.migration_cert_file.is_some(),
            trusted_ca: config.migration_trusted_ca_file.clone(),
            protocols: &[b"keelson-migration"],
        };
        let Some(server) = files.server()? else {
            return Ok(None);
        };
        let client = files.client()?;
        Ok(Some(Self { server, client }))
    }
}

/// A connection that another agent has made.
pub async fn accept(tls: Option<&MigrationTls>, mut stream: TcpStream) -> io::Result<Connection> {
    watch_over(&stream)?;
    let mut first = [0];
    in_time(stream.peek(&mut first)).await?;
    let speaks_tls = first == [HANDSHAKE_RECORD];
    match tls {
        None if speaks_tls => Err(io::Error::other(
            "the other side speaks TLS, for which this host has no certificate (migration_cert_file)",
        )),
        None => Ok(Box::new(stream)),
        Some(tls) if speaks_tls => {
            let acceptor = TlsAcceptor::from(tls.server.config());
            let accepting = acceptor.accept(stream).into_fallible();
            let accepted = tokio::time::timeout(GREETING_LIMIT, accepting).await;
            match accepted.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))? {
                Ok(stream) => Ok(Box::new(stream)),
                Err((error, stream)) => {
                    see_off(stream).await;
                    Err(error)
                }
            }
        }
        Some(_) => {
            // Read, so that it is still there to hear the answer.
            receive::<serde_json::Value, _>(&mut stream).await?;
            let reason = "this host takes guests by TLS alone (migration_cert_file)";
            send(&mut stream, &Answer::Refused(reason.into())).await?;
            Err(io::Error::other("the other side speaks no TLS"))
        }
    }
}

/// Ends a connection so that the other side reads why: what it has sent and nobody reads would make the
/// kernel reset it.
async fn see_off(mut stream: TcpStream) {
    let reading = async {
        stream.shutdown().await?;
        let mut rest = stream.take(FAREWELL_BYTES);
        tokio::io::copy(&mut rest, &mut tokio::io::sink()).await
    };
    // It is over in any case.
    let _ = tokio::time::timeout(FAREWELL_LIMIT, reading).await;
}

/// A connection to the agent that left the ticket. Its certificate must be one for its address.
pub async fn connect(tls: Option<&MigrationTls>, ticket: &Ticket) -> io::Result<Connection> {
    match (tls, ticket.tls) {
        (None, true) => {
            return Err(io::Error::other(
                "it takes guests by TLS alone, for which this host has no certificate (migration_cert_file)",
            ));
        }
        (Some(_), false) => {
            return Err(io::Error::other(
                "it has no certificate (migration_cert_file), and this host sends guests by TLS alone",
            ));
        }
        _ => {}
    }
    let stream = in_time(TcpStream::connect(&ticket.address)).await?;
    watch_over(&stream)?;
    let Some(tls) = tls else {
        return Ok(Box::new(stream));
    };
    let address: SocketAddr = ticket.address.parse().map_err(io::Error::other)?;
    let name = ServerName::IpAddress(address.ip().into());
    let connector = TlsConnector::from(tls.client.config());
    Ok(Box::new(in_time(connector.connect(name, stream)).await?))
}

async fn in_time<T>(work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(GREETING_LIMIT, work)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
