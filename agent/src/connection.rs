//! Connections to agents, as their clients make them.

use std::path::{Path, PathBuf};

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

/// A channel to the agent that listens at the Unix socket `socket`, connected with the first request.
pub fn connect(socket: &Path) -> Channel {
    let socket: PathBuf = socket.into();
    // The authority is never resolved: the connector knows the socket.
    let endpoint = Endpoint::from_static("http://keelsond");
    endpoint.connect_with_connector_lazy(service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    }))
}
