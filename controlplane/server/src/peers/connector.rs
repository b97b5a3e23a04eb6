//! Connections to other members, with or without TLS.

use std::time::Duration;

use tonic::transport::{Channel, Endpoint};

use super::LARGEST_PIECE;
use super::proto::lobby_client::LobbyClient;
use super::proto::peer_client::PeerClient;
use crate::tls::{self, Stamp, TlsFiles};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection on which nothing comes back for this long is given up: a member that was cut off
/// says no goodbye.
const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// Makes connections.
#[derive(Debug, Clone)]
pub struct Connector {
    tls: TlsFiles,
}

impl Connector {
    /// Uses files for `https` URLs, read anew for each connection.
    pub fn new(tls: TlsFiles) -> anyhow::Result<Self> {
        tls::client(&tls)?; // what is wrong with them is to be known at the start
        Ok(Self { tls })
    }

    /// Changes when certificates do.
    pub fn stamp(&self) -> Stamp {
        self.tls.stamp()
    }

    /// Where messages are streamed to.
    pub fn endpoint(&self, url: &str) -> anyhow::Result<Endpoint> {
        let mut endpoint = Endpoint::from_shared(url.to_owned())?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE);
        if url.starts_with("https://")
            && let Some(tls) = tls::client(&self.tls)?
        {
            endpoint = endpoint.tls_config(tls)?;
        }
        Ok(endpoint)
    }

    /// A client for single calls.
    pub fn client(&self, url: &str) -> anyhow::Result<PeerClient<Channel>> {
        let channel = self.endpoint(url)?.timeout(CALL_TIMEOUT).connect_lazy();
        Ok(PeerClient::new(channel).max_encoding_message_size(LARGEST_PIECE))
    }

    /// A client for what is asked before members serve.
    pub fn lobby(&self, url: &str) -> anyhow::Result<LobbyClient<Channel>> {
        let channel = self.endpoint(url)?.timeout(CALL_TIMEOUT).connect_lazy();
        Ok(LobbyClient::new(channel))
    }
}
